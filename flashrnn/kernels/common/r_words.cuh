// Loads of R, two or eight elements of 16 bits at a time.
//
// The lanes of a warp load a few bytes each, from many rows of R, so one load takes many accesses of the
// L1 cache. How long it takes to load R depends on the number of these accesses, not on their bytes.

#include "problem.cuh"
#include "common/ptx.cuh"

// Whether two neighbouring elements of a row of R can be loaded as a word: all rows begin at multiples of 4
// bytes, since R does.
constexpr bool R_HAS_WORDS = sizeof(Element) == 2 && D % 2 == 0;

// Two elements of 16 bits that lie side by side, the first at a multiple of 4 bytes.
__device__ inline unsigned load_word(const Element* from) {
    return __ldg(reinterpret_cast<const unsigned*>(from));
}

// Of two words of two elements each: the word of both low halves, and that of both high halves.
__device__ inline unsigned low_halves(unsigned first, unsigned second) {
    return (first & 0xffff) | second << 16;
}
__device__ inline unsigned high_halves(unsigned first, unsigned second) {
    return first >> 16 | (second & 0xffff0000);
}

// Whether rows of R can be loaded 16 bytes at a time: all begin at multiples of 16 bytes, since R does.
constexpr bool R_HAS_CHUNKS = sizeof(Element) == 2 && D % 8 == 0;

// Eight elements of 16 bits, the first at a multiple of 16 bytes; zeros if they do not exist.
__device__ inline void load_chunk(unsigned (&words)[4], const Element* from, bool exists) {
    uint4 chunk = {};
    if (exists) chunk = __ldg(reinterpret_cast<const uint4*>(from));
    words[0] = chunk.x, words[1] = chunk.y, words[2] = chunk.z, words[3] = chunk.w;
}

// Four neighbouring lanes, of which lane j has the words 4 j to 4 j + 3 of 16, exchange them: then it has
// the words j, j + 4, j + 8 and j + 12, as left operands of mma() need them.
__device__ inline void deal_words(unsigned (&words)[4]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = threadIdx.x & bit;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (k & bit) continue;
            // Of each two words a lane keeps the one whose number has its own bit.
            unsigned &low = words[k], &high = words[k | bit];
            const unsigned given = __shfl_xor_sync(~0u, upper ? low : high, bit);
            low = upper ? given : low;
            high = upper ? high : given;
        }
    }
}
