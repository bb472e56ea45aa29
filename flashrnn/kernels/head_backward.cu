// The scan over time, backward, for heads that fit a thread block; see head.cuh for who owns what.
//
// What lives where:
//
// - registers of the computing warps: R transposed (fragments.cuh), the carried gradients of the
//   states and the sums over time of the pre-activations' gradients, in float32;
// - shared memory: the fragments of R that registers do not hold; a ring of the next STAGES steps'
//   inputs, in a line the gates' pre-activations, the states before the step and the given gradients
//   of those after it; two steps' gradients of the pre-activations, the next product's operand;
// - global memory: each element read or written once, by the traffic threads, in 16 bytes where
//   addresses allow it; the initial and last states, which only one step needs, by the computing
//   warps, as the bias's gradient, a sum for each sequence.
//
// What orders the steps is one barrier at the end of each, as in head_forward.cu: before it the
// computing warps have read a step's inputs and written its gradients; the traffic threads have
// stored the gradients of the step computed before, have asked for the inputs of the one STAGES - 1
// steps on, and have seen those of the next one arrive.

constexpr int INPUTS = pitch(G + 2 * S), GATES = pitch(G);

extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE)
head_backward(const Element* __restrict__ R, const float* __restrict__ initial,
              const Element* __restrict__ states, const Element* __restrict__ gates,
              const Element* __restrict__ d_states, const float* __restrict__ d_last,
              Element* __restrict__ d_gates, float* __restrict__ d_initial,
              float* __restrict__ d_bias, long long initial_s, long long initial_b,
              long long initial_n, long long initial_d, long long d_states_s, long long d_states_b,
              long long d_states_t, long long d_states_n, long long d_states_d, long long d_last_s,
              long long d_last_b, long long d_last_n, long long d_last_d, long long T, long long B, int N,
              Clips clips) {
    Fragment* spare = reinterpret_cast<Fragment*>(shared_memory());
    Element* ring = reinterpret_cast<Element*>(spare + COMPUTING * SPARED * 32);
    Element* gradients = ring + STAGES * SEQUENCES * INPUTS;

    const int n = blockIdx.x % N;
    const long long first = static_cast<long long>(blockIdx.x / N) * SEQUENCES;
    const int last = B - 1 - first < SEQUENCES ? B - 1 - first : SEQUENCES - 1;
    const long long width = static_cast<long long>(N) * D;

    // In the ring, places that no unit has are zeros.
    if (D != DD) {
        for (int i = threadIdx.x; i < STAGES * SEQUENCES * INPUTS; i += THREADS) round_to(ring[i], 0.0f);
        __syncthreads();
    }
    // Which step's gradients were infinite before they were rounded: in what the first line has left.
    const auto step_with_infinity = [](Element* lines) {
        return reinterpret_cast<int*>(lines + GATES - SHARE);
    };
    if (CONTAINS<Operand>) {
        if (threadIdx.x < 2) *step_with_infinity(gradients + threadIdx.x * SEQUENCES * GATES) = -1;
        __syncthreads();
    }

    if (threadIdx.x >= 32 * COMPUTING) {
        if (SHIFT_REGISTERS) keep_registers<TRAFFIC_REGISTERS>();
        const long long at = (first * T + T - 1) * width + n * D;
        const long long at_gates = (first * T + T - 1) * G * width + n * D;
        const long long at_given = first * d_states_b + (T - 1) * d_states_t + n * d_states_n;
        Flow<G, const Element> input_gates({gates + at_gates, T * G * width, width, 1}, -G * width,
                                           INPUTS, last);
        // Those before the step: one step earlier.
        Flow<S, const Element> input_states({states + at - width, T * width, B * T * width, 1}, -width,
                                            INPUTS, last);
        Flow<S, const Element> input_given({d_states + at_given, d_states_b, d_states_s, d_states_d},
                                           -d_states_t, INPUTS, last);
        Flow<G, Element> output({d_gates + at_gates, T * G * width, width, 1}, -G * width, GATES, last);
        long long to_fetch = T;
        int slot = 0;
        const auto fetch_next = [&]() {
            Element* to = ring + slot * SEQUENCES * INPUTS;
            if (to_fetch > 0) {
                input_gates.fetch(to);
                input_given.fetch(to + (G + S) * DD);
            }
            if (to_fetch > 1) input_states.fetch(to + G * DD);
            --to_fetch;
            close_copy_group();
            input_gates.advance();
            input_states.advance();
            input_given.advance();
            slot = slot + 1 == STAGES ? 0 : slot + 1;
        };
        const auto store_next = [&](int done) {
            output.store(gradients + done % 2 * SEQUENCES * GATES);
            output.advance();
        };
        for (int i = 0; i < STAGES - 1; ++i) fetch_next();
        wait_for_copy_groups<STAGES - 2>();
        meet<THREADS>();
        for (int done = 0; done < T; ++done) {
            fetch_next();
            if (done > 0) store_next(done - 1);
            wait_for_copy_groups<STAGES - 2>();
            meet<THREADS>();
        }
        store_next(T - 1);
        return;
    }

    if (SHIFT_REGISTERS) take_registers<COMPUTING_REGISTERS>();
    const Lane lane;
    Matrix matrix;
    if (!CUT) matrix.load<false>(R, n, N, lane, spare);
    float d_carried[S][OWNED];
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const bool exists = lane.unit(e) < D && lane.sequence(e) <= last;
        const float* from =
            d_last + (first + lane.sequence(e)) * d_last_b + n * d_last_n + lane.unit(e) * d_last_d;
#pragma unroll
        for (int s = 0; s < S; ++s) d_carried[s][e] = exists ? from[s * d_last_s] : 0.0f;
    }
    meet<THREADS>();

    const unsigned line = matrix_line(gradients, GATES);
    constexpr unsigned TURN = SEQUENCES * GATES * sizeof(Element);
    const auto add_recurrent_gradient = [&](int done) {
        if (CUT) return;
        const int turn = (done + 1) % 2;
        Element* const read = gradients + turn * SEQUENCES * GATES;
        float sums[BLOCKS][4];
        // What was infinite before it was rounded, no clip is to contain.
        const bool contain = CONTAINS<Operand> && *step_with_infinity(read) != done;
        transposed_product<Operand>(sums, matrix, line + turn * TURN, GATES, contain);
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            float d_h = lane.owned(sums, e);
            if (NEEDS_CARE<Operand> && d_h != d_h) {
                const Element* line = read + lane.sequence(e) * GATES;
                d_h = careful_product<false>(R, n, N, 0, lane.unit(e), line);
            }
            d_carried[0][e] += clipped(d_h, clips.gradient);
        }
    };
    // Before the barrier that the next product waits for.
    const auto tell_of_infinity = [&](const float (&d_gates)[G][OWNED], int done) {
        if (!CONTAINS<Operand>) return;
        bool infinite = false;
#pragma unroll
        for (int i = 0; i < GR * OWNED; ++i) {
            const float d_gate = d_gates[RECURRENT[i / OWNED]][i % OWNED];
            infinite |= lane.unit(i % OWNED) < D && !is_finite(d_gate);
        }
        Element* const read = gradients + (done + 1) % 2 * SEQUENCES * GATES;
        if (infinite) *step_with_infinity(read) = done;
    };
    float d_bias_sums[G][OWNED] = {};
    int slot = 0;
    const auto take_step = [&](int done) {
        const Element* inputs = ring + slot * SEQUENCES * INPUTS;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        float preactivations[G][OWNED], before[S][OWNED], given[S][OWNED];
#pragma unroll
        for (int k = 0; k < G; ++k) load_owned(preactivations[k], inputs + k * DD, INPUTS, lane);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            load_owned(before[s], inputs + (G + s) * DD, INPUTS, lane);
            load_owned(given[s], inputs + (G + S + s) * DD, INPUTS, lane);
        }
        if (done == T - 1) {
#pragma unroll
            for (int e = 0; e < OWNED; ++e) {
                const bool exists = lane.unit(e) < D && lane.sequence(e) <= last;
                const float* from = initial + (first + lane.sequence(e)) * initial_b + n * initial_n +
                                    lane.unit(e) * initial_d;
#pragma unroll
                for (int s = 0; s < S; ++s) before[s][e] = exists ? from[s * initial_s] : 0.0f;
            }
        }
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            float mine[G], old[S], d_after[S], d_before[S], d_mine[G];
#pragma unroll
            for (int k = 0; k < G; ++k) mine[k] = preactivations[k][e];
