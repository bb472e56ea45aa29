// The table's operations that C's own functions for float do not give.
//
// None overflows into NaN, and none loses its relative precision near zero.

#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fffffff)

__device__ inline float sigmoid(float x) {
    // exp overflows to inf for x << 0, and 1 / inf is the right 0.
    return 1.0f / (1.0f + expf(-x));
}

// As PyTorch's, these give NaN where either argument is one.

__device__ inline float maximum(float x, float y) { return x > y || x != x ? x : y; }

__device__ inline float minimum(float x, float y) { return x < y || x != x ? x : y; }

// 1, 0 or -1; 0 for NaN.
__device__ inline float sign(float x) { return float(x > 0.0f) - float(x < 0.0f); }
