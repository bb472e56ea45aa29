// Backward scan by wgmma: how a cluster of CTAs divides a head of many sequences.
//
// A cluster computes one head of SEQUENCES sequences, for all steps. Its CTAs stand in ROWS rows and
// COLUMNS columns, in the order of their ranks, row by row; each has UNITS neighbouring units of the
// head, with all their gates:
//
//                column 0        column 1        ...                     units of a row:
//   row 0        units 0 ..      units UNITS ..                          64 * WARPGROUPS
//   row 1        ...
//
// The product of a CTA is a part of dh: of the units of its row, summed over the gates of the units of
// its column. So CTAs need the gates' gradients of their column (an all-gather), and the parts of a unit
// come from the CTAs of its row (a reduce-scatter). With 4 by 4 CTAs each receives three of 16 tiles of
// gradients and four parts; in a single row it would receive 16 parts, in a single column all tiles.
//
// A warp multiplies the 16 rows of R transposed that are 16 units of its row: those of one CTA. Rows i
// and i + 8 are the units 2 i and 2 i + 1, a pair (backward_packets.cuh).
//
// A tile, in shared memory, has the gates' gradients of a CTA's units. It consists of chunks of 16
// bytes, ordered by what is summed, then by sequence, and is the right operand of wgmma as it lies: the
// chunks of 8 sequences are one core matrix. A warp writes chunks of 8 pairs and two sequences at once.
// PADDING between the chunks of one place in the sum and those of the next puts these into different
// banks.

#include "cluster/backward_packets.cuh"

namespace wgmma_backward {

using namespace cluster_backward;

constexpr int GROUP_SIZE = ROWS * COLUMNS;
constexpr int SEQUENCES = 8 * N_TILES;
constexpr int WARPS = 4 * WARPGROUPS, THREADS = 32 * WARPS;
static_assert(COLUMNS * UNITS == 64 * WARPGROUPS, "each warp has 16 of the units of its CTA's row");
static_assert(UNITS % 16 == 0, "a warp's units are one CTA's");
static_assert(COLUMNS == 2 || COLUMNS == 4, "a thread has one or two elements in an n-tile");
static_assert(sizeof(Element) == 2, "a chunk has 8 elements");

constexpr int PADDING = 32;
constexpr int CHUNKS_BYTES = SEQUENCES * 16 + PADDING;
constexpr int TILE_BYTES = UNITS * GR / CHUNK * CHUNKS_BYTES;

// Elements (a unit and a sequence) of a thread: in each n-tile, and in all.
constexpr int ELEMENTS_A_TILE = 4 / COLUMNS;
constexpr int ELEMENTS = ELEMENTS_A_TILE * N_TILES;

// The thread's element e: its unit among the CTA's, its sequence among the cluster's. At once a warp has
// the 16 units of a row tile and the sequences 2 j and 2 j + 1 of an n-tile.
struct ThreadElement {
    int n_tile, j, unit, sequence;

    __device__ explicit ThreadElement(int e) : n_tile(e / ELEMENTS_A_TILE) {
        const int number = threadIdx.x / 32 + e % ELEMENTS_A_TILE * WARPS;
        j = number % 4;
        unit = number / 4 * 16 + threadIdx.x % 32 / 2;
        sequence = 8 * n_tile + 2 * j + threadIdx.x % 2;
    }
};

}  // namespace wgmma_backward
