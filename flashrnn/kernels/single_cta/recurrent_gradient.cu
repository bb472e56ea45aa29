// The gradient of R of heads that one CTA owns:
//
//     dR[g, n, d, p] = sum over b and t of d_gates[b, t, g, n, d] h[b, t - 1, n, p]
//
// Constants of the call say what else there is. With RAGGED, sequences have the steps that `lengths` says:
// rows behind them, whose gradients are 0, have no h before them, and chunks of such rows are passed over.
// With RESETS, rows of `reset_flags` have none either. With GATHERED, what stands in the place of
// h[b, t - 1] is looked up: `before_rows` has for each row the row of h before it, or -1 - k where that is
// row k of `h_starts`, for each direction.
//
// A CTA computes a part of the sum, over the rows (b, t) from part * rows_a_part on, for one head and
// the GATES recurrent gates from group * GATES on. gradient_sums.cu adds the parts afterwards, in a
// fixed order. Where there is one part (`parts` is null), nothing is left to add: dR is written as it is
// returned, and the CTAs after the R_ctas of dR sum the bias's gradient in the same launch.
// The CTA's tile has a line for each unit of its gates (GATES * BLOCK_D) and a column for each
// unit of h (BLOCK_D). The number of all rows may exceed 32 bits; that of a part does not.
//
// What lives where:
//
// - registers: the sums. Warp w has the lines 16 w to 16 w + 15 of every 16 * WARPS, in all columns;
// - shared memory: a ring of STAGES chunks of CHUNK rows, as they lie in global memory. All threads copy
//   them there; operands of the tensor cores are read transposed;
// - global memory: d_gates and h are read once for each group of gates, parts are written once.
//
// One barrier orders each chunk: before it each thread has waited for its own copies of the chunk, and
// has read the one before, into whose slot the copies issued after the barrier go.

#include "problem.cuh"
#include "common/mma.cuh"
#include "common/row_pieces.cuh"
#include "common/row_sums.cuh"

namespace single_cta {

constexpr int BLOCK_D = (D + 15) / 16 * 16;
// Elements in 16 bytes.
constexpr int VECTOR = 16 / sizeof(Element);
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNK = 64 / sizeof(Element);
constexpr int LINES = GATES * BLOCK_D;
constexpr int TILES = (LINES / 16 + WARPS - 1) / WARPS;
constexpr bool ALL_TILES = LINES % (16 * WARPS) == 0;
// Rows have a padding of 8 elements, against bank conflicts: with it rows of 16-bit elements are an odd
// number of 16 bytes apart, and rows of 4-byte elements begin 8 banks apart.
constexpr int LINES_PITCH = LINES + 8, COLUMNS_PITCH = BLOCK_D + 8;
constexpr int SLOT = CHUNK * (LINES_PITCH + COLUMNS_PITCH);
static_assert(STAGES * SLOT * sizeof(Element) == SHARED_MEMORY, "as the plan computes it");
// How threads share rows of d_gates and h.
using Pieces = RowPieces<D, PIECE_BYTES>;
// What they share of a chunk, and how many shares a thread has.
constexpr int GATE_SHARES = CHUNK * GATES * Pieces::THREADS, H_SHARES = CHUNK * Pieces::THREADS;
constexpr int GATE_ROUNDS = (GATE_SHARES + THREADS - 1) / THREADS;
constexpr int H_ROUNDS = (H_SHARES + THREADS - 1) / THREADS;

// Copies a row to shared memory; zeros if there is no such row.
__device__ inline void fetch_row(Element* to, const Element* from, bool exists, int thread) {
    Pieces::for_each(thread, [&](int, int first) {
        Element* piece_to = to + first;
        const Element* piece_from = from + first;
        if (!exists) {
#pragma unroll
            for (int i = 0; i < Pieces::PIECE; ++i) {
                if (Pieces::has(first + i)) round_to(piece_to[i], 0.0f);
            }
        } else {
            Pieces::fetch(shared_address(piece_to), piece_from, first);
        }
    });
}

// Rounds a row of the initial h into shared memory, as the forward scan's product had it.
__device__ inline void round_row(Element* to, const float* from, long long unit, int thread) {
    Pieces::for_each(thread, [&](int, int first) {
#pragma unroll
        for (int i = first; i < first + Pieces::PIECE; ++i) {
            if (Pieces::has(i)) round_to(to[i], from[i * unit]);
        }
    });
}

// A left operand of mma() with 16 lines, from rows in shared memory: the summed dimension runs over
// rows.
__device__ inline void load_left(unsigned (&words)[4], const Element* corner, int pitch) {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(Element) == 2) {
        const int row = lane / 16 * 8 + lane % 8, column = lane / 8 % 2 * 8;
        ldmatrix_transposed(words, shared_address(corner + row * pitch + column));
    } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const int row = lane % 4 + w / 2 * 4, column = lane / 4 + w % 2 * 8;
            words[w] = __float_as_uint(to_float(corner[row * pitch + column]));
            words[w] = prepare(words[w], Operand{});
        }
    }
}

