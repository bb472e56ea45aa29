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
// What orders the steps: the product waits for tiles of h before it multiplies them. The sequences' parts
// take turns, and all threads of the CTA meet twice in a turn:
//
// - after the part's product, when the producer threads have also read its Wx into the gates' tiles: from
//   here on the computing warps compute new states, and write tiles;
// - when they have: from here on the producer threads send h, store the tiles to global memory, and
//   read the next step's Wx into the gates' tiles.
//
// Then the computing warps wait for the next product's h: with one part for what has just been sent, with
// two for the other part's, which has been on its way since that part's turn.
//
// All CTAs of a cluster take as many steps as its longest sequence has, since each waits for h of all.
// A sequence that has ended keeps its states, and its h is sent on. After a reset the h of the start is
// sent, while the h before it is stored: which steps are cut from the next is read with their Wx.

#include "cluster/wgmma_product.cuh"
#include "common/sequence.cuh"

namespace cluster_wgmma {

// Shared memory, in bytes: the parts' exchanges, then their tiles, the bias, R, and the sequences' table.
constexpr int EXCHANGES_BYTES = exchange_bytes(0) + (PARTS == 2 ? exchange_bytes(1) : 0);
constexpr int TILES_BYTES = TILES * UNITS * SEQUENCES * sizeof(Element);
constexpr int BIAS_BYTES = G * UNITS * sizeof(float);
constexpr int TABLE = EXCHANGES_BYTES + TILES_BYTES + BIAS_BYTES + Matrix::BYTES;
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

