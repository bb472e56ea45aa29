// Several copies in one launch. Up to MOST are of contiguous elements:
//
//     to[i] = from[i] + plus[i]
//
// Where `plus` is null nothing is added. Two are of what a scan has written, h of each step and the last
// states, for a caller who has time before sequences and all in one type:
//
//     h_by_time[t, b, i] = states[0, b, t, i]
//     last_rounded[j]    = last_states[j]
//
// A copy has the CTAs from the end of the one before to its own `end`. What is not asked for has none.

#include "problem.cuh"
#include "copies/all.cuh"

namespace copying {

// Calls `one` for the thread's elements, out of so many that the CTAs from `first_cta` to `end` share.
template <typename One>
__device__ inline void for_each(int first_cta, int end, long long count, const One& one) {
    if (blockIdx.x < first_cta || blockIdx.x >= end) return;
    const long long stride = static_cast<long long>(end - first_cta) * THREADS;
    for (long long i = (blockIdx.x - first_cta) * THREADS + threadIdx.x; i < count; i += stride) one(i);
}

struct Copy {
    const Element* from;
    const Element* plus;
    Element* to;
    long long count;
    int end;
};

extern "C" __global__ void __launch_bounds__(THREADS)
copies(CALL) {
    const Copy all[] = {COPIES};
    int first = 0;
    // Unrolled, the list is the launch's constants: no thread has a copy of it.
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
        const Copy& copy = all[i];
        for_each(first, copy.end, copy.count, [&](long long j) {
            if (copy.plus) {
                round_to(copy.to[j], to_float(copy.from[j]) + to_float(copy.plus[j]));
            } else {
                copy.to[j] = copy.from[j];
            }
        });
        first = copy.end;
    }
    for_each(first, h_end, h_count, [&](unsigned j) {
        const unsigned row = j / width, t = row / B, b = row % B;
        h_by_time[j] = states[(b * T + t) * width + j % width];
    });
    for_each(h_end, last_end, last_count, [&](long long j) { round_to(last_rounded[j], last_states[j]); });
}

}  // namespace copying
