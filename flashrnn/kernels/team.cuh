// How teams of thread blocks own heads that none of them could hold: a team of TEAM blocks has one
// head and COLUMNS sequences at a time, for all steps; block `rank` of it the head's units from
// rank * UNITS on, with all their gates.
//
// Forward, a step needs h of all the head's units, backward the gradients of all their gates that R
// feeds: SENT values of a unit and sequence, sent by the unit's owner to the whole team. What its
// own units get out of them is a product with the block's part of R, with PRODUCED rows a unit. Its
// warps split what is summed, and add their sums in shared memory.
//
// Values travel in parcels (exchange.cuh), each of one value of A_PARCEL neighbouring units, made
// up by as many neighbouring lanes. A lane owns one unit and sequence, or OWNED of them.

constexpr int SENT = FORWARD ? 1 : GR;
constexpr int PRODUCED = FORWARD ? GR : 1;

constexpr int A_WORD = 4 / sizeof(Element);
constexpr int A_PARCEL = 3 * A_WORD;
constexpr int TEAM = (D + UNITS - 1) / UNITS;
constexpr int COLUMNS = 8 * BLOCKS;
constexpr int THREADS = 32 * WARPS;

// Parcels of one value of a block's units, for one sequence, and of all values.
constexpr int UNIT_PARCELS = (UNITS + A_PARCEL - 1) / A_PARCEL;
constexpr int PARCELS = SENT * UNIT_PARCELS;

// A warp's lanes make up this many parcels at once, the block this many.
constexpr int PARCELS_A_WARP = 32 / A_PARCEL;
constexpr int PARCELS_AT_ONCE = WARPS * PARCELS_A_WARP;
constexpr int OWNED = (UNIT_PARCELS * COLUMNS + PARCELS_AT_ONCE - 1) / PARCELS_AT_ONCE;

// The product's rows: unit by unit PRODUCED of them, in tiles of 16.
constexpr int TILES = (UNITS * PRODUCED + 15) / 16;

// What a team computes between two loads of R.
struct Item {
    int n;
    long long first_sequence;

    __device__ Item(long long number, int N)
        : n(number % N), first_sequence(number / N * COLUMNS) {}
};

// The lane's owned number e.
struct Owned {
    int parcel, column, unit;
    // Whether its lane has something to own, and whether the problem has this unit and sequence.
    bool in_parcel, exists;
    long long sequence, d;

    __device__ Owned(int e, int rank, const Item& item, long long B) {
        const int lane = threadIdx.x % 32, member = lane % A_PARCEL;
        const int index = e * PARCELS_AT_ONCE + lane / A_PARCEL * WARPS + threadIdx.x / 32;
        in_parcel = lane < PARCELS_A_WARP * A_PARCEL && index < UNIT_PARCELS * COLUMNS;
        parcel = index % UNIT_PARCELS;
        column = index / UNIT_PARCELS;
        unit = parcel * A_PARCEL + member;
        sequence = item.first_sequence + column;
        d = static_cast<long long>(rank) * UNITS + unit;
        exists = in_parcel && unit < UNITS && d < D && sequence < B;
    }

    __device__ bool makes_parcel() const { return in_parcel && threadIdx.x % 32 % A_PARCEL == 0; }
};

// The warps' sums of a step, of two steps in turn. Sequences lie apart by this much, so that a
// warp's sums go to 32 different banks.
constexpr int PITCH = 16 * TILES + 4;
using Partial = float[WARPS][COLUMNS][PITCH];

// A unit's rows.
struct alignas(PRODUCED % 4 == 0 ? 16 : PRODUCED % 2 == 0 ? 8 : 4) Rows {
    float values[PRODUCED];
};

// What the product yields for an owned unit and sequence, once the block's warps have met.
__device__ inline Rows total(const Partial& partial, const Owned& owned) {
    Rows sum = {};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        const float* from = &partial[w][owned.column][owned.unit * PRODUCED];
        const Rows part = *reinterpret_cast<const Rows*>(from);
#pragma unroll
        for (int i = 0; i < PRODUCED; ++i) sum.values[i] += part.values[i];
    }
    return sum;
}
