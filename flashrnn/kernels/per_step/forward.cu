// One step of the recurrence, forward: product, cell and stores in one launch.
//
// A CTA computes UNITS units of a head for COLUMNS sequences, all gates of each. Rows of its product
// are the units' gates, those of one gate together. What lives where:
//
// - global memory: h of the step before, which the product reads from `states`; the carried states in
//   float32, in `last_states`, where the last step leaves them. One thread alone reads and writes each;
// - shared memory: the warps' partial sums of the product;
// - registers: everything else.
//
// What orders the steps: each is a launch, step t + 1 behind step t in the stream. A launch lets the
// next one start at once (griddepcontrol_launch). That one loads R, Wx and b, which no launch writes,
// and then waits until the launch before is complete (griddepcontrol_wait). Only then does it read
// states.

#include "per_step/product.cuh"

namespace per_step {

// Rows of the product: gate k that R feeds has UNITS of them.
static_assert(SEGMENTS == 1 && GR * UNITS <= ROWS);

extern "C" __global__ void __launch_bounds__(THREADS, 1)
step_forward(const ForwardCall* __restrict__ call, int ahead, int N, int D) {
    griddepcontrol_launch();
    __shared__ Partial partial;

    const Tile tile(N, D);
    const int B = static_cast<int>(call->B);
    const int n = tile.n, lane = threadIdx.x % 32;
    const long long T = call->T, t = call->done + ahead;
    const long long width = static_cast<long long>(N) * D;
    Element* states = call->states;
    float* carried = call->last_states;

    // The lane's unit and first sequence in the product.
    const long long unit = tile.first_unit + lane / 4, sequence = tile.first_sequence + lane / 4;
    Product product;
    product.D = D;
    product.rows.first = call->R + (n * D + unit) * D;
    product.rows.stride = width * D;
    product.rows.count = unit < D ? GR : 0;
    // Loaded at every step, for the reason that `from` has below.
    const Element* h_initial = call->h_initial;
    materialize(h_initial);
    const Element* h = t == 0 ? h_initial : states + (t - 1) * width;
    const long long h_stride = t == 0 ? width : T * width;
    product.columns.first = h + sequence * h_stride + n * D;
    product.columns.stride = 8 * h_stride;
    product.columns.count = n_tiles_within(sequence, B);
    product.load_first_left();
    // A launch has CTAs for the largest batch that it serves. This test comes after R's loads so as not
    // to delay them: B is in memory too.
    if (tile.first_sequence >= B) return;

    // All of these loads are issued before the first result is used.
    Element from_Wx[ELEMENTS][G] = {}, from_b[ELEMENTS][G] = {};
    const long long Wx_g = call->Wx_g;
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(tile, e, B, D);
        const Element* Wx = call->Wx + element.b * call->Wx_b + t * call->Wx_t +
                            n * call->Wx_n + element.d * call->Wx_d;
        const Element* bias = call->b + element.place;
        materialize(Wx);
        materialize(bias);
#pragma unroll
        for (int k = 0; k < G; ++k) {
            if (element.exists && FED_WX[k] >= 0) from_Wx[e][k] = Wx[FED_WX[k] * Wx_g];
            if (element.exists && FED_B[k] >= 0) from_b[e][k] = bias[FED_B[k] * width];
        }
    }

    // Addresses of what the step before writes, known before the wait for it, so that a single latency
    // of memory follows it. To wait for a pointer that is still being loaded would be to wait for the
    // loads that are issued meanwhile, too.
    const float* from[ELEMENTS];
    long long from_s = B * width;
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(tile, e, B, D);
        from[e] = carried + element.b * width + element.place;
    }
    if (t == 0) {
        from_s = call->initial_s;
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            const ThreadElement element(tile, e, B, D);
            from[e] = call->initial + element.b * call->initial_b +
                      n * call->initial_n + element.d * call->initial_d;
        }
    }
    materialize(product.columns.first);
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) materialize(from[e]);

    float gates[ELEMENTS][G], before[ELEMENTS][S];
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
#pragma unroll
        for (int k = 0; k < G; ++k) {
            gates[e][k] = to_float(from_Wx[e][k]);
            if (FED_B[k] >= 0) gates[e][k] += to_float(from_b[e][k]);
        }
    }

    griddepcontrol_wait();
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(tile, e, B, D);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            before[e][s] = element.exists ? __ldcg(from[e] + s * from_s) : 0.0f;
        }
    }
    product.run(partial, [](int) { return 0; });

#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(tile, e, B, D);
        if (element.exists) {
#pragma unroll
            for (int k = 0; k < G; ++k) {
                if (FED_R[k] >= 0) {
                    gates[e][k] += total(partial, element.column, FED_R[k] * UNITS + element.row);
                }
            }
            float after[S];
            step(before[e], gates[e], after, call->clips.forward);
#pragma unroll
            for (int s = 0; s < S; ++s) {
                carried[row_of(s, element.b, B) * width + element.place] = after[s];
                round_to(states[(row_of(s, element.b, B) * T + t) * width + element.place], after[s]);
            }
            if (SAVE_GATES) {
                Element* saved = call->gates;
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    round_to(saved[((element.b * T + t) * G + k) * width + element.place], gates[e][k]);
                }
            }
        }
    }
}

// Writes the record that the launches of steps behind it in the stream read.
extern "C" __global__ void set_call(ForwardCall* to, const __grid_constant__ ForwardCall call) {
    *to = call;
}

}  // namespace per_step
