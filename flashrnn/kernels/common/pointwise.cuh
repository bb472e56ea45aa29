// The operations of cells/operations.py that are no operators of C, on float32 values.
//
// No intermediate value overflows into NaN, and none loses its relative precision near zero.

#include "types.cuh"

#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fffffff)

namespace pointwise {

__device__ inline float exp(float x) { return exp2_approximate(x * 1.4426950408889634f); }

__device__ inline float sigmoid(float x) {
    // For x << 0 exp(-x) overflows to infinity, and 1 / inf = 0 is right.
    return reciprocal_approximate(1.0f + exp(-x));
}

// For results that are rounded to bfloat16 the hardware's approximation is precise enough.
__device__ inline float tanh(float x, bfloat16) { return tanh_approximate(x); }

template <typename Rounded>
__device__ inline float tanh(float x, Rounded) {
    // 1 - 2 e / (1 + e) loses digits by cancellation where e is close to 1, that is near x = 0. There
    // tanh's Taylor polynomial is exact to 1e-8.
    const float square = x * x, e = exp(-2.0f * fabsf(x));
    const float ratio = 1.0f - 2.0f * e * reciprocal_approximate(1.0f + e);
    float series = 62.0f / 2835.0f * square - 17.0f / 315.0f;
    series = (series * square + 2.0f / 15.0f) * square - 1.0f / 3.0f;
    return square < 0.0625f ? x + x * square * series : copysignf(ratio, x);
}

__device__ inline float tanh(float x) { return tanh(x, Element{}); }

// log1p of numbers from 0 to 1, and a little beyond: x - x^2 / 2 + ... as a polynomial of degree 10, by
// Estrin's scheme. It is right to 1.5 units in the last place, and has no branch.
__device__ inline float log1p_up_to_1(float x) {
    const float square = x * x;
    float series = -0.00330106635f * square + (0.0201304853f * x - 0.0575343296f);
    series = series * square + (0.106683888f * x - 0.153488159f);
    series = series * square + (0.196932629f * x - 0.24958165f);
    series = series * square + (0.333304763f * x - 0.499999374f);
    return series * square + x;
}

// Like PyTorch's, these give NaN where either argument is NaN.

__device__ inline float maximum(float x, float y) { return x > y || x != x ? x : y; }

__device__ inline float minimum(float x, float y) { return x < y || x != x ? x : y; }

// 1, 0 or -1; 0 for NaN.
__device__ inline float sign(float x) { return float(x > 0.0f) - float(x < 0.0f); }

}  // namespace pointwise
