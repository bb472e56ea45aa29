// Backward scan over time, for heads that a cluster of CTAs computes. reduce_scatter.cuh says which CTA
// and thread has which units and sequences, and how CTAs exchange parts of dh.
//
// What lives where:
//
// - registers: the first fragments of R (common/r_matrix.cuh); in float32, of the thread's elements,
//   the gradients of the states and the sums over time of the gates' gradients; the next step's inputs,
//   loaded a whole step ahead: the gates' pre-activations, the states before the step, and the
//   gradients given for the first GIVEN states after it;
// - shared memory: the fragments of R that registers have no place for; the received parts of dh, and
//   the gates' gradients that the CTA multiplies, two buffers of each; with options of sequences, a
//   table of the cluster's;
// - global memory: the fragments of R that have no other place; residuals and gradients, each read or
//   written by the thread that has the element.
//
// What orders the steps: a warp that has elements waits for the parts of dh from all CTAs; all threads
// of the CTA meet at one barrier a step, after the gates' gradients are written and before they are
// multiplied.
//
// The derivative of a step is linear in the gradient that is put in. So it is computed before dh has
// arrived: for the gradients that are known, and, once, for dh = 1, which gives slopes. When dh has
// arrived, its multiple of the slopes is added. Where a value is not finite this is not the same (0
// times infinity is NaN): there the derivative is computed again, from the whole gradient.
//
// All CTAs of a cluster take as many steps as its longest sequence has, since each waits for parts of dh
// from all. Until its own last step a sequence's elements carry the gradients of its last states, put
// zeros where gates' gradients are multiplied, and ignore the dh that arrives. What would go on from a
// step that starts anew, dh too, is added to the gradient of what it starts from.

#include "cluster/backward_product.cuh"
#include "common/loads.cuh"
#include "common/sequence.cuh"
#include "common/gradient_clip.cuh"

