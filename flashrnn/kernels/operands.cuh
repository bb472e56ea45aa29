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
