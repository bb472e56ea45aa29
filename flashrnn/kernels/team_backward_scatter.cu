// The scan over time, backward, for heads that take a cluster of thread blocks, which exchange parts of
// dh; see team_scatter.cuh for who owns and sends what.
//
// What lives where:
//
// - registers: R as far as they hold it (matrix.cuh), and in float32 the carried gradients of the
//   lane's own units and the sums of its gates' gradients over time; the next step's inputs, which
//   have a whole step to come: the gates' pre-activations, the states before the step and the given
//   gradients of those after it;
// - shared memory: fragments of R that registers do not hold; the parts of dh that the cluster sends,
//   and the gates' gradients that the block multiplies, of two steps each;
// - global memory: what even shared memory does not hold of R; residuals and gradients, of which the
//   lane that owns an element reads or writes it.
//
// What orders the steps: an owning warp waits for what the cluster sends to the block, and the block's
// warps meet once a step, between the gradients and their product. The blocks of a cluster run at once.
//
// A step's derivative is linear in the gradient that it is given. So what the exchange brings only
// needs to be multiplied by its slopes, and added to what the rest gives: both are there before. (Where
// something is not finite that is another number, or none: there the derivative is computed once more.)

extern "C" __global__ void __launch_bounds__(THREADS, 1)
team_backward_scatter(const Element* __restrict__ R, const float* __restrict__ initial,
                      const Element* __restrict__ states, const Element* __restrict__ gates,
                      const Element* __restrict__ d_states, const float* __restrict__ d_last,
                      Element* __restrict__ d_gates, float* __restrict__ d_initial,
                      float* __restrict__ d_bias, Parcel*, Fragment* streamed,
                      long long initial_s, long long initial_b, long long initial_n,
                      long long initial_d, long long d_states_s, long long d_states_b,
                      long long d_states_t, long long d_states_n, long long d_states_d,
                      long long d_last_s, long long d_last_b, long long d_last_n,
                      long long d_last_d, long long T, long long B, int N, Clips clips, int) {
    const int rank = blockIdx.x % TEAM;
    const Item item(blockIdx.x / TEAM, B);
    Exchange exchange(shared_memory(), rank);
    Matrix matrix(shared_memory() + EXCHANGE_BYTES, streamed);
    if (!CUT) load_matrix(matrix, R, item.n, N, rank);

    const long long width = static_cast<long long>(N) * D;
    float d_carried[OWNED][S], d_bias_sums[OWNED][G] = {};
    Loaded input_gates[OWNED][G], input_states[OWNED][S], given[OWNED][S];
    // Where the inputs of the step lie that were fetched last, and where what it yields went.
    const Element *from_gates[OWNED], *from_states[OWNED], *from_given[OWNED];
    Element* to_gates[OWNED];
    // Fetches those of step t, the one before; of none before the first, they stay.
    const auto fetch_inputs = [&](long long t) {
        const long long plane = B * T * width;
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            from_gates[e] -= t >= 0 ? G * width : 0;
            from_states[e] -= t > 0 ? width : 0;
            from_given[e] -= t >= 0 ? d_states_t : 0;
            const bool ahead = t > PREFETCHED;
            const Element* const ahead_gates = from_gates[e] - (ahead ? PREFETCHED * G * width : 0);
            const Element* const ahead_states = from_states[e] - (ahead ? PREFETCHED * width : 0);
            const Element* const ahead_given =
                from_given[e] - (ahead ? PREFETCHED * d_states_t : 0);
#pragma unroll
            for (int k = 0; k < G; ++k) {
                input_gates[e][k].load(from_gates[e] + k * width);
                prefetch(ahead_gates + k * width);
            }
#pragma unroll
            for (int s = 0; s < S; ++s) {
                input_states[e][s].load(from_states[e] + s * plane);
                prefetch(ahead_states + s * plane);
                given[e][s].load(from_given[e] + s * d_states_s);
                prefetch(ahead_given + s * d_states_s);
            }
        }
    };
    // Those of step t once more.
    const auto load_residuals = [&](float (&preactivations)[G], float (&before)[S],
                                    const Owned& owned, long long t) {
        const long long row = owned.sequence * T + t, place = item.n * D + owned.d;
#pragma unroll
        for (int k = 0; k < G; ++k) {
            preactivations[k] = to_float(gates[(row * G + k) * width + place]);
        }
#pragma unroll
        for (int s = 0; s < S; ++s) {
            before[s] = t > 0 ? to_float(states[(s * B * T + row - 1) * width + place])
                              : initial[s * initial_s + owned.sequence * initial_b +
                                        item.n * initial_n + owned.d * initial_d];
        }
    };
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Owned owned(e, rank, item, B);
        const float* from =
            d_last + owned.sequence * d_last_b + item.n * d_last_n + owned.d * d_last_d;
