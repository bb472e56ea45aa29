// The scan over time, forward, for heads that a cluster owns warp by warp; see cluster.cuh for who owns
// what.
//
// What lives where:
//
// - registers of the computing warps: R as far as they hold it (matrix.cuh), the bias, the carried states
//   in float32;
// - shared memory: h of all units, of two exchanges; fragments of R that registers do not hold; a ring of
//   the next STAGES steps' inputs; two steps' new states, and pre-activations, where they are saved;
// - global memory: each element of Wx, states and gates read or written once, by the traffic threads, in
//   16 bytes, to multiples of which rows are aligned.
//
// What orders the steps: a computing warp waits for h of all units, which the cluster's blocks send each
// other; they run at once. At the end of a step, while h is on its way, the block's warps meet: the
// computing ones have read the step's inputs and written what it gives; what the traffic threads have
// done, traffic_forward.cuh says.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
cluster_forward(const Element* __restrict__ Wx, const Element* __restrict__ R,
                const Element* __restrict__ b, const float* __restrict__ initial,
                Element* __restrict__ states, float* __restrict__ last_states,
                Element* __restrict__ gates, long long Wx_b, long long Wx_t, long long Wx_g,
                long long Wx_n, long long Wx_d, long long initial_s, long long initial_b,
                long long initial_n, long long initial_d, long long T, long long B, int N,
                Clips clips) {
    const int rank = blockIdx.x % TEAM, cluster = blockIdx.x / TEAM;
    Exchange exchange(shared_memory(), rank);
    Matrix matrix(shared_memory() + EXCHANGE_BYTES, nullptr);
    constexpr int MATRIX_BYTES = WARPS * SPARED * 32 * sizeof(Fragment);
    Element* ring = reinterpret_cast<Element*>(shared_memory() + EXCHANGE_BYTES + MATRIX_BYTES);
    Element* new_states = ring + STAGES * SEQUENCES * INPUTS;
    Element* saved = new_states + 2 * SEQUENCES * STATES;

    // The cluster's head and first sequence, and the block's first unit.
    const int n = cluster % N;
    const long long first = static_cast<long long>(cluster / N) * SEQUENCES;
    const int last = B - 1 - first < SEQUENCES ? B - 1 - first : SEQUENCES - 1;
    const int first_unit = rank * UNITS, units = D - first_unit < UNITS ? D - first_unit : UNITS;
    const long long width = static_cast<long long>(N) * D;

    if (threadIdx.x >= 32 * COMPUTING) {
        const long long row = first * T * width + n * D + first_unit;
        const long long row_of_gates = first * T * G * width + n * D + first_unit;
        const Element* from_Wx = Wx + first * Wx_b + n * Wx_n + first_unit * Wx_d;
        Flow<GW, const Element> input({from_Wx, Wx_b, Wx_g, Wx_d}, Wx_t, INPUTS, last, units);
        Flow<S, Element> output({states + row, T * width, B * T * width, 1}, width, STATES, last, units);
        Flow<G, Element> output_gates({gates + row_of_gates, T * G * width, width, 1}, G * width,
                                      GATES, last, units);
        carry(input, output, output_gates, ring, new_states, saved, T);
        return;
    }

    matrix.load([&](int step) { return fragment(step, R, n, N, rank); });
    float bias[OWNED][G], carried[OWNED][S];
    bool exists[OWNED];
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Owned owned(e);
        const long long d = first_unit + owned.unit, sequence = first + owned.sequence;
        exists[e] = owned.unit < units && owned.sequence <= last;
        const float* from = initial + sequence * initial_b + n * initial_n + d * initial_d;
#pragma unroll
        for (int s = 0; s < S; ++s) carried[e][s] = exists[e] ? from[s * initial_s] : 0.0f;
#pragma unroll
        for (int k = 0; k < G; ++k) {
            const long long row = static_cast<long long>(FED_B[k]) * N + n;
            bias[e][k] = FED_B[k] >= 0 && owned.unit < units ? to_float(b[row * D + d]) : 0.0f;
        }
    }
    const auto send_h = [&] {
        float h[OWNED];
        // R has zeros for what is not there, which times infinity would be none.
#pragma unroll
        for (int e = 0; e < OWNED; ++e) h[e] = exists[e] ? carried[e][0] : 0.0f;
        exchange.send(h);
    };
    send_h();
    meet<THREADS>();

    int slot = 0;
    for (long long t = 0; t < T; ++t) {
        float preactivations[OWNED][G];
        const Element* inputs = ring + slot * SEQUENCES * INPUTS;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            const Owned owned(e);
            const Element* mine = inputs + owned.sequence * INPUTS + owned.unit;
#pragma unroll
            for (int k = 0; k < G; ++k) {
                preactivations[e][k] = bias[e][k];
                if (FED_WX[k] >= 0) preactivations[e][k] += to_float(mine[FED_WX[k] * PLACES]);
                // Here, not where it is used.
                settle(preactivations[e][k]);
            }
        }
        exchange.wait();
        const Recurrent recurrent = multiply(matrix, exchange);
        exchange.advance();
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
#pragma unroll
            for (int k = 0; k < G; ++k) {
                if (FED_R[k] >= 0) {
                    preactivations[e][k] += recurrent.gates[e][FED_R[k] < 0 ? 0 : FED_R[k]];
                }
            }
            float after[S];
            step(carried[e], preactivations[e], after, clips.forward);
#pragma unroll
            for (int s = 0; s < S; ++s) carried[e][s] = after[s];
        }
        if (t + 1 < T) send_h();
        // All that follows hides behind the exchange.
        const int turn = t % 2 * SEQUENCES;
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            const Owned owned(e);
            Element* to = new_states + (turn + owned.sequence) * STATES + owned.unit;
#pragma unroll
            for (int s = 0; s < S; ++s) round_to(to[s * PLACES], carried[e][s]);
            if (SAVE_GATES) {
                Element* to_gates = saved + (turn + owned.sequence) * GATES + owned.unit;
#pragma unroll
                for (int k = 0; k < G; ++k) round_to(to_gates[k * PLACES], preactivations[e][k]);
            }
        }
        meet<THREADS>();
    }
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Owned owned(e);
        if (!exists[e]) continue;
        float* to = last_states + (first + owned.sequence) * width + n * D + first_unit + owned.unit;
#pragma unroll
        for (int s = 0; s < S; ++s) to[s * B * width] = carried[e][s];
    }
}
