// How CTAs own heads of up to 128 units: each CTA one head and SEQUENCES sequences, for all steps.
//
// The first COMPUTING warps multiply by R and run the cell. The PRODUCERS threads after them copy
// between global and shared memory. The sequences are in TILES tiles of COLUMNS each, 2, 4 or 8. Every
// tile has WARPS computing warps of its own, each with R in its registers: warp w of a tile owns the
// units 16 w to 16 w + 15 of the head.
//
// A product has 8 columns, one for each sequence. Of a gate's sums, lane 4 i + j gets four from the
// tensor core: those of the units 2 i and 2 i + 1 of the warp (product.cuh orders the rows of R so) in
// the columns 2 j and 2 j + 1. Where COLUMNS is 2 or 4, every sequence fills 8 / COLUMNS equal columns,
// and the lanes that get the same sums share the cell's work between them. In every case a thread runs
// the cell for ELEMENTS = COLUMNS / 2 elements, each a unit of a sequence:
//
//     COLUMNS     element e of lane 4 i + j
//     8           unit 2 i + e / 2, sequence 2 j + e % 2 of the tile
//     4           unit 2 i + j / 2, sequence 2 (j % 2) + e
//     2           unit 2 i + j % 2, sequence j / 2
//
// All that a lane reads or writes in shared memory lies in lines, one for each sequence, which have a
// row of BLOCK_D elements for each gate or state.

#include "common/sequence.cuh"

namespace single_cta {

constexpr int BLOCK_D = (D + 15) / 16 * 16;
constexpr int WARPS = BLOCK_D / 16;
constexpr int COMPUTING = TILES * WARPS;
constexpr int COLUMNS = SEQUENCES / TILES;
constexpr int ELEMENTS = COLUMNS / 2;
constexpr int THREADS = 32 * COMPUTING + PRODUCERS;

// A CTA of more than 256 threads has fewer registers for each than a thread can address. On Hopper the
// producer warps then give some of theirs to the computing warps, if both are whole warpgroups.
constexpr bool SHIFT_REGISTERS = COMPUTING % 4 == 0 && PRODUCERS == 128 && THREADS > 256;
constexpr int PRODUCER_REGISTERS = COMPUTING == 8 ? 72 : 56;
constexpr int COMPUTING_REGISTERS =
    (65536 / THREADS / 8 * 8 * THREADS - PRODUCER_REGISTERS * PRODUCERS) / (32 * COMPUTING) / 8 * 8;

// Elements in 16 bytes.
constexpr int VECTOR = 16 / sizeof(Element);

// Elements from one line to the next. It is an odd number of 16 bytes, so that a warp's accesses to 4
// or 8 lines at once go to different banks.
__device__ constexpr int pitch(int rows) { return rows * BLOCK_D + VECTOR; }

// What common/copier.cuh asks for.
struct CopyLayout {
    static constexpr int LINES = SEQUENCES;
    static constexpr int UNITS = D;
    static constexpr bool EXACT = true;
    static constexpr int ROW_PITCH = BLOCK_D;
    static constexpr int PIECE_BYTES = ::PIECE_BYTES;
    static constexpr int FIRST_PRODUCER = 32 * COMPUTING;
    static constexpr int PRODUCERS = ::PRODUCERS;
    static constexpr bool SEQUENCED = ::SEQUENCED;
};

// Whether producer threads have so many pieces that each keeps one address for all (common/copier.cuh).
constexpr bool REGULAR = TILES > 1 && PIECE_BYTES == 16;
static_assert(TILES == 1 || !SEQUENCED);
// Whether copies leave the lines of sequences that do not exist as they are.
constexpr bool LEAVES_LINES = REGULAR || PIECE_BYTES < 16;

// The CTA's sequences, behind all else in shared memory.
constexpr int TABLE_BYTES = SEQUENCED ? SEQUENCES * int(sizeof(Sequence)) : 0;

struct alignas(2 * sizeof(Element)) Pair {
    Element first, second;
};

// The thread's elements, as the table above has them.
struct ThreadElements {
    int i, j, first_unit, first_sequence;

    __device__ ThreadElements()
        : i(threadIdx.x % 32 / 4), j(threadIdx.x % 4), first_unit(warp_of_tile() * 16),
          first_sequence(tile() * COLUMNS) {}

    __device__ static int tile() { return TILES == 1 ? 0 : threadIdx.x / 32 / WARPS; }
    __device__ static int warp_of_tile() {
        return TILES == 1 ? threadIdx.x / 32 : threadIdx.x / 32 % WARPS;
    }

    // Which of a gate's four sums belongs to element e: 0 and 1 are of unit 2 i, 2 and 3 of unit 2 i +
    // 1; 0 and 2 are in column 2 j, 1 and 3 in column 2 j + 1.
    __device__ int index_of_sum(int e) const {
        if (COLUMNS == 2) return j / 2 + 2 * (j % 2);
        if (COLUMNS == 4) return e + 2 * (j / 2);
        return e;
    }

    __device__ int unit(int e) const { return first_unit + 2 * i + index_of_sum(e) / 2; }

    // Of the CTA.
    __device__ int sequence(int e) const {
        return first_sequence + (2 * j + index_of_sum(e) % 2) % COLUMNS;
    }

    // The sum of element e out of a gate's four. It is written without a computed index, with which the
    // sums could not stay in registers.
    __device__ float sum(const float (&sums)[4], int e) const {
        if (COLUMNS == 8) return sums[e];
        if (COLUMNS == 4) return j < 2 ? sums[e] : sums[2 + e];
        return j % 2 ? (j < 2 ? sums[2] : sums[3]) : (j < 2 ? sums[0] : sums[1]);
    }
};

// Reads the thread's elements of a row. `lines` is the row in the first line.
__device__ inline void load_elements(float (&values)[ELEMENTS], const Element* lines, int pitch,
                                     const ThreadElements& elements) {
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const Element* from = lines + elements.sequence(e) * pitch + elements.unit(e);
        if constexpr (COLUMNS == 8) {
            if (e < 2) {
                const Pair pair = *reinterpret_cast<const Pair*>(from);
                values[e] = to_float(pair.first);
                values[e + 2] = to_float(pair.second);
            }
        } else {
            values[e] = to_float(*from);
        }
    }
}

// Rounds the thread's elements and writes them to a row; units beyond D stay 0.
__device__ inline void store_elements(Element* lines, int pitch, const float (&values)[ELEMENTS],
                                      const ThreadElements& elements) {
    Element rounded[ELEMENTS];
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        round_to(rounded[e], D == BLOCK_D || elements.unit(e) < D ? values[e] : 0.0f);
    }
    if constexpr (COLUMNS == 8) {
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            if (e < 2) {
                Element* to = lines + elements.sequence(e) * pitch + elements.unit(e);
                *reinterpret_cast<Pair*>(to) = {rounded[e], rounded[e + 2]};
            }
        }
    } else {
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            lines[elements.sequence(e) * pitch + elements.unit(e)] = rounded[e];
        }
    }
}

}  // namespace single_cta