#pragma unroll
            for (int s = 0; s < S; ++s) {
                old[s] = before[s][e];
                d_after[s] = d_carried[s][e] + given[s][e];
            }
            derivative(old, mine, d_after, d_before, d_mine, clips.forward);
#pragma unroll
            for (int k = 0; k < G; ++k) {
                preactivations[k][e] = d_mine[k];
                d_bias_sums[k][e] += d_mine[k];
            }
#pragma unroll
            for (int s = 0; s < S; ++s) d_carried[s][e] = d_before[s];
        }
        Element* to = gradients + done % 2 * SEQUENCES * GATES;
#pragma unroll
        for (int k = 0; k < G; ++k) store_owned(to + k * DD, GATES, preactivations[k], lane);
        tell_of_infinity(preactivations, done + 1);
        meet<THREADS>();
    };
    // The last step has no gradients after it. A product of zeros would not do: times an infinite R they
    // are none. Nor does the loop ask which step it is at, in the midst of what each step waits for.
    take_step(0);
    for (int done = 1; done < T; ++done) {
        add_recurrent_gradient(done);
        take_step(done);
    }
    add_recurrent_gradient(T);
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        if (lane.unit(e) >= D || lane.sequence(e) > last) continue;
        float* to = d_initial + (first + lane.sequence(e)) * width + n * D + lane.unit(e);
#pragma unroll
        for (int s = 0; s < S; ++s) to[s * B * width] = d_carried[s][e];
        float* to_bias = d_bias + (first + lane.sequence(e)) * G * width + n * D + lane.unit(e);
#pragma unroll
        for (int k = 0; k < G; ++k) to_bias[k * width] = d_bias_sums[k][e];
    }
}
