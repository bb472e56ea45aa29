// Which units' gates the 16 rows are that a warp multiplies, and which lane gets what comes of them.
//
// A warp has WARP_UNITS units of its block's, with all gates that R feeds: PADDED rows each. Lane
// 4 i + j of the tensor core gets rows i and i + 8 of two columns, 2 j and 2 j + 1, of each block of 8
// sequences. Those are
// - of one gate: of the units 2 i and 2 i + 1;
// - of two: both gates of unit i;
// - of three or four: the gates i % 2 and i % 2 + 2 of unit i / 2. Here the lane and its neighbour 4
//   lanes apart, which has the other gates, share the columns: i % 2 says which the lane keeps.

constexpr int SEQUENCES = 8 * BLOCKS;

constexpr int PADDED = GR <= 2 ? GR : 4;
constexpr int WARP_UNITS = 16 / PADDED;
static_assert(1 <= GR && GR <= 4, "a unit's rows are one lane's, or two lanes'");

// Units and sequences that a lane owns, in each block of 8 sequences and in all.
constexpr int OWNED_A_BLOCK = 4 / PADDED;
constexpr int OWNED = OWNED_A_BLOCK * BLOCKS;

// The lane's owned number e: of the block's units, and of its sequences.
struct Owned {
    int unit, sequence;

    __device__ explicit Owned(int e) {
        const int i = threadIdx.x % 32 / 4, j = threadIdx.x % 4, k = e % OWNED_A_BLOCK;
        const int of_warp = PADDED == 4 ? i / 2 : PADDED == 2 ? i : 2 * i + k / 2;
        unit = threadIdx.x / 32 * WARP_UNITS + of_warp;
        sequence = e / OWNED_A_BLOCK * 8 + 2 * j + (PADDED == 4 ? i : k) % 2;
    }
};

// The lane's part of 16 of R's columns for the warp's rows, as the tensor core wants its left operand:
// word w is of the lane's row w % 2. `column` says which column of R element k of the words w / 2 is.
template <typename Column>
__device__ inline Fragment rows_of(const Element* R, int n, int N, int rank, const Column& column) {
    const int i = threadIdx.x % 32 / 4;
    Fragment fragment;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const int half = w % 2;
        const int of_warp = PADDED == 4 ? i / 2 : PADDED == 2 ? i : 2 * i + half;
        const int gate = PADDED == 4 ? i % 2 + 2 * half : PADDED == 2 ? half : 0;
        const long long d = rank * UNITS + threadIdx.x / 32 * WARP_UNITS + of_warp;
        Element elements[2] = {};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int p = column(w / 2, k);
            if (gate < GR && d < D && p < D) {
                elements[k] = R[((static_cast<long long>(gate) * N + n) * D + d) * D + p];
            }
        }
        memcpy(&fragment.words[w], elements, 4);
        // Else all elements are loaded before the first become words.
        settle(fragment.words[w]);
    }
    return fragment;
}

// What R gives for the lane's own units and sequences.
struct Recurrent {
    float gates[OWNED][GR];

    // Of the sums that the tensor core left in the lane, four of each block of sequences.
    template <typename Sum>
    __device__ explicit Recurrent(const Sum& sum) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            float sums[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[i] = sum(block, i);
            if (PADDED == 4) {
                const bool odd = threadIdx.x / 4 % 2;
                const float first = __shfl_xor_sync(~0u, odd ? sums[0] : sums[1], 4);
                const float second = __shfl_xor_sync(~0u, odd ? sums[2] : sums[3], 4);
                const float all[4] = {odd ? first : sums[0], odd ? sums[1] : first,
                                      odd ? second : sums[2], odd ? sums[3] : second};
#pragma unroll
                for (int k = 0; k < GR; ++k) gates[block * OWNED_A_BLOCK][k] = all[k];
                continue;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int e = PADDED == 2 ? i % 2 : i, gate = PADDED == 2 ? i / 2 : 0;
                gates[(block * OWNED_A_BLOCK + e) % OWNED][gate % GR] = sums[i];
            }
        }
    }
};
