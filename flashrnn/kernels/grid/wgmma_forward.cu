// The scan over time, forward, of heads and many sequences that a group of CTAs owns (wgmma_tile.cuh),
// by wgmma.
//
// What lives where:
//
// - registers: in float32, the carried states of the lane's units; the sums of the product; the next
//   step's Wx, which is loaded while the group exchanges h; packets as they are received;
// - shared memory: the CTA's part of R; sums on their way to partner warps; the bias;
// - global memory: packets; Wx, states and gates, which each lane loads or stores for its own units.
//
// What orders the steps: a warp waits for the packets that it multiplies, those of one half of h of its
// batch tile, and its partner for the other half.
//
//     each warp        receive packets, multiply (the warps of a warpgroup issue each wgmma together),
//                      store the partner's sums
//                      barrier of the two partners
//                      add sums, cell step, send h
//                      barrier of the two partners
//                      load the next Wx, store states and gates
//
// CTAs wait for each other, so the launch is a cooperative one.
//
// Of sequences of different lengths a group computes as many steps as the first has, which is its longest
// (common/sequence.cuh): of all its batch tiles, since the warps of a warpgroup issue each wgmma together.
// All CTAs of the group read the same length. A sequence past its end sends its last h on and on, so what
// CTAs exchange is as ever.

#include "grid/wgmma_product.cuh"
#include "common/sequence.cuh"

