// The table's operations that C's own operators do not give, on float32 values.
//
// None overflows into NaN, and none loses its relative precision near zero.

#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fffffff)

namespace pointwise {

__device__ inline float exp(float x) { return exp2_approximate(x * 1.4426950408889634f); }

__device__ inline float sigmoid(float x) {
    // exp overflows to inf for x << 0, and 1 / inf is the right 0.
    return reciprocal_approximate(1.0f + exp(-x));
}

// What is rounded to 8 bits of mantissa need not be right to 24.
__device__ inline float tanh(float x, bfloat16) { return tanh_approximate(x); }

template <typename Rounded>
__device__ inline float tanh(float x, Rounded) {
    // 1 - 2 e / (1 + e) cancels where e is close to 1; there an odd polynomial, tanh's Taylor
    // series, is exact to 1e-8.
    const float square = x * x, e = exp(-2.0f * fabsf(x));
    const float ratio = 1.0f - 2.0f * e * reciprocal_approximate(1.0f + e);
    float series = 62.0f / 2835.0f * square - 17.0f / 315.0f;
    series = (series * square + 2.0f / 15.0f) * square - 1.0f / 3.0f;
    return square < 0.0625f ? x + x * square * series : copysignf(ratio, x);
}

__device__ inline float tanh(float x) { return tanh(x, Element{}); }

// As PyTorch's, these give NaN where either argument is one.

__device__ inline float maximum(float x, float y) { return x > y || x != x ? x : y; }

__device__ inline float minimum(float x, float y) { return x < y || x != x ? x : y; }

// 1, 0 or -1; 0 for NaN.
__device__ inline float sign(float x) { return float(x > 0.0f) - float(x < 0.0f); }

}  // namespace pointwise
