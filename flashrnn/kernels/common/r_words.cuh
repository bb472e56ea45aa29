// Loads of R, two elements of 16 bits at a time.
//
// Lanes of a warp load from many rows of R, of each a few bytes, so that a load is as many accesses of the
// L1 cache. Their number, not the bytes, is what it takes to load R.

#include "problem.cuh"
#include "common/ptx.cuh"

// Whether two neighbouring elements of a row of R can be loaded as a word: all rows begin at multiples of 4
// bytes, since R does.
constexpr bool R_HAS_WORDS = sizeof(Element) == 2 && D % 2 == 0;

// Two elements of 16 bits that lie side by side, the first at a multiple of 4 bytes.
__device__ inline unsigned load_word(const Element* from) {
    return __ldg(reinterpret_cast<const unsigned*>(from));
}

// Words of two elements each, out of two that have the first and the second of either: the low halves, and
// the high ones.
__device__ inline unsigned low_halves(unsigned first, unsigned second) {
    return (first & 0xffff) | second << 16;
}
__device__ inline unsigned high_halves(unsigned first, unsigned second) {
    return first >> 16 | (second & 0xffff0000);
}
