// In which order a team's values travel: that in which tensor cores multiply them, so that a lane finds
// its own in its registers when they arrive.
//
// The product takes parcel q of a sequence, of the TEAM * PARCELS that it has block by block, with
// slice q / 8: there it goes to the lanes 4 i + q % 8 / 2 of the tensor core's operand, i being
// the sequence's column. So a lane multiplies two parcels of a slice, in PARCEL_WORDS steps of
// two words: pairs as they lie in a parcel, which need not be moved, and then what is left of both.
// Warps take slices in turn.
constexpr int SLICES_A_WARP = (TEAM * PARCELS + 8 * SUM_PARTS - 1) / (8 * SUM_PARTS);
constexpr int SLICES = SLICES_A_WARP * SUM_PARTS;

// Parcels of all slices, and where that of a sequence lies among them.
constexpr int BUFFER = SLICES * 2 * BLOCKS * 32;

__device__ inline int parcel_place(int parcel, int column) {
    const int lane = column % 8 * 4 + parcel % 8 / 2;
    return ((parcel / 8 * 2 + parcel % 2) * BLOCKS + column / 8) * 32 + lane;
}

// Which of the two parcels, and which of its words, half a step takes.
__device__ constexpr int parcel_of(int step, int half) {
    return step < PARCEL_WORDS / 2 * 2 ? step / (PARCEL_WORDS / 2) : half;
}

__device__ constexpr int word_of(int step, int half) {
    return step < PARCEL_WORDS / 2 * 2 ? step % (PARCEL_WORDS / 2) * 2 + half : PARCEL_WORDS - 1;
}
