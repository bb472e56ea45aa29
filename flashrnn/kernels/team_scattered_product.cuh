// The product of a block's part of R and of the gates' gradients of its own units.

// Of the warp's tile f % TILES, step f / TILES % 2, slice f / TILES / 2.
__device__ inline Fragment fragment(int f, const Element* R, int n, int N, int rank) {
    const Pair pair(f % TILES, rank);
    const int step = f / TILES % 2, slice = f / TILES / 2;
    Fragment fragment;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const int share = slice * 4 + threadIdx.x % 4, word = 2 * step + w / 2;
        const int to = 2 * pair.pair + w % 2;
        const long long p = pair.rank * UNITS + to;
        Element elements[A_WORD] = {};
#pragma unroll
        for (int k = 0; k < A_WORD; ++k) {
            const int summed = share * SHARE + word * A_WORD + k;
            const int from = summed / GR, gate = summed % GR;
            const long long d = rank * UNITS + from;
            if (pair.exists && to < UNITS && p < D && from < UNITS && d < D) {
                elements[k] = R[((static_cast<long long>(gate) * N + n) * D + d) * D + p];
            }
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

// The warp's sums. `not_finite` is the matrix's.
template <typename Number>
__device__ inline void multiply(float (&sums)[TILES][BLOCKS][4], const Matrix& matrix,
                                const Exchange& exchange, NotFinite<Number> not_finite) {
    if (IS_CAREFUL<Number>) load_anew();
    float chains[CHAINS][TILES][BLOCKS][4] = {};
    Words words[SLICES][BLOCKS];
#pragma unroll
    for (int i = 0; i < SLICES * BLOCKS; ++i) {
        words[i / BLOCKS][i % BLOCKS] = exchange.operand(i / BLOCKS, i % BLOCKS);
#pragma unroll
        for (int w = 0; w < 4; ++w) not_finite.look_at(words[i / BLOCKS][i % BLOCKS].words[w]);
    }
#pragma unroll
    for (int step = 0; step < 2 * SLICES; ++step) {
#pragma unroll
        for (int pass = 0; pass < PASSES<Number>; ++pass) {
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
    if constexpr (NotFinite<Number>::MATTERS) {
        if (not_finite.any_in_warp()) multiply(sums, matrix, exchange, NotFinite<Careful>{});
    }
}
