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

__device__ inline void multiply(float (&sums)[4 * N_TILES], const Matrix& matrix,
                                const Exchange& exchange) {
    matrix.multiply(sums, [&](int step) {
        const int i = step / TILE_STEPS;
        if (step % TILE_STEPS == 0) exchange.wait(i);
        const unsigned h = shared_address(exchange.tile(exchange.sender(i))) +
                           step % TILE_STEPS * 2 * SEQUENCES * CHUNK_UNITS * sizeof(Element);
        return operand(h, SEQUENCES * CHUNK_UNITS * sizeof(Element), 128);
    });
}

}  // namespace cluster_wgmma
