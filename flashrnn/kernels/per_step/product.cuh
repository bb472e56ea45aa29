// The recurrent product of one step, for a CTA: total(column, row) is the sum over the
// summed dimension of left[row] * right[column].
//
// The left operand is R; the right one has a column for each sequence of the tile. The summed dimension
// has SEGMENTS segments of D elements. Each is cut into chunks of CHUNK elements, and warp c % WARPS
// multiplies chunk c. The warps' sums go to shared memory and are added there in a fixed order.
//
// Operands go from global memory to registers directly. A product is the same whatever order a chunk's
// elements are summed in, as long as both operands have the same one. The order here gives a lane 16
// bytes of a row that lie together: lane 4 i + j loads vector j of rows i and i + 8 and of column i.
//
// A warp has the loads of DEPTH chunks under way. `load_first_left` may run before the launch before
// is complete, since R does not depend on it.

#include "per_step/tile.cuh"
#include "common/mma.cuh"
#include "common/gradient_clip.cuh"
#include "common/sequence.cuh"

namespace per_step {

constexpr int WARPS = THREADS / 32;
constexpr int VECTOR_ELEMENTS = 16 / sizeof(Element);
constexpr int CHUNK = 4 * VECTOR_ELEMENTS;
static_assert(CHUNK * sizeof(Element) == CHUNK_BYTES);
// From a column of partial sums to the next: a warp's stores go to 32 different banks.
constexpr int PITCH = ROWS + 4;

// The warps' sums, in shared memory.
using Partial = float[WARPS][COLUMNS][PITCH];
static_assert(sizeof(Partial) == SHARED_MEMORY);

struct alignas(16) Vector {
    unsigned words[4];
};

// What the launch before writes is FRESH and is loaded past the L1 cache. The rest is loaded as memory
// that might change, not by ld.global.nc: the assembler may move such a load behind the wait for the
// launch before.
template <bool FRESH, typename Word>
__device__ inline Word load_word(const Element* from) {
    const Word* address = reinterpret_cast<const Word*>(from);
    return FRESH ? __ldcg(address) : *address;
}

// Elements k .. k + VECTOR_ELEMENTS - 1 of a row or column of D; zeros beyond its end, or without one.
template <bool FRESH>
__device__ inline Vector load_vector(const Element* line, bool exists, int k, int D) {
    Vector vector = {};
    if (!exists || k >= D) return vector;
    if (ALIGNED) {
        const uint4 words = load_word<FRESH, uint4>(line + k);
        return {words.x, words.y, words.z, words.w};
    }
    constexpr int A_WORD = 4 / sizeof(Element);
#pragma unroll
    for (int i = 0; i < VECTOR_ELEMENTS; ++i) {
        if (k + i < D) {
            const unsigned bits = load_word<FRESH, Bits>(line + k + i);
            vector.words[i / A_WORD] |= bits << 16 * (i % A_WORD);
        }
    }
    return vector;
}

// A lane's sums of one n-tile: in the tensor cores' layout, or without tensor cores, where each lane
// multiplies its own vectors, those of rows i and i + 8 with all 8 columns.
template <typename Operand>
struct Sums {
    float values[TILES][4] = {};

    __device__ void add(const Vector (&left)[TILES][2], const Vector& right) {
        unsigned words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) words[w] = contained(right.words[w], Operand{});
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const unsigned(&top)[4] = left[tile][0].words;
            const unsigned(&bottom)[4] = left[tile][1].words;
#pragma unroll
            for (int w = 0; w < 4; w += 2) {
                mma(values[tile], top[w], bottom[w], top[w + 1], bottom[w + 1], words[w], words[w + 1],
                    Operand{});
            }
        }
    }

    __device__ void finish(int lane, float (&finished)[TILES][4]) const {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) finished[tile][i] = values[tile][i];
        }
    }
};

template <>
struct Sums<float> {
    float values[TILES][2][8] = {};

