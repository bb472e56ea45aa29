// How a group of clusters owns a head and many sequences, for products by wgmma. All clusters of the group
// run at once and exchange h through global memory; each owns UNITS units of the head.
//
// The CTAs of a cluster divide the product in one way and the cell steps in another. Of the product each CTA
// has all rows of the cluster's units, with all their gates, and a part of the columns, which the product sums
// over: STEPS steps of 16 units of h. So it reads only this part of h, and holds only this part of R:
//
//                     h of the head
//                     part 0    part 1    part 2    part 3
//     R of the        CTA 0     CTA 1     CTA 2     CTA 3        sums of each CTA, for all sequences
//     cluster's units
//
// Then each CTA gives the others its sums of their sequences, n-tile by n-tile, adds up those that it gets,
// and computes the cell step of OWN_N_TILES n-tiles:
//
//                     n-tiles 0, 1   n-tiles 2, 3   n-tiles 4, 5   n-tiles 6, 7
//     cell steps of   CTA 0          CTA 1          CTA 2          CTA 3
//
// A group has BATCH_TILES batch tiles of SEQUENCES sequences, which take turns: while h of one is on its way,
// the others are multiplied and computed.
//
// A computing warp has WARP_UNITS units (common/gates_in_warp.cuh), and the same thread of each CTA the same
// units: what a thread sends is for the thread of its own number. Behind the computing warps come four more:
// one that receives h, and three that send it and copy a step's inputs and results between shared and global
// memory.
//
// Inputs and results lie in tiles, in shared memory: of each batch tile one for each gate, into which Wx is
// read and which pre-activations replace where they are saved, and one for each state; with resets one more,
// for the h that is stored. A tile consists of chunks of 16 bytes, 8 neighbouring units of a sequence, ordered
// by units, then by sequence.

#include "common/gates_in_warp.cuh"
#include "common/wgmma_matrix.cuh"

namespace grid_wgmma {

using namespace gates_in_warp;

constexpr int WARPS = 4 * WARPGROUPS;
constexpr int COMPUTING = 32 * WARPS;
// The producer warps: the one that receives h, and those that copy.
constexpr int RECEIVING = 32, COPYING = PRODUCERS - RECEIVING;
constexpr int THREADS = COMPUTING + PRODUCERS;
static_assert(UNITS == WARPS * WARP_UNITS, "each computing warp has one tile of 16 rows of R");
static_assert(N_TILES % CLUSTER_SIZE == 0, "each CTA of a cluster has as many n-tiles as the others");

// N-tiles of a batch tile whose cell steps a CTA computes; a thread's elements of them.
constexpr int OWN_N_TILES = N_TILES / CLUSTER_SIZE, OWN_SEQUENCES = 8 * OWN_N_TILES;
constexpr int OWN_ELEMENTS = OWN_N_TILES * ELEMENTS_A_TILE;

static_assert(sizeof(Element) == 2, "a chunk has 8 elements");
constexpr int CHUNK_UNITS = 8, UNIT_CHUNKS = UNITS / CHUNK_UNITS;
constexpr int TILE_CHUNKS = UNIT_CHUNKS * OWN_SEQUENCES, TILE = TILE_CHUNKS * CHUNK_UNITS;

// Where a tile has a unit of the cluster and one of the CTA's sequences.
__device__ inline int tile_index(int unit, int sequence) {
    return (unit / CHUNK_UNITS * OWN_SEQUENCES + sequence) * CHUNK_UNITS + unit % CHUNK_UNITS;
}

// The chunk of a tile that a copying thread copies. Eight neighbouring threads have eight neighbouring
// sequences, so that their accesses of shared memory go to different banks.
struct Chunk {
    int first_unit, sequence;

    __device__ Chunk(int i)
        : first_unit(i / 8 % UNIT_CHUNKS * CHUNK_UNITS), sequence(i / (8 * UNIT_CHUNKS) * 8 + i % 8) {}

    __device__ int index() const { return tile_index(first_unit, sequence); }
};

// The product's steps of 16 units: those of a cluster's units, of all units, and of each CTA.
constexpr int UNIT_STEPS = UNITS / 16;
constexpr int ALL_STEPS = CLUSTERS * UNIT_STEPS;
constexpr int STEPS = (ALL_STEPS + CLUSTER_SIZE - 1) / CLUSTER_SIZE;

// h is received in slices of SLICE_STEPS steps; the last one of a CTA may have fewer.
constexpr int SLICES = (STEPS + SLICE_STEPS - 1) / SLICE_STEPS;
static_assert(SLICES <= 32, "each lane of the receiving warp copies a slice");
__device__ constexpr int steps_of_slice(int slice) {
    return STEPS - slice * SLICE_STEPS < SLICE_STEPS ? STEPS - slice * SLICE_STEPS : SLICE_STEPS;
}

using Matrix = LeftOperand<STEPS>;

// h of a step, of all sequences of a batch tile, in shared and in global memory: 8 units of each sequence,
// 16 bytes, then the other 8. The 16 bytes of 8 sequences are one core matrix of wgmma's right operand.
constexpr unsigned OCTET_BYTES = SEQUENCES * 16, STEP_H_BYTES = 2 * OCTET_BYTES;
constexpr unsigned H_BYTES = STEPS * STEP_H_BYTES;

// What a group computes at a time: BATCH_TILES batch tiles of a head. The last one of a head may have fewer
// sequences.
struct WorkTile {
    int n;
    long long first_sequence;

    __device__ static long long count_of_head(long long B) {
        return (B + BATCH_TILES * SEQUENCES - 1) / (BATCH_TILES * SEQUENCES);
    }

    __device__ WorkTile(long long index, long long B)
        : n(index / count_of_head(B)),
          first_sequence(index % count_of_head(B) * BATCH_TILES * SEQUENCES) {}
};

}  // namespace grid_wgmma
