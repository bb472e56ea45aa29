// The product of the CTA's part of R with h, by warpgroups.
//
// It sums over the tiles of h in the order in which the exchange waits for them, from the CTA's own on,
// in STEPS steps of 16 units. R's columns are in the same order (wgmma_matrix.cuh says where they lie).

#include "cluster/wgmma_exchange.cuh"
#include "cluster/wgmma_matrix.cuh"

namespace cluster_wgmma {

constexpr int TILE_STEPS = UNITS / 16;
constexpr int STEPS = GROUP_SIZE * TILE_STEPS;

using Matrix = LeftOperand<STEPS>;

__device__ inline Matrix load_matrix(unsigned char* shared, const Element* R, int n, int N, int rank) {
    return Matrix(shared, [&](int step) {
        const int sender = (rank + step / TILE_STEPS) % GROUP_SIZE;
        const int first = sender * UNITS + step % TILE_STEPS * 16 + 2 * (threadIdx.x % 4);
        return rows_of(R, n, N, rank, [&](int half, int k) { return first + 8 * half + k; });
    });
}

// Starts the product of a part with the tiles of a barrier, when they have arrived. The barriers follow in
// order; wgmma_wait() completes the sums.
template <int PART>
__device__ inline void multiply(float (&all_sums)[4 * N_TILES], const Matrix& matrix,
                                const Exchange& exchange, int barrier) {
    constexpr int FIRST = first_n_tile(PART), COUNT = first_n_tile(PART + 1) - FIRST;
    constexpr unsigned SUMMED = sequences_of(PART) * CHUNK_UNITS * sizeof(Element);
    float(&sums)[4 * COUNT] = reinterpret_cast<float(&)[4 * COUNT]>(all_sums[4 * FIRST]);
    const unsigned long long left = matrix.left();
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
            matrix.multiply_step(sums, left, step, right);
        }
    }
    wgmma_commit();
}

}  // namespace cluster_wgmma
