// How teams of thread blocks own heads and many sequences at a time. As in team.cuh a block `rank` has
// the head's units from rank * UNITS on, with all their gates, and sends their h to the team at each
// step. But the team has up to TILES tiles of 16 sequences at once, and multiplies them by the
// instructions that a group of four warps issues together.
//
// There sequences are the product's rows, a tile of them each warp's, and the block's units with all
// gates that R feeds its columns. There are two such groups of warps: each sums one half of what is
// summed. Then a warp and its mate, the other group's warp that has the same tile, share out the
// tile's sequences: a lane has LANE_UNITS neighbouring units of one sequence, which are a parcel. Of
// their sums one half is in its own registers, the other in those of the mate's lane of its number.

constexpr int LANE_UNITS = 6;
constexpr int UNITS = 4 * LANE_UNITS;
constexpr int TEAM = (D + UNITS - 1) / UNITS;

// A tile is two blocks of 8 sequences.
constexpr int BLOCKS = 2;
constexpr int COLUMNS = 8 * BLOCKS;

constexpr int SUM_PARTS = 2;
constexpr int WARPS = 4 * SUM_PARTS;
constexpr int THREADS = 32 * WARPS;

constexpr int PARCEL_WORDS = 3;
constexpr int PARCELS = UNITS / LANE_UNITS;

__device__ inline int sum_part() { return threadIdx.x / 128; }
__device__ inline int tile_of_warp() { return threadIdx.x / 32 % 4; }

// A step's inputs are loaded one step ahead, and brought to the L2 cache so many steps before that.
constexpr int PREFETCHED = 3;

// Neighbouring units' elements are loaded and stored two at a time; D is even.
constexpr int PAIRS = LANE_UNITS / 2;

// What a team computes at a time: a head's next sequences, or another head's first.
struct Item {
    int n;
    long long first_sequence;

    __device__ static long long count_of_head(long long B) {
        return (B + TILES * COLUMNS - 1) / (TILES * COLUMNS);
    }

    __device__ Item(long long number, long long B)
        : n(number / count_of_head(B)),
          first_sequence(number % count_of_head(B) * TILES * COLUMNS) {}
};

// What a lane owns.
struct Owned {
    // Of the tile, and of the block's.
    int column, parcel;
    // The problem's sequence, and the first of the units: where the problem lacks them, others that
    // are computed in vain.
    long long sequence, d;
    // Whether there is such a sequence, and how many pairs of units.
    bool has_sequence;
    int pairs;

    __device__ Owned(int rank, const Item& item, long long B) {
        const int lane = threadIdx.x % 32;
        const bool has_tile = tile_of_warp() < TILES;
        column = lane / 4 + 8 * sum_part();
        parcel = lane % 4;
        sequence = item.first_sequence + (has_tile ? tile_of_warp() : 0) * COLUMNS + column;
        d = static_cast<long long>(rank) * UNITS + parcel * LANE_UNITS;
        has_sequence = has_tile && sequence < B;
        pairs = d >= D ? 0 : D - d >= LANE_UNITS ? PAIRS : (D - d) / 2;
        if (sequence >= B) sequence = B - 1;
        if (d >= D) d = 0;
    }
};
