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

// Rounded to so many, unless that makes infinity of a finite number.
__device__ inline unsigned to_tf32(unsigned word) {
    const bool largest = fabsf(__uint_as_float(word)) > __uint_as_float(0x7f7fefffu);
    return largest ? word : round_to_tf32(word);
}

__device__ inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                           unsigned b0, unsigned b1, tf32) {
    mma_truncated(c, to_tf32(a0), to_tf32(a1), to_tf32(a2), to_tf32(a3), to_tf32(b0), to_tf32(b1));
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

__device__ inline unsigned prepare(unsigned word, tf32) { return to_tf32(word); }

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
    mma_truncated(c, a0, a1, a2, a3, to_tf32(b0), to_tf32(b1));
}

// float32 in full: every factor is the sum of two that have 11 bits of mantissa or so; of their
// four products the smallest does not matter. Of infinity the lower part is NaN, and so is all that is
// multiplied with it.
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

// The same where factors may be infinite or NaN. These take part in the last pass alone, that of the
// upper parts, and are 0 in the others.
struct Careful {};
template <>
constexpr int PASSES<Careful> = 3;

template <typename Operand>
constexpr bool IS_CAREFUL = false;
template <>
constexpr bool IS_CAREFUL<Careful> = true;

__device__ inline unsigned careful_part(int pass, unsigned word, bool left) {
    // Here: else what R's words become would be kept, step after step, for what hardly ever comes.
    settle(word);
    const unsigned magnitude = word & 0x7fffffffu;
    if (pass == 2) return magnitude > 0x7f800000u ? 0x7fffffffu : high_bits(word);
    if (magnitude >= 0x7f800000u) return 0;
    return left == (pass == 0) ? low_bits(word) : high_bits(word);
}

__device__ inline void mma_pass(int pass, float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                unsigned a3, unsigned b0, unsigned b1, Careful) {
    mma_truncated(c, careful_part(pass, a0, true), careful_part(pass, a1, true),
                  careful_part(pass, a2, true), careful_part(pass, a3, true),
                  careful_part(pass, b0, false), careful_part(pass, b1, false));
}

// Whether words that a warp multiplies are finite, which matters to float32 in full: if not, it
// multiplies them once more, with care.
template <typename Operand>
struct NotFinite {
    static constexpr bool MATTERS = false;

    __device__ void look_at(unsigned) {}
};

template <>
struct NotFinite<float> {
    static constexpr bool MATTERS = true;

    // NaN once one was not.
    float sum = 0.0f;

    __device__ void look_at(unsigned word) { sum += __uint_as_float(low_bits(word)); }
    __device__ bool any_in_warp() const { return __any_sync(~0u, sum != sum); }
};
