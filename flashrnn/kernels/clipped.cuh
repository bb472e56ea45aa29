// The gradient that reaches h through R, as the problem's options have it.
__device__ inline float clipped(float d_h) {
    return CLIP ? pointwise::maximum(pointwise::minimum(d_h, CLIPVAL), -CLIPVAL) : d_h;
}
