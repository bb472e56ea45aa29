// The product of a block's part of R with h, by groups of four warps.
//
// It takes what blocks send in the order of their ranks from the block's own on, and so R's columns: in
// steps of 16, of which HELD are in the registers of the warps that multiply them, the others in shared
// memory. These take turns: an instruction that reads R from shared memory takes longer.

constexpr int STEPS_A_LINE = UNITS / 16;
constexpr int STEPS = TEAM * STEPS_A_LINE;
constexpr int SPARED = STEPS - HELD;

__device__ constexpr int held_before(int step) { return step * HELD / STEPS; }
__device__ constexpr bool is_held(int step) { return held_before(step + 1) > held_before(step); }

// R in shared memory: for each group of warps and step 64 rows of 16 elements, in blocks of 8 by 8.
constexpr int STEP_BYTES = 64 * 16 * sizeof(Element);
constexpr int MATRIX_BYTES = GROUPS * SPARED * STEP_BYTES;

struct Matrix {
    Fragment held[HELD];
    unsigned spared;

    __device__ Matrix(unsigned char* shared, const Element* R, int n, int N, int rank) {
        const int warp = threadIdx.x / 32 % 4, i = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
        unsigned char* const mine = shared + threadIdx.x / 128 * SPARED * STEP_BYTES;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int sender = (rank + step / STEPS_A_LINE) % TEAM;
            const int first = sender * UNITS + step % STEPS_A_LINE * 16 + 2 * j;
            const Fragment fragment =
                rows_of(R, n, N, rank, [&](int half, int k) { return first + 8 * half + k; });
            if (is_held(step)) {
                held[held_before(step)] = fragment;
                continue;
            }
            unsigned char* const to = mine + (step - held_before(step)) * STEP_BYTES;
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const int block = 2 * (2 * warp + w % 2) + w / 2;
                *reinterpret_cast<unsigned*>(to + block * 128 + i * 16 + j * 4) = fragment.words[w];
            }
        }
        spared = shared_address(mine);
    }
};

__device__ inline void multiply(float (&sums)[4 * BLOCKS], const Matrix& matrix,
                                const Exchange& exchange) {
    // Here, not as a number for each step that is kept all the time.
    unsigned spared = matrix.spared;
    settle(spared);
    begin_products();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int i = step / STEPS_A_LINE;
        if (step % STEPS_A_LINE == 0) exchange.wait(i);
        const unsigned h = shared_address(exchange.line(exchange.sender(i))) +
                           step % STEPS_A_LINE * 2 * SEQUENCES * EIGHT * sizeof(Element);
        const unsigned long long right = operand(h, SEQUENCES * EIGHT * sizeof(Element), 128);
        const bool add = step > 0;
        if (is_held(step)) {
            multiply_by_group(sums, matrix.held[held_before(step)].words, right, add, Operand{});
        } else {
            const unsigned R = spared + (step - held_before(step)) * STEP_BYTES;
            multiply_by_group(sums, operand(R, 128, 256), right, add, Operand{});
        }
    }
    close_products();
    wait_for_products<0>();
    keep(sums);
}
