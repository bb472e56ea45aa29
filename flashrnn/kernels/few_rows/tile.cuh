// A product's tile, for a CTA: C[m, n] is the sum over k of A(m, k) B(n, k), for TILE values of m and n each.
// Several CTAs may share a tile: each sums over some of the chunks of k.
//
// A and B are matrices in global memory whose rows are contiguous. A row is that of an m (or n), and the
// summed dimension runs along it; or, BY_K, it is that of a k, and the summed dimension runs over the rows.
//
// What lives where:
//
// - registers: the sums. The 16 warps are GROUPS of four, which take a quarter of each chunk each. A warp of
//   a group has a quarter of the tile, 32 times 32 elements;
// - shared memory: a ring of STAGES chunks of CHUNK values of k, of both matrices as they lie in global
//   memory. All threads copy them there. At the end the groups' sums take its place, and are added;
// - global memory: of a tile that CTAs share, each one's sums, and a counter.
//
// One barrier orders each chunk: before it each thread has waited for its own copies of the chunk, and has
// read the one before, into whose slot the copies issued after the barrier go.
//
// A CTA that has written its sums of a shared tile adds one to the tile's counter, which releases them and
// acquires those of the others. The CTA that comes last adds all of them up, in the order of the chunks.

#include "problem.cuh"
#include "common/mma.cuh"

namespace few_rows {

constexpr int TILE = 64;
constexpr int GROUPS = 4;
constexpr int THREADS = 512;
constexpr int CHUNK = 256 / sizeof(Element), QUARTER = CHUNK / GROUPS;
// Summed elements of an mma().
constexpr int DEPTH = 32 / sizeof(Element);
// Elements of a piece that is copied at once. All rows begin and end at multiples of PIECE_BYTES.
constexpr int PIECE = PIECE_BYTES / sizeof(Element);
// From one row to the next in shared memory, such that a warp's accesses go to different banks.
template <bool BY_K>
constexpr int PITCH = BY_K ? TILE + 8 : CHUNK + 16 / sizeof(Element);
constexpr int PART = CHUNK * PITCH<true>, SLOT = 2 * PART;
static_assert(TILE * PITCH<false> <= PART);
static_assert(STAGES * SLOT * sizeof(Element) == SHARED_MEMORY, "as the plan computes it");
constexpr int SUMS_PITCH = TILE + 4;
static_assert(GROUPS * TILE * SUMS_PITCH * sizeof(float) <= SHARED_MEMORY);
// The tensor cores cut up to a unit off a sum's last place with each product that they add. In float32 they
// add up a chunk alone, and the sum over chunks is rounded as usual.
constexpr bool SUMS_BY_CHUNK = NEEDS_CARE<Operand>;

__device__ inline Element* ring() { return reinterpret_cast<Element*>(shared_memory()); }

// The address of an element of the ring.
__device__ inline unsigned ring_address(int place) {
    return shared_address(shared_memory()) + place * sizeof(Element);
}

// Copies a piece, of 4 bytes and more, to a place of the ring; zeros unless it exists. The copy belongs to the
// group that the thread commits next.
__device__ inline void copy_piece(int to, const Element* from, bool exists) {
    cp_async_piece<PIECE_BYTES>(ring_address(to), from, exists);
}

// A matrix whose rows lie equally far from each other.
struct Rows {
    static constexpr bool EVEN = true;
    // They are no steps.
    static constexpr unsigned T = 1;

    const Element* first;
    long long pitch;

    __device__ const Element* row(int i) const { return first + i * pitch; }
    __device__ float element(int i, int place) const { return to_float(row(i)[place]); }
};

// A row that is a step of a sequence, where each sequence has T rows. Others follow by steps of a constant
// size, without a division for each.
template <int STEP>
struct Position {
    unsigned row, sequence, step, T, sequences_on, steps_on;

    __device__ Position(unsigned row, unsigned T)
        : row(row), sequence(row / T), step(row % T), T(T), sequences_on(STEP / T), steps_on(STEP % T) {}

