// What becomes of gradients on their way through R, as the problem's options have it.

// The gradient that reaches h.
__device__ inline float clipped(float d_h, float clipval) {
    return CLIP ? pointwise::maximum(pointwise::minimum(d_h, clipval), -clipval) : d_h;
}

// The gates' gradients that it is made of, where it is clipped: what has become infinite by rounding to
// float16 is its largest number to the product, so that the clip can contain it.

constexpr unsigned LARGEST_PAIR = 0x7bff7bff;
constexpr float LARGEST_FLOAT16 = 65504.0f;

// Of a word as it is stored, where nothing tells what has become infinite from what was before.
template <typename Number>
__device__ inline unsigned contained(unsigned word, Number) {
    return word;
}

__device__ inline unsigned contained(unsigned word, float16) {
    return CLIP ? clip_pair(word, LARGEST_PAIR, float16{}) : word;
}

// Of one that is not yet rounded.
template <typename Number>
__device__ inline float contained(float d_gate, Number) {
    return d_gate;
}

__device__ inline float contained(float d_gate, float16) {
    const bool rounds_to_infinity = fabsf(d_gate) > LARGEST_FLOAT16 && fabsf(d_gate) < INFINITE;
    return CLIP && rounds_to_infinity ? copysignf(LARGEST_FLOAT16, d_gate) : d_gate;
}
