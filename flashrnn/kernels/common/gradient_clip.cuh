// Clipping of the gradient that flows back through R. CLIP is a constant of every backward scan
// (problem.cuh).

#include "problem.cuh"
#include "common/mma.cuh"

// The gradient that reaches h through R.
__device__ inline float clipped(float d_h, float clipval) {
    return CLIP ? pointwise::maximum(pointwise::minimum(d_h, clipval), -clipval) : d_h;
}

// Finite gradients of gates may overflow when they are rounded to float16. Without a clip the infinity
// stands for them. With a clip the product must take float16's largest number instead: infinities may
// add up to NaN, which no clip bounds.

// Whether factors of the product are bounded so.
template <typename Number>
constexpr bool CONTAINS = false;
template <>
constexpr bool CONTAINS<float16> = CLIP;

// The factor for a gradient that is not yet rounded.
template <typename Number>
__device__ inline float contained(float d_gate, Number) {
    const bool becomes_infinite = fabsf(d_gate) > 65504.0f && is_finite(d_gate);
    return CONTAINS<Number> && becomes_infinite ? copysignf(65504.0f, d_gate) : d_gate;
}

// The factors for a word of rounded gradients. Those that were infinite before they were rounded are
// bounded too, for the word does not tell.
template <typename Number>
__device__ inline unsigned contained(unsigned word, Number) {
    return word;
}

__device__ inline unsigned contained(unsigned word, float16) {
    return CLIP ? clip_pair(word, 0x7bff7bffu, float16{}) : word;
}