    __device__ void advance() {
        row += STEP, sequence += sequences_on, step += steps_on;
        if (step >= T) step -= T, ++sequence;
    }
};

// What a thread copies of a matrix's part of each chunk: a piece of every STEP-th row.
//
// Of a matrix whose rows are not EVEN each row of a chunk is asked for by its position.
template <bool BY_K, typename Matrix>
struct Part {
    static constexpr int THREADS_A_ROW = (BY_K ? TILE : CHUNK) / PIECE, STEP = THREADS / THREADS_A_ROW;
    static constexpr int ROUNDS = (BY_K ? CHUNK : TILE) / STEP;
    static_assert(THREADS % THREADS_A_ROW == 0 && ROUNDS * STEP == (BY_K ? CHUNK : TILE));
    static_assert(BY_K || Matrix::EVEN, "rows are addressed as if they lay equally far from each other");

    const Matrix& matrix;
    // The thread's next piece and its place in a row, how many rows and places follow there, and where in a
    // slot the piece goes.
    const Element* from;
    int place, rows, places, to;
    Position<STEP> position;

    // The part begins at a row and place of the matrix, which has so many of each.
    __device__ Part(const Matrix& matrix, int first_row, int first_place, int all_rows, int all_places)
        : matrix(matrix), position(own_row(first_row), matrix.T) {
        const int row = own_row(first_row), in_row = threadIdx.x % THREADS_A_ROW * PIECE;
        place = first_place + in_row;
        rows = all_rows - row, places = all_places - place;
        to = (row - first_row) * PITCH<BY_K> + in_row;
        if constexpr (Matrix::EVEN) from = matrix.row(row) + place;
    }
    __device__ bool exists(int round) const { return round * STEP < rows && places > 0; }
    __device__ static int own_row(int first_row) { return first_row + threadIdx.x / THREADS_A_ROW; }

    // Starts copying the next chunk to a place of the ring.
    __device__ void fetch(int slot) {
        if constexpr (PIECE_BYTES >= 4) {
#pragma unroll 4
            for (int round = 0; round < ROUNDS; ++round) {
                const int own = slot + to + round * STEP * PITCH<BY_K>;
                if constexpr (Matrix::EVEN) {
                    copy_piece(own, from + round * STEP * matrix.pitch, exists(round));
                } else {
                    matrix.fetch(own, position, place, exists(round));
                    position.advance();
                }
            }
        } else {
            // Single elements go through registers. The loads of several are issued before the first arrives.
            constexpr int AT_ONCE = 16;
            static_assert(ROUNDS % AT_ONCE == 0);
#pragma unroll 1
            for (int round = 0; round < ROUNDS; round += AT_ONCE) {
                Element taken[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    round_to(taken[i], 0.0f);
                    if constexpr (Matrix::EVEN) {
                        if (exists(round + i)) taken[i] = from[(round + i) * STEP * matrix.pitch];
                    } else {
                        if (exists(round + i)) taken[i] = matrix.single(position, place);
                        position.advance();
                    }
                }
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    ring()[slot + to + (round + i) * STEP * PITCH<BY_K>] = taken[i];
                }
            }
        }
        if constexpr (BY_K) {
            rows -= CHUNK;
            if constexpr (Matrix::EVEN) from += CHUNK * matrix.pitch;
        } else {
            from += CHUNK, places -= CHUNK;
        }
    }
};

// A left operand of mma(): 16 values of m, from a corner in the ring.
template <bool BY_K>
__device__ inline void load_left(unsigned (&words)[4], int corner) {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(Element) == 2) {
        if constexpr (BY_K) {
            const int k = lane / 16 * 8 + lane % 8, m = lane / 8 % 2 * 8;
            ldmatrix_transposed(words, ring_address(corner + k * PITCH<true> + m));
        } else {
            const int m = lane % 16, k = lane / 16 * 8;
            ldmatrix(words, ring_address(corner + m * PITCH<false> + k));
        }
    } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const int k = lane % 4 + w / 2 * 4, m = lane / 4 + w % 2 * 8;
            const Element x = ring()[corner + (BY_K ? k * PITCH<true> + m : m * PITCH<false> + k)];
            words[w] = prepare(__float_as_uint(to_float(x)), Operand{});
        }
    }
}

