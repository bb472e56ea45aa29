// The product of the CTA's part of R with h, by warpgroups.
//
// It sums over the tiles of h in the order in which the exchange waits for them, from the CTA's own on,
// in STEPS steps of 16 units. R's columns are in the same order. Of IN_REGISTERS of the steps R is in
// the registers of the warps that multiply it, of the others in shared memory. Both kinds are
// interleaved evenly: a wgmma that reads R from shared memory takes longer, and others run meanwhile.

#include "cluster/wgmma_exchange.cuh"
#include "common/wgmma.cuh"

namespace cluster_wgmma {

constexpr int TILE_STEPS = UNITS / 16;
constexpr int STEPS = GROUP_SIZE * TILE_STEPS;
constexpr int IN_SHARED = STEPS - IN_REGISTERS;

__device__ constexpr int in_registers_before(int step) { return step * IN_REGISTERS / STEPS; }
__device__ constexpr bool is_in_registers(int step) {
    return in_registers_before(step + 1) > in_registers_before(step);
}

// R in shared memory: for each warpgroup and step 64 rows of 16 elements, in core matrices of 8 by 8.
constexpr int STEP_BYTES = 64 * 16 * sizeof(Element);
constexpr int MATRIX_BYTES = WARPGROUPS * IN_SHARED * STEP_BYTES;

struct Matrix {
    Fragment in_registers[IN_REGISTERS];
    unsigned in_shared;

    __device__ Matrix(unsigned char* shared, const Element* R, int n, int N, int rank) {
        const int warp = threadIdx.x / 32 % 4, i = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
        unsigned char* const warpgroup = shared + threadIdx.x / 128 * IN_SHARED * STEP_BYTES;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int sender = (rank + step / TILE_STEPS) % GROUP_SIZE;
            const int first = sender * UNITS + step % TILE_STEPS * 16 + 2 * j;
            const Fragment fragment =
                rows_of(R, n, N, rank, [&](int half, int k) { return first + 8 * half + k; });
            if (is_in_registers(step)) {
                in_registers[in_registers_before(step)] = fragment;
                continue;
            }
            unsigned char* const to = warpgroup + (step - in_registers_before(step)) * STEP_BYTES;
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const int core_matrix = 2 * (2 * warp + w % 2) + w / 2;
                unsigned char* const word = to + core_matrix * 128 + i * 16 + j * 4;
                *reinterpret_cast<unsigned*>(word) = fragment.words[w];
            }
        }
        in_shared = shared_address(warpgroup);
    }
};

// An operand so many bytes further on, within the same 256 KB.
__device__ inline unsigned long long moved(unsigned long long operand, unsigned bytes) {
    return operand >> 32 << 32 | static_cast<unsigned>(operand) + bytes / 16;
}

// Starts the product of a part with the tiles of a barrier, when they have arrived. The barriers follow in
// order; wgmma_wait() completes the sums.
template <int PART>
__device__ inline void multiply(float (&all_sums)[4 * N_TILES], const Matrix& matrix,
                                const Exchange& exchange, int barrier) {
    constexpr int FIRST = first_n_tile(PART), COUNT = first_n_tile(PART + 1) - FIRST;
    constexpr unsigned SUMMED = sequences_of(PART) * CHUNK_UNITS * sizeof(Element);
    float(&sums)[4 * COUNT] = reinterpret_cast<float(&)[4 * COUNT]>(all_sums[4 * FIRST]);
    // Else the compiler computes the descriptors of all steps once, and keeps them in registers.
    unsigned in_shared = matrix.in_shared;
    materialize(in_shared);
    const unsigned long long left = operand(in_shared, 128, 256);
    const unsigned buffer = shared_address(exchange.tile(0));
    exchange.wait(barrier);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < TILES_A_BARRIER; ++i) {
        const int tile = barrier * TILES_A_BARRIER + i;
        if (tile >= GROUP_SIZE) break;
        const unsigned h = buffer + exchange.sender(tile) * tile_bytes(PART);
        const unsigned long long first = operand(h, SUMMED, 128);
#pragma unroll
        for (int k = 0; k < TILE_STEPS; ++k) {
            const int step = tile * TILE_STEPS + k;
            const unsigned long long right = moved(first, 2 * k * SUMMED);
            const bool add = step > 0;
            if (is_in_registers(step)) {
                wgmma(sums, matrix.in_registers[in_registers_before(step)].words, right, add, Operand{});
            } else {
                const int before = step - in_registers_before(step);
                wgmma(sums, moved(left, before * STEP_BYTES), right, add, Operand{});
            }
        }
    }
    wgmma_commit();
}

}  // namespace cluster_wgmma