namespace cluster_backward {

constexpr int TABLE_BYTES = SEQUENCED ? SEQUENCES * int(sizeof(Sequence)) : 0;
constexpr int TABLE = EXCHANGE_BYTES + WARPS * IN_SHARED * 32 * sizeof(Fragment);
static_assert(TABLE + TABLE_BYTES == SHARED_MEMORY,
              "backward_plan.py computes another size of shared memory");
static_assert(IN_REGISTERS + IN_SHARED + IN_MEMORY == 2 * SLICES * ROW_TILES,
              "backward_plan.py counts other fragments of R");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
cluster_reduce_scatter_backward(CALL) {
    const int rank = blockIdx.x % GROUP_SIZE;
    const WorkTile work(blockIdx.x / GROUP_SIZE, B);
    Exchange exchange(shared_memory(), rank);
    Matrix matrix(shared_memory() + EXCHANGE_BYTES, static_cast<Fragment*>(R_in_memory));
    if (!CUT) load_matrix(matrix, R, work.n, N, rank);

    Sequence* table = reinterpret_cast<Sequence*>(shared_memory() + TABLE);
    long long steps = T;
    if (SEQUENCED) {
        const long long left = B - 1 - work.first_sequence;
        const int last = left < SEQUENCES ? left : SEQUENCES - 1;
        steps = fill_table<SEQUENCES, THREADS>(table, work.first_sequence, last, T, sequence_order,
                                               sequence_rows, sequence_lengths, runs_backwards, work.n);
    }
    // Which of the batch an element's sequence is.
    const auto index_of = [&](const ThreadElement& element) {
        return SEQUENCED ? table[element.cluster_sequence].index : element.sequence;
    };
    const ResetStates starts = {STARTS ? reset_states + work.n * reset_states_n : nullptr,
                                reset_states_s, reset_states_b, reset_states_t, reset_states_d};

    const long long width = static_cast<long long>(N) * D;
    float d_carried[ELEMENTS][S], d_bias_sums[ELEMENTS][G] = {};
    Loaded input_gates[ELEMENTS][G], input_states[ELEMENTS][S], given[ELEMENTS][S];
    // Of the step that was fetched last: where its inputs are. Of the step that was computed last:
    // where its gates' gradients were written.
    const Element *from_gates[ELEMENTS], *from_states[ELEMENTS], *from_given[ELEMENTS];
    Element* to_gates[ELEMENTS];
    // Whether a step starts anew: the one that was fetched last, the one that was computed last.
    int fetched_is_cut[ELEMENTS] = {};
    bool is_cut[ELEMENTS] = {};
    // Loads the inputs of step t, which is the one before the last that was fetched. For t = -1 the
    // addresses stay, and what is loaded is not used.
    const auto fetch_inputs = [&](long long t) {
        const long long plane = (PACKED ? T : B * T) * width;
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            bool exists = true;
            // From a row that the head computes to the one that it computes next.
            long long next_row = 1;
            if constexpr (SEQUENCED) {
                const ThreadElement element(e, rank, work, B);
                const Sequence& own = table[element.cluster_sequence];
                // In place of a step that is not there it loads row 0, and does not use it.
                exists = own.has(t);
                next_row = own.advance(1);
                const long long row = exists ? own.first_row + own.time(t) : 0;
                const long long before = exists && t > 0 ? row - next_row : row;
                const long long column = work.n * D + element.d;
                from_gates[e] = gates + row * G * width + column;
                from_states[e] = states + before * width + column;
                from_given[e] = d_states + (exists ? own.offset(t, d_states_b, d_states_t) : 0) +
                                work.n * d_states_n + element.d * d_states_d;
                fetched_is_cut[e] = RESETS && own.may_be_cut(t) ? reset_flags[own.flag(t)] : 0;
            } else {
                from_gates[e] -= t >= 0 ? G * width : 0;
                from_states[e] -= t > 0 ? width : 0;
                from_given[e] -= t >= 0 ? d_states_t : 0;
            }
            const bool ahead = exists && t > PREFETCHED;
            const Element* const ahead_gates =
                from_gates[e] - (ahead ? PREFETCHED * next_row * G * width : 0);
            const Element* const ahead_states =
                from_states[e] - (ahead ? PREFETCHED * next_row * width : 0);
            const Element* const ahead_given =
                from_given[e] - (ahead ? PREFETCHED * next_row * d_states_t : 0);
#pragma unroll
            for (int k = 0; k < G; ++k) {
                input_gates[e][k].load(from_gates[e] + k * width);
                prefetch_l2(ahead_gates + k * width);
            }
#pragma unroll
            for (int s = 0; s < S; ++s) {
                input_states[e][s].load(from_states[e] + s * plane);
                prefetch_l2(ahead_states + s * plane);
                if (s >= GIVEN) continue;
                given[e][s].load(from_given[e] + s * d_states_s);
                prefetch_l2(ahead_given + s * d_states_s);
            }
        }
    };
    // The residuals of step t again, after the inputs of the next step have taken their registers.
    const auto load_residuals = [&](float (&preactivations)[G], float (&before)[S],
                                    const ThreadElement& element, long long t, bool cut) {
        const Sequence& own = table[element.cluster_sequence];
        const long long row = SEQUENCED ? own.first_row + own.time(t) : element.sequence * T + t;
        const long long all_rows = PACKED ? T : B * T, column = work.n * D + element.d;
#pragma unroll
        for (int k = 0; k < G; ++k) {
            preactivations[k] = to_float(gates[(row * G + k) * width + column]);
        }
#pragma unroll
        for (int s = 0; s < S; ++s) {
            const long long row_before = SEQUENCED ? s * all_rows + row - own.advance(1)
                                                   : s * B * T + row - 1;
            before[s] = t > 0 ? to_float(states[row_before * width + column])
                              : initial[s * initial_s + index_of(element) * initial_b +
                                        work.n * initial_n + element.d * initial_d];
            if (RESETS && cut) before[s] = starts.value(s, own, t, element.d);
        }
    };
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(e, rank, work, B);
        const float* from =
            d_last + index_of(element) * d_last_b + work.n * d_last_n + element.d * d_last_d;
#pragma unroll
        for (int s = 0; s < S; ++s) {
            d_carried[e][s] = GIVEN_LAST && element.exists ? from[s * d_last_s] : 0.0f;
        }
        if (SEQUENCED) continue;
        const long long column = work.n * D + element.d;
        from_gates[e] = gates + (element.sequence + 1) * T * G * width + column;
        to_gates[e] = d_gates + (element.sequence + 1) * T * G * width + column;
        from_states[e] = states + ((element.sequence + 1) * T - 1) * width + column;
        from_given[e] = d_states + element.sequence * d_states_b + T * d_states_t +
                        work.n * d_states_n + element.d * d_states_d;
    }
    fetch_inputs(steps - 1);
    // The gradient of what an element goes back to at a step, which only this thread adds to.
    const auto reset_gradient = [&](const ThreadElement& element, long long t) {
        const Sequence& own = table[element.cluster_sequence];
        return d_reset_states + own.offset_of_start(t, d_reset_states_b, d_reset_states_t) +
               work.n * D + element.d;
    };
    // Where the step that was computed last starts anew: what it hands on belongs to its start.
    const auto leave_cut_step = [&](int e, const ThreadElement& element, long long t) {
        if (!RESETS || !is_cut[e]) return;
#pragma unroll
        for (int s = 0; s < S; ++s) {
            if (STARTS && d_reset_states && element.exists) {
                reset_gradient(element, t)[s * d_reset_states_s] += d_carried[e][s];
            }
            d_carried[e][s] = 0.0f;
        }
    };

    for (long long t = steps - 1; t >= 0; --t) {
        float d_preactivations[ELEMENTS][G];
        if (ThreadElement::any_in_warp()) {
            // Slopes: the derivatives by dh. All this is computed while dh is on its way.
            float state_slopes[ELEMENTS][S], gate_slopes[ELEMENTS][G], d_after[ELEMENTS][S];
            // 0, or NaN where a value is not finite.
            float finite[ELEMENTS] = {};
            // Whether this step starts anew.
            bool cuts[ELEMENTS];
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) {
                const ThreadElement element(e, rank, work, B);
                const Sequence& own = table[element.cluster_sequence];
                leave_cut_step(e, element, t + 1);
                cuts[e] = RESETS && fetched_is_cut[e];
                float preactivations[G], before[S], d_h[S] = {1.0f};
#pragma unroll
                for (int k = 0; k < G; ++k) preactivations[k] = input_gates[e][k].value();
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    before[s] = input_states[e][s].value();
                    if (t == 0 && element.exists) {
                        before[s] = initial[s * initial_s + index_of(element) * initial_b +
                                            work.n * initial_n + element.d * initial_d];
                    }
                    if (RESETS && cuts[e]) before[s] = starts.value(s, own, t, element.d);
                    d_after[e][s] = d_carried[e][s];
                    if (s < GIVEN) d_after[e][s] += given[e][s].value();
                }
                // The gradients of the last states wait for the sequence's last step.
                float d_waiting[S];
#pragma unroll
                for (int s = 0; s < S; ++s) d_waiting[s] = d_carried[e][s];
                derivative(before, preactivations, d_after[e], d_carried[e], d_preactivations[e],
                           clips.forward);
                if (RAGGED && !own.has(t)) {
#pragma unroll
                    for (int s = 0; s < S; ++s) d_carried[e][s] = d_waiting[s];
#pragma unroll
                    for (int k = 0; k < G; ++k) d_preactivations[e][k] = 0.0f;
                }
                if (CUT) continue;
                derivative(before, preactivations, d_h, state_slopes[e], gate_slopes[e], clips.forward);
                // Computed before the wait, not where they are used.
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    materialize(d_preactivations[e][k]);
                    materialize(gate_slopes[e][k]);
                    finite[e] += 0.0f * d_preactivations[e][k] + 0.0f * gate_slopes[e][k];
                }
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    materialize(d_carried[e][s]);
                    materialize(state_slopes[e][s]);
                    finite[e] += 0.0f * d_carried[e][s] + 0.0f * state_slopes[e][s];
                }
                materialize(finite[e]);
            }
            fetch_inputs(t - 1);

            if (!CUT && t + 1 < steps) {
                exchange.wait();
#pragma unroll
                for (int e = 0; e < ELEMENTS; ++e) {
                    const ThreadElement element(e, rank, work, B);
                    const float d_h = clipped(exchange.sum_received(element), clips.gradient);
                    // The step computed last is not the sequence's, or starts anew.
                    if (RAGGED && !table[element.cluster_sequence].has(t + 1)) continue;
                    if (RESETS && is_cut[e]) {
                        if (STARTS && d_reset_states && element.exists) *reset_gradient(element, t + 1) += d_h;
                        continue;
                    }
                    if (!is_finite(finite[e] + d_h)) {
                        float preactivations[G], before[S];
                        load_residuals(preactivations, before, element, t, cuts[e]);
                        d_after[e][0] += d_h;
                        derivative(before, preactivations, d_after[e], d_carried[e],
                                   d_preactivations[e], clips.forward);
                        continue;
                    }
#pragma unroll
                    for (int k = 0; k < G; ++k) d_preactivations[e][k] += gate_slopes[e][k] * d_h;
#pragma unroll
                    for (int s = 0; s < S; ++s) d_carried[e][s] += state_slopes[e][s] * d_h;
                }
            }
            if (RESETS) {
#pragma unroll
                for (int e = 0; e < ELEMENTS; ++e) is_cut[e] = cuts[e];
            }
            if (!CUT) {
#pragma unroll
                for (int e = 0; e < ELEMENTS; ++e) {
                    float recurrent[GR];
#pragma unroll
                    for (int k = 0; k < GR; ++k) {
                        recurrent[k] = contained(d_preactivations[e][RECURRENT[k]], Element{});
                    }
                    exchange.put_gradients(recurrent, ThreadElement(e, rank, work, B));
                }
            }
        }
        if (!CUT) {
            named_barrier<THREADS>();
            float sums[ROW_TILES][N_TILES][4];
            multiply<Operand>(sums, matrix, exchange, R, work.n, N, rank);
            exchange.send(sums, rank);
            exchange.advance();
        }
        if (!ThreadElement::any_in_warp()) continue;
        // This too is done while dh is on its way.
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            const ThreadElement element(e, rank, work, B);
            if constexpr (SEQUENCED) {
                const Sequence& own = table[element.cluster_sequence];
                if (!own.has(t)) continue;
                const long long row = own.first_row + own.time(t);
                to_gates[e] = d_gates + row * G * width + work.n * D + element.d;
            } else {
                to_gates[e] -= G * width;
            }
            if (!element.exists) continue;
