// The product of the CTA's part of R with h, by warpgroups.
//
// It sums over the tiles of h in the order in which the exchange waits for them, from the CTA's own on,
// in STEPS steps of 16 units. R's columns are in the same order (wgmma_matrix.cuh says where they lie).

#include "cluster/wgmma_exchange.cuh"
#include "common/wgmma_matrix.cuh"

namespace cluster_wgmma {

constexpr int TILE_STEPS = UNITS / 16;
constexpr int STEPS = GROUP_SIZE * TILE_STEPS;

using Matrix = LeftOperand<STEPS>;

__device__ inline Matrix load_matrix(unsigned char* shared, const Element* R, int n, int N, int rank) {
    const LaneRows rows(R, n, N, rank);
    return Matrix(shared, [&](int step) {
        const int sender = (rank + step / TILE_STEPS) % GROUP_SIZE;
        const int first = sender * UNITS + step % TILE_STEPS * 16 + 2 * (threadIdx.x % 4);
        return rows.words([&](int half, int k) { return first + 8 * half + k; });
    });
}

// The sums of a part, which may be fewer than the first one has.
template <int PART>
__device__ inline void multiply(float (&room)[sums_of(0)], const Matrix& matrix,
                                const Exchange& exchange) {
    float(&sums)[sums_of(PART)] = reinterpret_cast<float(&)[sums_of(PART)]>(room);
    constexpr unsigned CHUNKS_BYTES = sequences_of(PART) * CHUNK_UNITS * sizeof(Element);
    // Else the compiler computes the places of all tiles once, and keeps them in registers (see
    // LeftOperand::multiply).
    unsigned own = exchange.rank;
    materialize(own);
    const int rank = __shfl_sync(~0u, own, 0);
    const unsigned long long first = operand(shared_address(exchange.tile(0)), CHUNKS_BYTES, 128);
    matrix.multiply(sums, [&](int step) {
        const int i = step / TILE_STEPS;
        if (step % (TILES_A_BARRIER * TILE_STEPS) == 0) {
            exchange.wait(i);
            // Else the compiler puts one here, does not see that no thread diverges, and has each
            // wgmma wait for the one before.
            wgmma_fence();
        }
        // Whose tile is multiplied as the i-th; the CTA's own is the first.
        const int sender = rank + i < GROUP_SIZE ? rank + i : rank + i - GROUP_SIZE;
        return moved(first, sender * tile_bytes(PART) + step % TILE_STEPS * 2 * CHUNKS_BYTES);
    });
}

}  // namespace cluster_wgmma