// Two right operands of mma() with 8 columns each: words 0 and 1, and 2 and 3.
__device__ inline void load_right(unsigned (&words)[4], const Element* corner, int pitch) {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(Element) == 2) {
        const int row = lane % 16, column = lane / 16 * 8;
        ldmatrix_transposed(words, shared_address(corner + row * pitch + column));
    } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const int row = lane % 4 + w % 2 * 4, column = lane / 4 + w / 2 * 8;
            words[w] = __float_as_uint(to_float(corner[row * pitch + column]));
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
recurrent_gradient(CALL) {
    const long long width = static_cast<long long>(N) * D;
    if (blockIdx.x >= R_ctas) {
        float* sums = reinterpret_cast<float*>(shared_memory());
        sum_bias<THREADS>(d_b, d_bias, b_rows, width, b_columns, b_shares, blockIdx.x - R_ctas, sums);
        return;
    }
    Element* ring = reinterpret_cast<Element*>(shared_memory());
    constexpr int GROUPS = (GR + GATES - 1) / GATES;
    const int n = blockIdx.x % N, group = blockIdx.x / N % GROUPS, part = blockIdx.x / N / GROUPS;
    // The part's first row and how many rows follow; from here on rows are counted within the part.
    const long long begin = static_cast<long long>(part) * rows_a_part, left = B * T - begin;
    const int rows = left < rows_a_part ? left : rows_a_part, chunks = (rows + CHUNK - 1) / CHUNK;
    // The sequence and step of a row, and how many steps the sequence has. That of the next chunk's first
    // row is kept and moved on, since a division takes longer than the rest of an address's computation,
    // and a length that is asked for a chunk ahead is not waited for.
    struct Position {
        long long sequence;
        unsigned step, length;

        __device__ void advance(int rows, unsigned T, const int* lengths, long long sequences) {
            step += rows;
            if (step < T) return;
            sequence += step / T;
            step %= T;
            ask_length(T, lengths, sequences);
        }
        // Behind the last sequence there is none to ask.
        __device__ void ask_length(unsigned T, const int* lengths, long long sequences) {
            length = RAGGED && sequence < sequences ? lengths[sequence] : T;
        }
        __device__ bool is_step() const { return !RAGGED || step < length; }
        // Whether all rows of the chunk that begins there lie behind the sequence's last step.
        __device__ bool is_idle(unsigned T) const { return !is_step() && step + CHUNK <= T; }
    } next = {begin / T, static_cast<unsigned>(begin % T)};
    next.ask_length(T, lengths, B);
    const Element* gates_of_part = d_gates + begin * G * width + n * D;
    // h before a row's step: that of the row before, except at step 0.
    const Element* h_of_part = h + (begin - 1) * width + n * D;
    const int* before_part = before_rows + begin;
    if (GATHERED && runs_backwards) before_part += runs_backwards[n] * B * T;
    const auto row_of_h = [&](long long of_h) {
        return (of_h >= 0 ? h + of_h * width : h_starts + (-1 - of_h) * width) + n * D;
    };
    const int* of_rows = GATHERED ? before_part : reset_flags + begin;
    // What the thread looks up for the next chunk, a chunk ahead. It does not wait for it before that
    // chunk: no address is computed until then.
    constexpr bool AHEAD = (GATHERED || RESETS) && H_ROUNDS <= 2;
    unsigned looked_up[AHEAD ? H_ROUNDS : 1];
    const auto look_up = [&](int chunk) {
#pragma unroll
        for (int round = 0; round < (AHEAD ? H_ROUNDS : 0); ++round) {
            const int row = chunk * CHUNK + (threadIdx.x + round * THREADS) / Pieces::THREADS;
            const int* from = of_rows + (row < rows ? row : 0);
            looked_up[round] = load_opaque(reinterpret_cast<const unsigned*>(from));
        }
    };
    look_up(0);

    // Which gate the group has in place s.
    const auto gate_of = [&](int s) {
        int gate = 0;
#pragma unroll
        for (int k = 0; k < GR; ++k) {
            if (k == group * GATES + s) gate = RECURRENT[k];
        }
        return gate;
    };
    // Which of the thread's rows of h begin between two words, a bit for each of a slot's.
    unsigned between = 0;
    static_assert(STAGES * H_ROUNDS <= 32);

    // Returns whether there is nothing to fetch.
    const auto fetch = [&](int chunk) {
        Element* lines = ring + chunk % STAGES * SLOT;
        Element* columns = lines + CHUNK * LINES_PITCH;
        const int first = chunk * CHUNK;
        const bool idle = next.is_idle(T);
        // All threads take the same number of iterations, so that loops can be unrolled. Unrolled by
        // more than two, registers spill.
#pragma unroll 2
        for (int round = 0; round < (idle ? 0 : GATE_ROUNDS); ++round) {
            const int i = threadIdx.x + round * THREADS;
            if (GATE_SHARES % THREADS && i >= GATE_SHARES) break;
            const int thread = i % Pieces::THREADS, share = i / Pieces::THREADS;
            const int s = share % GATES, row = share / GATES;
            const int gate = gate_of(s), line = (first + row) * G + gate;
            const Element* from = gates_of_part + static_cast<long long>(line) * (N * D);
            fetch_row(lines + row * LINES_PITCH + s * BLOCK_D, from, first + row < rows, thread);
        }
        const auto set_between = [&](int round, bool is_between) {
            const unsigned bit = 1u << (chunk % STAGES * H_ROUNDS + round);
            if (Pieces::IN_WORDS) between = is_between ? between | bit : between & ~bit;
        };
#pragma unroll 2
        for (int round = 0; round < (idle ? 0 : H_ROUNDS); ++round) {
            const int i = threadIdx.x + round * THREADS;
            if (H_SHARES % THREADS && i >= H_SHARES) break;
            const int thread = i % Pieces::THREADS, row = i / Pieces::THREADS;
            const int of_row = AHEAD ? static_cast<int>(looked_up[AHEAD ? round : 0])
                               : GATHERED || RESETS ? of_rows[first + row < rows ? first + row : 0]
                                                    : 0;
            if constexpr (GATHERED) {
                const bool exists = first + row < rows;
                Element* to = columns + row * COLUMNS_PITCH;
                const Element* from = row_of_h(of_row);
                fetch_row(to, from, exists, thread);
                set_between(round, exists && Pieces::behind_word(from));
            } else {
                Position position = next;
                position.advance(row, T, lengths, B);
                Element* to = columns + row * COLUMNS_PITCH;
                const bool exists = first + row < rows && position.is_step() && !of_row;
                const Element* from = h_of_part + static_cast<long long>(first + row) * (N * D);
                if (sizeof(Element) == 4) {
                    const Element* initial = reinterpret_cast<const Element*>(h_initial);
                    from = position.step ? from : initial + position.sequence * width + n * D;
                } else if (exists && position.step == 0) {
                    const float* initial = h_initial + position.sequence * h_initial_b + n * h_initial_n;
                    round_row(to, initial, h_initial_d, thread);
                    set_between(round, false);
                    continue;
                }
                fetch_row(to, from, exists, thread);
                set_between(round, exists && Pieces::behind_word(from));
            }
        }
        look_up(chunk + 1);
        next.advance(CHUNK, T, lengths, B);
        return idle;
    };
    // Completes what the thread has fetched of a chunk, after it has waited for that.
    const auto settle = [&](int chunk) {
        if constexpr (Pieces::IN_WORDS) {
            Element* lines = ring + chunk % STAGES * SLOT;
            const int thread = threadIdx.x % Pieces::THREADS, first = chunk * CHUNK;
            const auto share_of = [](int round) {
                return static_cast<int>(threadIdx.x + round * THREADS) / Pieces::THREADS;
            };
            Pieces::settle<GATE_ROUNDS>(
                thread,
                [&](int round) {
                    const int s = share_of(round) % GATES, row = share_of(round) / GATES;
                    const int line = (first + row) * G + gate_of(s);
                    const Element* from = gates_of_part + static_cast<long long>(line) * (N * D);
                    return row < CHUNK && first + row < rows && Pieces::behind_word(from);
                },
                [&](int round) {
                    const int s = share_of(round) % GATES, row = share_of(round) / GATES;
                    return lines + row * LINES_PITCH + s * BLOCK_D + thread * Pieces::PIECE;
                });
            const unsigned moves = between >> chunk % STAGES * H_ROUNDS;
            Pieces::settle<H_ROUNDS>(
                thread, [&](int round) { return moves >> round & 1; },
                [&](int round) {
                    Element* columns = lines + CHUNK * LINES_PITCH;
                    return columns + share_of(round) * COLUMNS_PITCH + thread * Pieces::PIECE;
                });
        }
    };
    // Of the chunks fetched last, a bit each: whether they are idle.
    unsigned idle_chunks = 0;
    for (int chunk = 0; chunk < STAGES - 1; ++chunk) {
        idle_chunks *= 2;
        if (chunk < chunks) idle_chunks += fetch(chunk);
        cp_async_commit();
    }

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sums[TILES][BLOCK_D / 8][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
        cp_async_wait<STAGES - 2>();
        settle(chunk);
        __syncthreads();
        idle_chunks *= 2;
        if (chunk + STAGES - 1 < chunks) idle_chunks += fetch(chunk + STAGES - 1);
        cp_async_commit();
        if (RAGGED && idle_chunks >> (STAGES - 1) & 1) continue;
        const Element* lines = ring + chunk % STAGES * SLOT;
        const Element* columns = lines + CHUNK * LINES_PITCH;
#pragma unroll
        for (int row = 0; row < CHUNK; row += 2 * VECTOR) {
            unsigned left[TILES][4];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const int line = 16 * (warp + tile * WARPS);
                if (ALL_TILES || line < LINES) {
                    load_left(left[tile], lines + row * LINES_PITCH + line, LINES_PITCH);
                }
            }
#pragma unroll
            for (int pair = 0; pair < BLOCK_D / 16; ++pair) {
                unsigned right[4];
                load_right(right, columns + row * COLUMNS_PITCH + 16 * pair, COLUMNS_PITCH);
#pragma unroll
                for (int pass = 0; pass < PASSES<Operand>; ++pass) {
#pragma unroll
                    for (int tile = 0; tile < TILES; ++tile) {
                        if (!ALL_TILES && 16 * (warp + tile * WARPS) >= LINES) continue;
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            mma_pass(pass, sums[tile][2 * pair + half], left[tile][0], left[tile][1],
                                     left[tile][2], left[tile][3], right[2 * half],
                                     right[2 * half + 1], Operand{});
                        }
                    }
                }
            }
        }
    }

    bool any_nan = false;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int n_tile = 0; n_tile < BLOCK_D / 8; ++n_tile) {
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                const int line = 16 * (warp + tile * WARPS) + lane / 4 + v / 2 * 8;
                const int s = group * GATES + line / BLOCK_D, d = line % BLOCK_D;
                const int p = 8 * n_tile + 2 * (lane % 4) + v % 2;
                if (line < LINES && s < GR && d < D && p < D) {
                    const long long matrix = (static_cast<long long>(part) * GR + s) * N + n;
                    const long long place = (matrix * D + d) * D + p;
                    const float sum = sums[tile][n_tile][v];
                    if (parts) {
                        parts[place] = sum;
                    } else {
                        round_to(d_R[place], sum);
                    }
                    any_nan |= sum != sum;
                }
            }
        }
    }
    // Sums that came out as NaN or infinite are computed once more, in scalar float32 (NEEDS_CARE).
    if (!NEEDS_CARE<Operand> || !__syncthreads_or(any_nan)) return;
    float* results = parts ? parts : reinterpret_cast<float*>(d_R);
#pragma unroll 1
    for (int i = threadIdx.x; i < GATES * D * D; i += THREADS) {
        const int s = group * GATES + i / (D * D), d = i / D % D, p = i % D;
        if (s >= GR) break;
        float& result = results[(((static_cast<long long>(part) * GR + s) * N + n) * D + d) * D + p];
        if (is_finite(result)) continue;
        int gate = 0;
#pragma unroll
        for (int k = 0; k < GR; ++k) {
            if (k == s) gate = RECURRENT[k];
        }
        float sum = 0.0f;
#pragma unroll 1
        for (long long row = begin; row < begin + rows; ++row) {
            float before;
            if ((RAGGED && row % T >= lengths[row / T]) || (RESETS && reset_flags[row])) {
                continue;
            } else if (GATHERED) {
                before = to_float(row_of_h(before_part[row - begin])[p]);
            } else {
                before = row % T ? to_float(h[(row - 1) * width + n * D + p])
                                 : h_initial[row / T * width + n * D + p];
            }
            sum += to_float(d_gates[(row * G + gate) * width + n * D + d]) * before;
        }
        result = sum;
    }
}

}  // namespace single_cta
