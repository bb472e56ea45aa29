// The cell of one step, forward, where a library has computed the step's recurrent product.
//
// A thread computes VECTOR units of a sequence. All numbers are in global memory: the product, in
// float32, is the library's output; h of the step is its next input, and lies where it is returned, in
// `states`. The carried states are in float32, in `last_states`, where the last step leaves them. One
// thread alone reads and writes each.
//
// The launch before in the stream is that of the product. Wx and b, which no launch of the scan writes,
// are loaded before the wait for it. What does write them may come right before the first step, whose
// launch therefore starts when all before it is complete.

#include "per_step/units.cuh"

namespace per_step {

extern "C" __global__ void __launch_bounds__(THREADS) cell_forward(CALL) {
    const Units own(B, N);
    if (!own.exist) return;
    const long long t = done, width = static_cast<long long>(N) * D;

    Numbers<Element> from_Wx[G], from_b[G];
    const Element* of_step = Wx + own.b * Wx_b + t * Wx_t + own.n * Wx_n + own.d * Wx_d;
    const Element* bias = b + own.place;
#pragma unroll
    for (int k = 0; k < G; ++k) {
        if (FED_WX[k] >= 0) from_Wx[k] = load(of_step + FED_WX[k] * Wx_g, Wx_d);
        if (FED_B[k] >= 0) from_b[k] = load(bias + FED_B[k] * width);
    }

    griddepcontrol_wait();
    const float* sums = product + (own.n * B + own.b) * GR * D + own.d;
    float* carried = last_states + own.b * width + own.place;
    // The compiler may not load from an address before it knows it.
    materialize(sums);
    materialize(carried);
    Numbers<float> from_R[GR], before[S] = {};
#pragma unroll
    for (int k = 0; k < GR; ++k) from_R[k] = load_fresh(sums + k * D);
#pragma unroll
    for (int s = 0; s < S; ++s) {
        const float* from = initial + s * initial_s + own.b * initial_b + own.n * initial_n;
        if (t == 0) before[s] = load_each(from + own.d * initial_d, initial_d);
        else if (READ >> s & 1) before[s] = load_fresh(carried + s * B * width);
    }

    Numbers<float> after[S];
    Numbers<Element> saved[G];
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        float preactivations[G], of_before[S], of_after[S];
#pragma unroll
        for (int k = 0; k < G; ++k) {
            float sum = FED_WX[k] >= 0 ? to_float(from_Wx[k].of[v]) : 0.0f;
            if (FED_B[k] >= 0) sum += to_float(from_b[k].of[v]);
            if (FED_R[k] >= 0) sum += from_R[FED_R[k] >= 0 ? FED_R[k] : 0].of[v];
            preactivations[k] = sum;
            round_to(saved[k].of[v], sum);
        }
#pragma unroll
        for (int s = 0; s < S; ++s) of_before[s] = before[s].of[v];
        step(of_before, preactivations, of_after, clips.forward);
#pragma unroll
        for (int s = 0; s < S; ++s) after[s].of[v] = of_after[s];
    }

#pragma unroll
    for (int s = 0; s < S; ++s) {
        if ((READ >> s & 1) || t == T - 1) store(carried + s * B * width, after[s]);
        if (s >= STORED) continue;
        Numbers<Element> rounded;
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) round_to(rounded.of[v], after[s].of[v]);
        store(states + ((s * B + own.b) * T + t) * width + own.place, rounded);
    }
    if (!SAVE_GATES) return;
#pragma unroll
    for (int k = 0; k < G; ++k) {
        store(gates + ((own.b * T + t) * G + k) * width + own.place, saved[k]);
    }
}

}  // namespace per_step
