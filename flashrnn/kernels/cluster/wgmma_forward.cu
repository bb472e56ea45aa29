// Forward scan over time, for heads of many sequences that a cluster of CTAs computes by wgmma.
// wgmma_tile.cuh says which CTA and warp has which units, wgmma_exchange.cuh how CTAs exchange h.
//
// What lives where:
//
// - registers of the computing warps: R of IN_REGISTERS of the product's steps, the product's sums, the
//   states in float32;
// - shared memory: the rest of R; h of all units, one buffer or two; a tile for each gate, into which
//   Wx is read and which pre-activations replace where they are saved; a tile for each state but h; the
//   bias; with options of sequences, a table of the cluster's, with resets also a tile of the h that is
//   stored, and for each sequence whether its next step starts anew;
// - global memory: each element of Wx, states and gates is read or written once, by the producer
//   threads, in 16 bytes. (The host has copied what is not aligned to 16 bytes.)
//
// What orders the steps: the product waits for each tile of h before it multiplies it. All threads of
// the CTA meet twice in a step:
//
// - after the product, when the producer threads have also read the step's Wx into the gates' tiles:
//   from here on the computing warps compute new states, and write tiles;
// - when they have: from here on the producer threads send h, store the tiles to global memory, and
//   read the next step's Wx into the gates' tiles, while the computing warps wait for h of other CTAs
//   and multiply it.
//
// All CTAs of a cluster take as many steps as its longest sequence has, since each waits for h of all.
// A sequence that has ended keeps its states, and its h is sent on. After a reset the h of the start is
// sent, while the h before it is stored: which steps are cut from the next is read with their Wx.

#include "cluster/wgmma_product.cuh"
#include "common/sequence.cuh"