#pragma unroll
        for (int s = 0; s < S; ++s) d_carried[e][s] = owned.exists ? from[s * d_last_s] : 0.0f;
        const long long place = item.n * D + owned.d;
        from_gates[e] = gates + (owned.sequence + 1) * T * G * width + place;
        to_gates[e] = d_gates + (owned.sequence + 1) * T * G * width + place;
        from_states[e] = states + ((owned.sequence + 1) * T - 1) * width + place;
        from_given[e] = d_states + owned.sequence * d_states_b + T * d_states_t +
                        item.n * d_states_n + owned.d * d_states_d;
    }
    fetch_inputs(T - 1);

    for (long long t = T - 1; t >= 0; --t) {
        float d_preactivations[OWNED][G];
        if (Owned::any()) {
            // By the gradient of h. These hide behind the exchange.
            float state_slopes[OWNED][S], gate_slopes[OWNED][G], d_after[OWNED][S];
            // 0, or NaN where something is not finite.
            float finite[OWNED] = {};
#pragma unroll
            for (int e = 0; e < OWNED; ++e) {
                const Owned owned(e, rank, item, B);
                float preactivations[G], before[S], d_h[S] = {1.0f};
#pragma unroll
                for (int k = 0; k < G; ++k) preactivations[k] = input_gates[e][k].value();
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    before[s] = input_states[e][s].value();
                    if (t == 0 && owned.exists) {
                        before[s] = initial[s * initial_s + owned.sequence * initial_b +
                                            item.n * initial_n + owned.d * initial_d];
                    }
                    d_after[e][s] = d_carried[e][s] + given[e][s].value();
                }
                derivative(before, preactivations, d_after[e], d_carried[e], d_preactivations[e],
                           clips.forward);
                if (CUT) continue;
                derivative(before, preactivations, d_h, state_slopes[e], gate_slopes[e], clips.forward);
                // Here, not where they are used.
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    settle(d_preactivations[e][k]);
                    settle(gate_slopes[e][k]);
                    finite[e] += 0.0f * d_preactivations[e][k] + 0.0f * gate_slopes[e][k];
                }
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    settle(d_carried[e][s]);
                    settle(state_slopes[e][s]);
                    finite[e] += 0.0f * d_carried[e][s] + 0.0f * state_slopes[e][s];
                }
                settle(finite[e]);
            }
            fetch_inputs(t - 1);

            if (!CUT && t + 1 < T) {
                exchange.wait();
#pragma unroll
                for (int e = 0; e < OWNED; ++e) {
                    const Owned owned(e, rank, item, B);
                    const float d_h = clipped(exchange.total(owned), clips.gradient);
                    if (!is_finite(finite[e] + d_h)) {
                        float preactivations[G], before[S];
                        load_residuals(preactivations, before, owned, t);
                        d_after[e][0] += d_h;
                        derivative(before, preactivations, d_after[e], d_carried[e],
                                   d_preactivations[e], clips.forward);
                        continue;
                    }
#pragma unroll
                    for (int k = 0; k < G; ++k) d_preactivations[e][k] += gate_slopes[e][k] * d_h;
#pragma unroll
                    for (int s = 0; s < S; ++s) d_carried[e][s] += state_slopes[e][s] * d_h;
                }
            }
            if (!CUT) {
#pragma unroll
                for (int e = 0; e < OWNED; ++e) {
                    float recurrent[GR];
#pragma unroll
                    for (int k = 0; k < GR; ++k) {
                        recurrent[k] = contained(d_preactivations[e][RECURRENT[k]], Element{});
                    }
                    exchange.put(recurrent, Owned(e, rank, item, B));
                }
            }
        }
        if (!CUT) {
            meet<THREADS>();
            float sums[TILES][BLOCKS][4];
            multiply<Operand>(sums, matrix, exchange, R, item.n, N, rank);
            exchange.send(sums, rank);
            exchange.advance();
        }
        if (!Owned::any()) continue;
        // So does all that follows.
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            const Owned owned(e, rank, item, B);
            to_gates[e] -= G * width;
            if (!owned.exists) continue;
#pragma unroll
            for (int k = 0; k < G; ++k) {
                round_to(to_gates[e][k * width], d_preactivations[e][k]);
                d_bias_sums[e][k] += d_preactivations[e][k];
            }
        }
    }
    if (!Owned::any()) return;
    if (!CUT) exchange.wait();
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Owned owned(e, rank, item, B);
        if (!CUT) d_carried[e][0] += clipped(exchange.total(owned), clips.gradient);
        if (!owned.exists) continue;
        const long long place = item.n * D + owned.d;
        float* to = d_initial + owned.sequence * width + place;
#pragma unroll
        for (int s = 0; s < S; ++s) to[s * B * width] = d_carried[e][s];
        float* to_bias = d_bias + owned.sequence * G * width + place;
#pragma unroll
        for (int k = 0; k < G; ++k) to_bias[k * width] = d_bias_sums[e][k];
    }
}
