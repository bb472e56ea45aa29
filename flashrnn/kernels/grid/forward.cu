// The scan over time, forward, of heads that a group of CTAs owns (tile.cuh), by mma.
//
// What lives where:
//
// - registers: fragments of R, as many as fit (product.cuh); the bias; in float32, the carried states of
//   the thread's elements of the current batch tile; their next Wx, which is loaded while the group
//   exchanges h;
// - shared memory: more fragments of R; the sums of the warps, of two products; with interleaved batch
//   tiles, the carried states of all of them; with options of sequences, where their rows lie;
// - global memory: the remaining fragments of R; packets; Wx, states and gates, which each thread loads
//   or stores for its own elements.
//
// What orders the steps:
//
//     all warps                 receive packets, multiply, store sums
//                               CTA barrier
//     warps with elements       add sums, cell step, send h
//                               CTA barrier, only if there are warps without elements, which wait for it
//     warps with elements       load the next Wx, store states and gates
//
// A warp receives packets of a part of the group's CTAs, so behind the first barrier the CTA has
// received those of all. CTAs wait for each other, so the launch is a cooperative one; but not for a single
// step (ONE_STEP), for which each reads the initial h itself.
//
// Batch tiles may have different numbers of steps; sequences.cuh says why the exchange stays right. A
// sequence past its end keeps its last states and sends their h on and on, and nothing of it is stored.
// After a step whose next one starts anew, what is sent and carried is what the states go back to, and
// what is stored is what they were.

#include "grid/product.cuh"
#include "common/loads.cuh"

