// Forward scan by wgmma: how a cluster of CTAs divides a head of many sequences.
//
// A cluster computes one head of SEQUENCES sequences, for all steps. Its CTA `rank` has the head's
// units from rank * UNITS on, each computing warp WARP_UNITS of these with all their gates
// (gates_in_warp.cuh). The four warps of a warpgroup multiply their 64 rows of R by wgmma, which reads
// h from shared memory, for all SEQUENCES at once, and R from registers or shared memory.
//
// A CTA's producer threads, four warps after its WARPGROUPS, send h to the other CTAs and copy a step's
// inputs and results between shared and global memory.
//
// The sequences are one part, or PARTS = 2, which are exchanged, multiplied and computed in turn: while h of
// one part is on its way, the same warps multiply and compute the other.
//
// A tile, in shared memory, has one value for each unit of the CTA and each sequence of a part: h, a
// gate, or another state. It consists of chunks of 16 bytes, CHUNK_UNITS neighbouring units of a
// sequence, ordered by units, then by sequence:
//
//   units 0..7 of sequence 0 | units 0..7 of sequence 1 | ... | units 8..15 of sequence 0 | ...
//
// The chunks of 8 sequences are one core matrix (8 rows of 16 bytes) of wgmma's right operand. So a
// tile of h is multiplied as it lies, and is what CTAs send each other; and a chunk is contiguous in
// global memory.

#include "common/gates_in_warp.cuh"

namespace cluster_wgmma {

using namespace gates_in_warp;

constexpr int WARPS = 4 * WARPGROUPS;
constexpr int COMPUTING = 32 * WARPS;
constexpr int THREADS = COMPUTING + PRODUCERS;
static_assert(UNITS == WARPS * WARP_UNITS, "each computing warp has one tile of 16 rows of R");
static_assert(sizeof(Element) == 2, "a chunk has 8 elements");

constexpr int CHUNK_UNITS = 8, UNIT_CHUNKS = UNITS / CHUNK_UNITS;
// Tiles of a part: one for each gate, and for each state but h, whose tile is in the exchange's buffers.
// With resets the h that is stored, that before a reset, has one too.
constexpr int TILES = G + S - 1 + RESETS;

// The first n-tile of a part among the cluster's, its first sequence, the first of the thread's elements;
// a part's sequences.
__device__ constexpr int first_n_tile(int part) {
    return part == PARTS ? N_TILES : part * ((N_TILES + 1) / 2);
}
__device__ constexpr int first_sequence(int part) { return 8 * first_n_tile(part); }
__device__ constexpr int first_element(int part) { return ELEMENTS_A_TILE * first_n_tile(part); }
__device__ constexpr int sequences_of(int part) { return first_sequence(part + 1) - first_sequence(part); }

// A thread's sums of a part's product.
__device__ constexpr int sums_of(int part) { return 4 * (first_n_tile(part + 1) - first_n_tile(part)); }

// Chunks and elements of a part's tile.
__device__ constexpr int chunks_of(int part) { return UNIT_CHUNKS * sequences_of(part); }
__device__ constexpr int tile_of(int part) { return chunks_of(part) * CHUNK_UNITS; }

// Where a part's tile has a unit of one of the cluster's sequences.
__device__ inline int tile_index(int part, int unit, int sequence) {
    const int chunk = unit / CHUNK_UNITS * sequences_of(part) + sequence - first_sequence(part);
    return chunk * CHUNK_UNITS + unit % CHUNK_UNITS;
}

// The chunk that a producer thread copies, of each tile of a part. Eight neighbouring threads have eight
// neighbouring sequences, so that their accesses of shared memory go to different banks.
struct Chunk {
    int part, unit_chunk, sequence;

    __device__ Chunk(int part, int i)
        : part(part),
          unit_chunk(i / 8 % UNIT_CHUNKS),
          sequence(first_sequence(part) + i / (8 * UNIT_CHUNKS) * 8 + i % 8) {}

    __device__ int first_unit() const { return unit_chunk * CHUNK_UNITS; }
    __device__ int index() const { return tile_index(part, first_unit(), sequence); }
};

}  // namespace cluster_wgmma
