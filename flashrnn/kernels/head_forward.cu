// The scan over time, forward, for heads that fit a thread block; see head.cuh for who owns what.
//
// What lives where:
//
// - registers of the computing warps: R (fragments.cuh), the bias, the carried states in float32;
// - shared memory: the fragments of R that registers do not hold; a ring of the next STAGES steps'
//   inputs; two steps' new states, of which h is also the next product's operand; two steps'
//   pre-activations, where they are saved;
// - global memory: each element read or written once, by the traffic threads, in 16 bytes where
//   addresses allow it.
//
// What orders the steps is one barrier at the end of each. Before the barrier of step t the
// computing warps have read the inputs of step t and written its new states; what the traffic threads
// have done then, traffic_forward.cuh says.

// Whether the computing warp may meet sums that are to be multiplied with care: at the first step, of which
// the lines hold h, or at any later one.
__device__ inline bool may_need_care(const Matrix& matrix, const Element* lines) {
    if (!NEEDS_CARE<Operand> || !H_IS_NEAR) return NEEDS_CARE<Operand>;
    bool far = false;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
        const Fragment a = matrix[f];
#pragma unroll
        for (int w = 0; w < 4; ++w) far |= is_far(__uint_as_float(a.words[w]));
    }
    for (int i = threadIdx.x % 32; i < SEQUENCES * DD; i += 32) {
        far |= is_far(to_float(lines[i / DD * STATES + i % DD]));
    }
    return __any_sync(~0u, far);
}

// All steps of the scan, of a computing warp.
template <bool WITH_CARE>
__device__ inline void take_steps(float (&carried)[S][OWNED], const float (&bias)[G][OWNED],
                                  const Matrix& matrix, const Lane& lane, const Element* ring,
                                  Element* new_states, Element* saved, const Element* R, int n, int N,
                                  long long T, const Clips& clips) {
    // The pre-activations of number e, of which the product has made NaN.
    const auto multiply_with_care = [&](float (&mine)[G], int e, const Element* inputs,
                                        const Element* read) {
        const int unit = lane.unit(e), sequence = lane.sequence(e);
#pragma unroll
        for (int s = 0; s < GR; ++s) {
            const int k = RECURRENT[s];
            const Element* input = inputs + sequence * INPUTS + FED_WX[k] * DD + unit;
            mine[k] = (FED_WX[k] >= 0 ? to_float(*input) : 0.0f) + bias[k][e] +
                      careful_product<true>(R, n, N, s, unit, read + sequence * STATES);
        }
    };
    const unsigned line = matrix_line(new_states, STATES);
    constexpr unsigned TURN = SEQUENCES * STATES * sizeof(Element);
    int slot = 0;
    for (int t = 0; t < T; ++t) {
        float sums[GR][BLOCKS][4], preactivations[G][OWNED];
        recurrent_product(sums, matrix, line + (t + 1) % 2 * TURN, STATES);
        // Nothing here depends on the product, and all of it hides behind it.
        const Element* inputs = ring + slot * SEQUENCES * INPUTS;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
#pragma unroll
        for (int k = 0; k < G; ++k) {
            float input[OWNED] = {};
            if (FED_WX[k] >= 0) load_owned(input, inputs + FED_WX[k] * DD, INPUTS, lane);
#pragma unroll
            for (int e = 0; e < OWNED; ++e) preactivations[k][e] = input[e] + bias[k][e];
        }
#pragma unroll
        for (int s = 0; s < GR; ++s) {
#pragma unroll
            for (int e = 0; e < OWNED; ++e) {
                preactivations[RECURRENT[s]][e] += lane.owned(sums[s], e);
            }
        }
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            float mine[G], old[S], after[S];
#pragma unroll
            for (int k = 0; k < G; ++k) mine[k] = preactivations[k][e];
#pragma unroll
            for (int s = 0; s < S; ++s) old[s] = carried[s][e];
            step(old, mine, after, clips.forward);
            if constexpr (WITH_CARE) {
                // Is any of them NaN? Asked beside the step, which hardly ever is taken again.
                float all = 0.0f;
#pragma unroll
                for (int s = 0; s < GR; ++s) all += mine[RECURRENT[s]];
                if (all != all) {
                    const Element* read = new_states + (t + 1) % 2 * SEQUENCES * STATES;
                    multiply_with_care(mine, e, inputs, read);
#pragma unroll
                    for (int k = 0; k < G; ++k) preactivations[k][e] = mine[k];
                    step(old, mine, after, clips.forward);
                }
            }
#pragma unroll
            for (int s = 0; s < S; ++s) carried[s][e] = after[s];
        }
        Element* to = new_states + t % 2 * SEQUENCES * STATES;
#pragma unroll
        for (int s = 0; s < S; ++s) store_owned(to + s * DD, STATES, carried[s], lane);
        if (SAVE_GATES) {
            Element* gates_to = saved + t % 2 * SEQUENCES * GATES;
#pragma unroll
            for (int k = 0; k < G; ++k) store_owned(gates_to + k * DD, GATES, preactivations[k], lane);
        }
        meet<THREADS>();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE)
