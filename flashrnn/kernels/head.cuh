// How thread blocks own heads: one head and SEQUENCES sequences each, for all steps.
//
// COMPUTING warps multiply and run the cell, the TRAFFIC threads after them move everything
// between global and shared memory. Computing warp w owns the head's units 16 w to 16 w + 15.
// Tensor cores give its lane 4 i + j, for one gate, four numbers: of the units 2 i and 2 i + 1 and
// of the columns 2 j and 2 j + 1 (the rows of R are laid out so that these are neighbours). A product
// has 8 columns. Where SEQUENCES is 4 or 2 each sequence has several of them, alike, and the lanes
// that hold the same numbers share the cell's work: so a lane runs the cell SEQUENCES / 2 times.

constexpr int DD = (D + 15) / 16 * 16;
constexpr int COMPUTING = DD / 16;
constexpr int BLOCKS = (SEQUENCES + 7) / 8;
constexpr int COLUMNS = SEQUENCES < 8 ? SEQUENCES : 8;
constexpr int OWNED = SEQUENCES / 2;
constexpr int THREADS = 32 * COMPUTING + TRAFFIC;

// Where a lane gets fewer registers than it can address, the traffic threads hand some of theirs to
// the computing warps, on a GPU that can do so: it does for whole groups of four warps.
constexpr bool SHIFT_REGISTERS = COMPUTING % 4 == 0 && TRAFFIC == 128 && THREADS > 256;
constexpr int TRAFFIC_REGISTERS = 72;
constexpr int COMPUTING_REGISTERS =
    (65536 / THREADS / 8 * 8 * THREADS - TRAFFIC_REGISTERS * TRAFFIC) / (32 * COMPUTING) / 8 * 8;

// Lines of shared memory, one for each sequence, lie an odd number of 16 bytes apart, so that what
// a warp reads at once, of 8 lines or of 4, comes from different banks.
constexpr int SHARE = 16 / sizeof(Element);
__device__ constexpr int pitch(int rows) { return rows * DD + SHARE; }

// Of a row: units in global memory, and places in a line.
constexpr int ROW = D, PLACES = DD;

struct alignas(2 * sizeof(Element)) Pair {
    Element first, second;
};

struct Lane {
    int i, j, first_unit;

    __device__ Lane()
        : i(threadIdx.x % 32 / 4), j(threadIdx.x % 4), first_unit(threadIdx.x / 32 * 16) {}

    // Which of a tile's four numbers is the lane's owned number e: 0 and 1 are the unit 2 i, 2 and
    // 3 the other one; 0 and 2 the column 2 j, 1 and 3 the other one.
    __device__ int number(int e) const {
        if (COLUMNS == 2) return j / 2 + 2 * (j % 2);
        if (COLUMNS == 4) return e + 2 * (j / 2);
        return e % 4;
    }

    __device__ int unit(int e) const { return first_unit + 2 * i + number(e) / 2; }

    __device__ int sequence(int e) const { return e / 4 * 8 + column(number(e) % 2); }

    // The lane's first or second column.
    __device__ int column(int which) const { return (2 * j + which) % COLUMNS; }

    // The owned number out of the tiles of all blocks.
    __device__ float owned(const float (&tiles)[BLOCKS][4], int e) const {
        const float(&tile)[4] = tiles[e / 4];
        if (COLUMNS == 8) return tile[e % 4];
        if (COLUMNS == 4) return j < 2 ? tile[e] : tile[2 + e];
        return j % 2 ? (j < 2 ? tile[2] : tile[3]) : (j < 2 ? tile[0] : tile[1]);
    }
};

// The lane's owned numbers out of one row of the lines.
__device__ inline void load_owned(float (&owned)[OWNED], const Element* lines, int pitch,
                                  const Lane& lane) {
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Element* from = lines + lane.sequence(e) * pitch + lane.unit(e);
        if constexpr (COLUMNS == 8) {
            if (e % 4 < 2) {
                const Pair pair = *reinterpret_cast<const Pair*>(from);
                owned[e] = to_float(pair.first);
                owned[e + 2] = to_float(pair.second);
            }
        } else {
            owned[e] = to_float(*from);
        }
    }
}

// Rounds the lane's owned numbers into one row of the lines; units beyond D stay 0.
__device__ inline void store_owned(Element* lines, int pitch, const float (&owned)[OWNED],
                                   const Lane& lane) {
    Element rounded[OWNED];
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        round_to(rounded[e], D == DD || lane.unit(e) < D ? owned[e] : 0.0f);
    }
    if constexpr (COLUMNS == 8) {
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            if (e % 4 < 2) {
                *reinterpret_cast<Pair*>(lines + lane.sequence(e) * pitch + lane.unit(e)) = {
                    rounded[e], rounded[e + 2]};
            }
        }
    } else {
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            lines[lane.sequence(e) * pitch + lane.unit(e)] = rounded[e];
        }
    }
}
