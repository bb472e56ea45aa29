// The scan over time, backward, for heads that take a team of thread blocks; see team.cuh for who
// owns what.
//
// What lives where:
//
// - registers: R transposed as far as they hold it (team_product.cuh), and in float32 the carried
//   gradients of the lane's own units and of the tile whose turn it is, and the sums of its gates'
//   gradients over time and tiles; the next turn's inputs, on their way while the team exchanges
//   gradients: the gates' pre-activations, the states before the step and the given gradients of
//   those after it;
// - shared memory: fragments of R that registers do not hold; the warps' sums, of two products in
//   turn; carried gradients of other turns; in a cluster the parcels, of two exchanges of each tile;
// - global memory: what even shared memory does not hold of R; the parcels, but in a cluster; residuals
//   and gradients, of which the lane that owns an element reads or writes it.
//
// What orders the steps is as in team_forward.cu.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
team_backward(const Element* __restrict__ R, const float* __restrict__ initial,
              const Element* __restrict__ states, const Element* __restrict__ gates,
              const Element* __restrict__ d_states, const float* __restrict__ d_last,
              Element* __restrict__ d_gates, float* __restrict__ d_initial,
              float* __restrict__ d_bias, Parcel* parcels, Fragment* streamed, long long initial_s,
              long long initial_b, long long initial_n, long long initial_d, long long d_states_s,
              long long d_states_b, long long d_states_t, long long d_states_n, long long d_states_d,
              long long d_last_s, long long d_last_b, long long d_last_n, long long d_last_d,
              long long T, long long B, int N, Clips clips, int teams) {
    const int rank = blockIdx.x % TEAM, team = blockIdx.x / TEAM;
    const Exchange exchange(shared_memory(), parcels, team);
    Partial* partial = reinterpret_cast<Partial*>(shared_memory() + EXCHANGE_BYTES);
    Carried d_carried(reinterpret_cast<float*>(partial + 2));
    Matrix matrix(shared_memory() + EXCHANGE_BYTES + 2 * sizeof(Partial) + Carried::BYTES, streamed);
    Arrivals arrivals;

    const long long width = static_cast<long long>(N) * D, items = N * Item::count_of_head(B);
    unsigned tag = 0, products = 0;
    int loaded = -1;

    for (long long number = team; number < items; number += teams) {
        const Item item(number, B);
        if (!CUT && item.n != loaded) load_matrix(matrix, R, item.n, N, rank);
        loaded = item.n;

        float d_bias_sums[OWNED][G] = {};
        Loaded input_gates[OWNED][G], input_states[OWNED][S], given[OWNED][S];
        const auto fetch_inputs = [&](int turn, long long t) {
            const long long earlier = t > PREFETCHED ? PREFETCHED : 0, before = t > 0 ? t - 1 : 0;
#pragma unroll
            for (int e = 0; e < OWNED; ++e) {
                const Owned owned(e, rank, item, turn, B);
                const long long place = item.n * D + owned.d;
                const Element* from_gates = gates + (owned.sequence * T + t) * G * width + place;
                const Element* from_states = states + (owned.sequence * T + before) * width + place;
                const Element* from_given = d_states + owned.sequence * d_states_b + t * d_states_t +
                                            item.n * d_states_n + owned.d * d_states_d;
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    input_gates[e][k].load(from_gates + k * width);
                    prefetch(from_gates + (k - earlier * G) * width);
                }
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    input_states[e][s].load(from_states + s * B * T * width);
                    prefetch(from_states + (s * B * T - earlier) * width);
                    given[e][s].load(from_given + s * d_states_s);
                    prefetch(from_given + s * d_states_s - earlier * d_states_t);
                }
            }
        };
        for (int turn = 0; turn < item.turns; ++turn) {
#pragma unroll
            for (int e = 0; e < OWNED; ++e) {
                const Owned owned(e, rank, item, turn, B);
                const float* from =
                    d_last + owned.sequence * d_last_b + item.n * d_last_n + owned.d * d_last_d;
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    d_carried.now[e][s] = owned.exists ? from[s * d_last_s] : 0.0f;
                }
            }
            d_carried.put(turn);
        }
        fetch_inputs(0, T - 1);

        // The step before the first has no gates, just what R gives back.
        for (long long t = T - 1;; --t, ++tag) {
            for (int turn = 0; turn < item.turns; ++turn) {
                const bool last = turn + 1 == item.turns;
                const int next = last ? 0 : turn + 1;
                if (!CUT && t + 1 < T) {
                    if (TURNS == 1) arrivals.look_for(exchange, turn, tag);
                    multiply<Operand>(partial[++products % 2], matrix, arrivals, R, item.n, N, rank);
                }
                // Sent before other tiles had their turns, it comes while the warp computes its units.
                if (!CUT && TURNS > 1) arrivals.look_for(exchange, next, tag + last);
                if (!CUT && t + 1 < T) meet<THREADS>();
                if (!Owned::any()) {
                    if (!CUT && t >= 0) exchange.stand_by();
                    continue;
                }

                d_carried.take(turn);
                if (!CUT && t + 1 < T) {
#pragma unroll
                    for (int e = 0; e < OWNED; ++e) {
                        const Owned owned(e, rank, item, turn, B);
                        if (!owned.exists) continue;
                        const float d_h = total(partial[products % 2], owned).values[0];
                        d_carried.now[e][0] += clipped(d_h, clips.gradient);
                    }
                }
                if (t < 0) {
                    d_carried.put(turn);
                    continue;
                }
                float d_preactivations[OWNED][G];
#pragma unroll
                for (int e = 0; e < OWNED; ++e) {
                    const Owned owned(e, rank, item, turn, B);
                    float preactivations[G], before[S], d_after[S], d_before[S];
#pragma unroll
                    for (int k = 0; k < G; ++k) preactivations[k] = input_gates[e][k].value();
#pragma unroll
                    for (int s = 0; s < S; ++s) {
                        before[s] = input_states[e][s].value();
                        if (t == 0 && owned.exists) {
                            before[s] = initial[s * initial_s + owned.sequence * initial_b +
                                                item.n * initial_n + owned.d * initial_d];
                        }
                        d_after[s] = d_carried.now[e][s] + given[e][s].value();
                    }
                    derivative(before, preactivations, d_after, d_before, d_preactivations[e],
                               clips.forward);
#pragma unroll
                    for (int k = 0; k < G; ++k) {
                        if (owned.exists) d_bias_sums[e][k] += d_preactivations[e][k];
                    }
#pragma unroll
                    for (int s = 0; s < S; ++s) d_carried.now[e][s] = d_before[s];
                }
                if (!CUT) {
#pragma unroll
                    for (int e = 0; e < OWNED; ++e) {
                        const Owned owned(e, rank, item, turn, B);
#pragma unroll
                        for (int s = 0; s < SENT; ++s) {
                            const float d_gate = d_preactivations[e][RECURRENT[s]];
                            unsigned words[PARCEL_WORDS];
                            make_parcel(words, owned.exists ? contained(d_gate, Element{}) : 0.0f);
                            const int parcel = rank * PARCELS + s * UNIT_PARCELS + owned.parcel;
                            exchange.send(words, parcel, owned, turn, tag + 1);
                        }
                    }
                    exchange.sent();
                }
                // All that follows hides behind the exchange.
                d_carried.put(turn);
                fetch_inputs(next, last && t > 0 ? t - 1 : t);
#pragma unroll
                for (int e = 0; e < OWNED; ++e) {
                    const Owned owned(e, rank, item, turn, B);
                    if (!owned.exists) continue;
                    const long long place = item.n * D + owned.d;
                    Element* to = d_gates + (owned.sequence * T + t) * G * width + place;
#pragma unroll
                    for (int k = 0; k < G; ++k) round_to(to[k * width], d_preactivations[e][k]);
                }
            }
            if (t < 0) break;
        }
        for (int turn = 0; turn < item.turns; ++turn) {
            d_carried.take(turn);
#pragma unroll
            for (int e = 0; e < OWNED; ++e) {
                const Owned owned(e, rank, item, turn, B);
                if (!owned.exists) continue;
                const long long place = item.n * D + owned.d;
                float* to = d_initial + owned.sequence * width + place;
#pragma unroll
                for (int s = 0; s < S; ++s) to[s * B * width] = d_carried.now[e][s];
                // All tiles' sums are in the first one's place.
                float* to_bias = d_bias + owned.sequence * G * width + place;
#pragma unroll
                for (int k = 0; k < G; ++k) to_bias[k * width] = turn ? 0.0f : d_bias_sums[e][k];
            }
        }
    }
}
