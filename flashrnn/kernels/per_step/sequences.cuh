// Which sequences a launch computes a step of, and where their rows lie, for calls with options of
// sequences (common/sequence.cuh). What these read is in records of such calls only, so all of them are
// templates of the record.

#include "common/sequence.cuh"
#include "per_step/product.cuh"

namespace per_step {

// The sequence at a place of the order in which CTAs take them; beyond the batch one without steps.
template <typename Call>
__device__ inline Sequence sequence_of(const Call* call, long long place, int n) {
    if (place >= call->B) return {};
    return sequence_at(place, call->T, call->sequence_order, call->sequence_rows, call->sequence_lengths,
                       call->runs_backwards, n);
}

template <typename Call>
__device__ inline long long rows_of_all(const Call* call) {
    if constexpr (SEQUENCED) return call->rows_of_all;
    else return 0;
}

// Whether a step starts anew.
template <typename Call>
__device__ inline bool is_cut(const Call* call, const Sequence& own, int step) {
    return RESETS && own.may_be_cut(step) && call->reset_flags[own.flag(step)];
}

// State s of a unit that a step starts anew with.
template <typename Call>
__device__ inline float start_of(const Call* call, const Sequence& own, int step, int s, int n, int d) {
    const float* origin = call->reset_states ? call->reset_states + n * call->reset_states_n : nullptr;
    const ResetStates starts = {origin, call->reset_states_s, call->reset_states_b, call->reset_states_t,
                                call->reset_states_d};
    return starts.value(s, own, step, d);
}

// h before a step of a sequence: of the step before, or what the sequence starts with.
template <typename Call>
__device__ inline const Element* h_before(const Call* call, const Sequence& own, int step,
                                          long long width) {
    const long long row = own.first_row + own.time(step);
    const long long of_h = call->before_rows[own.backwards * call->rows_of_all + row];
    return of_h >= 0 ? call->states + of_h * width : call->h_starts + (-1 - of_h) * width;
}

}  // namespace per_step
