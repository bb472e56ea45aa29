// What kernels read of a call's options, made of the options as they are given, in one launch:
//
// - the order in which CTAs take the sequences, the longest first, and in that order their first rows and
//   their lengths; also their lengths in the order of the batch;
// - the flags of resets, in 4 bytes each;
// - for each row, where h before its step is, and what sequences start with and go back to, rounded as h
//   is (Before in backends/gradients.py);
// - zeros in the rows of a packed batch that are no step of any sequence.
//
// What is not asked for has no address. The first order_ctas CTAs have the order, a warp for each
// sequence; the next row_ctas the rows, ROWS_A_CTA each; the others what sequences start with, a warp for
// each start. Lengths and cu_seqlens out of range are moved into it: no table leads out of the batch.

#include "problem.cuh"

namespace sequence_tables {

constexpr int WARPS = THREADS / 32;

// Where sequences lie among all rows.
struct Batch {
    // In shared memory: lengths, or of a packed batch where sequences begin and the last one ends.
    const int* bounds;
    long long T;
    bool is_ragged, is_packed;

    __device__ int length(int sequence) const {
        if (is_packed) return bounds[sequence + 1] - bounds[sequence];
        return is_ragged ? bounds[sequence] : T;
    }
    __device__ int first_row(int sequence) const {
        return is_packed ? bounds[sequence] : sequence * T;
    }
};

// Fills the bounds by all threads: clamped to 0 and T, and cu_seqlens to the ones before.
__device__ inline void load_bounds(int* bounds, int count, const void* given, bool is_wide,
                                   long long stride, long long T, bool is_packed) {
    __shared__ int largest[THREADS];
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const long long x = is_wide ? static_cast<const long long*>(given)[i * stride]
                                    : static_cast<const int*>(given)[i * stride];
        bounds[i] = x < 0 ? 0 : x > T ? T : x;
    }
    __syncthreads();
    if (!is_packed) return;
    // A thread has the next `share` of them. It looks for the largest of its own, and then for the
    // largest that threads before it have.
    const int share = (count + THREADS - 1) / THREADS, begin = threadIdx.x * share;
    const int end = begin + share < count ? begin + share : count;
    int own = 0;
#pragma unroll 1
    for (int i = begin; i < end; ++i) {
        if (bounds[i] > own) own = bounds[i];
        bounds[i] = own;
    }
    largest[threadIdx.x] = own;
#pragma unroll 1
    for (int distance = 1; distance < THREADS; distance *= 2) {
        __syncthreads();
        const int before = threadIdx.x >= distance ? largest[threadIdx.x - distance] : 0;
        __syncthreads();
        if (before > largest[threadIdx.x]) largest[threadIdx.x] = before;
    }
    __syncthreads();
    const int before = threadIdx.x ? largest[threadIdx.x - 1] : 0;
#pragma unroll 1
    for (int i = begin; i < end && bounds[i] < before; ++i) bounds[i] = before;
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS)
make_tables(CALL) {
    __shared__ int bounds[MOST_SEQUENCES + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long width = static_cast<long long>(N) * D;
    const bool of_order = blockIdx.x < order_ctas;
    const int of_rows = blockIdx.x - order_ctas;

    if (!of_order && of_rows >= row_ctas) {
        const long long start = static_cast<long long>(of_rows - row_ctas) * WARPS + warp;
        if (start >= starts) return;
        const int k = start - B;
        const long long of_sequence = k / starts_a_sequence, t = k % starts_a_sequence;
        const float* from = k < 0 ? initial + start * initial_b
                                  : reset_states + of_sequence * reset_states_b + t * reset_states_t;
        const long long head = k < 0 ? initial_n : reset_states_n, unit = k < 0 ? initial_d : reset_states_d;
        for (int i = lane; i < width; i += 32) {
            const float value = k >= 0 && !reset_states ? 0.0f : from[i / D * head + i % D * unit];
            round_to(h_starts[start * width + i], value);
        }
        return;
    }

    const Batch batch = {bounds, T, given != nullptr, is_packed != 0};
    if (given) load_bounds(bounds, B + is_packed, given, is_wide, given_b, T, batch.is_packed);
    if (of_order) {
        const int sequence = blockIdx.x * WARPS + warp;
        if (sequence >= B) return;
        const int own = batch.length(sequence);
        // How many sequences come before it: longer ones, and of the same length those before it.
        int place = 0;
        for (int i = lane; i < B; i += 32) {
            const int length = batch.length(i);
            place += length > own || (length == own && i < sequence);
        }
        for (int other = 1; other < 32; other *= 2) place += __shfl_xor_sync(~0u, place, other);
        if (lane) return;
        order[place] = sequence;
        first_rows[place] = batch.first_row(sequence);
        sorted_lengths[place] = own;
        lengths[sequence] = own;
        return;
    }

    const long long begin = static_cast<long long>(of_rows) * ROWS_A_CTA;
    const long long end = begin + ROWS_A_CTA < rows ? begin + ROWS_A_CTA : rows;
    // Rows are numbered by 32 bits.
    const int steps = T, count = end - begin;
    const auto flag = [&](int row) {
        const long long of_sequence = is_packed ? 0 : row / steps, t = is_packed ? row : row % steps;
        return reset && reset[of_sequence * reset_b + t * reset_t];
    };
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const int row = begin + i;
        const bool is_cut = flag(row);
        if (flags) flags[row] = is_cut;
        if (!before_rows) continue;
        int sequence = is_packed ? 0 : row / steps;
        if (is_packed) {
            // The first one that ends behind the row; B if none does.
            for (int high = B; sequence < high;) {
                const int middle = (sequence + high) / 2;
                if (bounds[middle + 1] > row) high = middle;
                else sequence = middle + 1;
            }
        }
        const bool exists = sequence < B;
        const int step = exists ? row - batch.first_row(sequence) : 0;
        const int length = exists ? batch.length(sequence) : 0;
        const int start = -1 - sequence, zeros = -1 - B;
        const int reset_start = !reset_states           ? zeros
                                : starts_a_sequence > 1 ? zeros - row
                                                        : zeros - sequence;
        // Gradients are 0 in rows that are no step, and so is their own h; a start may be NaN.
        const bool is_step = step >= 0 && step < length;
        before_rows[row] = !is_step ? row : is_cut ? reset_start : step == 0 ? start : row - 1;
        if (directions < 2) continue;
        // A flag cuts its row from the one before.
        before_rows[rows + row] = !is_step             ? row
                                  : step == length - 1 ? start
                                  : flag(row + 1)      ? reset_start
                                                       : row + 1;
    }
    if (!idle) return;
    const long long first = bounds[0], last = bounds[B];
#pragma unroll 1
    for (int span = 0; span < idle_spans; ++span) {
        Element* const of_span = idle + span * rows * idle_width;
        const long long before = (first < end ? first : end) * idle_width;
#pragma unroll 1
        for (long long i = begin * idle_width + threadIdx.x; i < before; i += THREADS) {
            round_to(of_span[i], 0.0f);
        }
        const long long behind = (last > begin ? last : begin) * idle_width;
#pragma unroll 1
        for (long long i = behind + threadIdx.x; i < end * idle_width; i += THREADS) {
            round_to(of_span[i], 0.0f);
        }
    }
}

}  // namespace sequence_tables
