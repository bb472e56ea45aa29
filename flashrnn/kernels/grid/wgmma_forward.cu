// The scan over time, forward, of heads and many sequences that a group of clusters owns (wgmma_tile.cuh), by
// wgmma. wgmma_exchange.cuh says what CTAs send each other, and what orders it.
//
// What lives where:
//
// - registers of the computing warps: R of IN_REGISTERS of the product's steps; the product's sums; of the
//   thread's elements the carried states, in float32;
// - shared memory: the rest of R; h of the CTA's part, of each batch tile; the other CTAs' sums; the tiles;
//   the bias;
// - global memory: h of all units, two buffers for each batch tile. Each element of Wx, states and gates is
//   read or written once, by the copying warps, in 16 bytes. (The host has copied what is not aligned.)
//
// In a turn, a step of one batch tile, the computing warps multiply h, which the receiving warp copies, and
// exchange sums within the cluster. Then they meet the copying warps twice:
//
// - when these have read the turn's Wx into its tiles, and stored what was in them: from here on the computing
//   warps compute new states, and write tiles;
// - when they have: from here on the copying warps send h, store the tiles, and read the next step's Wx,
//   while the computing warps take the next turn.
//
// CTAs wait for each other, so the launch is a cooperative one.
//
// Of sequences of different lengths a batch tile takes as many steps as its first one has, which is its
// longest (common/sequence.cuh); all CTAs of the group read the same length. A sequence that has ended keeps its
// states, and its h is sent on. After a reset the h of the start is sent, while the h before it is stored:
// which steps are cut from the next is read with their Wx.

#include "grid/wgmma_exchange.cuh"
#include "common/sequence.cuh"

