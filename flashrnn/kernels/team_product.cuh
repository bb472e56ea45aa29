// The product of a block's part of R and of what its team has exchanged.

// What row `row` of the block's product has of R for element k of a parcel's word.
__device__ inline Element element(const Element* R, int n, int N, int rank, int row, int parcel, int word,
                                  int k) {
    // Among the units of the block that sends it.
    const int sent = parcel % UNIT_PARCELS * A_PARCEL + word * A_WORD + k;
    const int from = parcel / PARCELS * UNITS + sent, to = rank * UNITS + row / PRODUCED;
    const int gate = FORWARD ? row % PRODUCED : parcel % PARCELS / UNIT_PARCELS;
    const bool exists = parcel < TEAM * PARCELS && sent < UNITS && from < D &&
                        row < UNITS * PRODUCED && to < D;
    if (!exists) return {};
    const int d = FORWARD ? to : from, p = FORWARD ? from : to;
    return R[((static_cast<long long>(gate) * N + n) * D + d) * D + p];
}

// Of the warp's tile f % TILES, step f / TILES % PARCEL_WORDS, slice f / TILES / PARCEL_WORDS.
__device__ inline Fragment fragment(int f, const Element* R, int n, int N, int rank) {
    const int lane = threadIdx.x % 32;
    const int tile = row_part() * TILES + f % TILES, step = f / TILES % PARCEL_WORDS;
    const int slice = f / TILES / PARCEL_WORDS * SUM_PARTS + sum_part();
    Fragment fragment;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const int parcel = slice * 8 + lane % 4 * 2 + parcel_of(step, w / 2);
        const int row = 16 * tile + w % 2 * 8 + lane / 4;
        Element elements[A_WORD] = {};
#pragma unroll
        for (int k = 0; k < A_WORD; ++k) {
            elements[k] = element(R, n, N, rank, row, parcel, word_of(step, w / 2), k);
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

// The sums of the warps that share rows, of two products in turn. Sequences lie apart by this much, so
// that a warp's sums go to 32 different banks.
constexpr int PITCH = 16 * TILES * ROW_PARTS + 4;
using Partial = float[SUM_PARTS][COLUMNS][PITCH];

// An instruction waits for the one before that adds to the same sum, so there are several of them.
constexpr int CHAINS = TILES * BLOCKS == 1 ? 4 : TILES * BLOCKS == 2 ? 2 : 1;

// Two words that the tensor core sums at once lie in neighbouring registers. Those that are left of
// two parcels do not, and to move them the compiler would have their parcels arrive first: they are
// multiplied one by one. (float32's are taken apart in any case, into registers of their own.)
__device__ constexpr bool apart(int step) {
    return sizeof(Element) == 2 && PARCEL_WORDS % 2 && step == PARCEL_WORDS - 1;
}

// Which of the block's rows and columns the sum i of a warp's tile and of a block of 8 sequences is of.
struct Place {
    int row, column;

    __device__ Place(int tile, int block, int i)
        : row(16 * (row_part() * TILES + tile) + threadIdx.x % 32 / 4 + 8 * (i / 2)),
          column(8 * block + 2 * (threadIdx.x % 4) + i % 2) {}
};

// The warp's sums that are not finite, with care and out of R itself: float32's words have an element
// each. What is finite keeps its bits, so that no sequence's depend on another's.
__device__ inline void careful_product(float (&sums)[TILES][BLOCKS][4], const Arrivals& arrivals,
                                       const Element* R, int n, int N, int rank) {
#pragma unroll
    for (int j = 0; j < TILES * BLOCKS * 4; ++j) {
        const int tile = j / (4 * BLOCKS), block = j / 4 % BLOCKS;
        const Place place(tile, block, j % 4);
        float sum = 0.0f;
#pragma unroll 1
        for (int q = 0; q < 8 * SLICES_A_WARP; ++q) {
            const int parcel = (q / 8 * SUM_PARTS + sum_part()) * 8 + q % 8;
            const auto words = arrivals.again(parcel, place.column);
#pragma unroll
            for (int word = 0; word < PARCEL_WORDS; ++word) {
                const Element of_R = element(R, n, N, rank, place.row, parcel, word, 0);
                sum += to_float(of_R) * __uint_as_float(words.words[word]);
            }
        }
        float& fast = sums[tile][block][j % 4];
        if (!is_finite(fast)) fast = sum;
    }
}

// Multiplies the values of an exchange, and puts the warp's sums where total() finds them. A template,
// so that mma_half, which is there for 16 bits alone, is not looked for with float32. R is the matrix's.
template <typename Number>
__device__ inline void multiply(Partial& partial, const Matrix& matrix, Arrivals& arrivals,
                                const Element* R, int n, int N, int rank) {
    float sums[CHAINS][TILES][BLOCKS][4] = {};
#pragma unroll
    for (int i = 0; i < SLICES_A_WARP; ++i) {
        unsigned words[BLOCKS][2 * PARCEL_WORDS];
        arrivals.take(i, words);
#pragma unroll
        for (int step = 0; step < PARCEL_WORDS; ++step) {
#pragma unroll
            for (int pass = 0; pass < (apart(step) ? 2 : PASSES<Operand>); ++pass) {
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    const Fragment a = matrix[(i * PARCEL_WORDS + step) * TILES + tile];
#pragma unroll
                    for (int block = 0; block < BLOCKS; ++block) {
                        const unsigned* b = &words[block][2 * step];
                        float(&sum)[4] = sums[(i * PARCEL_WORDS + step) % CHAINS][tile][block];
                        if constexpr (sizeof(Element) == 2) {
                            if (apart(step)) {
                                mma_half(sum, a.words[2 * pass], a.words[2 * pass + 1], b[pass],
                                         Number{});
                                continue;
                            }
                        }
                        mma_pass(pass, sum, a.words[0], a.words[1], a.words[2], a.words[3], b[0],
                                 b[1], Number{});
                    }
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TILES * BLOCKS * 4; ++i) {
#pragma unroll
        for (int chain = 1; chain < CHAINS; ++chain) {
            sums[0][i / (4 * BLOCKS)][i / 4 % BLOCKS][i % 4] +=
                sums[chain][i / (4 * BLOCKS)][i / 4 % BLOCKS][i % 4];
        }
    }
    if constexpr (NEEDS_CARE<Number>) {
        bool needs_care = false;
#pragma unroll
        for (int i = 0; i < TILES * BLOCKS * 4; ++i) {
            const float sum = sums[0][i / (4 * BLOCKS)][i / 4 % BLOCKS][i % 4];
            needs_care |= sum != sum;
        }
        if (__any_sync(~0u, needs_care)) careful_product(sums[0], arrivals, R, n, N, rank);
    }
#pragma unroll
    for (int j = 0; j < TILES * BLOCKS * 4; ++j) {
        const int tile = j / (4 * BLOCKS), block = j / 4 % BLOCKS;
        const Place place(tile, block, j % 4);
        partial[sum_part()][place.column][place.row] = sums[0][tile][block][j % 4];
    }
}

// A unit's rows.
struct alignas(PRODUCED % 4 == 0 ? 16 : PRODUCED % 2 == 0 ? 8 : 4) Rows {
    float values[PRODUCED];
};

// What the product yields for an owned unit and sequence, once the block's warps have met.
__device__ inline Rows total(const Partial& partial, const Owned& owned) {
    Rows sum = {};
#pragma unroll
    for (int part = 0; part < SUM_PARTS; ++part) {
        const float* from = &partial[part][owned.column][owned.unit * PRODUCED];
        const Rows rows = *reinterpret_cast<const Rows*>(from);
#pragma unroll
        for (int i = 0; i < PRODUCED; ++i) sum.values[i] += rows.values[i];
    }
    return sum;
}
