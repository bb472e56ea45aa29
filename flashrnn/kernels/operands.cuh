// What tensor cores multiply, as their instructions are told.

// Of a warp's 16 rows of a left operand in registers, and 16 summed elements, the lane's part: the words a0
// to a3 of mma().
struct alignas(16) Fragment {
    unsigned words[4];
};

// What a product of four warps reads from shared memory: blocks of 8 rows (columns, of a right operand) of 8
// summed elements of 16 bits, 128 bytes each, from a shared address on. Those of the next 8 summed
// elements lie `summed` bytes apart, those of other rows `rows`. (In a cluster an address has the block's
// rank in its upper bits, which are to go.)
__device__ inline unsigned long long operand(unsigned address, unsigned summed, unsigned rows) {
    const unsigned low = summed / 16 << 16 | (address & 0x3ffff) / 16;
    return static_cast<unsigned long long>(rows / 16) << 32 | low;
}

// Products of 4-byte elements: the tensor core sees the upper 19 bits of each, 11 of them mantissa.

__device__ inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                           unsigned b0, unsigned b1, tf32) {
    mma_truncated(c, round_to_tf32(a0), round_to_tf32(a1), round_to_tf32(a2), round_to_tf32(a3),
                  round_to_tf32(b0), round_to_tf32(b1));
}

__device__ inline unsigned high_bits(unsigned x) { return x & 0xffffe000u; }

__device__ inline unsigned low_bits(unsigned x) {
    return __float_as_uint(__uint_as_float(x) - __uint_as_float(high_bits(x)));
}

// What a left operand's word becomes, once, before it is multiplied by mma_pass.
template <typename Operand>
__device__ inline unsigned prepare(unsigned word, Operand) {
    return word;
}

__device__ inline unsigned prepare(unsigned word, tf32) { return round_to_tf32(word); }

// How many instructions a product of operands takes; each adds to c. `pass` is a constant once the
// loop over it is unrolled.
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

// float32 in full: every factor is the sum of two that have 11 bits of mantissa or so; of their
// four products the smallest does not matter.
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

// Infinity is no such sum: its lower part comes out as NaN, and so does all that is multiplied with it.
// So what has such factors is multiplied once more with care: number by number, and slowly, for it hardly
// ever comes to that.
template <typename Operand>
constexpr bool NEEDS_CARE = PASSES<Operand> > 1;

// Of factors that are nearer to 0, be they right and left or parts of these, neither a product nor a sum
// of 2^7 of them is infinite. NaN is none of the far ones: it makes NaN with care too.
__device__ inline bool is_far(float x) { return fabsf(x) >= 1.152921504606846976e18f; }  // 2^60

__device__ inline bool is_finite(float x) { return fabsf(x) <= 3.4028234663852886e38f; }
