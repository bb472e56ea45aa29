// The scan over time, forward, for heads that take a team of thread blocks and many sequences; see
// wide.cuh for who owns what.
//
// What lives where:
//
// - registers: in float32 the carried states of the lane's own units; the product's sums; the next
//   step's Wx, on its way while the team exchanges h; parcels as they arrive;
// - shared memory: the block's part of R and the bias; halves of sums, for the warps' mates;
// - global memory: parcels; Wx, states and gates, of which the lane that owns an element reads or
//   writes it.
//
// What orders the steps: a warp waits for the parcels of its tile that it multiplies, and so with its
// mate for the whole team's; it meets its mate between the halves' writing and reading, and again
// before the next are written. The warps of a group begin each product together. All blocks of a
// launch run at once: it is a cooperative one.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
wide_forward(const Element* __restrict__ Wx, const Element* __restrict__ R,
             const Element* __restrict__ b, const float* __restrict__ initial,
             Element* __restrict__ states, float* __restrict__ last_states,
             Element* __restrict__ gates, Parcel* parcels, long long Wx_b, long long Wx_t,
             long long Wx_g, long long Wx_n, long long Wx_d, long long initial_s,
             long long initial_b, long long initial_n, long long initial_d, long long T, long long B,
             int N, Clips clips, int teams) {
    const int rank = blockIdx.x % TEAM, team = blockIdx.x / TEAM;
    const Exchange exchange(parcels, team);
    unsigned* matrix = reinterpret_cast<unsigned*>(shared_memory());
    Two* halves = reinterpret_cast<Two*>(shared_memory() + MATRIX_BYTES);
    float* bias = reinterpret_cast<float*>(shared_memory() + MATRIX_BYTES + HALVES_BYTES);
    Arrivals arrivals;

    const long long width = static_cast<long long>(N) * D, items = N * Item::count_of_head(B);
    // The same for all lanes of a warp, as the compiler is to know.
    const int tile = tile_of_warp(), second = __shfl_sync(~0u, sum_part(), 0);
    const unsigned right = shared_address(matrix) + second * PARCEL_WORDS * WORDS_A_STEP * 4;
    unsigned tag = 1;
    int loaded = -1;

    for (long long number = team; number < items; number += teams) {
        const Item item(number, B);
        const Owned owned(rank, item, B);
        if (item.n != loaded) {
            __syncthreads();
            load_matrix(matrix, R, item.n, N, rank);
            for (int i = threadIdx.x; i < G * UNITS; i += THREADS) {
                const int k = i % G, d = rank * UNITS + i / G;
                const long long row = static_cast<long long>(FED_B[k]) * N + item.n;
                bias[i] = FED_B[k] >= 0 && d < D ? to_float(b[row * D + d]) : 0.0f;
            }
            show_to_products();
            __syncthreads();
        }
        loaded = item.n;

        const long long place = item.n * D + owned.d;
        const Element* from_Wx = Wx + owned.sequence * Wx_b + item.n * Wx_n + owned.d;
        Element* to_states = states + owned.sequence * T * width + place;
        Element* to_gates = gates + owned.sequence * T * G * width + place;
        unsigned input[GW][PAIRS];
        const auto fetch_input = [&](long long t) {
            const long long later = t + PREFETCHED < T ? PREFETCHED * Wx_t : 0;
#pragma unroll
            for (int k = 0; k < GW; ++k) {
                const Element* from = from_Wx + t * Wx_t + k * Wx_g;
#pragma unroll
                for (int i = 0; i < PAIRS; ++i) {
                    // The pair before, where the problem has no such units.
                    const int there = i < owned.pairs ? 2 * i : 0;
                    input[k][i] = load_alone(reinterpret_cast<const unsigned*>(from + there));
                }
                prefetch(from + later);
            }
        };
        float carried[LANE_UNITS][S];
        const auto send_h = [&](unsigned tag) {
            unsigned words[PARCEL_WORDS];
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) {
                words[i] = round_pair(carried[2 * i][0], carried[2 * i + 1][0], Element{});
                // R has zeros for them, which times infinity would be none.
                if (i >= owned.pairs) words[i] = 0;
            }
            exchange.send(words, rank * PARCELS + owned.parcel, owned.column, tag);
        };
#pragma unroll
        for (int u = 0; u < LANE_UNITS; ++u) {
            const float* from = initial + owned.sequence * initial_b + item.n * initial_n +
                                (owned.d + (u / 2 < owned.pairs ? u : 0)) * initial_d;
#pragma unroll
            for (int s = 0; s < S; ++s) carried[u][s] = from[s * initial_s];
        }
        if (tile < TILES) send_h(tag);
        fetch_input(0);

        for (long long t = 0; t < T; ++t, ++tag) {
            float sums[2 * LANE_SUMS], recurrent[LANE_SUMS];
            if (tile < TILES) arrivals.look_for(exchange, tag);
            multiply(sums, right, arrivals);
            if (tile >= TILES) continue;
            if (second) {
                share_out<true>(recurrent, sums, halves);
            } else {
                share_out<false>(recurrent, sums, halves);
            }

            float preactivations[LANE_UNITS][G];
#pragma unroll
            for (int u = 0; u < LANE_UNITS; ++u) {
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    float sum = bias[(owned.parcel * LANE_UNITS + u) * G + k];
                    if (FED_WX[k] >= 0) {
                        const unsigned pair = input[FED_WX[k] < 0 ? 0 : FED_WX[k]][u / 2];
                        sum += element_of_pair(pair, u % 2, Element{});
                    }
                    if (FED_R[k] >= 0) sum += recurrent[u * PRODUCED + (FED_R[k] < 0 ? 0 : FED_R[k])];
                    preactivations[u][k] = sum;
                }
                float after[S];
                step(carried[u], preactivations[u], after, clips.forward);
#pragma unroll
                for (int s = 0; s < S; ++s) carried[u][s] = after[s];
            }
            if (t + 1 < T) send_h(tag + 1);
            // All that follows hides behind the exchange.
            meet_some<64>(1 + tile);
            fetch_input(t + 1 < T ? t + 1 : t);
            if (!owned.has_sequence) continue;
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) {
                if (i >= owned.pairs) break;
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    Element* to = to_states + (s * B * T + t) * width + 2 * i;
                    *reinterpret_cast<unsigned*>(to) =
                        round_pair(carried[2 * i][s], carried[2 * i + 1][s], Element{});
                }
                if (SAVE_GATES) {
#pragma unroll
                    for (int k = 0; k < G; ++k) {
                        Element* to = to_gates + (t * G + k) * width + 2 * i;
                        *reinterpret_cast<unsigned*>(to) = round_pair(
                            preactivations[2 * i][k], preactivations[2 * i + 1][k], Element{});
                    }
                }
            }
        }
        if (!owned.has_sequence) continue;
        float* to = last_states + owned.sequence * width + place;
#pragma unroll
        for (int u = 0; u < LANE_UNITS; ++u) {
            if (u / 2 >= owned.pairs) break;
#pragma unroll
            for (int s = 0; s < S; ++s) to[s * B * width + u] = carried[u][s];
        }
    }
}
