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

#include "per_step/sequences.cuh"

namespace per_step {

// Rows of the product: gate k that R feeds has UNITS of them.
static_assert(SEGMENTS == 1 && GR * UNITS <= ROWS);

// A template, so that what only some records have is looked up in those alone (sequences.cuh).
template <typename Call>
__device__ __forceinline__ void run_step(const Call* __restrict__ call, int ahead, int N, int D,
                                         Partial& partial) {
    griddepcontrol_launch();
    const Tile tile(N, D);
    const int B = static_cast<int>(call->B);
    const int n = tile.n, lane = threadIdx.x % 32;
    // The step: with options of sequences, what a sequence computes so many steps after its first.
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
    Sequence own[ELEMENTS];
    if constexpr (SEQUENCED) {
        // The first sequence is the longest. The launch before need not be complete for a CTA without
        // steps, but each launch must be behind it.
        if (!sequence_of(call, tile.first_sequence, n).has(t)) {
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
            product.own_columns[n_tile] =
                column.has(t) ? h_before(call, column, t, width) + n * D : nullptr;
        }
    }
    // Where an element's numbers of the step and those that it carries stand.
    const auto row_of_step = [&](const ThreadElement& element, int e) {
        return SEQUENCED ? own[e].first_row + own[e].time(t) : element.b * T + t;
    };
    const auto has_step = [&](const ThreadElement& element, int e) {
        return element.exists && (!SEQUENCED || own[e].has(t));
    };
    const auto index_of = [&](const ThreadElement& element, int e) {
        return SEQUENCED ? own[e].index : element.b;
    };

    // All of these loads are issued before the first result is used.
    Element from_Wx[ELEMENTS][G] = {}, from_b[ELEMENTS][G] = {};
    const long long Wx_g = call->Wx_g;
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(tile, e, B, D);
        const long long of_step = SEQUENCED ? own[e].offset(t, call->Wx_b, call->Wx_t)
                                            : element.b * call->Wx_b + t * call->Wx_t;
        const Element* Wx = call->Wx + of_step + n * call->Wx_n + element.d * call->Wx_d;
        const Element* bias = call->b + element.place;
        materialize(Wx);
        materialize(bias);
#pragma unroll
        for (int k = 0; k < G; ++k) {
            if (has_step(element, e) && FED_WX[k] >= 0) from_Wx[e][k] = Wx[FED_WX[k] * Wx_g];
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
        from[e] = carried + index_of(element, e) * width + element.place;
    }
    if (t == 0) {
        from_s = call->initial_s;
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            const ThreadElement element(tile, e, B, D);
            from[e] = call->initial + index_of(element, e) * call->initial_b +
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
        if constexpr (SEQUENCED) {
            if (!element.exists || !is_cut(call, own[e], t)) continue;
#pragma unroll
            for (int s = 0; s < S; ++s) before[e][s] = start_of(call, own[e], t, s, n, element.d);
        }
    }
    product.run(partial, [](int) { return 0; });

#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(tile, e, B, D);
        if (has_step(element, e)) {
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
                carried[row_of(s, index_of(element, e), B) * width + element.place] = after[s];
                if (s >= STORED) continue;
                const long long row = SEQUENCED ? s * rows_of_all(call) + row_of_step(element, e)
                                                : row_of(s, element.b, B) * T + t;
                round_to(states[row * width + element.place], after[s]);
            }
            if (SAVE_GATES) {
                Element* saved = call->gates;
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    const long long row = row_of_step(element, e);
                    round_to(saved[(row * G + k) * width + element.place], gates[e][k]);
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
step_forward(const ForwardCall* __restrict__ call, int ahead, int N, int D) {
    __shared__ Partial partial;
    run_step(call, ahead, N, D, partial);
}

// Writes the record that the launches of steps behind it in the stream read.
extern "C" __global__ void set_call(ForwardCall* to, const __grid_constant__ ForwardCall call) {
    *to = call;
}

}  // namespace per_step