namespace grid_wgmma {

extern "C" __global__ void __launch_bounds__(THREADS, 1)
grid_wgmma_forward(CALL) {
    const int rank = blockIdx.x % GROUP_SIZE, group = blockIdx.x / GROUP_SIZE;
    const Exchange exchange(static_cast<Packet*>(packets), group);
    unsigned* matrix = reinterpret_cast<unsigned*>(shared_memory());
    SumPair* partner_sums = reinterpret_cast<SumPair*>(shared_memory() + MATRIX_BYTES);
    float* bias = reinterpret_cast<float*>(shared_memory() + MATRIX_BYTES + PARTNER_SUMS_BYTES);
    ReceivedPackets received;

    const long long width = static_cast<long long>(N) * D;
    const long long all_rows = PACKED ? T : B * T;
    const long long work_tiles = N * WorkTile::count_of_head(B);
    // By a shuffle, so that the compiler knows that it is the same for all lanes of a warp.
    const int tile = tile_of_warp(), second = __shfl_sync(~0u, sum_part(), 0);
    const unsigned right = shared_address(matrix) + second * PACKET_WORDS * WORDS_A_STEP * 4;
    unsigned flag = 1;
    int loaded_head = -1;

    for (long long index = group; index < work_tiles; index += groups) {
        const WorkTile work(index, B);
        const LaneUnits mine(rank, work, B);
        if (work.n != loaded_head) {
            __syncthreads();
            load_matrix(matrix, R, work.n, N, rank);
            for (int i = threadIdx.x; i < G * UNITS; i += THREADS) {
                const int k = i % G, d = rank * UNITS + i / G;
                const long long row = static_cast<long long>(FED_B[k]) * N + work.n;
                bias[i] = FED_B[k] >= 0 && d < D ? to_float(b[row * D + d]) : 0.0f;
            }
            fence_proxy_async();
            __syncthreads();
        }
        loaded_head = work.n;

        Sequence own = {};
        long long steps = T;
        if (SEQUENCED) {
            const auto at = [&](long long place) {
                return sequence_at(place, T, sequence_order, sequence_rows, sequence_lengths,
                                   runs_backwards, work.n);
            };
            own = at(mine.sequence);
            steps = at(work.first_sequence).length;
        }
        // Where the sequence's step 0 is, how far the next step is from one, and which row a step is.
        const long long of_sequence = SEQUENCED ? own.offset(0, Wx_b, Wx_t) : mine.sequence * Wx_b;
        const long long of_step = SEQUENCED ? own.advance(Wx_t) : Wx_t;
        const auto row = [&](long long t) { return SEQUENCED ? own.row(t) : t; };
        const long long batch_index = SEQUENCED ? own.index : mine.sequence;
        const ResetStates starts = {STARTS ? reset_states + work.n * reset_states_n : nullptr,
                                    reset_states_s, reset_states_b, reset_states_t, reset_states_d};

        const long long place = work.n * D + mine.d;
        const Element* from_Wx = Wx + of_sequence + work.n * Wx_n + mine.d;
        Element* to_states = states + (SEQUENCED ? 0 : mine.sequence * T * width) + place;
        Element* to_gates = gates + (SEQUENCED ? 0 : mine.sequence * T * G * width) + place;
        unsigned input[GW][PAIRS] = {};
        const auto fetch_input = [&](long long t) {
            if (SEQUENCED && !own.has(t)) return;
            const bool has_later = SEQUENCED ? own.has(t + PREFETCHED) : t + PREFETCHED < T;
            const long long later = has_later ? PREFETCHED * of_step : 0;
#pragma unroll
            for (int k = 0; k < GW; ++k) {
                const Element* from = from_Wx + t * of_step + k * Wx_g;
#pragma unroll
                for (int i = 0; i < PAIRS; ++i) {
                    // The first pair, where the problem has no such units.
                    const int there = i < mine.pairs ? 2 * i : 0;
                    input[k][i] = load_opaque(reinterpret_cast<const unsigned*>(from + there));
                }
                prefetch_l2(from + later);
            }
        };
        float carried[LANE_UNITS][S];
        const auto send_h = [&](unsigned flag) {
            unsigned words[PACKET_WORDS];
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) {
                words[i] = round_pair(carried[2 * i][0], carried[2 * i + 1][0], Element{});
                // Units that the problem lacks: R has zeros for them, and h must be finite.
                if (i >= mine.pairs) words[i] = 0;
            }
            exchange.send(words, rank * PACKETS + mine.packet, mine.column, flag);
        };
        // Sets the states to what they go back to before a step.
        const auto reset = [&](long long t) {
#pragma unroll
            for (int u = 0; u < LANE_UNITS; ++u) {
                const long long d = mine.d + (u / 2 < mine.pairs ? u : 0);
#pragma unroll
                for (int s = 0; s < S; ++s) carried[u][s] = starts.value(s, own, t, d);
            }
        };
#pragma unroll
        for (int u = 0; u < LANE_UNITS; ++u) {
            const float* from = initial + batch_index * initial_b + work.n * initial_n +
                                (mine.d + (u / 2 < mine.pairs ? u : 0)) * initial_d;
#pragma unroll
            for (int s = 0; s < S; ++s) carried[u][s] = from[s * initial_s];
        }
        if constexpr (RESETS) {
            if (own.is_cut(0, reset_flags)) reset(0);
        }
        if (tile < BATCH_TILES && (!RAGGED || steps > 0)) send_h(flag);
        fetch_input(0);

        for (long long t = 0; t < steps; ++t, ++flag) {
            // Whether the next step starts anew. The flag arrives before the packets.
            unsigned next_is_cut;
            if constexpr (RESETS) next_is_cut = own.is_cut(t + 1, reset_flags);
            float sums[2 * LANE_SUMS], recurrent[LANE_SUMS];
            if (tile < BATCH_TILES) received.begin(exchange, flag);
            multiply(sums, right, received);
            if (tile >= BATCH_TILES) continue;
            if (second) {
                add_halves<true>(recurrent, sums, partner_sums);
            } else {
                add_halves<false>(recurrent, sums, partner_sums);
            }

            float preactivations[LANE_UNITS][G], stored[LANE_UNITS][S];
#pragma unroll
            for (int u = 0; u < LANE_UNITS; ++u) {
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    float sum = bias[(mine.packet * LANE_UNITS + u) * G + k];
                    if (FED_WX[k] >= 0) {
                        const unsigned pair = input[FED_WX[k] < 0 ? 0 : FED_WX[k]][u / 2];
                        sum += element_of_pair(pair, u % 2, Element{});
                    }
                    if (FED_R[k] >= 0) sum += recurrent[u * PRODUCED + (FED_R[k] < 0 ? 0 : FED_R[k])];
                    preactivations[u][k] = sum;
                }
                float after[S];
                step(carried[u], preactivations[u], after, clips.forward);
                // Past its end a sequence keeps its last states.
                const bool goes_on = !RAGGED || own.has(t);
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    carried[u][s] = stored[u][s] = goes_on ? after[s] : carried[u][s];
                }
            }
            if constexpr (RESETS) {
                if (next_is_cut) reset(t + 1);
            }
            if (t + 1 < steps) send_h(flag + 1);
            // What follows overlaps with the exchange. Behind this barrier the partner has read the
            // sums, so that the next ones may be stored.
            named_barrier_of<64>(1 + tile);
            fetch_input(t + 1 < steps ? t + 1 : t);
            if (!mine.has_sequence || (RAGGED && !own.has(t))) continue;
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) {
                if (i >= mine.pairs) break;
#pragma unroll
                for (int s = 0; s < STORED; ++s) {
                    Element* to = to_states + (s * all_rows + row(t)) * width + 2 * i;
                    *reinterpret_cast<unsigned*>(to) =
                        round_pair(stored[2 * i][s], stored[2 * i + 1][s], Element{});
                }
                if (SAVE_GATES) {
#pragma unroll
                    for (int k = 0; k < G; ++k) {
                        Element* to = to_gates + (row(t) * G + k) * width + 2 * i;
                        *reinterpret_cast<unsigned*>(to) = round_pair(
                            preactivations[2 * i][k], preactivations[2 * i + 1][k], Element{});
                    }
                }
            }
        }
        if (!mine.has_sequence) continue;
        float* to = last_states + batch_index * width + place;
#pragma unroll
        for (int u = 0; u < LANE_UNITS; ++u) {
            if (u / 2 >= mine.pairs) break;
#pragma unroll
            for (int s = 0; s < S; ++s) to[s * B * width + u] = carried[u][s];
        }
        if constexpr (RAGGED && !PACKED && STORED > 0) {
            // Rows past the end.
            for (long long t = own.length; t < T; ++t) {
#pragma unroll
                for (int i = 0; i < STORED * PAIRS; ++i) {
                    if (i % PAIRS >= mine.pairs) continue;
                    const long long of_row = (i / PAIRS * all_rows + own.first_row + t) * width;
                    *reinterpret_cast<unsigned*>(to_states + of_row + i % PAIRS * 2) = 0;
                }
            }
        }
    }
}

}  // namespace grid_wgmma
