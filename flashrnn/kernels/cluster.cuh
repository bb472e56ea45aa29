// How a cluster of thread blocks owns a head of which each of its warps can multiply all rows that make
// up the gates of a few units, so that between one h and the next a warp needs nothing of others.
//
// The cluster has one head and SEQUENCES sequences, for all steps; block `rank` of it the head's units
// from rank * UNITS on, a warp WARP_UNITS of these, with all gates that R feeds: the 16 rows of one
// tile, PADDED of them a unit. All that R sums for them is the warp's.
//
// That is little of each sequence's memory for a warp to load or store, and a request for each. So
// a block's traffic threads, which come after its WARPS computing warps, move all of it (traffic.cuh).

constexpr int TEAM = (D + UNITS - 1) / UNITS;
constexpr int COMPUTING = WARPS;
constexpr int THREADS = 32 * COMPUTING + TRAFFIC;

static_assert(UNITS == WARPS * WARP_UNITS, "a warp has a tile of rows");

// Steps of the tensor core, each of which sums 16 units, a lane four: their number in the whole team.
constexpr int STEPS = (TEAM * UNITS + 15) / 16;

static_assert(sizeof(Element) == 2, "a word has two elements");

// Of a row: units in global memory, and places in a line. Lines, one for each sequence, lie an odd
// number of 16 bytes apart, mostly, so that what a warp reads at once comes from different banks.
constexpr int ROW = UNITS, PLACES = UNITS;
constexpr int SHARE = 16 / sizeof(Element);
__device__ constexpr int pitch(int rows) {
    return ((rows * PLACES + SHARE - 1) / SHARE + 1) * SHARE;
}

// The warp's part of R for a step of the tensor core.
__device__ inline Fragment fragment(int step, const Element* R, int n, int N, int rank) {
    const int first = 16 * step + threadIdx.x % 4 * 4;
    return rows_of(R, n, N, rank, [&](int half, int k) { return first + 2 * half + k; });
}

// Four units' h for one sequence.
struct alignas(8) Quad {
    unsigned words[2];
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
    return Recurrent([&](int block, int i) {
        float sum = chains[0][block][i];
#pragma unroll
        for (int chain = 1; chain < CHAINS; ++chain) sum += chains[chain][block][i];
        return sum;
    });
}