    __device__ void add(const Vector (&left)[TILES][2], const Vector& right) {
#pragma unroll
        for (int column = 0; column < 8; ++column) {
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const int source = 4 * column + threadIdx.x % 4;
                const float r = __uint_as_float(__shfl_sync(~0u, right.words[w], source));
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        values[tile][half][column] += __uint_as_float(left[tile][half].words[w]) * r;
                    }
                }
            }
        }
    }

    // Adds the sums of the four lanes of a row, and gives them in the tensor cores' layout.
    __device__ void finish(int lane, float (&finished)[TILES][4]) const {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const int half = i / 8, column = i % 8;
                float sum = values[tile][half][column];
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                if (lane % 4 == column / 2) finished[tile][2 * half + column % 2] = sum;
            }
        }
    }
};

// The lane's rows or columns of an operand: how many of them the problem has, and where they lie.
struct Lines {
    const Element* first;
    long long stride;
    int count;
};

struct Product {
    Lines rows, columns;
    // With options of sequences, in the place of `columns`: each where its own sequence has it, or null.
    const Element* own_columns[SEQUENCED ? N_TILES : 1];
    int D;
    int chunks_per_segment;

    Vector left[DEPTH][TILES][2];
    Vector right[DEPTH][N_TILES];

    // Set rows, columns and D first.
    __device__ void load_first_left() {
        chunks_per_segment = (D + CHUNK - 1) / CHUNK;
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) load_left(i, warp() + i * WARPS);
    }

    // Ends with a barrier. column_offset(segment): where a segment begins, from the column's start.
    template <typename Offset>
    __device__ void run(Partial& partial, Offset column_offset) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) load_right(i, warp() + i * WARPS, column_offset);

        Sums<Operand> sums[N_TILES];
        const int chunks = SEGMENTS * chunks_per_segment;
        for (int first = warp(); first < chunks; first += DEPTH * WARPS) {
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                const int chunk = first + i * WARPS;
                if (chunk < chunks) {
#pragma unroll
                    for (int n_tile = 0; n_tile < N_TILES; ++n_tile) {
                        sums[n_tile].add(left[i], right[i][n_tile]);
                    }
                    load_left(i, chunk + DEPTH * WARPS);
                    load_right(i, chunk + DEPTH * WARPS, column_offset);
                }
            }
        }

        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int n_tile = 0; n_tile < N_TILES; ++n_tile) {
            float finished[TILES][4];
            sums[n_tile].finish(lane, finished);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = 8 * n_tile + 2 * (lane % 4) + i % 2;
                    partial[warp()][column][16 * tile + lane / 4 + 8 * (i / 2)] = finished[tile][i];
                }
            }
        }
        __syncthreads();
    }

    __device__ static int warp() { return threadIdx.x / 32; }

    // Where the lane's vector of a chunk begins within its segment; D or more: beyond the end.
    __device__ int place(int chunk, int segment) const {
        return segment < SEGMENTS
                   ? (chunk - segment * chunks_per_segment) * CHUNK + threadIdx.x % 4 * VECTOR_ELEMENTS
                   : D;
    }

    __device__ int segment_of(int chunk) const {
        return SEGMENTS == 1 ? chunk >= chunks_per_segment : chunk / chunks_per_segment;
    }

    __device__ void load_left(int i, int chunk) {
        const int segment = segment_of(chunk), k = place(chunk, segment);
        const long long offset = static_cast<long long>(segment) * D;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 2 * tile + half;
                left[i][tile][half] =
                    load_vector<false>(rows.first + row * rows.stride + offset, row < rows.count, k, D);
            }
        }
    }

    template <typename Offset>
    __device__ void load_right(int i, int chunk, Offset column_offset) {
        const int segment = segment_of(chunk), k = place(chunk, segment);
        const long long offset = column_offset(segment);
#pragma unroll
        for (int n_tile = 0; n_tile < N_TILES; ++n_tile) {
            if (SEQUENCED) {
                const Element* column = own_columns[SEQUENCED ? n_tile : 0];
                right[i][n_tile] = load_vector<true>(column + offset, column != nullptr, k, D);
                continue;
            }
            right[i][n_tile] = load_vector<true>(columns.first + n_tile * columns.stride + offset,
                                                n_tile < columns.count, k, D);
        }
    }
};

// An element of the product, after run().
__device__ inline float total(const Partial& partial, int column, int row) {
    float sum = partial[0][column][row];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) sum += partial[w][column][row];
    return sum;
}

}  // namespace per_step