namespace grid {

extern "C" __global__ void __launch_bounds__(THREADS, 1)
grid_forward(CALL) {
    const int rank = blockIdx.x % GROUP_SIZE, group = blockIdx.x / GROUP_SIZE;
    const Exchange exchange(static_cast<Packet*>(packets), group);
    Partial* partial = reinterpret_cast<Partial*>(shared_memory());
    Carried carried(reinterpret_cast<float*>(partial + 2));
    WorkSequences sequences = {reinterpret_cast<Sequence*>(shared_memory() + SEQUENCES_OFFSET), T};
    Matrix matrix(shared_memory() + MATRIX_OFFSET, static_cast<Fragment*>(R_in_memory));
    ReceivedPackets received;

    const long long width = static_cast<long long>(N) * D;
    const long long all_rows = PACKED ? T : B * T;
    const long long work_tiles = N * WorkTile::count_of_head(B);
    unsigned flag = 1, products = 0;
    int loaded_head = -1;

    for (long long index = group; index < work_tiles; index += groups) {
        const WorkTile work(index, B);
        if (work.n != loaded_head) load_matrix(matrix, R, work.n, N, rank);
        loaded_head = work.n;
        sequences.begin(work, B, sequence_order, sequence_rows, sequence_lengths, runs_backwards);
        const ResetStates starts = {STARTS ? reset_states + work.n * reset_states_n : nullptr,
                                    reset_states_s, reset_states_b, reset_states_t, reset_states_d};

        float bias[ELEMENTS][G];
        Loaded input[ELEMENTS][GW] = {};
        const auto fetch_input = [&](int tile, long long t) {
            const long long steps_later = t + PREFETCHED < T ? PREFETCHED * Wx_t : 0;
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) {
                const ThreadElement element(e, rank, work, tile, B);
                const Sequence own = sequences.of(element, tile);
                if (RAGGED && !own.has(t)) continue;
                const long long of_step = SEQUENCED ? own.offset(t, Wx_b, Wx_t)
                                                    : element.sequence * Wx_b + t * Wx_t;
                const Element* from = Wx + of_step + work.n * Wx_n + element.d * Wx_d;
                long long later = REVERSE ? own.advance(steps_later) : steps_later;
                if (RAGGED) later = own.has(t + PREFETCHED) ? PREFETCHED * own.advance(Wx_t) : 0;
#pragma unroll
                for (int k = 0; k < GW; ++k) {
                    input[e][k].load(from + k * Wx_g);
                    prefetch_l2(from + k * Wx_g + later);
                }
            }
        };
        // Whether the step after one that is fetched starts anew. It is asked for beside the inputs, while
        // the group exchanges h, so that no step begins with a look at where its sequences lie.
        unsigned next_is_cut[ELEMENTS];
        const auto fetch_flags = [&](int tile, long long t) {
#pragma unroll
            for (int e = 0; e < (RESETS ? ELEMENTS : 0); ++e) {
                const ThreadElement element(e, rank, work, tile, B);
                next_is_cut[e] = sequences.of(element, tile).is_cut(t + 1, reset_flags);
            }
        };
        // Sets an element's states to what they go back to before a step.
        const auto reset = [&](int e, const ThreadElement& element, const Sequence& own, long long t) {
#pragma unroll
            for (int s = 0; s < S; ++s) {
                carried.now[e][s] = element.exists ? starts.value(s, own, t, element.d) : 0.0f;
            }
        };
        const auto send_h = [&](int tile, unsigned flag) {
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) {
                const ThreadElement element(e, rank, work, tile, B);
                unsigned words[PACKET_WORDS];
                make_packet(words, element.exists ? carried.now[e][0] : 0.0f);
                exchange.send(words, rank * PACKETS + element.packet, element, tile, flag);
            }
        };
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            const ThreadElement element(e, rank, work, 0, B);
#pragma unroll
            for (int k = 0; k < G; ++k) {
                const long long row = static_cast<long long>(FED_B[k]) * N + work.n;
                bias[e][k] = FED_B[k] >= 0 && element.exists ? to_float(b[row * D + element.d]) : 0.0f;
            }
        }
        for (int tile = 0; tile < work.tiles; ++tile) {
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) {
                const ThreadElement element(e, rank, work, tile, B);
                const Sequence own = sequences.of(element, tile);
                const long long batch_index = SEQUENCED ? own.index : element.sequence;
                const float* from =
                    initial + batch_index * initial_b + work.n * initial_n + element.d * initial_d;
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    carried.now[e][s] = element.exists ? from[s * initial_s] : 0.0f;
                }
                if constexpr (RESETS) {
                    if (own.is_cut(0, reset_flags)) reset(e, element, own, 0);
                }
            }
            carried.store(tile);
            if (!ONE_STEP && (!RAGGED || sequences.steps(tile) > 0)) send_h(tile, flag);
        }
        const auto begin_receiving = [&](int tile, unsigned flag) {
            if constexpr (ONE_STEP) {
                // Nobody has sent anything.
                const long long first = work.first_of(tile);
                const float* const of_tile = initial + first * initial_b + work.n * initial_n;
                received.begin(InitialH::of(of_tile, initial_b, initial_d, B - first));
            } else {
                received.begin(exchange, tile, flag);
            }
        };
        fetch_input(0, 0);
        fetch_flags(0, 0);
        if (INTERLEAVED > 1) begin_receiving(0, flag);

        const long long steps = RAGGED ? sequences.steps(0) : T;
        int tiles = work.tiles;
        // So many steps have all of these tiles.
        int common_steps = RAGGED ? sequences.steps(tiles - 1) : 0;
        for (long long t = 0; t < steps; ++t, ++flag) {
            if constexpr (RAGGED) {
                while (common_steps <= t) common_steps = sequences.steps(--tiles - 1);
            }
            for (int tile = 0; tile < tiles; ++tile, ++products) {
                const bool last = tile + 1 == tiles;
                const int next = last ? 0 : tile + 1;
                const auto has_next_step = [&] {
                    if (ONE_STEP) return false;
                    if (!RAGGED) return t + 1 < T;
                    return t + 1 < common_steps || t + 1 < sequences.steps(tile);
                };
                if (INTERLEAVED == 1) begin_receiving(tile, flag);
                multiply<Operand>(partial[products % 2], matrix, received, R, work.n, N, rank);
                // The next batch tile's packets have been sent while the group computed other tiles.
                // They arrive while the warp computes its elements of this one.
                if (INTERLEAVED > 1 && !(ONE_STEP && last)) begin_receiving(next, flag + last);
                named_barrier<THREADS>();
                if (!ThreadElement::warp_has_any()) {
                    exchange.wait_until_sent();
                    continue;
                }

                carried.load(tile);
                float preactivations[ELEMENTS][G], stored[ELEMENTS][S];
#pragma unroll
                for (int e = 0; e < ELEMENTS; ++e) {
                    const ThreadElement element(e, rank, work, tile, B);
                    UnitSums recurrent = {};
                    if (element.exists) recurrent = unit_sums(partial[products % 2], element);
#pragma unroll
                    for (int k = 0; k < G; ++k) {
                        float sum = bias[e][k];
                        if (FED_WX[k] >= 0) sum += input[e][FED_WX[k] < 0 ? 0 : FED_WX[k]].value();
                        if (FED_R[k] >= 0) sum += recurrent.values[FED_R[k] < 0 ? 0 : FED_R[k]];
                        preactivations[e][k] = sum;
                    }
                    float after[S];
                    step(carried.now[e], preactivations[e], after, clips.forward);
                    const Sequence own = sequences.of(element, tile);
                    // Past its end a sequence keeps its last states.
                    const bool goes_on = !RAGGED || own.has(t);
#pragma unroll
                    for (int s = 0; s < S; ++s) {
                        carried.now[e][s] = stored[e][s] = goes_on ? after[s] : carried.now[e][s];
                    }
                    if constexpr (RESETS) {
                        if (next_is_cut[e]) reset(e, element, own, t + 1);
                    }
                }
                if (has_next_step()) send_h(tile, flag + 1);
                exchange.signal_sent();
                // What follows overlaps with the exchange.
                carried.store(tile);
                fetch_input(next, last && t + 1 < steps ? t + 1 : t);
                fetch_flags(next, last ? t + 1 : t);
#pragma unroll
                for (int e = 0; e < ELEMENTS; ++e) {
                    const ThreadElement element(e, rank, work, tile, B);
                    const Sequence own = sequences.of(element, tile);
                    if (!element.exists || (RAGGED && !own.has(t))) continue;
                    const long long place = work.n * D + element.d;
                    const long long own_row = own.row(t);
#pragma unroll
                    for (int s = 0; s < STORED; ++s) {
                        const long long row =
                            SEQUENCED ? s * all_rows + own_row : (s * B + element.sequence) * T + t;
                        round_to(states[row * width + place], stored[e][s]);
                    }
                    if (SAVE_GATES) {
                        const long long row = SEQUENCED ? own_row : element.sequence * T + t;
                        Element* to = gates + row * G * width + place;
#pragma unroll
                        for (int k = 0; k < G; ++k) round_to(to[k * width], preactivations[e][k]);
                    }
                }
            }
        }
        for (int tile = 0; tile < work.tiles; ++tile) {
            carried.load(tile);
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) {
                const ThreadElement element(e, rank, work, tile, B);
                if (!element.exists) continue;
                const Sequence own = sequences.of(element, tile);
                const long long batch_index = SEQUENCED ? own.index : element.sequence;
                const long long place = work.n * D + element.d;
                float* to = last_states + batch_index * width + place;
#pragma unroll
                for (int s = 0; s < S; ++s) to[s * B * width] = carried.now[e][s];
                if constexpr (RAGGED && !PACKED && STORED > 0) {
                    // Rows past the end.
                    for (long long t = own.length; t < T; ++t) {
#pragma unroll
                        for (int s = 0; s < STORED; ++s) {
                            const long long row = s * all_rows + own.first_row + t;
                            round_to(states[row * width + place], 0.0f);
                        }
                    }
                }
            }
        }
    }
}

}  // namespace grid
