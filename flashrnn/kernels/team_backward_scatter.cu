// The scan over time, backward, for heads that take a cluster of thread blocks, which exchange parts of
// dh; see team_scatter.cuh for who owns and sends what.
//
// What lives where:
//
// - registers: R as far as they hold it (team_matrix.cuh), and in float32 the carried gradients of the
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
// needs to be multiplied by its slopes, and added to what the rest gives: both are there before.

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
                      long long d_last_d, long long T, long long B, int N, int) {
    const int rank = blockIdx.x % TEAM;
    const Item item(blockIdx.x / TEAM, B);
    const Exchange exchange(shared_memory(), rank);
    Matrix matrix(shared_memory() + EXCHANGE_BYTES, streamed);
    if (!CUT) load_matrix(matrix, R, item.n, N, rank);

    const long long width = static_cast<long long>(N) * D;
    float d_carried[OWNED][S], d_bias_sums[OWNED][G] = {};
    Loaded input_gates[OWNED][G], input_states[OWNED][S], given[OWNED][S];
    const auto fetch_inputs = [&](long long t) {
        const long long earlier = t > PREFETCHED ? PREFETCHED : 0, before = t > 0 ? t - 1 : 0;
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            const Owned owned(e, rank, item, B);
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
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Owned owned(e, rank, item, B);
        const float* from =
            d_last + owned.sequence * d_last_b + item.n * d_last_n + owned.d * d_last_d;
#pragma unroll
        for (int s = 0; s < S; ++s) d_carried[e][s] = owned.exists ? from[s * d_last_s] : 0.0f;
    }
    fetch_inputs(T - 1);

    // The exchange that a step waits for; there is none before the first.
    unsigned tag = 0;
    for (long long t = T - 1; t >= 0; --t, ++tag) {
        float d_preactivations[OWNED][G];
        if (Owned::any()) {
            // By the gradient of h. These hide behind the exchange.
            float state_slopes[OWNED][S], gate_slopes[OWNED][G];
#pragma unroll
            for (int e = 0; e < OWNED; ++e) {
                const Owned owned(e, rank, item, B);
                float preactivations[G], before[S], d_after[S], d_h[S] = {1.0f};
#pragma unroll
                for (int k = 0; k < G; ++k) preactivations[k] = input_gates[e][k].value();
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    before[s] = input_states[e][s].value();
                    if (t == 0 && owned.exists) {
                        before[s] = initial[s * initial_s + owned.sequence * initial_b +
                                            item.n * initial_n + owned.d * initial_d];
                    }
                    d_after[s] = d_carried[e][s] + given[e][s].value();
                }
                derivative(before, preactivations, d_after, d_carried[e], d_preactivations[e]);
                if (CUT) continue;
                derivative(before, preactivations, d_h, state_slopes[e], gate_slopes[e]);
                // Here, not where they are used.
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    settle(d_preactivations[e][k]);
                    settle(gate_slopes[e][k]);
                }
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    settle(d_carried[e][s]);
                    settle(state_slopes[e][s]);
                }
            }
            fetch_inputs(t > 0 ? t - 1 : t);

            if (!CUT && tag > 0) {
                exchange.wait(tag);
#pragma unroll
                for (int e = 0; e < OWNED; ++e) {
                    const float d_h = clipped(exchange.total(Owned(e, rank, item, B), tag));
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
                    for (int k = 0; k < GR; ++k) recurrent[k] = d_preactivations[e][RECURRENT[k]];
                    exchange.put(recurrent, Owned(e, rank, item, B), tag + 1);
                }
            }
        }
        if (!CUT) {
            meet<THREADS>();
            float sums[TILES][BLOCKS][4];
            multiply<Operand>(sums, matrix, exchange, tag + 1);
            exchange.send(sums, rank, tag + 1);
        }
        if (!Owned::any()) continue;
        // So does all that follows.
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            const Owned owned(e, rank, item, B);
            if (!owned.exists) continue;
            const long long place = item.n * D + owned.d;
            Element* to = d_gates + (owned.sequence * T + t) * G * width + place;
#pragma unroll
            for (int k = 0; k < G; ++k) {
                round_to(to[k * width], d_preactivations[e][k]);
                d_bias_sums[e][k] += d_preactivations[e][k];
            }
        }
    }
    if (!Owned::any()) return;
    if (!CUT) exchange.wait(tag);
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Owned owned(e, rank, item, B);
        if (!CUT) d_carried[e][0] += clipped(exchange.total(owned, tag));
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