namespace cluster_wgmma {

constexpr int BIAS_BYTES = G * UNITS * sizeof(float);
constexpr int TABLE = EXCHANGE_BYTES + TILES * TILE_BYTES + BIAS_BYTES + Matrix::BYTES;
constexpr int TABLE_BYTES = SEQUENCED ? SEQUENCES * int(sizeof(Sequence)) : 0;
constexpr int FLAG_BYTES = RESETS ? SEQUENCES * int(sizeof(int)) : 0;
static_assert(TABLE + TABLE_BYTES + FLAG_BYTES == SHARED_MEMORY,
              "wgmma_plan.py computes another size of shared memory");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
cluster_wgmma_forward(CALL) {
    const int rank = blockIdx.x % GROUP_SIZE, cluster = blockIdx.x / GROUP_SIZE;
    // The cluster's head and first sequence, and the CTA's first unit.
    const int n = cluster % N;
    const long long first = static_cast<long long>(cluster / N) * SEQUENCES;
    const int last = B - 1 - first < SEQUENCES ? B - 1 - first : SEQUENCES - 1;
    const int first_unit = rank * UNITS;
    const int units = D - first_unit < UNITS ? D - first_unit : UNITS;
    const long long width = static_cast<long long>(N) * D;

    Exchange exchange(shared_memory(), rank);
    Element* const tiles = reinterpret_cast<Element*>(shared_memory() + EXCHANGE_BYTES);
    float* const bias = reinterpret_cast<float*>(tiles + TILES * TILE);
    // With resets the last tile has the h that is stored.
    Element* const stored_h = RESETS ? tiles + (TILES - 1) * TILE : nullptr;

    Sequence* const table = reinterpret_cast<Sequence*>(shared_memory() + TABLE);
    // Whether the step after the present one starts anew.
    int* const flags = reinterpret_cast<int*>(shared_memory() + TABLE + TABLE_BYTES);
    long long steps = T;
    if (SEQUENCED) {
        steps = fill_table<SEQUENCES, THREADS>(table, first, last, T, sequence_order, sequence_rows,
                                               sequence_lengths, runs_backwards, n);
    }
    // Which of the batch a sequence of the cluster's is.
    const auto index_of = [&](int sequence) { return SEQUENCED ? table[sequence].index : first + sequence; };

    if (threadIdx.x >= COMPUTING) {
        if (SHIFT_REGISTERS) setmaxnreg_dec<PRODUCER_REGISTERS>();
        // In place of sequences that do not exist it reads the last one that does.
        const auto fetch_inputs = [&](long long t) {
#pragma unroll 1
            for (int i = threadIdx.x - COMPUTING; i < CHUNKS; i += PRODUCERS) {
                const Chunk chunk(i);
                if (chunk.first_unit() >= units) continue;
                const int sequence = chunk.sequence < last ? chunk.sequence : last;
                if (SEQUENCED && !table[sequence].has(t)) continue;
                const long long of_step = SEQUENCED ? table[sequence].offset(t, Wx_b, Wx_t)
                                                    : (first + sequence) * Wx_b + t * Wx_t;
                const Element* from = Wx + of_step + n * Wx_n + first_unit + chunk.first_unit();
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    if (FED_WX[k] < 0) continue;
                    cp_async(tiles + k * TILE + chunk.index(), from + FED_WX[k] * Wx_g);
                }
            }
            for (int i = threadIdx.x - COMPUTING; RESETS && i < SEQUENCES; i += PRODUCERS) {
                flags[i] = table[i].may_be_cut(t + 1) ? reset_flags[table[i].flag(t + 1)] : 0;
            }
            cp_async_commit();
            cp_async_wait<0>();
        };
        const auto store_outputs = [&](long long t) {
#pragma unroll 1
            for (int i = threadIdx.x - COMPUTING; i < CHUNKS; i += PRODUCERS) {
                const Chunk chunk(i);
                if (chunk.first_unit() >= units || chunk.sequence > last) continue;
                if (SEQUENCED && !table[chunk.sequence].has(t)) continue;
                const auto store = [&](Element* to, const Element* tile) {
                    *reinterpret_cast<uint4*>(to) =
                        *reinterpret_cast<const uint4*>(tile + chunk.index());
                };
                const long long unit = n * D + first_unit + chunk.first_unit();
                const Sequence& own = table[chunk.sequence];
                const long long row =
                    SEQUENCED ? own.first_row + own.time(t) : (first + chunk.sequence) * T + t;
#pragma unroll
                for (int s = 0; s < STORED; ++s) {
                    const long long first_row = s * (PACKED ? T : B * T);
                    store(states + (first_row + row) * width + unit,
                          s == 0 ? (RESETS ? stored_h : exchange.tile(rank)) : tiles + (G - 1 + s) * TILE);
                }
                if (!SAVE_GATES) continue;
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    store(gates + (row * G + k) * width + unit, tiles + k * TILE);
                }
            }
        };
        // Writes zeros to the rows past each sequence's end.
        const auto clear_rest = [&] {
#pragma unroll 1
            for (int i = threadIdx.x - COMPUTING; i < CHUNKS; i += PRODUCERS) {
                const Chunk chunk(i);
                if (chunk.first_unit() >= units || chunk.sequence > last) continue;
                const Sequence& own = table[chunk.sequence];
                const long long unit = n * D + first_unit + chunk.first_unit();
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
        named_barrier<THREADS>();
        for (long long t = 0; t < steps; ++t) {
            exchange.send();
            // A chunk is stored and read anew by the same thread, so nothing else needs to order the
            // two.
            if (t > 0) store_outputs(t - 1);
            fetch_inputs(t);
            named_barrier<THREADS>();
            exchange.signal_consumed();
            ++exchange.number;
            named_barrier<THREADS>();
        }
        store_outputs(steps - 1);
        if (RAGGED && !PACKED && STORED) clear_rest();
        cluster_barrier();
        return;
    }

    if (SHIFT_REGISTERS) setmaxnreg_inc<COMPUTING_REGISTERS>();
    const Matrix matrix =
        load_matrix(reinterpret_cast<unsigned char*>(bias + G * UNITS), R, n, N, rank);
    for (int i = threadIdx.x; i < G * UNITS; i += COMPUTING) {
        const int k = i / UNITS, unit = i % UNITS;
        const long long row = static_cast<long long>(FED_B[k]) * N + n;
        bias[i] = FED_B[k] >= 0 && unit < units ? to_float(b[row * D + first_unit + unit]) : 0.0f;
    }
    const ResetStates starts = {
        reset_states ? reset_states + n * reset_states_n + first_unit * reset_states_d : nullptr,
        reset_states_s, reset_states_b, reset_states_t, reset_states_d};
    float carried[ELEMENTS][S];
    // Sets an element's states to what they go back to before a step.
    const auto reset = [&](int e, long long t) {
        const ThreadElement element(e);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            carried[e][s] = element.unit < units
                                ? starts.value(s, table[element.sequence], t, element.unit)
                                : 0.0f;
        }
    };
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(e);
        const bool exists = element.unit < units && element.sequence <= last;
        const float* from = initial + index_of(element.sequence) * initial_b + n * initial_n +
                            (first_unit + element.unit) * initial_d;
#pragma unroll
        for (int s = 0; s < S; ++s) carried[e][s] = exists ? from[s * initial_s] : 0.0f;
        if (RESETS) {
            const Sequence& own = table[element.sequence];
            if (own.may_be_cut(0) && reset_flags[own.flag(0)]) reset(e, 0);
        }
    }
    const auto write_h = [&] {
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            const ThreadElement element(e);
            // For units beyond D, R has zeros: 0 times an infinite h would be NaN.
            const float h = element.unit < units ? carried[e][0] : 0.0f;
            round_to(exchange.tile(rank)[tile_index(element.unit, element.sequence)], h);
        }
        fence_proxy_async();
        named_barrier<THREADS>();
    };
    write_h();
    for (long long t = 0; t < steps; ++t) {
        float sums[4 * N_TILES];
        multiply(sums, matrix, exchange);
        exchange.expect_tiles(exchange.buffer());
        named_barrier<THREADS>();
        const RecurrentSums recurrent([&](int n_tile, int i) { return sums[4 * n_tile + i]; });
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            const ThreadElement element(e);
            Element* const values = tiles + tile_index(element.unit, element.sequence);
            float preactivations[G], after[S];
#pragma unroll
            for (int k = 0; k < G; ++k) {
                preactivations[k] = bias[k * UNITS + element.unit];
                if (FED_WX[k] >= 0) preactivations[k] += to_float(values[k * TILE]);
                if (FED_R[k] >= 0) {
                    preactivations[k] += recurrent.gates[e][FED_R[k] < 0 ? 0 : FED_R[k]];
                }
                if (SAVE_GATES) round_to(values[k * TILE], preactivations[k]);
            }
            step(carried[e], preactivations, after, clips.forward);
            // Past its end a sequence keeps its last states.
            if (RAGGED && !table[element.sequence].has(t)) continue;
#pragma unroll
            for (int s = 0; s < S; ++s) {
                carried[e][s] = after[s];
                if (s > 0) round_to(values[(G - 1 + s) * TILE], after[s]);
            }
            if (RESETS) {
                round_to(stored_h[tile_index(element.unit, element.sequence)], after[0]);
                if (flags[element.sequence]) reset(e, t + 1);
            }
        }
        exchange.wait_until_consumed();
        ++exchange.number;
        write_h();
    }
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(e);
        if (element.unit >= units || element.sequence > last) continue;
        float* to = last_states + index_of(element.sequence) * width + n * D + first_unit + element.unit;
#pragma unroll
        for (int s = 0; s < S; ++s) to[s * B * width] = carried[e][s];
    }
    cluster_barrier();
}

}  // namespace cluster_wgmma
