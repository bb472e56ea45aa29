// The cell's derivative of one step, where a library has computed the step's recurrent product.
//
// As cell_forward.cu. The product is of the gates' gradients of step t + 1. They lie where they are
// returned, in `d_gates`; where the library cannot read them there, also in `factors`, [N, B, GR, D].
// The carried gradients are in float32, in `d_initial`, where step 0 leaves those of the initial states,
// but for what reaches the initial h through R.
//
// The residuals and the given gradients, which no launch of the scan writes, are loaded before the wait.

#include "per_step/units.cuh"
#include "common/gradient_clip.cuh"

namespace per_step {

extern "C" __global__ void __launch_bounds__(THREADS) cell_backward(CALL) {
    const Units own(B, N);
    if (!own.exist) return;
    const long long t = done, width = static_cast<long long>(N) * D;
    // Whether a gradient comes from step t + 1 through R.
    const bool recurrent = !CUT && t + 1 < T;

    const long long row = own.b * T + t;
    Numbers<Element> from_gates[G], from_states[S] = {}, from_given[S];
    Numbers<float> from_initial[S] = {};
    const Element* saved = gates + row * G * width + own.place;
    const Element* states_before = states + (row - 1) * width + own.place;
    const Element* of_step =
        d_states + own.b * d_states_b + t * d_states_t + own.n * d_states_n + own.d * d_states_d;
#pragma unroll
    for (int k = 0; k < G; ++k) from_gates[k] = load(saved + k * width);
#pragma unroll
    for (int s = 0; s < S; ++s) {
        const float* first = initial + s * initial_s + own.b * initial_b + own.n * initial_n;
        if (READ >> s & 1) {
            if (t == 0) from_initial[s] = load_each(first + own.d * initial_d, initial_d);
            else from_states[s] = load(states_before + s * B * T * width);
        }
        if (s < GIVEN) from_given[s] = load(of_step + s * d_states_s, d_states_d);
    }

    griddepcontrol_wait();
    const float* sums = product + (own.n * B + own.b) * D + own.d;
    float* carried = d_initial + own.b * width + own.place;
    // The compiler may not load from an address before it knows it.
    materialize(sums);
    materialize(carried);
    Numbers<float> from_R = {}, later[S];
    if (recurrent) from_R = load_fresh(sums);
#pragma unroll
    for (int s = 0; s < S; ++s) {
        later[s] = {};
        const float* last = d_last + s * d_last_s + own.b * d_last_b + own.n * d_last_n;
        if (t + 1 < T) {
            if (PASSED >> s & 1) later[s] = load_fresh(carried + s * B * width);
        } else if (GIVEN_LAST) {
            later[s] = load_each(last + own.d * d_last_d, d_last_d);
        }
    }

    Numbers<float> earlier[S];
    Numbers<Element> rounded[G], contents[G];
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        float before[S], preactivations[G], gradients[S], d_before[S], d_preactivations[G];
#pragma unroll
        for (int k = 0; k < G; ++k) preactivations[k] = to_float(from_gates[k].of[v]);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            before[s] = t == 0 ? from_initial[s].of[v] : to_float(from_states[s].of[v]);
            gradients[s] = later[s].of[v];
            if (s < GIVEN) gradients[s] += to_float(from_given[s].of[v]);
        }
        if (recurrent) gradients[0] += clipped(from_R.of[v], clips.gradient);
        derivative(before, preactivations, gradients, d_before, d_preactivations, clips.forward);
#pragma unroll
        for (int s = 0; s < S; ++s) earlier[s].of[v] = d_before[s];
#pragma unroll
        for (int k = 0; k < G; ++k) {
            round_to(rounded[k].of[v], d_preactivations[k]);
            round_to(contents[k].of[v], contained(d_preactivations[k], Element{}));
        }
    }

#pragma unroll
    for (int k = 0; k < G; ++k) {
        store(d_gates + (row * G + k) * width + own.place, rounded[k]);
        if (!STAGED || FED_R[k] < 0) continue;
        store(factors + ((own.n * B + own.b) * GR + FED_R[k]) * D + own.d, contents[k]);
    }
#pragma unroll
    for (int s = 0; s < S; ++s) {
        if ((PASSED >> s & 1) || t == 0) store(carried + s * B * width, earlier[s]);
    }
}

}  // namespace per_step
