// Operands of the tensor cores' instructions, and products of float32 elements by several instructions.

#include "common/ptx.cuh"

// A lane's part of a left operand of mma(), the words a0 to a3.
struct alignas(16) Fragment {
    unsigned words[4];
};

// The matrix descriptor of a wgmma operand in shared memory without swizzling. The operand consists of
// core matrices of 128 bytes: 8 rows (of a right operand: columns) of 8 summed elements of 16 bits.
// From one core matrix to the next there are `summed` bytes along the summed dimension, `rows` bytes
// along the other. (A shared address in a cluster has the CTA's rank in its upper bits, which the mask
// removes.)
__device__ inline unsigned long long operand(unsigned address, unsigned summed, unsigned rows) {
    const unsigned low = summed / 16 << 16 | (address & 0x3ffff) / 16;
    return static_cast<unsigned long long>(rows / 16) << 32 | low;
}

// Products of 4-byte elements. The tensor core reads the upper 19 bits of each: sign, 8 bits of
// exponent, 10 of mantissa.

__device__ inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                           unsigned b0, unsigned b1, tf32) {
    mma_truncated(c, round_to_tf32(a0), round_to_tf32(a1), round_to_tf32(a2), round_to_tf32(a3),
                  round_to_tf32(b0), round_to_tf32(b1));
}

// x = high_bits(x) + low_bits(x); the first is exactly what the tensor core reads of x.
__device__ inline unsigned high_bits(unsigned x) { return x & 0xffffe000u; }

__device__ inline unsigned low_bits(unsigned x) {
    return __float_as_uint(__uint_as_float(x) - __uint_as_float(high_bits(x)));
}

// Converts a word of a left operand, once, for all mma_pass() that use it.
template <typename Operand>
__device__ inline unsigned prepare(unsigned word, Operand) {
    return word;
}

__device__ inline unsigned prepare(unsigned word, tf32) { return round_to_tf32(word); }

// How many instructions a product takes, each of which adds to c; mma_pass() is one of them. Loops over
// `pass` are unrolled, which makes it a constant.
template <typename Operand>
constexpr int PASSES = 1;
template <>
constexpr int PASSES<float> = 3;

template <typename Operand>
__device__ inline void mma_pass(int pass, float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                unsigned a3, unsigned b0, unsigned b1, Operand operand) {
    mma(c, a0, a1, a2, a3, b0, b1, operand);
}

__device__ inline void mma_pass(int pass, float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                unsigned a3, unsigned b0, unsigned b1, tf32) {
    mma_truncated(c, a0, a1, a2, a3, round_to_tf32(b0), round_to_tf32(b1));
}

// Full float32: each factor is split into its high and low bits. Of the four products the one of both
// low parts is too small to matter.
__device__ inline void mma_pass(int pass, float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                unsigned a3, unsigned b0, unsigned b1, float) {
    if (pass == 0) {
        mma_truncated(c, low_bits(a0), low_bits(a1), low_bits(a2), low_bits(a3), high_bits(b0),
                      high_bits(b1));
    } else {
        mma_truncated(c, high_bits(a0), high_bits(a1), high_bits(a2), high_bits(a3),
                      pass == 1 ? low_bits(b0) : high_bits(b0),
                      pass == 1 ? low_bits(b1) : high_bits(b1));
    }
}

// Whether products split their factors. The low bits of an infinite factor are inf - inf = NaN, so the
// sum is NaN even where it should be infinite. Kernels therefore compute sums that came out as NaN once
// more, by scalar float32 arithmetic. That is slow, but rare.
template <typename Operand>
constexpr bool NEEDS_CARE = PASSES<Operand> > 1;

__device__ inline bool is_finite(float x) { return fabsf(x) <= 3.4028234663852886e38f; }