    Exchange exchanges[2] = {{shared_memory(), rank, 0},
                             {shared_memory() + exchange_bytes(0), rank, PARTS - 1}};
    // A part's tile: that of a gate, then that of a state but h, then, with resets, of the h that is stored.
    Element* const tiles = reinterpret_cast<Element*>(shared_memory() + EXCHANGES_BYTES);
    const auto tile = [&](int part, int number) {
        return tiles + TILES * UNITS * first_sequence(part) + number * tile_of(part);
    };
    constexpr int STORED_H = TILES - 1;
    float* const bias = reinterpret_cast<float*>(shared_memory() + EXCHANGES_BYTES + TILES_BYTES);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) exchanges[part].begin();
    cluster_barrier();

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

    // The same for a warp, as the compiler must know to have products run asynchronously.
    const bool computes = __shfl_sync(~0u, threadIdx.x / 32, 0) < WARPS;
    if (!computes) {
        if (SHIFT_REGISTERS) setmaxnreg_dec<PRODUCER_REGISTERS>();
        const int thread = threadIdx.x - COMPUTING;
        // In place of sequences that do not exist it reads the last one that does.
        const auto fetch_inputs = [&](int part, long long t) {
#pragma unroll 1
            for (int i = thread; i < chunks_of(part); i += PRODUCERS) {
                const Chunk chunk(part, i);
                if (chunk.first_unit() >= units) continue;
                const int sequence = chunk.sequence < last ? chunk.sequence : last;
                if (SEQUENCED && !table[sequence].has(t)) continue;
                const auto inputs_of = [&](long long t) {
                    const long long of_step = SEQUENCED ? table[sequence].offset(t, Wx_b, Wx_t)
                                                        : (first + sequence) * Wx_b + t * Wx_t;
                    return Wx + of_step + n * Wx_n + first_unit + chunk.first_unit();
                };
                // Those of the next step come from the L2 cache then. Of two parts each has time to get
                // its inputs during the other's turn.
                const bool prefetches = PARTS == 1 && (SEQUENCED ? table[sequence].has(t + 1) : t + 1 < T);
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    if (FED_WX[k] < 0) continue;
                    cp_async(tile(part, k) + chunk.index(), inputs_of(t) + FED_WX[k] * Wx_g);
                    if (prefetches) prefetch_l2(inputs_of(t + 1) + FED_WX[k] * Wx_g);
                }
            }
            for (int i = thread; RESETS && i < sequences_of(part); i += PRODUCERS) {
                const int sequence = first_sequence(part) + i;
                const Sequence& own = table[sequence];
                flags[sequence] = own.may_be_cut(t + 1) ? reset_flags[own.flag(t + 1)] : 0;
            }
        };
        // Pre-activations, or states.
        const auto store_outputs = [&](int part, long long t, bool of_gates) {
#pragma unroll 1
            for (int i = thread; i < chunks_of(part); i += PRODUCERS) {
                const Chunk chunk(part, i);
                if (chunk.first_unit() >= units || chunk.sequence > last) continue;
                if (SEQUENCED && !table[chunk.sequence].has(t)) continue;
                const auto store = [&](Element* to, const Element* from) {
                    *reinterpret_cast<uint4*>(to) =
                        *reinterpret_cast<const uint4*>(from + chunk.index());
                };
                const long long unit = n * D + first_unit + chunk.first_unit();
                const Sequence& own = table[chunk.sequence];
                const long long row =
                    SEQUENCED ? own.first_row + own.time(t) : (first + chunk.sequence) * T + t;
#pragma unroll
                for (int s = 0; s < STORED && !of_gates; ++s) {
                    const long long first_row = s * (PACKED ? T : B * T);
                    store(states + (first_row + row) * width + unit,
                          s > 0    ? tile(part, G - 1 + s)
                          : RESETS ? tile(part, STORED_H)
                                   : exchanges[part].tile(rank));
                }
#pragma unroll
                for (int k = 0; k < G && of_gates; ++k) {
                    store(gates + (row * G + k) * width + unit, tile(part, k));
                }
            }
        };
        // Writes zeros to the rows past each sequence's end.
        const auto clear_rest = [&](int part) {
#pragma unroll 1
            for (int i = thread; i < chunks_of(part); i += PRODUCERS) {
                const Chunk chunk(part, i);
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
        // Between two steps of each part. A chunk is stored and read anew by the same thread, so nothing
        // else needs to order the two.
        for (long long t = 0; t <= steps; ++t) {
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                Exchange& exchange = exchanges[part];
                if (t > 0) {
                    // All Wx but those of the part whose turn was last.
                    cp_async_wait<PARTS - 1>();
                    named_barrier<THREADS>();
                    exchange.signal_consumed();
                    ++exchange.number;
                }
                named_barrier<THREADS>();
                if (t < steps) exchange.send();
                if (SAVE_GATES && t > 0) store_outputs(part, t - 1, true);
                if (t < steps) fetch_inputs(part, t);
                cp_async_commit();
                if (t > 0) store_outputs(part, t - 1, false);
            }
        }
        for (int part = 0; part < PARTS && RAGGED && !PACKED && STORED; ++part) clear_rest(part);
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
        STARTS ? reset_states + n * reset_states_n + first_unit * reset_states_d : nullptr,
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
    const auto write_h = [&](int part) {
        Element* const own_tile = exchanges[part].tile(rank);
#pragma unroll
        for (int e = first_element(part); e < first_element(part + 1); ++e) {
            const ThreadElement element(e);
            // For units beyond D, R has zeros: 0 times an infinite h would be NaN.
            const float h = element.unit < units ? carried[e][0] : 0.0f;
            round_to(own_tile[tile_index(part, element.unit, element.sequence)], h);
        }
        fence_proxy_async();
        named_barrier<THREADS>();
    };
    // Completes the pre-activations of the elements of some n-tiles. It reads all that it reads from tiles
    // before it writes any: else each read would wait for a write.
    float preactivations[ELEMENTS][G];
    const auto add_up = [&](int part, int begin, int end, const float* sums) {
#pragma unroll
        for (int n_tile = begin; n_tile < end; ++n_tile) {
            const RecurrentSums<1> recurrent(
                [&](int, int i) { return sums[4 * (n_tile - first_n_tile(part)) + i]; });
#pragma unroll
            for (int i = 0; i < ELEMENTS_A_TILE; ++i) {
                const int e = n_tile * ELEMENTS_A_TILE + i;
                const ThreadElement element(e);
                const int index = tile_index(part, element.unit, element.sequence);
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    float& sum = preactivations[e][k];
                    sum = bias[k * UNITS + element.unit];
                    if (FED_WX[k] >= 0) sum += to_float(tile(part, k)[index]);
                    if (FED_R[k] >= 0) sum += recurrent.gates[i][FED_R[k] < 0 ? 0 : FED_R[k]];
                }
            }
        }
        if (!SAVE_GATES) return;
#pragma unroll
        for (int e = begin * ELEMENTS_A_TILE; e < end * ELEMENTS_A_TILE; ++e) {
            const ThreadElement element(e);
#pragma unroll
            for (int k = 0; k < G; ++k) {
                Element* const to = tile(part, k) + tile_index(part, element.unit, element.sequence);
                round_to(*to, preactivations[e][k]);
            }
        }
    };
    // Computes an element's next states.
    const auto compute = [&](int part, int e, long long t) {
        const ThreadElement element(e);
        const int index = tile_index(part, element.unit, element.sequence);
        float after[S];
        step(carried[e], preactivations[e], after, clips.forward);
        // Past its end a sequence keeps its last states.
        if (RAGGED && !table[element.sequence].has(t)) return;
#pragma unroll
        for (int s = 0; s < S; ++s) {
            carried[e][s] = after[s];
            if (s > 0) round_to(tile(part, G - 1 + s)[index], after[s]);
        }
        if (RESETS) {
            round_to(tile(part, STORED_H)[index], after[0]);
            if (flags[element.sequence]) reset(e, t + 1);
        }
    };
    // A part's step.
    const auto turn = [&](int part, long long t) {
        Exchange& exchange = exchanges[part];
        // Of their own for each part: where both have the same, the compiler finds too few registers, and has
        // each wgmma wait for the one before.
        float sums[PARTS][sums_of(0)];
        if (part == 0) multiply<0>(sums[0], matrix, exchange);
        if (part == 1) multiply<PARTS - 1>(sums[PARTS - 1], matrix, exchange);
        exchange.expect_tiles(exchange.buffer());
        named_barrier<THREADS>();
        // As many pre-activations at a time as there are registers for.
        const int begin = first_n_tile(part), end = first_n_tile(part + 1);
        const int batches = (end - begin + 2) / 3, batch = (end - begin + batches - 1) / batches;
#pragma unroll
        for (int n_tile = begin; n_tile < end; n_tile += batch) {
            const int behind = n_tile + batch < end ? n_tile + batch : end;
            add_up(part, n_tile, behind, sums[part]);
#pragma unroll
            for (int e = n_tile * ELEMENTS_A_TILE; e < behind * ELEMENTS_A_TILE; ++e) compute(part, e, t);
        }
        exchange.wait_until_consumed();
        ++exchange.number;
        write_h(part);
    };
#pragma unroll
    for (int part = 0; part < PARTS; ++part) write_h(part);
    for (long long t = 0; t < steps; ++t) {
        turn(0, t);
        if (PARTS == 2) turn(PARTS - 1, t);
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
