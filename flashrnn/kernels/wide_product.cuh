// The product of what a team has exchanged and of a block's part of R, by a group of four warps.
//
// R lies in shared memory as the instruction wants its right operand: for each step of 16 summed
// elements COLUMNS_OF_R columns in blocks of 8 by 8 elements, two blocks for each 8 columns. A lane's
// sums are of columns 8 j + 2 (lane % 4) and the next, for all j: they are the lane's LANE_UNITS
// units, each with PRODUCED gates, so in that order the columns are laid out.

constexpr int PRODUCED = GR;
constexpr int LANE_SUMS = LANE_UNITS * PRODUCED;
constexpr int COLUMNS_OF_R = 4 * LANE_SUMS;

constexpr int WORDS_A_STEP = COLUMNS_OF_R * 8;
constexpr int STEPS = SLICES * PARCEL_WORDS;
constexpr int MATRIX_BYTES = STEPS * WORDS_A_STEP * 4;

// Halves of sums on their way from warps to their mates, two at a time.
struct alignas(8) Two {
    float values[2];
};
constexpr int HALVES_BYTES = WARPS * 32 * LANE_SUMS * 4;

__device__ inline void load_matrix(unsigned* shared, const Element* R, int n, int N, int rank) {
#pragma unroll 8
    for (int i = threadIdx.x; i < STEPS * WORDS_A_STEP; i += THREADS) {
        // Of a column in a block of columns, by words of two elements.
        const int word = i % 4, row = i / 4 % 8, half = i / 32 % 2;
        const int column = i / 64 % (COLUMNS_OF_R / 8) * 8 + row, step = i / WORDS_A_STEP;
        const int sum = column / 8 * 2 + column % 2, unit = column % 8 / 2 * LANE_UNITS + sum / PRODUCED;
        const int d = rank * UNITS + unit, gate = sum % PRODUCED;
        const int parcel = step / PARCEL_WORDS * 8 + word * 2 + parcel_of(step % PARCEL_WORDS, half);
        const int p = parcel * LANE_UNITS + word_of(step % PARCEL_WORDS, half) * 2;
        const Element* from = R + ((static_cast<long long>(gate) * N + n) * D + d) * D + p;
        shared[i] = d < D && p < D ? *reinterpret_cast<const unsigned*>(from) : 0;
    }
}

// Multiplies the values of an exchange; the lane's sums are of two sequences of its warp's tile, 8
// apart, in pairs by turns.
__device__ inline void multiply(float (&sums)[2 * LANE_SUMS], unsigned right, Arrivals& arrivals) {
    const bool has_tile = tile_of_warp() < TILES;
    if (has_tile) arrivals.ask(0);
#pragma unroll
    for (int first = 0; first < SLICES_A_WARP; first += SLICES_AT_ONCE) {
        unsigned left[SLICES_AT_ONCE][PARCEL_WORDS][4] = {};
        if (has_tile) {
            arrivals.wait(first);
#pragma unroll
            for (int i = 0; i < SLICES_AT_ONCE * PARCEL_WORDS * 4; ++i) {
                const int step = i / 4 % PARCEL_WORDS, half = i % 4 / 2;
                const Parcel(&of_slice)[2][BLOCKS] = arrivals.parcels[i / 4 / PARCEL_WORDS];
                left[i / 4 / PARCEL_WORDS][step][i % 4] =
                    of_slice[parcel_of(step, half)][i % 2].words[word_of(step, half)];
            }
            if (first + SLICES_AT_ONCE < SLICES_A_WARP) arrivals.ask(first + SLICES_AT_ONCE);
        }
        begin_products();
#pragma unroll
        for (int i = 0; i < SLICES_AT_ONCE; ++i) {
            if (first + i >= SLICES_A_WARP) break;
#pragma unroll
            for (int step = 0; step < PARCEL_WORDS; ++step) {
                const int place = (first + i) * SUM_PARTS * PARCEL_WORDS + step;
                multiply_by_group(sums, left[i][step],
                                  operand(right + place * WORDS_A_STEP * 4, 128, 256),
                                  first + i + step > 0, Operand{});
            }
        }
        close_products();
        wait_for_products<0>();
    }
    keep(sums);
}

// The sums of both groups of warps, for the sequence that the lane owns: the first one's take the
// first 8 of their tile.
template <bool SECOND>
__device__ inline void share_out(float (&totals)[LANE_SUMS], const float (&sums)[2 * LANE_SUMS],
                                 Two* halves) {
    Two* given = halves + threadIdx.x;
    const Two* taken = halves + (threadIdx.x ^ 128);
#pragma unroll
    for (int i = 0; i < LANE_SUMS; i += 2) {
        const int other = 2 * i + (SECOND ? 0 : 2);
        given[i / 2 * THREADS] = {sums[other], sums[other + 1]};
    }
    meet_some<64>(1 + tile_of_warp());
#pragma unroll
    for (int i = 0; i < LANE_SUMS; i += 2) {
        const int own = 2 * i + (SECOND ? 2 : 0);
        const Two other = taken[i / 2 * THREADS];
        totals[i] = sums[own] + other.values[0];
        totals[i + 1] = sums[own + 1] + other.values[1];
    }
}
