// One step of the recurrence, backward: product, derivative and stores in one launch.
//
// A CTA computes UNITS units of a head for COLUMNS sequences. Rows of its product are its units, and the
// summed dimension has a segment for each gate that R feeds. So R comes transposed, [N, D, GR, D]: the
// first D are the units that forward sums over. What lives where:
//
// - global memory: the gates' gradients of step t + 1, which the product reads from `d_gates`; the
//   carried gradients in float32, in `d_initial`, where the last launch leaves them as the gradients
//   of the initial states. One thread alone reads and writes each;
// - shared memory: the warps' partial sums of the product;
// - registers: everything else.
//
// What orders the steps: each is a launch, t from T - 1 to 0 and then -1, which only adds what reaches
// the initial h through R. A launch lets the next one start at once (griddepcontrol_launch). That one
// loads R, the residuals and the given gradients, and then waits until the launch before is complete
// (griddepcontrol_wait). Only then does it read d_gates.

#include "per_step/product.cuh"

namespace per_step {

static_assert(SEGMENTS == GR && UNITS == ROWS);

extern "C" __global__ void __launch_bounds__(THREADS, 1)
step_backward(const BackwardCall* __restrict__ call, int ahead, int N, int D) {
    griddepcontrol_launch();
    __shared__ Partial partial;

    const Tile tile(N, D);
    const int B = static_cast<int>(call->B);
    const int n = tile.n, lane = threadIdx.x % 32;
    const long long T = call->T, t = T - 1 - (call->done + ahead);
    const long long width = static_cast<long long>(N) * D;
    Element* d_gates = call->d_gates;
    float* d_carried = call->d_initial;
    const Clips clips = call->clips;
    // Whether a gradient comes from step t + 1 through R: not to the last step, and never with CUT.
    const bool recurrent = !CUT && t + 1 < T;

    // The lane's first unit and sequence in the product.
    const long long unit = tile.first_unit + lane / 4, sequence = tile.first_sequence + lane / 4;
    Product product;
    product.D = D;
    product.rows.first = call->R + (n * D + unit) * GR * D;
    product.rows.stride = 8 * GR * D;
    product.rows.count = !recurrent ? 0 : unit + 8 < D ? 2 : unit < D ? 1 : 0;
    product.columns.first = d_gates + (sequence * T + t + 1) * G * width + n * D;
    product.columns.stride = 8 * T * G * width;
    product.columns.count = recurrent ? n_tiles_within(sequence, B) : 0;
    if (!CUT) product.load_first_left();
    // As in forward.cu: a CTA beyond the batch.
    if (tile.first_sequence >= B) return;

    // All of these loads are issued before the first result is used.
    Element from_gates[ELEMENTS][G] = {}, from_states[ELEMENTS][S] = {}, given[ELEMENTS][S] = {};
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(tile, e, B, D);
        const Element* saved =
            call->gates + (element.b * T + t) * G * width + element.place;
        const Element* states =
            call->states + (element.b * T + t - 1) * width + element.place;
        const Element* d_states = call->d_states + element.b * call->d_states_b + t * call->d_states_t +
                                  n * call->d_states_n + element.d * call->d_states_d;
        const long long states_s = B * T * width, d_states_s = call->d_states_s;
        materialize(saved);
        materialize(states);
        if (GIVEN) materialize(d_states);
#pragma unroll
        for (int k = 0; k < G; ++k) {
            if (element.exists && t >= 0) from_gates[e][k] = saved[k * width];
        }
#pragma unroll
        for (int s = 0; s < S; ++s) {
            if (element.exists && t > 0) from_states[e][s] = states[s * states_s];
            if (s < GIVEN && element.exists && t >= 0) given[e][s] = d_states[s * d_states_s];
        }
    }

    // Addresses of what step t + 1 writes, computed before the wait for it: see forward.cu.
    const float* from[ELEMENTS];
    long long from_s = B * width;
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(tile, e, B, D);
        from[e] = d_carried + element.b * width + element.place;
    }
    if (t == T - 1) {
        from_s = call->d_last_s;
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            const ThreadElement element(tile, e, B, D);
            from[e] = call->d_last + element.b * call->d_last_b + n * call->d_last_n +
                      element.d * call->d_last_d;
        }
    }
    materialize(product.columns.first);
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) materialize(from[e]);

    float gates[ELEMENTS][G], before[ELEMENTS][S], gradients[ELEMENTS][S];
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(tile, e, B, D);
#pragma unroll
        for (int k = 0; k < G; ++k) gates[e][k] = to_float(from_gates[e][k]);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            before[e][s] = to_float(from_states[e][s]);
            gradients[e][s] = to_float(given[e][s]);
            if (element.exists && t == 0) {
                const float* initial = call->initial;
                before[e][s] = initial[s * call->initial_s + element.b * call->initial_b +
                                       n * call->initial_n + element.d * call->initial_d];
            }
        }
    }

    griddepcontrol_wait();
    float carried[ELEMENTS][S];
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(tile, e, B, D);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            const bool exists = element.exists && (GIVEN_LAST || t + 1 < T);
            carried[e][s] = exists ? __ldcg(from[e] + s * from_s) : 0.0f;
        }
    }
    if (!CUT) {
        product.run(partial, [=](int segment) {
            long long offset = 0;
#pragma unroll
            for (int s = 0; s < SEGMENTS; ++s) {
                if (s == segment) offset = RECURRENT[s] * width;
            }
            return offset;
        });
    }

#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(tile, e, B, D);
        if (element.exists) {
#pragma unroll
            for (int s = 0; s < S; ++s) gradients[e][s] += carried[e][s];
            if (recurrent) {
                gradients[e][0] += clipped(total(partial, element.column, element.row), clips.gradient);
            }
            float d_before[S], d_preactivations[G];
            if (t >= 0) {
                derivative(before[e], gates[e], gradients[e], d_before, d_preactivations, clips.forward);
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    round_to(d_gates[((element.b * T + t) * G + k) * width + element.place],
                             d_preactivations[k]);
                }
            }
#pragma unroll
            for (int s = 0; s < S; ++s) {
                const long long at = row_of(s, element.b, B) * width + element.place;
                d_carried[at] = t >= 0 ? d_before[s] : gradients[e][s];
            }
        }
    }
}

// Writes the record that the launches of steps behind it in the stream read.
extern "C" __global__ void set_call(BackwardCall* to, const __grid_constant__ BackwardCall call) {
    *to = call;
}

}  // namespace per_step
