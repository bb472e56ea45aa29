// Forward scan by mma: how a cluster of CTAs divides a head.
//
// A cluster computes one head of SEQUENCES sequences, for all steps. Its CTA `rank` has the head's
// units from rank * UNITS on, each computing warp WARP_UNITS of these with all their gates
// (gates_in_warp.cuh). So a warp needs h of all units of the step before, which it gets by
// mma_exchange.cuh, and nothing else of other warps.
//
// A warp's values of one sequence and gate are less than the 16 bytes that are worth a memory request.
// So computing warps do not access Wx, states and gates in global memory: the CTA's PRODUCERS threads,
// which come after its WARPS computing warps, copy them to and from shared memory
// (common/forward_producer.cuh).

#include "common/gates_in_warp.cuh"
#include "common/r_matrix.cuh"

namespace cluster_mma {

using namespace gates_in_warp;

constexpr int GROUP_SIZE = (D + UNITS - 1) / UNITS;
constexpr int COMPUTING = WARPS;
constexpr int THREADS = 32 * COMPUTING + PRODUCERS;

static_assert(UNITS == WARPS * WARP_UNITS, "each computing warp has one tile of 16 rows of R");

// Steps of the product, each of which sums 16 of the head's units.
constexpr int STEPS = (GROUP_SIZE * UNITS + 15) / 16;

static_assert(sizeof(Element) == 2, "a word has two elements");

// A line in shared memory is what one sequence has of `rows` gates or states: a row of UNITS elements
// for each. From one sequence's line to the next it is this number of elements, 16 bytes more than the
// line needs: for most sizes an odd number of 16 bytes, so that what a warp reads at once is in
// different banks.
__device__ constexpr int line_pitch(int rows) {
    constexpr int CHUNK = 16 / sizeof(Element);
    return ((rows * UNITS + CHUNK - 1) / CHUNK + 1) * CHUNK;
}

// The lane's part of the warp's 16 rows of R in a step of the product. Of each 16 units that a step
// sums, lane 4 i + j has the four from 4 j on, not 2 j, 2 j + 1, 2 j + 8 and 2 j + 9 as PTX numbers the
// operand: the sum is the same in any order, and h of four neighbouring units is one read of 8 bytes.
__device__ inline Fragment fragment(int step, const LaneRows& rows) {
    const int first = 16 * step + threadIdx.x % 4 * 4;
    return rows.words([&](int half, int k) { return first + 2 * half + k; });
}

// The lane's words of the right operand: h of those four units of one sequence.
struct alignas(8) HFragment {
    unsigned words[2];
};

// Consecutive mma instructions add to different sums, so that none waits for the one before it.
constexpr int CHAINS = 4 / N_TILES;

// R h for the thread's elements. `h(step, n_tile)` gives the lane's HFragment.
template <typename H>
__device__ inline RecurrentSums<N_TILES> multiply(const Matrix& matrix, const H& h) {
    float chains[CHAINS][N_TILES][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const Fragment a = matrix[step];
#pragma unroll
        for (int n_tile = 0; n_tile < N_TILES; ++n_tile) {
            const HFragment b = h(step, n_tile);
            mma(chains[step % CHAINS][n_tile], a.words[0], a.words[1], a.words[2], a.words[3],
                b.words[0], b.words[1], Operand{});
        }
    }
    return RecurrentSums<N_TILES>([&](int n_tile, int i) {
        float sum = chains[0][n_tile][i];
#pragma unroll
        for (int chain = 1; chain < CHAINS; ++chain) sum += chains[chain][n_tile][i];
        return sum;
    });
}

}  // namespace cluster_mma
