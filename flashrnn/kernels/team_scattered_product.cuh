// The product of a block's part of R and of the gates' gradients of its own units.

// What the unit `to` of a pair has of R for element k of a share of what is summed.
__device__ inline Element element(const Element* R, int n, int N, int rank, const Pair& pair, int to,
                                  int share, int k) {
    const int summed = share * SHARE + k, from = summed / GR, gate = summed % GR;
    const int unit = 2 * pair.pair + to;
    const long long p = pair.rank * UNITS + unit, d = rank * UNITS + from;
    const bool exists = pair.exists && unit < UNITS && p < D && from < UNITS && d < D;
    if (!exists) return {};
    return R[((static_cast<long long>(gate) * N + n) * D + d) * D + p];
}

// Of the warp's tile f % TILES, step f / TILES % 2, slice f / TILES / 2.
__device__ inline Fragment fragment(int f, const Element* R, int n, int N, int rank) {
    const Pair pair(f % TILES, rank);
    const int step = f / TILES % 2, slice = f / TILES / 2;
    Fragment fragment;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const int share = slice * 4 + threadIdx.x % 4, word = 2 * step + w / 2;
        Element elements[A_WORD] = {};
#pragma unroll
        for (int k = 0; k < A_WORD; ++k) {
            elements[k] = element(R, n, N, rank, pair, w % 2, share, word * A_WORD + k);
        }
        memcpy(&fragment.words[w], elements, 4);
        fragment.words[w] = prepare(fragment.words[w], Operand{});
        // Else all elements are loaded before the first become words.
        settle(fragment.words[w]);
    }
    return fragment;
}

__device__ inline void load_matrix(Matrix& matrix, const Element* R, int n, int N, int rank) {
    matrix.load([&](int f) { return fragment(f, R, n, N, rank); });
}

// An instruction waits for the one before that adds to the same sum, so there are several of them.
constexpr int CHAINS = TILES * BLOCKS == 1 ? 4 : TILES * BLOCKS == 2 ? 2 : 1;

// The warp's sums that are not finite, with care and out of R itself: float32's words have an element
// each. What is finite keeps its bits, so that no sequence's depend on another's.
__device__ inline void careful_product(float (&sums)[TILES][BLOCKS][4], const Exchange& exchange,
                                       const Element* R, int n, int N, int rank) {
#pragma unroll
    for (int j = 0; j < TILES * BLOCKS * 4; ++j) {
        const int tile = j / (4 * BLOCKS), block = j / 4 % BLOCKS, i = j % 4;
        const Pair pair(tile, rank);
        const int column = 2 * (threadIdx.x % 4) + i % 2;
        float sum = 0.0f;
#pragma unroll 1
        for (int share = 0; share < 4 * SLICES; ++share) {
            const Words words = exchange.operand(share / 4, block, 4 * column + share % 4);
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                const Element of_R = element(R, n, N, rank, pair, i / 2, share, word);
                sum += to_float(of_R) * __uint_as_float(words.words[word]);
            }
        }
        if (!is_finite(sums[tile][block][i])) sums[tile][block][i] = sum;
    }
}

// The warp's sums. R is the matrix's.
template <typename Number>
__device__ inline void multiply(float (&sums)[TILES][BLOCKS][4], const Matrix& matrix,
                                const Exchange& exchange, const Element* R, int n, int N, int rank) {
    float chains[CHAINS][TILES][BLOCKS][4] = {};
    Words words[SLICES][BLOCKS];
#pragma unroll
    for (int i = 0; i < SLICES * BLOCKS; ++i) {
        words[i / BLOCKS][i % BLOCKS] = exchange.operand(i / BLOCKS, i % BLOCKS, threadIdx.x % 32);
    }
#pragma unroll
    for (int step = 0; step < 2 * SLICES; ++step) {
#pragma unroll
        for (int pass = 0; pass < PASSES<Operand>; ++pass) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const Fragment a = matrix[step * TILES + tile];
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block) {
                    const unsigned* b = &words[step / 2][block].words[2 * (step % 2)];
                    mma_pass(pass, chains[step % CHAINS][tile][block], a.words[0], a.words[1],
                             a.words[2], a.words[3], b[0], b[1], Number{});
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TILES * BLOCKS * 4; ++i) {
        const int tile = i / (4 * BLOCKS), block = i / 4 % BLOCKS;
        float sum = chains[0][tile][block][i % 4];
#pragma unroll
        for (int chain = 1; chain < CHAINS; ++chain) sum += chains[chain][tile][block][i % 4];
        sums[tile][block][i % 4] = sum;
    }
    if constexpr (NEEDS_CARE<Number>) {
        bool needs_care = false;
#pragma unroll
        for (int i = 0; i < TILES * BLOCKS * 4; ++i) {
            const float sum = sums[i / (4 * BLOCKS)][i / 4 % BLOCKS][i % 4];
            needs_care |= sum != sum;
        }
        if (__any_sync(~0u, needs_care)) careful_product(sums, exchange, R, n, N, rank);
    }
}
