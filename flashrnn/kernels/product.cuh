// The recurrent product of one step, for a thread block: total(column, row) is the sum over the
// summed dimension of left[row] * right[column].
//
// The left operand is R, whose rows it reads where they lie; the right one has a column for each
// sequence of the block's tile. The summed dimension has SEGMENTS segments of D elements; each is
// cut in chunks, and chunk c is warp c % WARPS's, so that every warp has sums of its own, which
// are added in shared memory in a fixed order.
//
// No operand passes through shared memory. The places of a chunk may be permuted as long as both
// operands' are permuted alike, and so a lane's share of a row is 16 bytes that lie together:
// lane 4 i + j holds share j of the rows i and i + 8 and of the column i.
//
// A warp keeps DEPTH chunks on their way: `fetch_left` may run before the step before is
// complete, for R does not depend on it.

constexpr int WARPS = THREADS / 32;
constexpr int SHARE = 16 / sizeof(Element);
constexpr int CHUNK = 4 * SHARE;
// Rows lie apart by this much, so that a warp's sums go to 32 different banks.
constexpr int PITCH = ROWS + 4;

struct alignas(16) Piece {
    unsigned words[4];
};

// What the launch before wrote is FRESH, and read past the first-level cache. What is not is read as if it
// might be written all the same: of memory that nobody writes, the assembler may put off the reading
// until the launch before is complete.
template <bool FRESH, typename Word>
__device__ inline Word load_word(const Element* from) {
    const Word* address = reinterpret_cast<const Word*>(from);
    return FRESH ? __ldcg(address) : *address;
}

// Elements k .. k + SHARE - 1 of a line of D, zeros beyond it or where there is none.
template <bool FRESH>
__device__ inline Piece load_share(const Element* line, bool exists, int k, int D) {
    Piece piece = {};
    if (!exists || k >= D) return piece;
    if (ALIGNED) {
        const uint4 words = load_word<FRESH, uint4>(line + k);
        return {words.x, words.y, words.z, words.w};
    }
    constexpr int A_WORD = 4 / sizeof(Element);
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
        if (k + i < D) {
            const unsigned bits = load_word<FRESH, Bits>(line + k + i);
            piece.words[i / A_WORD] |= bits << 16 * (i % A_WORD);
        }
    }
    return piece;
}

// A lane's part of the sums of one column block: those of the tensor core's layout, or where
// each lane multiplies its shares itself, rows i and i + 8 times all 8 columns.
template <typename Operand>
struct Sums {
    float values[TILES][4] = {};

    __device__ void add(const Piece (&left)[TILES][2], const Piece& right) {
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

    __device__ void add(const Piece (&left)[TILES][2], const Piece& right) {
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

    // Adds the four lanes that share a row, and hands out the sums in the tensor core's layout.
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

// The lane's rows, or columns, of an operand: `count` of them, fewer where the tile reaches beyond
// the problem, evenly apart.
struct Lines {
    const Element* first;
    long long apart;
    int count;
};

struct Product {
    Lines rows, columns;
    int D;
    int chunks_per_segment;

    Piece left[DEPTH][TILES][2];
    Piece right[DEPTH][BLOCKS];

    // Set rows, columns and D first.
    __device__ void fetch_left() {
        chunks_per_segment = (D + CHUNK - 1) / CHUNK;
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) load_left(i, warp() + i * WARPS);
    }

    // The product; column_offset(segment) is how far a segment lies from the column's start.
    template <typename Offset>
    __device__ void run(float (&partial)[WARPS][COLUMNS][PITCH], Offset column_offset) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) load_right(i, warp() + i * WARPS, column_offset);

        Sums<Operand> sums[BLOCKS];
        const int chunks = SEGMENTS * chunks_per_segment;
        for (int first = warp(); first < chunks; first += DEPTH * WARPS) {
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                const int chunk = first + i * WARPS;
                if (chunk < chunks) {
#pragma unroll
                    for (int block = 0; block < BLOCKS; ++block) {
                        sums[block].add(left[i], right[i][block]);
                    }
                    load_left(i, chunk + DEPTH * WARPS);
                    load_right(i, chunk + DEPTH * WARPS, column_offset);
                }
            }
        }

        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            float finished[TILES][4];
            sums[block].finish(lane, finished);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = 8 * block + 2 * (lane % 4) + i % 2;
                    partial[warp()][column][16 * tile + lane / 4 + 8 * (i / 2)] = finished[tile][i];
                }
            }
        }
        __syncthreads();
    }

    __device__ static int warp() { return threadIdx.x / 32; }

    // Where the lane's share of a chunk begins within its segment; D or more: beyond the end.
    __device__ int place(int chunk, int segment) const {
        return segment < SEGMENTS
                   ? (chunk - segment * chunks_per_segment) * CHUNK + threadIdx.x % 4 * SHARE
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
                    load_share<false>(rows.first + row * rows.apart + offset, row < rows.count, k, D);
            }
        }
    }

    template <typename Offset>
    __device__ void load_right(int i, int chunk, Offset column_offset) {
        const int segment = segment_of(chunk), k = place(chunk, segment);
        const long long offset = column_offset(segment);
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            right[i][block] = load_share<true>(columns.first + block * columns.apart + offset,
                                               block < columns.count, k, D);
        }
    }
};

// An element of the product, once the block's warps have met.
__device__ inline float total(const float (&partial)[WARPS][COLUMNS][PITCH], int column, int row) {
    float sum = partial[0][column][row];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) sum += partial[w][column][row];
    return sum;
}