// Two right operands of mma(), of 8 values of n each: words 0 and 1, and 2 and 3.
template <bool BY_K>
__device__ inline void load_right(unsigned (&words)[4], int corner) {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(Element) == 2) {
        if constexpr (BY_K) {
            const int k = lane % 16, n = lane / 16 * 8;
            ldmatrix_transposed(words, ring_address(corner + k * PITCH<true> + n));
        } else {
            const int n = lane / 16 * 8 + lane % 8, k = lane / 8 % 2 * 8;
            ldmatrix(words, ring_address(corner + n * PITCH<false> + k));
        }
    } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const int k = lane % 4 + w % 2 * 4, n = lane / 4 + w / 2 * 8;
            const Element x = ring()[corner + (BY_K ? k * PITCH<true> + n : n * PITCH<false> + k)];
            words[w] = __float_as_uint(to_float(x));
        }
    }
}

struct Zero {
    __device__ float operator()(int) const { return 0.0f; }
};

// A CTA's share of a tile: which of so many it is, and the tile's global memory, room for TILE * TILE sums of
// each and a counter.
struct Share {
    int index = 0, count = 1;
    float* sums = nullptr;
    unsigned* counter = nullptr;

    __device__ float* of_cta(int other) const { return sums + other * (TILE * TILE); }
};

// Hands on a CTA's sums of a tile, of every THREADS-th element for each thread. In the CTA that comes last the
// sums of all take their place, and the answer is true.
template <int ROUNDS>
__device__ inline bool add_shares(const Share& share, float (&sums)[ROUNDS]) {
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        store_relaxed(share.of_cta(share.index) + threadIdx.x + round * THREADS, sums[round]);
    }
    __syncthreads();
    bool is_last = false;
    if (threadIdx.x == 0) is_last = add_acquire_release(share.counter, 1) == share.count - 1u;
    if (!__syncthreads_or(is_last)) return false;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) sums[round] = 0.0f;
#pragma unroll 4
    for (int other = 0; other < share.count; ++other) {
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            sums[round] += load_relaxed(share.of_cta(other) + threadIdx.x + round * THREADS);
        }
    }
    return true;
}