#pragma unroll
            for (int k = 0; k < G; ++k) {
                round_to(to_gates[e][k * width], d_preactivations[e][k]);
                d_bias_sums[e][k] += d_preactivations[e][k];
            }
        }
    }
    if (!ThreadElement::any_in_warp()) return;
    // Nothing has been sent where no sequence has a step.
    const bool receives = !CUT && (!SEQUENCED || steps > 0);
    if (receives) exchange.wait();
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(e, rank, work, B);
        const Sequence& own = table[element.cluster_sequence];
        if (receives && (!RAGGED || own.has(0))) {
            d_carried[e][0] += clipped(exchange.sum_received(element), clips.gradient);
        }
        leave_cut_step(e, element, 0);
        if (!element.exists) continue;
        const long long column = work.n * D + element.d;
        float* to = d_initial + index_of(element) * width + column;
#pragma unroll
        for (int s = 0; s < S; ++s) to[s * B * width] = d_carried[e][s];
        float* to_bias = d_bias + index_of(element) * G * width + column;
#pragma unroll
        for (int k = 0; k < G; ++k) to_bias[k * width] = d_bias_sums[e][k];
        if (!RAGGED || PACKED) continue;
        // Rows past the sequence's end.
#pragma unroll 1
        for (long long t = own.length; t < T; ++t) {
            Element* const rest = d_gates + (own.first_row + t) * G * width + column;
#pragma unroll
            for (int k = 0; k < G; ++k) round_to(rest[k * width], 0.0f);
        }
    }
}

}  // namespace cluster_backward
