// How a team exchanges values. Forward, a step needs h of all the head's units, backward the gradients
// of all their gates that R feeds: SENT values of a unit and sequence, sent by the unit's owner to the
// whole team. What its own units get out of them is a product with the block's part of R, with PRODUCED
// rows a unit. Its warps share out the rows, in ROW_PARTS, and what is summed, in SUM_PARTS; the
// latter's sums are added in shared memory.
//
// Values travel in parcels, each of one value of A_PARCEL neighbouring units, made up by as many
// neighbouring lanes. A lane owns one unit and sequence of each tile, or OWNED of them. How parcels
// travel is another file's: through the L2 cache (team_gather_grid.cuh), or within a cluster of thread
// blocks from shared memory to shared memory (team_gather_cluster.cuh).

constexpr int SENT = FORWARD ? 1 : GR;
constexpr int PRODUCED = FORWARD ? GR : 1;

constexpr int A_PARCEL = PARCEL_WORDS * A_WORD;

// Parcels of one value of a block's units, for one sequence, and of all values.
constexpr int UNIT_PARCELS = (UNITS + A_PARCEL - 1) / A_PARCEL;
constexpr int PARCELS = SENT * UNIT_PARCELS;

// A warp's lanes make up this many parcels at once, the block this many.
constexpr int PARCELS_A_WARP = 32 / A_PARCEL;
constexpr int PARCELS_AT_ONCE = WARPS * PARCELS_A_WARP;
constexpr int OWNED_PARCELS = UNIT_PARCELS * COLUMNS;
constexpr int OWNED = (OWNED_PARCELS + PARCELS_AT_ONCE - 1) / PARCELS_AT_ONCE;

// The product's rows: unit by unit PRODUCED of them, in tiles of 16.
constexpr int TILES = (UNITS * PRODUCED + 16 * ROW_PARTS - 1) / (16 * ROW_PARTS);

__device__ inline int sum_part() { return threadIdx.x / 32 / ROW_PARTS; }
__device__ inline int row_part() { return threadIdx.x / 32 % ROW_PARTS; }

// The lane's owned number e, in a turn.
struct Owned {
    int parcel, column, unit;
    // Whether its lane has something to own, and whether the problem has this unit and sequence.
    bool in_parcel, exists;
    // Of the problem in any case: where it lacks the lane's own, something that the warp reads anyway.
    long long sequence, d;

    __device__ Owned(int e, int rank, const Item& item, int turn, long long B) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int first = e * PARCELS_AT_ONCE + warp * PARCELS_A_WARP;
        int index = first + lane / A_PARCEL;
        in_parcel = lane < PARCELS_A_WARP * A_PARCEL && index < OWNED_PARCELS;
        if (!in_parcel) index = first < OWNED_PARCELS ? first : OWNED_PARCELS - 1;
        parcel = index % UNIT_PARCELS;
        column = index / UNIT_PARCELS;
        unit = parcel * A_PARCEL + lane % A_PARCEL;
        sequence = item.first_sequence + turn * COLUMNS + column;
        d = static_cast<long long>(rank) * UNITS + unit;
        exists = in_parcel && unit < UNITS && d < D && sequence < B;
        if (sequence >= B) sequence = B - 1;
        if (d >= D) d = D - 1;
    }

    // Whether the warp's lanes have something to own.
    __device__ static bool any() { return threadIdx.x / 32 * PARCELS_A_WARP < OWNED_PARCELS; }
    static constexpr bool SOME_WARPS_DO_NOT = (WARPS - 1) * PARCELS_A_WARP >= OWNED_PARCELS;
};

// What a lane carries from a tile's step to its next: S numbers for each unit and sequence that it
// owns. They stay in registers where one tile has all turns; else those of the tile whose turn it is
// do, and a lane finds the others' in shared memory where it has put them.
struct Carried {
    float now[OWNED][S];
    float* kept;

    static constexpr int BYTES = TURNS == 1 ? 0 : TURNS * OWNED * S * THREADS * sizeof(float);

    __device__ explicit Carried(float* shared) : kept(shared + threadIdx.x) {}

    __device__ void take(int turn) {
        if (TURNS == 1) return;
#pragma unroll
        for (int i = 0; i < OWNED * S; ++i) {
            now[i / S][i % S] = kept[(turn * OWNED * S + i) * THREADS];
        }
    }

    __device__ void put(int turn) const {
        if (TURNS == 1) return;
#pragma unroll
        for (int i = 0; i < OWNED * S; ++i) {
            kept[(turn * OWNED * S + i) * THREADS] = now[i / S][i % S];
        }
    }
};

// A parcel of the lane's value and its neighbours', in all lanes that make it up.
__device__ inline void make_parcel(unsigned (&words)[PARCEL_WORDS], float value) {
    Element rounded;
    round_to(rounded, value);
    unsigned word = 0;
    memcpy(&word, &rounded, sizeof(Element));
    if (A_WORD == 2) word |= __shfl_down_sync(~0u, word, 1) << 16;
    const int first = threadIdx.x % 32 / A_PARCEL * A_PARCEL;
#pragma unroll
    for (int i = 0; i < PARCEL_WORDS; ++i) words[i] = __shfl_sync(~0u, word, first + i * A_WORD);
}