// Computes a tile of C and writes it, or a share of it, which the last CTA of the tile completes and writes.
//
// M, N and K are the sizes of the product, and `m` and `n` where the tile begins. `to(m, n)` is the place of
// an element of C, and `plus(n)` what is added to all sums of an n.
template <bool A_BY_K, bool B_BY_K, typename Left, typename Right, typename To, typename Plus = Zero>
__device__ inline void multiply_tile(const Left& a, const Right& b, int M, int N, int K, int m, int n,
                                     const To& to, const Share& share = {}, const Plus& plus = {}) {
    const int all_chunks = (K + CHUNK - 1) / CHUNK, most = (all_chunks + share.count - 1) / share.count;
    const int first = share.index * most, rest = all_chunks - first, chunks = rest < most ? rest : most;
    const int k_first = first * CHUNK;
    Part<A_BY_K, Left> of_a(a, A_BY_K ? k_first : m, A_BY_K ? m : k_first, A_BY_K ? K : M, A_BY_K ? M : K);
    Part<B_BY_K, Right> of_b(b, B_BY_K ? k_first : n, B_BY_K ? n : k_first, B_BY_K ? K : N, B_BY_K ? N : K);
    const auto fetch = [&](int chunk) {
        const int slot = chunk % STAGES * SLOT;
        of_a.fetch(slot);
        of_b.fetch(slot + PART);
    };
    for (int chunk = 0; chunk < STAGES - 1; ++chunk) {
        if (chunk < chunks) fetch(chunk);
        cp_async_commit();
    }

    constexpr int A_ROW = A_BY_K ? 1 : PITCH<false>, A_K = A_BY_K ? PITCH<true> : 1;
    constexpr int B_ROW = B_BY_K ? 1 : PITCH<false>, B_K = B_BY_K ? PITCH<true> : 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
    const int m_of_warp = warp / 2 % 2 * 32, n_of_warp = warp % 2 * 32;
    const int of_warp_a = m_of_warp * A_ROW + group * QUARTER * A_K;
    const int of_warp_b = PART + n_of_warp * B_ROW + group * QUARTER * B_K;
    float sums[2][4][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (chunk + STAGES - 1 < chunks) fetch(chunk + STAGES - 1);
        cp_async_commit();
        const int slot = chunk % STAGES * SLOT;
        float of_chunk[2][4][4] = {};
        auto& sums_now = SUMS_BY_CHUNK ? of_chunk : sums;
#pragma unroll
        for (int k = 0; k < QUARTER; k += DEPTH) {
            unsigned left[2][4], right[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                load_left<A_BY_K>(left[i], slot + of_warp_a + 16 * i * A_ROW + k * A_K);
                load_right<B_BY_K>(right[i], slot + of_warp_b + 16 * i * B_ROW + k * B_K);
            }
#pragma unroll
            for (int pass = 0; pass < PASSES<Operand>; ++pass) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        mma_pass(pass, sums_now[i][j], left[i][0], left[i][1], left[i][2], left[i][3],
                                 right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1], Operand{});
                    }
                }
            }
        }
        if (!SUMS_BY_CHUNK) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int v = 0; v < 4; ++v) sums[i][j][v] += of_chunk[i][j][v];
            }
        }
    }

    // The copies of the last chunks are read.
    __syncthreads();
    float* const of_groups = reinterpret_cast<float*>(shared_memory());
    constexpr int OF_GROUP = TILE * SUMS_PITCH;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                const int row = m_of_warp + 16 * i + lane / 4 + v / 2 * 8;
                const int column = n_of_warp + 8 * j + lane % 4 * 2 + v % 2;
                of_groups[group * OF_GROUP + row * SUMS_PITCH + column] = sums[i][j][v];
            }
        }
    }
    __syncthreads();
    constexpr int ROUNDS = TILE * TILE / THREADS;
    float whole[ROUNDS];
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int i = threadIdx.x + round * THREADS;
        whole[round] = share.index == 0 && n + i % TILE < N ? plus(n + i % TILE) : 0.0f;
#pragma unroll
        for (int of = 0; of < GROUPS; ++of) {
            whole[round] += of_groups[of * OF_GROUP + i / TILE * SUMS_PITCH + i % TILE];
        }
    }
    if (share.count > 1 && !add_shares(share, whole)) return;
    bool any_nan = false;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int i = threadIdx.x + round * THREADS;
        if (m + i / TILE >= M || n + i % TILE >= N) continue;
        round_to(*to(m + i / TILE, n + i % TILE), whole[round]);
        any_nan |= whole[round] != whole[round];
    }
    // Sums that came out as NaN or infinite are computed once more, in scalar float32 (NEEDS_CARE).
    if (!NEEDS_CARE<Operand> || !__syncthreads_or(any_nan)) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
        const int own_m = m + i / TILE, own_n = n + i % TILE;
        if (own_m >= M || own_n >= N || is_finite(to_float(*to(own_m, own_n)))) continue;
        float sum = plus(own_n);
#pragma unroll 1
        for (int k = 0; k < K; ++k) {
            const float left = A_BY_K ? a.element(k, own_m) : a.element(own_m, k);
            sum += left * (B_BY_K ? b.element(k, own_n) : b.element(own_n, k));
        }
        round_to(*to(own_m, own_n), sum);
    }
}

__device__ inline int tiles_of(int size) { return (size + TILE - 1) / TILE; }

}  // namespace few_rows
