// The product of a head's transposed R and the gradients of its gates.

#include "common/gradient_clip.cuh"
#include "single_cta/product.cuh"

namespace single_cta {

// Several chains, for the reason that product.cuh gives.
constexpr int CHAINS_BACKWARD = PASSES<Operand> == 1 ? 4 : 6;

// The gradient of the h that R reads, from the recurrent gates' rows of the lines. `contain`: infinite
// factors are bounded, as common/gradient_clip.cuh says.
template <typename Number>
__device__ inline void transposed_product(float (&sums)[4], const Matrix& matrix, unsigned line,
                                          bool contain) {
    float chains[CHAINS_BACKWARD][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step += 2) {
#pragma unroll
        for (int s = 0; s < GR; ++s) {
            unsigned right[4];
            load_right(right, line + RECURRENT[s] * BLOCK_D * int(sizeof(Element)), step);
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                if (contain) right[w] = contained(right[w], Number{});
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (step + half == STEPS) break;
                const Fragment a = matrix[(step + half) * GR + s];
#pragma unroll
                for (int pass = 0; pass < PASSES<Operand>; ++pass) {
                    const int chain = (2 * s + half) * PASSES<Operand> + pass;
                    multiply(pass, chains[chain % CHAINS_BACKWARD], a, right, half, Number{});
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sums[i] = chains[0][i];
#pragma unroll
        for (int c = 1; c < CHAINS_BACKWARD; ++c) sums[i] += chains[c][i];
    }
}

}  // namespace single_cta
