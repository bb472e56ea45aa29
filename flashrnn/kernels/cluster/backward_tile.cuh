// Backward scan of a cluster: how its CTAs divide a head. A cluster computes one head of SEQUENCES
// sequences, for all steps; its CTA `rank` has the head's units from rank * UNITS on, with all their
// gates.

#include "problem.cuh"

namespace cluster_backward {

constexpr int GROUP_SIZE = (D + UNITS - 1) / UNITS;
constexpr int SEQUENCES = 8 * N_TILES;
constexpr int THREADS = 32 * WARPS;

constexpr int ELEMENTS_A_WORD = 4 / sizeof(Element);

// What a cluster computes: sequences of a head.
struct WorkTile {
    int n;
    long long first_sequence;

    __device__ WorkTile(long long number, long long B) {
        const long long head_tiles = (B + SEQUENCES - 1) / SEQUENCES;
        n = number / head_tiles;
        first_sequence = number % head_tiles * SEQUENCES;
    }
};

}  // namespace cluster_backward
