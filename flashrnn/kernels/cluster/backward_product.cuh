// The product of the gates' gradients of the CTA's own units and of its part of R.

#include "cluster/reduce_scatter.cuh"
#include "common/r_matrix.cuh"

namespace cluster_backward {

// R between element k of a chunk of what is summed, a gate of one of the CTA's units, and unit 0 or 1
// of a pair; 0 where one of them does not exist.
__device__ inline Element R_element(const Element* R, int n, int N, int rank, const Pair& pair,
                                    int unit_of_pair, int chunk, int k) {
    const int summed = chunk * CHUNK + k, from = summed / GR, gate = summed % GR;
    const int unit = 2 * pair.pair + unit_of_pair;
    const long long p = pair.rank * UNITS + unit, d = rank * UNITS + from;
    Element found = {};
    if (pair.exists && unit < UNITS && p < D && from < UNITS && d < D) {
        found = R[((static_cast<long long>(gate) * N + n) * D + d) * D + p];
    }
    return found;
}

// The lane's part of the warp's fragment f: of row tile f % ROW_TILES, step f / ROW_TILES % 2 of slice
// f / ROW_TILES / 2.
__device__ inline Fragment fragment(int f, const Element* R, int n, int N, int rank) {
    const Pair pair(f % ROW_TILES, rank);
    const int step = f / ROW_TILES % 2, slice = f / ROW_TILES / 2;
    Fragment fragment;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const int chunk = slice * 4 + threadIdx.x % 4, word = 2 * step + w / 2;
        Element elements[ELEMENTS_A_WORD] = {};
#pragma unroll
        for (int k = 0; k < ELEMENTS_A_WORD; ++k) {
            elements[k] = R_element(R, n, N, rank, pair, w % 2, chunk, word * ELEMENTS_A_WORD + k);
        }
        memcpy(&fragment.words[w], elements, 4);
        fragment.words[w] = prepare(fragment.words[w], Operand{});
        // Without this the compiler loads all elements before it packs any of them, and spills.
        materialize(fragment.words[w]);
    }
    return fragment;
}

__device__ inline void load_matrix(Matrix& matrix, const Element* R, int n, int N, int rank) {
    matrix.load([&](int f) { return fragment(f, R, n, N, rank); });
}

// Consecutive mma instructions add to different sums, so that none waits for the one before it.
constexpr int CHAINS = ROW_TILES * N_TILES == 1 ? 4 : ROW_TILES * N_TILES == 2 ? 2 : 1;

// Computes the warp's sums that are not finite once more, in float32 and out of R in global memory (see
// NEEDS_CARE). The other sums stay as they are, so that no sequence's bits depend on another sequence's
// values.
__device__ inline void careful_product(float (&sums)[ROW_TILES][N_TILES][4], const Exchange& exchange,
                                       const Element* R, int n, int N, int rank) {
#pragma unroll 1
    for (int j = 0; j < ROW_TILES * N_TILES * 4; ++j) {
        const int tile = j / (4 * N_TILES), n_tile = j / 4 % N_TILES, i = j % 4;
        const Pair pair(tile, rank);
        const int sequence = 2 * (threadIdx.x % 4) + i % 2;
        float sum = 0.0f;
#pragma unroll 1
        for (int chunk = 0; chunk < 4 * SLICES; ++chunk) {
            const Words words = exchange.operand(chunk / 4, n_tile, 4 * sequence + chunk % 4);
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                const Element R_value = R_element(R, n, N, rank, pair, i / 2, chunk, word);
                sum += to_float(R_value) * __uint_as_float(words.words[word]);
            }
        }
#pragma unroll
        for (int k = 0; k < ROW_TILES * N_TILES * 4; ++k) {
            float& fast = sums[k / (4 * N_TILES)][k / 4 % N_TILES][k % 4];
            if (k == j && !is_finite(fast)) fast = sum;
        }
    }
}

// The warp's sums. `matrix` has R, which global memory has too.
template <typename Number>
__device__ inline void multiply(float (&sums)[ROW_TILES][N_TILES][4], const Matrix& matrix,
                                const Exchange& exchange, const Element* R, int n, int N, int rank) {
    float chains[CHAINS][ROW_TILES][N_TILES][4] = {};
    Words words[SLICES][N_TILES];
#pragma unroll
    for (int i = 0; i < SLICES * N_TILES; ++i) {
        words[i / N_TILES][i % N_TILES] = exchange.operand(i / N_TILES, i % N_TILES, threadIdx.x % 32);
    }
#pragma unroll
    for (int step = 0; step < 2 * SLICES; ++step) {
#pragma unroll
        for (int pass = 0; pass < PASSES<Operand>; ++pass) {
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile) {
                const Fragment a = matrix[step * ROW_TILES + tile];
#pragma unroll
                for (int n_tile = 0; n_tile < N_TILES; ++n_tile) {
                    const unsigned* b = &words[step / 2][n_tile].words[2 * (step % 2)];
                    mma_pass(pass, chains[step % CHAINS][tile][n_tile], a.words[0], a.words[1],
                             a.words[2], a.words[3], b[0], b[1], Number{});
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES * N_TILES * 4; ++i) {
        const int tile = i / (4 * N_TILES), n_tile = i / 4 % N_TILES;
        float sum = chains[0][tile][n_tile][i % 4];
#pragma unroll
        for (int chain = 1; chain < CHAINS; ++chain) sum += chains[chain][tile][n_tile][i % 4];
        sums[tile][n_tile][i % 4] = sum;
    }
    if constexpr (NEEDS_CARE<Number>) {
        bool needs_care = false;
#pragma unroll
        for (int i = 0; i < ROW_TILES * N_TILES * 4; ++i) {
            const float sum = sums[i / (4 * N_TILES)][i / 4 % N_TILES][i % 4];
            needs_care |= sum != sum;
        }
        if (__any_sync(~0u, needs_care)) careful_product(sums, exchange, R, n, N, rank);
    }
}

}  // namespace cluster_backward
