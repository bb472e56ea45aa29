// How a cluster of thread blocks owns a head of which each of its warps can multiply all rows that make
// up the gates of a few units, so that between one h and the next a warp needs nothing of others.
//
// The cluster has one head and SEQUENCES sequences, for all steps; block `rank` of it the head's units
// from rank * UNITS on, a warp WARP_UNITS of these, with all gates that R feeds: the 16 rows of one
// tile, PADDED of them a unit. All that R sums for them is the warp's.
//
// Lane 4 i + j of the tensor core gets rows i and i + 8 of two columns, 2 j and 2 j + 1. Those are
// - of one gate: of the units 2 i and 2 i + 1;
// - of two: both gates of unit i;
// - of three or four: the gates i % 2 and i % 2 + 2 of unit i / 2. Here the lane and its neighbour 4
//   lanes apart, which has the other gates, share the columns: i % 2 says which the lane keeps.
//
// That is little of each sequence's memory for a warp to load or store, and a request for each. So
// a block's traffic threads, which come after its WARPS computing warps, move all of it (traffic.cuh).

constexpr int TEAM = (D + UNITS - 1) / UNITS;
constexpr int SEQUENCES = 8 * BLOCKS;
constexpr int COMPUTING = WARPS;
constexpr int THREADS = 32 * COMPUTING + TRAFFIC;

constexpr int PADDED = GR <= 2 ? GR : 4;
constexpr int WARP_UNITS = 16 / PADDED;
static_assert(1 <= GR && GR <= 4, "a unit's rows are one lane's, or two lanes'");
static_assert(UNITS == WARPS * WARP_UNITS, "a warp has a tile of rows");

// Units and sequences that a lane owns, in each block of 8 sequences and in all.
constexpr int OWNED_A_BLOCK = 4 / PADDED;
constexpr int OWNED = OWNED_A_BLOCK * BLOCKS;

// Steps of the tensor core, each of which sums 16 units, a lane four: their number in the whole team.
constexpr int STEPS = (TEAM * UNITS + 15) / 16;

constexpr int A_WORD = 4 / sizeof(Element);
static_assert(A_WORD == 2, "elements of 16 bits");

// Of a row: units in global memory, and places in a line. Lines, one for each sequence, lie an odd
// number of 16 bytes apart, mostly, so that what a warp reads at once comes from different banks.
constexpr int ROW = UNITS, PLACES = UNITS;
constexpr int SHARE = 16 / sizeof(Element);
__device__ constexpr int pitch(int rows) {
    return ((rows * PLACES + SHARE - 1) / SHARE + 1) * SHARE;
}

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

// The warp's part of R for a step of the tensor core.
__device__ inline Fragment fragment(int step, const Element* R, int n, int N, int rank) {
    const int i = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
    Fragment fragment;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const int half = w % 2;
        const int of_warp = PADDED == 4 ? i / 2 : PADDED == 2 ? i : 2 * i + half;
        const int gate = PADDED == 4 ? i % 2 + 2 * half : PADDED == 2 ? half : 0;
        const long long d = rank * UNITS + threadIdx.x / 32 * WARP_UNITS + of_warp;
        Element elements[A_WORD] = {};
#pragma unroll
        for (int k = 0; k < A_WORD; ++k) {
            const int p = 16 * step + 4 * j + w / 2 * A_WORD + k;
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

// Four units' h for one sequence.
struct alignas(8) Quad {
    unsigned words[2];
};

// What R gives for the lane's own units and sequences.
struct Recurrent {
    float gates[OWNED][GR];
};

// An instruction waits for the one before that adds to the same sum, so there are several of them.
constexpr int CHAINS = 4 / BLOCKS;

// The product with the h that has come, of which `arrived` gives a lane its part of a step.
template <typename Arrived>
__device__ inline Recurrent multiply(const Matrix& matrix, const Arrived& arrived) {
    float chains[CHAINS][BLOCKS][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const Fragment a = matrix[step];
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const Quad quad = arrived(step, block);
            mma(chains[step % CHAINS][block], a.words[0], a.words[1], a.words[2], a.words[3],
                quad.words[0], quad.words[1], Operand{});
        }
    }
    Recurrent recurrent;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
        float sums[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums[i] = chains[0][block][i];
#pragma unroll
            for (int chain = 1; chain < CHAINS; ++chain) sums[i] += chains[chain][block][i];
        }
        if (PADDED == 4) {
            const bool odd = threadIdx.x / 4 % 2;
            const float first = __shfl_xor_sync(~0u, odd ? sums[0] : sums[1], 4);
            const float second = __shfl_xor_sync(~0u, odd ? sums[2] : sums[3], 4);
            const float gates[4] = {odd ? first : sums[0], odd ? sums[1] : first,
                                    odd ? second : sums[2], odd ? sums[3] : second};
#pragma unroll
            for (int k = 0; k < GR; ++k) recurrent.gates[block * OWNED_A_BLOCK][k] = gates[k];
            continue;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int e = PADDED == 2 ? i % 2 : i, gate = PADDED == 2 ? i / 2 : 0;
            recurrent.gates[(block * OWNED_A_BLOCK + e) % OWNED][gate % GR] = sums[i];
        }
    }
    return recurrent;
}
