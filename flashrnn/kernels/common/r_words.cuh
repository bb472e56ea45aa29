// Loads of R, two elements of 16 bits at a time.
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
