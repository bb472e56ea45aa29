// A sequence of a call: where its rows lie, how many there are, and in which order a head computes them.
//
// Step 0 of a head is the first that it computes. A head that runs backwards computes the last row of a
// sequence first. Rows are those of [B, T], or of a packed batch, [1, total].
//
// Constants of the plan (problem.cuh), each false where a call does not have the option: RESETS, some
// steps start anew; STARTS, from given states and not from zeros; RAGGED, sequences have lengths of their
// own; PACKED, they lie one behind another; REVERSE, some heads run backwards. The host sorts ragged
// sequences, the longest first. A CTA's sequences are neighbours in that order, so that they end at
// nearly the same step.

#include "problem.cuh"

constexpr bool SEQUENCED = RESETS || RAGGED || REVERSE;

// In shared memory, one for each line of a CTA.
struct alignas(16) Sequence {
    // Which of the batch it is; its first row; whether the head runs backwards.
    int index, first_row, length, backwards;

    // The same as a constant where no head does.
    __device__ bool runs_backwards() const { return REVERSE && backwards; }

    // Where in the sequence a step is.
    __device__ long long time(int step) const { return runs_backwards() ? length - 1 - step : step; }

    // Which of all rows a step is.
    __device__ long long row(int step) const { return first_row + time(step); }

    // The offset of a step in a tensor with such strides from sequence to sequence and from row to row.
    __device__ long long offset(int step, long long sequence_stride, long long row_stride) const {
        const long long first = PACKED ? first_row * row_stride : index * sequence_stride;
        return first + time(step) * row_stride;
    }

    // The same in reset_states, which have one start a sequence (row_stride is 0) or one a row.
    __device__ long long offset_of_start(int step, long long sequence_stride, long long row_stride) const {
        return index * sequence_stride + ((PACKED ? first_row : 0) + time(step)) * row_stride;
    }

    // How far the next step is from one.
    __device__ long long advance(long long row_stride) const {
        return runs_backwards() ? -row_stride : row_stride;
    }

    __device__ bool has(int step) const { return step >= 0 && step < length; }

    // A flag cuts its row from the one before: a step is cut from the step before it by its own flag,
    // or, backwards, by the other's.
    __device__ bool may_be_cut(int step) const { return has(step) && (step > 0 || !runs_backwards()); }
    __device__ long long flag(int step) const { return first_row + time(step) + runs_backwards(); }

    // Whether a step is cut from the one before it; not 0 if so. The load is not waited for.
    __device__ unsigned is_cut(int step, const int* flags) const {
        return may_be_cut(step) ? load_opaque(reinterpret_cast<const unsigned*>(flags) + flag(step)) : 0;
    }
};

// The sequence at a place of the order in which CTAs take them.
__device__ inline Sequence sequence_at(long long place, long long T, const int* order, const int* firsts,
                                       const int* lengths, const int* head_runs_backwards, int n) {
    Sequence sequence;
    sequence.index = RAGGED ? order[place] : place;
    sequence.first_row = RAGGED ? firsts[place] : place * T;
    sequence.length = RAGGED ? lengths[place] : T;
    sequence.backwards = REVERSE ? head_runs_backwards[n] : 0;
    return sequence;
}

// Fills the table of a CTA's LINES sequences, from `first` on in that order, by all its THREADS threads;
// beyond `last`, the last one that exists, with that one. Returns the number of steps of the first of
// them, which is the longest. All threads meet at a barrier here.
template <int LINES, int THREADS>
__device__ inline int fill_table(Sequence* table, long long first, int last, long long T,
                                 const int* order, const int* firsts, const int* lengths,
                                 const int* head_runs_backwards, int n) {
    for (int i = threadIdx.x; i < LINES; i += THREADS) {
        table[i] = sequence_at(first + (i < last ? i : last), T, order, firsts, lengths,
                               head_runs_backwards, n);
    }
    __syncthreads();
    return table[0].length;
}

// What states go back to at a cut. Without an origin, zeros.
struct ResetStates {
    const float* origin;
    long long state, sequence, row, unit;

    __device__ float value(int s, const Sequence& own, int step, int d) const {
        if (!origin) return 0.0f;
        return __ldg(origin + s * state + own.offset_of_start(step, sequence, row) + d * unit);
    }
};
