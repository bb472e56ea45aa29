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

#include "per_step/sequences.cuh"

namespace per_step {

static_assert(SEGMENTS == GR && UNITS == ROWS);

// A template, so that what only some records have is looked up in those alone (sequences.cuh).
template <typename Call>
__device__ __forceinline__ void run_step(const Call* __restrict__ call, int ahead, int N, int D,
                                         Partial& partial) {
    griddepcontrol_launch();
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
    Sequence own[ELEMENTS];
    if constexpr (SEQUENCED) {
        // As in forward.cu: a CTA whose sequences do not have the step yet. None of no steps goes on to
        // the last launch, which is no step.
        if (!sequence_of(call, tile.first_sequence, n).has(t < 0 ? 0 : t)) {
            griddepcontrol_wait();
            return;
        }
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            own[e] = sequence_of(call, ThreadElement(tile, e, B, D).b, n);
        }
#pragma unroll
        for (int n_tile = 0; n_tile < N_TILES; ++n_tile) {
            const Sequence column = sequence_of(call, sequence + 8 * n_tile, n);
            const long long row = column.first_row + column.time(t + 1);
            product.own_columns[n_tile] =
                recurrent && column.has(t + 1) ? d_gates + row * G * width + n * D : nullptr;
        }
    }
    // Whether an element takes part in the launch, and where its numbers of a step and those that it
    // carries stand.
    const auto takes_part = [&](const ThreadElement& element, int e) {
        return element.exists && (!SEQUENCED || own[e].has(t < 0 ? 0 : t));
    };
    const auto row_of_step = [&](const ThreadElement& element, int e, long long step) {
        return SEQUENCED ? own[e].first_row + own[e].time(step) : element.b * T + step;
    };
    const auto index_of = [&](const ThreadElement& element, int e) {
        return SEQUENCED ? own[e].index : element.b;
    };

    // All of these loads are issued before the first result is used.
    Element from_gates[ELEMENTS][G] = {}, from_states[ELEMENTS][S] = {}, given[ELEMENTS][S] = {};
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(tile, e, B, D);
        const Element* saved =
            call->gates + row_of_step(element, e, t) * G * width + element.place;
        const Element* states =
            call->states + row_of_step(element, e, t - 1) * width + element.place;
        const long long of_step = SEQUENCED ? own[e].offset(t, call->d_states_b, call->d_states_t)
                                            : element.b * call->d_states_b + t * call->d_states_t;
        const Element* d_states =
            call->d_states + of_step + n * call->d_states_n + element.d * call->d_states_d;
        const long long states_s = (SEQUENCED ? rows_of_all(call) : B * T) * width;
        const long long d_states_s = call->d_states_s;
        materialize(saved);
        materialize(states);
        if (GIVEN) materialize(d_states);
#pragma unroll
        for (int k = 0; k < G; ++k) {
            if (takes_part(element, e) && t >= 0) from_gates[e][k] = saved[k * width];
        }
#pragma unroll
        for (int s = 0; s < S; ++s) {
            if (takes_part(element, e) && t > 0) from_states[e][s] = states[s * states_s];
            if (s < GIVEN && takes_part(element, e) && t >= 0) given[e][s] = d_states[s * d_states_s];
        }
    }

    // Addresses of what step t + 1 writes, computed before the wait for it: see forward.cu.
    const float* from[ELEMENTS];
    long long from_s = B * width;
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(tile, e, B, D);
        from[e] = d_carried + index_of(element, e) * width + element.place;
    }
    // With options of sequences the host has put them there.
    if (!SEQUENCED && t == T - 1) {
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
                before[e][s] =
                    initial[s * call->initial_s + index_of(element, e) * call->initial_b +
                            n * call->initial_n + element.d * call->initial_d];
            }
        }
        if constexpr (SEQUENCED) {
            if (!element.exists || !is_cut(call, own[e], t)) continue;
#pragma unroll
            for (int s = 0; s < S; ++s) before[e][s] = start_of(call, own[e], t, s, n, element.d);
        }
    }

    griddepcontrol_wait();
    float carried[ELEMENTS][S];
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(tile, e, B, D);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            const bool exists = element.exists && (SEQUENCED || GIVEN_LAST || t + 1 < T);
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
        if (takes_part(element, e)) {
            const long long index = index_of(element, e);
            if constexpr (SEQUENCED) {
                if (recurrent && own[e].has(t + 1)) {
                    carried[e][0] +=
                        clipped(total(partial, element.column, element.row), clips.gradient);
                }
                // What would go on from a step that starts anew belongs to what it starts with.
                if (is_cut(call, own[e], t + 1)) {
                    float* to = call->d_reset_states + n * D + element.d +
                                own[e].offset_of_start(t + 1, call->d_reset_states_b,
                                                       call->d_reset_states_t);
#pragma unroll
                    for (int s = 0; s < S; ++s) {
                        if (call->d_reset_states) to[s * call->d_reset_states_s] += carried[e][s];
                        carried[e][s] = 0.0f;
                    }
                }
            }
#pragma unroll
            for (int s = 0; s < S; ++s) gradients[e][s] += carried[e][s];
            if (!SEQUENCED && recurrent) {
                gradients[e][0] += clipped(total(partial, element.column, element.row), clips.gradient);
            }
            float d_before[S], d_preactivations[G];
            if (t >= 0) {
                derivative(before[e], gates[e], gradients[e], d_before, d_preactivations, clips.forward);
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    const long long row = row_of_step(element, e, t);
                    round_to(d_gates[(row * G + k) * width + element.place], d_preactivations[k]);
                }
            }
#pragma unroll
            for (int s = 0; s < S; ++s) {
                const long long at = row_of(s, index, B) * width + element.place;
                d_carried[at] = t >= 0 ? d_before[s] : gradients[e][s];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
step_backward(const BackwardCall* __restrict__ call, int ahead, int N, int D) {
    __shared__ Partial partial;
    run_step(call, ahead, N, D, partial);
}

// Writes the record that the launches of steps behind it in the stream read.
extern "C" __global__ void set_call(BackwardCall* to, const __grid_constant__ BackwardCall call) {
    *to = call;
}

}  // namespace per_step
