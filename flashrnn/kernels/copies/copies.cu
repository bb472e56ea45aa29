// Several copies of contiguous elements in one launch:
//
//     to[i] = from[i] + plus[i]
//
// Where `plus` is null nothing is added. A copy has the CTAs from the end of the one before to its own `end`.

#include "problem.cuh"
#include "copies/all.cuh"

namespace copying {

struct Copy {
    const Element* from;
    const Element* plus;
    Element* to;
    long long count;
    int end;
};

__device__ inline void run(const Copy& copy, int first_cta) {
    const long long stride = static_cast<long long>(copy.end - first_cta) * THREADS;
    for (long long i = (blockIdx.x - first_cta) * THREADS + threadIdx.x; i < copy.count; i += stride) {
        if (copy.plus) {
            round_to(copy.to[i], to_float(copy.from[i]) + to_float(copy.plus[i]));
        } else {
            copy.to[i] = copy.from[i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
copies(CALL) {
    const Copy all[] = {COPIES};
    int first = 0;
    // Unrolled, the list is the launch's constants: no thread has a copy of it.
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
        if (blockIdx.x >= first && blockIdx.x < all[i].end) run(all[i], first);
        first = all[i].end;
    }
}

}  // namespace copying
