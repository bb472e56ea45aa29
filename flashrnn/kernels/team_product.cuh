// The product of a block's part of R and of what its team has exchanged.

// Of the warp's tile f % TILES, step f / TILES % PARCEL_WORDS, slice f / TILES / PARCEL_WORDS.
__device__ inline Fragment fragment(int f, const Element* R, int n, int N, int rank) {
    const int lane = threadIdx.x % 32;
    const int tile = row_part() * TILES + f % TILES, step = f / TILES % PARCEL_WORDS;
    const int slice = f / TILES / PARCEL_WORDS * SUM_PARTS + sum_part();
    Fragment fragment;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const int parcel = slice * 8 + lane % 4 * 2 + parcel_of(step, w / 2);
        const int word = word_of(step, w / 2);
        const int row = 16 * tile + w % 2 * 8 + lane / 4;
        Element elements[A_WORD] = {};
#pragma unroll
        for (int k = 0; k < A_WORD; ++k) {
            // Among the units of the block that sends it.
            const int sent = parcel % UNIT_PARCELS * A_PARCEL + word * A_WORD + k;
            const int from = parcel / PARCELS * UNITS + sent, to = rank * UNITS + row / PRODUCED;
            const int gate = FORWARD ? row % PRODUCED : parcel % PARCELS / UNIT_PARCELS;
            const bool exists = parcel < TEAM * PARCELS && sent < UNITS && from < D &&
                                row < UNITS * PRODUCED && to < D;
            const Element* head = R + (static_cast<long long>(gate) * N + n) * D * D;
            if (exists) {
                const int d = FORWARD ? to : from, p = FORWARD ? from : to;
                elements[k] = head[static_cast<long long>(d) * D + p];
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

using Sums = float[CHAINS][TILES][BLOCKS][4];

// Adds what R gives for the values of an exchange, by the warp's part. A template, so that mma_half, which
// is there for 16 bits alone, is not looked for with float32. `not_finite` is the matrix's.
template <typename Number>
__device__ inline void add_products(Sums& sums, const Matrix& matrix, Arrivals& arrivals,
                                    NotFinite<Number> not_finite) {
#pragma unroll
    for (int i = 0; i < SLICES_A_WARP; ++i) {
        unsigned words[BLOCKS][2 * PARCEL_WORDS];
        if constexpr (IS_CAREFUL<Number>) {
            arrivals.take_again(i, words);
        } else {
            arrivals.take(i, words);
        }
#pragma unroll
        for (int k = 0; k < BLOCKS * 2 * PARCEL_WORDS; ++k) {
            not_finite.look_at(words[k % BLOCKS][k / BLOCKS]);
        }
#pragma unroll
        for (int step = 0; step < PARCEL_WORDS; ++step) {
#pragma unroll
            for (int pass = 0; pass < (apart(step) ? 2 : PASSES<Number>); ++pass) {
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
    if constexpr (NotFinite<Number>::MATTERS) {
        if (!not_finite.any_in_warp()) return;
#pragma unroll
        for (int i = 0; i < CHAINS * TILES * BLOCKS * 4; ++i) (&sums[0][0][0][0])[i] = 0.0f;
        add_products(sums, matrix, arrivals, NotFinite<Careful>{});
    }
}

// Multiplies the values of an exchange, and puts the warp's sums where total() finds them.
__device__ inline void multiply(Partial& partial, const Matrix& matrix, Arrivals& arrivals) {
    Sums sums = {};
    add_products(sums, matrix, arrivals, matrix.not_finite);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = 8 * block + 2 * (lane % 4) + i % 2;
                const int row = 16 * (row_part() * TILES + tile) + lane / 4 + 8 * (i / 2);
                float sum = sums[0][tile][block][i];
#pragma unroll
                for (int chain = 1; chain < CHAINS; ++chain) sum += sums[chain][tile][block][i];
                partial[sum_part()][column][row] = sum;
            }
        }
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