namespace grid_wgmma {

// Shared memory, in bytes: the exchange, the tiles of each batch tile, the bias, R, and with options of
// sequences a table of the CTA's, with resets also whether their next step starts anew. With resets the h that
// is stored, that before a reset, has a tile of its own.
constexpr int TILES = G + S + RESETS, STORED_H = RESETS ? TILES - 1 : G;
constexpr int TILES_BYTES = BATCH_TILES * TILES * TILE * sizeof(Element);
constexpr int BIAS_BYTES = G * UNITS * sizeof(float);
constexpr int BIAS = EXCHANGE_BYTES + TILES_BYTES, MATRIX = BIAS + BIAS_BYTES;
constexpr int TABLE = MATRIX + Matrix::BYTES, ALL_OWN = BATCH_TILES * OWN_SEQUENCES;
constexpr int TABLE_BYTES = SEQUENCED ? ALL_OWN * int(sizeof(Sequence)) : 0;
constexpr int FLAG_BYTES = RESETS ? ALL_OWN * int(sizeof(int)) : 0;
static_assert(TABLE + TABLE_BYTES + FLAG_BYTES == SHARED_MEMORY,
              "wgmma_plan.py computes another size of shared memory");

// Barriers. Of the computing and the copying warps: the tiles' inputs are there, and their outputs stored;
// and the outputs are written. Of the copying warps: h is in global memory.
constexpr int READY = 2, WRITTEN = 3, COPIED = 4;

__device__ inline Matrix load_matrix(unsigned char* shared, const Element* R, int n, int N,
                                     const Exchange& exchange) {
    const LaneRows rows(R, n, N, exchange.cluster);
    return Matrix(shared, [&](int step) {
        const int first = (exchange.rank * STEPS + step) * 16 + 2 * (threadIdx.x % 4);
        return rows.words([&](int half, int k) { return first + 8 * half + k; });
    });
}

__device__ inline void multiply(float (&sums)[4 * N_TILES], const Matrix& matrix, const Exchange& exchange,
                                int tile, unsigned number) {
    unsigned first = shared_address(exchange.h(tile));
    // Else the compiler computes the places of all steps once, and keeps them in registers.
    materialize(first);
    const unsigned long long right = operand(__shfl_sync(~0u, first, 0), OCTET_BYTES, 128);
    matrix.multiply(sums, [&](int step) {
        if (step % SLICE_STEPS == 0) {
            exchange.wait_for_slice(tile, step / SLICE_STEPS, number);
            // Else the compiler puts one here, does not see that no thread diverges, and has each
            // wgmma wait for the one before.
            wgmma_fence();
        }
        return moved(right, step * STEP_H_BYTES);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
grid_wgmma_forward(CALL) {
    const int rank = blockIdx.x % CLUSTER_SIZE, cluster = blockIdx.x / CLUSTER_SIZE % CLUSTERS;
    const int group = blockIdx.x / (CLUSTER_SIZE * CLUSTERS);
    const Exchange exchange(shared_memory(), packets, group, cluster, rank);
    const long long width = static_cast<long long>(N) * D;
    const long long work_tiles = N * WorkTile::count_of_head(B);
    // The cluster's first unit, and how many of its units exist.
    const int first_unit = cluster * UNITS;
    const int units = D - first_unit < UNITS ? D - first_unit : UNITS;
    Element* const tiles = reinterpret_cast<Element*>(shared_memory() + EXCHANGE_BYTES);
    float* const bias = reinterpret_cast<float*>(shared_memory() + BIAS);
    // A batch tile's tile: that of a gate, then that of a state.
    const auto tile_of = [&](int tile, int number) { return tiles + (tile * TILES + number) * TILE; };
    // The first of the CTA's sequences in each batch tile.
    const int first_column = rank * OWN_SEQUENCES;
    Sequence* const table = reinterpret_cast<Sequence*>(shared_memory() + TABLE);
    int* const flags = reinterpret_cast<int*>(shared_memory() + TABLE + TABLE_BYTES);
    // The number of each batch tile's present exchange.
    unsigned numbers[BATCH_TILES] = {};
    // The steps of a batch tile.
    const auto steps_of = [&](const WorkTile& work, int tile) -> long long {
        if (!RAGGED) return T;
        const long long place = work.first_sequence + tile * SEQUENCES;
        return sequence_lengths[place < B ? place : B - 1];
    };

    // The same for a warp, as the compiler must know to have products run asynchronously.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp >= WARPS) {
        if (SHIFT_REGISTERS) setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (warp == WARPS) {
            for (long long index = group; index < work_tiles; index += groups) {
                const WorkTile work(index, B);
                long long steps[BATCH_TILES];
#pragma unroll
                for (int tile = 0; tile < BATCH_TILES; ++tile) steps[tile] = steps_of(work, tile);
                for (long long t = 0; t < steps[0]; ++t) {
#pragma unroll
                    for (int tile = 0; tile < BATCH_TILES; ++tile) {
                        if (t < steps[tile]) exchange.receive(tile, numbers[tile]++);
                    }
                }
            }
            cluster_barrier();
            return;
        }
        const int thread = threadIdx.x - COMPUTING - RECEIVING;
        for (long long index = group; index < work_tiles; index += groups) {
            const WorkTile work(index, B);
            const auto place_of = [&](int tile, int sequence) {
                return work.first_sequence + tile * SEQUENCES + first_column + sequence;
            };
            long long steps[BATCH_TILES];
#pragma unroll
            for (int tile = 0; tile < BATCH_TILES; ++tile) steps[tile] = steps_of(work, tile);
            if constexpr (SEQUENCED) {
                named_barrier_of<COMPUTING + COPYING>(READY);
                for (int i = thread; i < ALL_OWN; i += COPYING) {
                    // In place of sequences that do not exist the last one that does.
                    const long long place = place_of(i / OWN_SEQUENCES, i % OWN_SEQUENCES);
                    table[i] = sequence_at(place < B ? place : B - 1, T, sequence_order, sequence_rows,
                                           sequence_lengths, runs_backwards, work.n);
                }
                named_barrier_of<COMPUTING + COPYING>(WRITTEN);
            }
            const auto send_h = [&](int tile, unsigned number) {
#pragma unroll 1
                for (int i = thread; i < TILE_CHUNKS; i += COPYING) {
                    const Chunk chunk(i);
                    // What nobody sends stays zero.
                    if (chunk.first_unit >= units) continue;
                    *exchange.place(tile, number, chunk.first_unit, first_column + chunk.sequence) =
                        *reinterpret_cast<const uint4*>(tile_of(tile, G) + chunk.index());
                }
                named_barrier_of<COPYING>(COPIED);
                exchange.send(tile);
            };
            const auto fetch_inputs = [&](int tile, long long t) {
#pragma unroll 1
                for (int i = thread; i < TILE_CHUNKS; i += COPYING) {
                    const Chunk chunk(i);
                    if (chunk.first_unit >= units) continue;
                    // In place of sequences that do not exist it reads the last one that does.
                    const long long place = place_of(tile, chunk.sequence);
                    const Sequence& own = table[tile * OWN_SEQUENCES + chunk.sequence];
                    if (SEQUENCED && !own.has(t)) continue;
                    const long long of_step = SEQUENCED ? own.offset(t, Wx_b, Wx_t)
                                                        : (place < B ? place : B - 1) * Wx_b + t * Wx_t;
                    const Element* const from =
                        Wx + of_step + work.n * Wx_n + first_unit + chunk.first_unit;
#pragma unroll
                    for (int k = 0; k < G; ++k) {
                        if (FED_WX[k] < 0) continue;
                        cp_async(tile_of(tile, k) + chunk.index(), from + FED_WX[k] * Wx_g);
                    }
                }
                for (int i = thread; RESETS && i < OWN_SEQUENCES; i += COPYING) {
                    const Sequence& own = table[tile * OWN_SEQUENCES + i];
                    flags[tile * OWN_SEQUENCES + i] =
                        own.may_be_cut(t + 1) ? reset_flags[own.flag(t + 1)] : 0;
                }
            };
            const auto store_outputs = [&](int tile, long long t) {
#pragma unroll 1
                for (int i = thread; i < TILE_CHUNKS; i += COPYING) {
                    const Chunk chunk(i);
                    const long long place = place_of(tile, chunk.sequence);
                    if (chunk.first_unit >= units || place >= B) continue;
                    const Sequence& own = table[tile * OWN_SEQUENCES + chunk.sequence];
                    if (SEQUENCED && !own.has(t)) continue;
                    const auto store = [&](Element* to, int number) {
                        *reinterpret_cast<uint4*>(to) =
                            *reinterpret_cast<const uint4*>(tile_of(tile, number) + chunk.index());
                    };
                    const long long row = SEQUENCED ? own.row(t) : place * T + t;
                    const long long unit = work.n * D + first_unit + chunk.first_unit;
#pragma unroll
                    for (int s = 0; s < STORED; ++s) {
                        const long long first_row = s * (PACKED ? T : B * T);
                        store(states + (first_row + row) * width + unit, s > 0 ? G + s : STORED_H);
                    }
#pragma unroll
                    for (int k = 0; k < G && SAVE_GATES; ++k) {
                        store(gates + (row * G + k) * width + unit, k);
                    }
                }
            };
            // Writes zeros to the rows past each sequence's end.
            const auto clear_rest = [&](int tile) {
#pragma unroll 1
                for (int i = thread; i < TILE_CHUNKS; i += COPYING) {
                    const Chunk chunk(i);
                    if (chunk.first_unit >= units || place_of(tile, chunk.sequence) >= B) continue;
                    const Sequence& own = table[tile * OWN_SEQUENCES + chunk.sequence];
                    const long long unit = work.n * D + first_unit + chunk.first_unit;
#pragma unroll 1
                    for (long long t = own.length; t < T; ++t) {
#pragma unroll
                        for (int s = 0; s < STORED; ++s) {
                            Element* const to = states + (s * B * T + own.first_row + t) * width + unit;
                            *reinterpret_cast<uint4*>(to) = uint4{};
                        }
                    }
                }
            };
#pragma unroll
            for (int tile = 0; tile < BATCH_TILES; ++tile) {
                named_barrier_of<COMPUTING + COPYING>(READY);
                named_barrier_of<COMPUTING + COPYING>(WRITTEN);
                if (RAGGED && steps[tile] == 0) continue;
                send_h(tile, numbers[tile]);
                fetch_inputs(tile, 0);
                cp_async_commit();
            }
            for (long long t = 0; t < steps[0]; ++t) {
#pragma unroll
                for (int tile = 0; tile < BATCH_TILES; ++tile) {
                    if (t >= steps[tile]) continue;
                    // All Wx but those of the batch tiles whose turns come later.
                    if (t < steps[BATCH_TILES - 1]) cp_async_wait<BATCH_TILES - 1>();
                    if (t >= steps[BATCH_TILES - 1]) cp_async_wait<0>();
                    named_barrier_of<COMPUTING + COPYING>(READY);
                    named_barrier_of<COMPUTING + COPYING>(WRITTEN);
                    ++numbers[tile];
                    if (t + 1 < steps[tile]) send_h(tile, numbers[tile]);
                    exchange.signal_sent(tile);
                    store_outputs(tile, t);
                    if (t + 1 < steps[tile]) fetch_inputs(tile, t + 1);
                    cp_async_commit();
                }
            }
            for (int tile = 0; tile < BATCH_TILES && RAGGED && !PACKED && STORED; ++tile) clear_rest(tile);
        }
        cluster_barrier();
        return;
    }

    if (SHIFT_REGISTERS) setmaxnreg_inc<COMPUTING_REGISTERS>();
    unsigned turn = 0;
    for (long long index = group; index < work_tiles; index += groups) {
        const WorkTile work(index, B);
        const Matrix matrix = load_matrix(shared_memory() + MATRIX, R, work.n, N, exchange);
        for (int i = threadIdx.x; i < G * UNITS; i += COMPUTING) {
            const int k = i / UNITS, unit = i % UNITS;
            const long long row = static_cast<long long>(FED_B[k]) * N + work.n;
            bias[i] = FED_B[k] >= 0 && unit < units ? to_float(b[row * D + first_unit + unit]) : 0.0f;
        }
        // Others read R and the bias behind the next barrier.
        fence_proxy_async();

        if constexpr (SEQUENCED) {
            named_barrier_of<COMPUTING + COPYING>(READY);
            named_barrier_of<COMPUTING + COPYING>(WRITTEN);
        }
        const auto own_of = [&](int tile, int e) -> const Sequence& {
            return table[tile * OWN_SEQUENCES + ThreadElement(e).sequence];
        };
        const auto place_of = [&](int tile, int e) {
            return work.first_sequence + tile * SEQUENCES + first_column + ThreadElement(e).sequence;
        };
        // Which of the batch an element's sequence is.
        const auto index_of = [&](int tile, int e) -> long long {
            return SEQUENCED ? own_of(tile, e).index : place_of(tile, e);
        };
        const auto exists = [&](int tile, int e) {
            return ThreadElement(e).unit < units && place_of(tile, e) < B;
        };
        const ResetStates starts = {
            STARTS ? reset_states + work.n * reset_states_n + first_unit * reset_states_d : nullptr,
            reset_states_s, reset_states_b, reset_states_t, reset_states_d};
        float carried[BATCH_TILES][OWN_ELEMENTS][S];
        // Sets an element's states to what they go back to before a step.
        const auto reset = [&](int tile, int e, long long t) {
            const ThreadElement element(e);
#pragma unroll
            for (int s = 0; s < S; ++s) {
                carried[tile][e][s] =
                    element.unit < units ? starts.value(s, own_of(tile, e), t, element.unit) : 0.0f;
            }
        };
        long long steps[BATCH_TILES];
#pragma unroll
        for (int tile = 0; tile < BATCH_TILES; ++tile) steps[tile] = steps_of(work, tile);
#pragma unroll
        for (int tile = 0; tile < BATCH_TILES; ++tile) {
            named_barrier_of<COMPUTING + COPYING>(READY);
#pragma unroll
            for (int e = 0; e < OWN_ELEMENTS; ++e) {
                const ThreadElement element(e);
                const float* const from = initial + index_of(tile, e) * initial_b + work.n * initial_n +
                                          (first_unit + element.unit) * initial_d;
#pragma unroll
                for (int s = 0; s < S; ++s) carried[tile][e][s] = exists(tile, e) ? from[s * initial_s] : 0.0f;
                if constexpr (RESETS) {
                    const Sequence& own = own_of(tile, e);
                    if (own.may_be_cut(0) && reset_flags[own.flag(0)]) reset(tile, e, 0);
                }
                round_to(tile_of(tile, G)[tile_index(element.unit, element.sequence)], carried[tile][e][0]);
            }
            named_barrier_of<COMPUTING + COPYING>(WRITTEN);
        }

        for (long long t = 0; t < steps[0]; ++t) {
#pragma unroll
            for (int tile = 0; tile < BATCH_TILES; ++tile) {
                if (t >= steps[tile]) continue;
                float sums[4 * N_TILES], totals[4 * OWN_N_TILES];
                multiply(sums, matrix, exchange, tile, numbers[tile]++);
                exchange.signal_multiplied(tile);
                exchange.give_sums(sums, turn);
                exchange.add_sums(totals, sums, turn);
                ++turn;
                const RecurrentSums<OWN_N_TILES> recurrent(
                    [&](int n_tile, int i) { return totals[4 * n_tile + i]; });
                float preactivations[OWN_ELEMENTS][G];
                named_barrier_of<COMPUTING + COPYING>(READY);
                // All that is read from tiles is read before any is written: else each read would wait for a
                // write.
#pragma unroll
                for (int e = 0; e < OWN_ELEMENTS; ++e) {
                    const ThreadElement element(e);
                    const int place = tile_index(element.unit, element.sequence);
#pragma unroll
                    for (int k = 0; k < G; ++k) {
                        float& sum = preactivations[e][k];
                        sum = bias[k * UNITS + element.unit];
                        if (FED_WX[k] >= 0) sum += to_float(tile_of(tile, k)[place]);
                        if (FED_R[k] >= 0) sum += recurrent.gates[e][FED_R[k] < 0 ? 0 : FED_R[k]];
                    }
                }
#pragma unroll
                for (int e = 0; e < OWN_ELEMENTS; ++e) {
                    const ThreadElement element(e);
                    const int place = tile_index(element.unit, element.sequence);
                    float after[S];
                    step(carried[tile][e], preactivations[e], after, clips.forward);
                    // Past its end a sequence keeps its last states.
                    const bool goes_on = !RAGGED || own_of(tile, e).has(t);
#pragma unroll
                    for (int s = 0; s < S; ++s) {
                        if (goes_on) carried[tile][e][s] = after[s];
                        round_to(tile_of(tile, s > 0 ? G + s : STORED_H)[place], carried[tile][e][s]);
                    }
                    if constexpr (RESETS) {
                        if (flags[tile * OWN_SEQUENCES + element.sequence]) reset(tile, e, t + 1);
                        round_to(tile_of(tile, G)[place], carried[tile][e][0]);
                    }
#pragma unroll
                    for (int k = 0; k < G && SAVE_GATES; ++k) {
                        round_to(tile_of(tile, k)[place], preactivations[e][k]);
                    }
                }
                named_barrier_of<COMPUTING + COPYING>(WRITTEN);
            }
        }
#pragma unroll
        for (int tile = 0; tile < BATCH_TILES; ++tile) {
#pragma unroll
            for (int e = 0; e < OWN_ELEMENTS; ++e) {
                if (!exists(tile, e)) continue;
                float* const to = last_states + index_of(tile, e) * width + work.n * D + first_unit +
                                  ThreadElement(e).unit;
#pragma unroll
                for (int s = 0; s < S; ++s) to[s * B * width] = carried[tile][e][s];
            }
        }
    }
    cluster_barrier();
}

}  // namespace grid_wgmma
