// What becomes of gradients on their way through R, as the problem's options have it.

// The gradient that reaches h.
__device__ inline float clipped(float d_h, float clipval) {
    return CLIP ? pointwise::maximum(pointwise::minimum(d_h, clipval), -clipval) : d_h;
}

// The gates' gradients that it is made of, where it is clipped: what becomes infinite by rounding to
// float16 is its largest number to the product, so that the clip contains it.

template <typename Number>
constexpr bool CONTAINS = false;
template <>
constexpr bool CONTAINS<float16> = CLIP;

// Of one that is not yet rounded.
template <typename Number>
__device__ inline float contained(float d_gate, Number) {
    const bool becomes_infinite = fabsf(d_gate) > 65504.0f && is_finite(d_gate);
    return CONTAINS<Number> && becomes_infinite ? copysignf(65504.0f, d_gate) : d_gate;
}

// Of a word of two that are: no word tells what has become infinite from what was before.
template <typename Number>
__device__ inline unsigned contained(unsigned word, Number) {
    return word;
}

__device__ inline unsigned contained(unsigned word, float16) {
    return CLIP ? clip_pair(word, 0x7bff7bffu, float16{}) : word;
}