head_forward(const Element* __restrict__ Wx, const Element* __restrict__ R,
             const Element* __restrict__ b, const float* __restrict__ initial,
             Element* __restrict__ states, float* __restrict__ last_states,
             Element* __restrict__ gates, long long Wx_b, long long Wx_t, long long Wx_g,
             long long Wx_n, long long Wx_d, long long initial_s, long long initial_b,
             long long initial_n, long long initial_d, long long T, long long B, int N,
             Clips clips) {
    Fragment* spare = reinterpret_cast<Fragment*>(shared_memory());
    Element* ring = reinterpret_cast<Element*>(spare + COMPUTING * SPARED * 32);
    Element* new_states = ring + STAGES * SEQUENCES * INPUTS;
    Element* saved = new_states + 2 * SEQUENCES * STATES;

    const int n = blockIdx.x % N;
    const long long first = static_cast<long long>(blockIdx.x / N) * SEQUENCES;
    const int last = B - 1 - first < SEQUENCES ? B - 1 - first : SEQUENCES - 1;
    const long long width = static_cast<long long>(N) * D;

    // Places that no unit has are zeros, whatever is multiplied with them.
    if (D != DD) {
        for (int i = threadIdx.x; i < STAGES * SEQUENCES * INPUTS; i += THREADS) {
            round_to(ring[i], 0.0f);
        }
        __syncthreads();
    }

    if (threadIdx.x >= 32 * COMPUTING) {
        if (SHIFT_REGISTERS) keep_registers<TRAFFIC_REGISTERS>();
        const long long head = first * T * width + n * D, head_gates = first * T * G * width + n * D;
        Flow<GW, const Element> input(
            {Wx + first * Wx_b + n * Wx_n, Wx_b, Wx_g, Wx_d}, Wx_t, INPUTS, last);
        Flow<S, Element> output({states + head, T * width, B * T * width, 1}, width, STATES, last);
        Flow<G, Element> output_gates({gates + head_gates, T * G * width, width, 1}, G * width, GATES,
                                      last);
        carry(input, output, output_gates, ring, new_states, saved, T);
        return;
    }

    if (SHIFT_REGISTERS) take_registers<COMPUTING_REGISTERS>();
    const Lane lane;
    Matrix matrix;
    matrix.load<true>(R, n, N, lane, spare);
    float carried[S][OWNED];
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const bool exists = lane.unit(e) < D && lane.sequence(e) <= last;
        const float* from = initial + (first + lane.sequence(e)) * initial_b + n * initial_n +
                            lane.unit(e) * initial_d;
#pragma unroll
        for (int s = 0; s < S; ++s) carried[s][e] = exists ? from[s * initial_s] : 0.0f;
    }
    float bias[G][OWNED];
#pragma unroll
    for (int k = 0; k < G; ++k) {
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            const bool fed = FED_B[k] >= 0 && lane.unit(e) < D;
            const long long row = static_cast<long long>(FED_B[k]) * N + n;
            bias[k][e] = fed ? to_float(b[row * D + lane.unit(e)]) : 0.0f;
        }
    }
    // h before the first step lies where that before step 0 would.
    store_owned(new_states + SEQUENCES * STATES, STATES, carried[0], lane);
    meet<THREADS>();

    if (may_need_care(matrix, new_states + SEQUENCES * STATES)) {
        take_steps<true>(carried, bias, matrix, lane, ring, new_states, saved, R, n, N, T, clips);
    } else {
        take_steps<false>(carried, bias, matrix, lane, ring, new_states, saved, R, n, N, T, clips);
    }
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        if (lane.unit(e) >= D || lane.sequence(e) > last) continue;
        float* to = last_states + (first + lane.sequence(e)) * width + n * D + lane.unit(e);
#pragma unroll
        for (int s = 0; s < S; ++s) to[s * B * width] = carried[s][e];
    }
}
