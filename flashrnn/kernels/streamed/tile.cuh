// How a launch divides the steps of many sequences, forward, where R is read from global memory at each step.
//
// A step is a product of large matrices, and a CTA computes a tile of it: of SEQUENCES sequences the gates
// of UNITS units of a head. Its warpgroups have 64 sequences each, and all of the columns, COLUMNS gates:
//
//                        units 0 ..   units UNITS ..   ...
//     sequences 0 ..     CTA 0        CTA 2                     The CTAs of a cluster have the same units,
//     sequences 128 ..   CTA 1        CTA 3                     and share what they read of R.
//
// A cluster has a tile for each of its CTAs, one above the other: a work tile. If there are more of these than
// clusters, each cluster computes several in each step, always the same ones. So one thread has an element in
// all steps, and alone reads and writes its carried states.
//
// The columns of a tile are such that a thread's sums (common/wgmma.cuh) are all gates of neighbouring units: of
// each group as many as fill 16 bytes, 8 of 32 units in 16 bits and 4 of 16 in float32; in 16 bits 4 of a last group of
// 16 units. A group of 4 w units has w / 2 n-tiles of 8 columns for each gate. Column 2 j + k of n-tile h is the
// unit w j + 2 h + k.
//
// Operands lie in global memory as wgmma reads them from shared memory: in stripes of 16 bytes, SPAN summed
// elements, of all columns of a tile, or of all of its sequences, one after another. A stripe of 8 columns is one
// core matrix. So a chunk of CHUNK_STRIPES stripes is copied as one piece. Of float32 elements they are rounded to
// TF32, to nearest: wgmma would cut off what does not fit.

#include "problem.cuh"
#include "common/mma.cuh"
#include "common/wgmma.cuh"

namespace streamed {

constexpr int WARPGROUPS = 2, WARPS = 4 * WARPGROUPS, COMPUTING = 32 * WARPS;
constexpr int THREADS = COMPUTING + PRODUCERS;
constexpr int SEQUENCES = 64 * WARPGROUPS;
constexpr int COLUMNS = UNITS * GR;
static_assert(UNITS % 16 == 0 && COLUMNS <= 256, "a tile is one wgmma wide");

// Summed elements of a stripe.
constexpr int SPAN = 16 / sizeof(Element);

// Of a head: tiles side by side; stripes of its units, an even number, of which the last may not exist.
constexpr int UNIT_TILES = (D + UNITS - 1) / UNITS;
constexpr int STRIPES = (D + 2 * SPAN - 1) / (2 * SPAN) * 2;
constexpr int CHUNK_STRIPES = 8;
constexpr int CHUNKS = (STRIPES + CHUNK_STRIPES - 1) / CHUNK_STRIPES;
constexpr int LAST_STRIPES = STRIPES - (CHUNKS - 1) * CHUNK_STRIPES;
static_assert(D % SPAN == 0, "a stripe exists as a whole");

// A stripe of a tile, of R and of h, in bytes.
constexpr int R_STRIPE = COLUMNS * 16, H_STRIPE = SEQUENCES * 16;

// The groups of a tile's units, of which the last one may be smaller.
constexpr int GROUP = 4 * SPAN, GROUPS = (UNITS + GROUP - 1) / GROUP;

// Neighbouring units of a group that a thread has, and the most.
__device__ constexpr int width_of(int group) { return group < UNITS / GROUP ? SPAN : 4; }
constexpr int WIDTH = UNITS < GROUP ? 4 : SPAN;

// A thread's elements lie in so many pieces: of each group its units of two sequences. Loops over pieces are
// unrolled, which makes their widths constants.
constexpr int PIECES = 2 * GROUPS;

struct Piece {
    int width;
    // Within the tile.
    int unit, sequence;

    __device__ explicit Piece(int i)
        : width(width_of(i / 2)),
          unit(i / 2 * GROUP + threadIdx.x % 4 * width),
          sequence(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i % 2 * 8) {}

    // Which of the thread's sums is that of a gate of unit v of piece i.
    __device__ static constexpr int sum(int i, int gate, int v) {
        const int group = i / 2, n_tile = group * GR * GROUP / 8 + gate * width_of(group) / 2 + v / 2;
        return 4 * n_tile + i % 2 * 2 + v % 2;
    }
};

// A gate and unit of a tile's column.
struct Column {
    int gate, unit;

    __device__ explicit Column(int column) {
        const int group = column / (GROUP * GR), width = width_of(group);
        const int n_tile = column % (GROUP * GR) / 8, in_gate = n_tile % (width / 2);
        gate = n_tile / (width / 2);
        unit = group * GROUP + column % 8 / 2 * width + 2 * in_gate + column % 2;
    }
};

// What a cluster computes at a time, and the CTA's tile of it.
struct WorkTile {
    int n, unit_tile, row_tile;

    // Rows of tiles of a head, a multiple of CLUSTER_SIZE: of the last ones no sequence may exist.
    __device__ static int row_tiles(long long B) {
        constexpr int OF_WORK_TILE = SEQUENCES * CLUSTER_SIZE;
        return static_cast<int>((B + OF_WORK_TILE - 1) / OF_WORK_TILE) * CLUSTER_SIZE;
    }
    __device__ static int count(long long B, int N) {
        return N * UNIT_TILES * (row_tiles(B) / CLUSTER_SIZE);
    }

    __device__ WorkTile(int index, int rank, int N)
        : n(index / UNIT_TILES % N),
          unit_tile(index % UNIT_TILES),
          row_tile(index / UNIT_TILES / N * CLUSTER_SIZE + rank) {}
};

}  // namespace streamed
