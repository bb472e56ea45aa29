// What the backward scans of clusters have in common: packets of parts of dh, and the order of the
// gates' gradients that are multiplied.
//
// Rows i and i + 8 of a product's row tile are the two units of a pair. So the four sums that mma or wgmma
// leaves in a lane, of two units and two neighbouring sequences, are a packet of 16 bytes:
//
//   | first unit, even sequence | odd sequence | second unit, even sequence | odd sequence |

#include "problem.cuh"

namespace cluster_backward {

struct alignas(16) Words {
    unsigned words[4];
};

// Pairs of a CTA's units.
constexpr int PAIRS = (UNITS + 1) / 2;

// The index of the packet of a pair and of the sequences 2 j and 2 j + 1 of an n-tile. Packets that a
// warp sends at once are neighbours, and the numbers that it adds up at once are in 32 different banks.
__device__ inline int packet_index(int n_tile, int pair, int j) {
    return (n_tile * PAIRS + pair) * 4 + (j ^ pair / 2 % 4);
}

// The dimension that the product sums: all gates of the first unit, then of the next, and so on. 16
// bytes of it, for one sequence, are a chunk.
constexpr int CHUNK = 16 / sizeof(Element);

// As many gates of a unit as are neighbours in one chunk, whichever unit it is: they are written at
// once.
constexpr int NEIGHBOURS = (GR & -GR) < CHUNK ? GR & -GR : CHUNK;
struct alignas(NEIGHBOURS * sizeof(Element)) PackedGates {
    Element values[NEIGHBOURS];
};

}  // namespace cluster_backward
