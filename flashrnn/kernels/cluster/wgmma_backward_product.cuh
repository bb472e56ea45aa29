// The product of R transposed with the gates' gradients of the CTA's column, by warpgroups: of the units
// of the CTA's row a part of dh.
//
// It sums over tiles in the order in which the exchange waits for them, from the CTA's own on, in STEPS
// steps of 16 gates (wgmma_matrix.cuh says where R lies).

#include "cluster/wgmma_backward_exchange.cuh"
#include "common/wgmma_matrix.cuh"
#include "common/r_words.cuh"

namespace wgmma_backward {

constexpr int TILE_STEPS = UNITS * GR / 16;
constexpr int STEPS = ROWS * TILE_STEPS;

using Matrix = LeftOperand<STEPS>;

// The lane's words of a step: the warp's 16 units, of which word w has unit 2 i + w % 2, and 16 gates.
// Zeros stand for what does not exist.
__device__ inline Fragment fragment(const Element* R, int n, int N, const Exchange& exchange, int step) {
    const int i = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
    const int first_p = exchange.row * COLUMNS * UNITS + threadIdx.x / 32 * 16;
    const int rank = exchange.row_of(step / TILE_STEPS) * COLUMNS + exchange.column;
    Fragment fragment;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        // Of each element of the words both units: p and the next one.
        const long long p = first_p + 2 * i;
        unsigned units[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int summed = step % TILE_STEPS * 16 + half * 8 + 2 * j + k, gate = summed % GR;
            const long long d = rank * UNITS + summed / GR;
            const Element* from = R + ((static_cast<long long>(gate) * N + n) * D + d) * D + p;
            if constexpr (R_HAS_WORDS) {
                units[k] = d < D && p < D ? load_word(from) : 0;
            } else {
                Element pair[2] = {};
                if (d < D && p < D) pair[0] = from[0];
                if (d < D && p + 1 < D) pair[1] = from[1];
                memcpy(&units[k], pair, 4);
            }
        }
        fragment.words[2 * half] = low_halves(units[0], units[1]);
        fragment.words[2 * half + 1] = high_halves(units[0], units[1]);
        // Without this the compiler loads all elements before it packs any of them, and spills.
        materialize(fragment.words[2 * half]);
        materialize(fragment.words[2 * half + 1]);
    }
    return fragment;
}

__device__ inline void multiply(float (&sums)[4 * N_TILES], const Matrix& matrix,
                                const Exchange& exchange) {
    unsigned long long tile = 0;
    matrix.multiply(sums, [&](int step) {
        if (step % TILE_STEPS == 0) {
            const int i = step / TILE_STEPS;
            if (i > 0) {
                exchange.wait_for_tile(i);
                // Else the compiler puts one here, does not see that no thread diverges, and has each
                // wgmma wait for the one before.
                wgmma_fence();
            }
            tile = operand(shared_address(exchange.tile(exchange.row_of(i))), CHUNKS_BYTES, 128);
        }
        // Of a descriptor the lowest bits are the address, in units of 16 bytes.
        return tile + step % TILE_STEPS * 2 * CHUNKS_BYTES / 16;
    });
}

}  // namespace wgmma_backward
