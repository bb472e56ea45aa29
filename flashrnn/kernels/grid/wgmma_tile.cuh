// How groups of CTAs own heads and many sequences at a time, for products by wgmma. As in tile.cuh, CTA
// `rank` of a group has the head's units from rank * UNITS on, with all their gates, and sends their h
// to the group at each step. But the group has up to BATCH_TILES tiles of 16 sequences, and computes a
// step of all of them at once.
//
// A CTA has two warpgroups, of four warps each. Of the product, sequences are the rows, and a CTA's
// units with all gates that R feeds are the columns. Warp w of either warpgroup has batch tile w. Each
// warpgroup sums over one half of h (sum_part()), so the sums of a batch tile are in two partner warps:
//
//                       warpgroup 0               warpgroup 1
//                       first half of h           second half of h
//     batch tile 0      warp 0          <---->    warp 4
//     batch tile 1      warp 1          <---->    warp 5
//     batch tile 2      warp 2          <---->    warp 6
//     batch tile 3      warp 3          <---->    warp 7
//     cell step of      sequences 0-7             sequences 8-15
//
// The partners exchange sums through shared memory (add_halves()), and each then computes the cell step
// of 8 of the tile's sequences. A lane has LANE_UNITS neighbouring units of one sequence: one packet.

#include "problem.cuh"
#include "grid/packet_order.cuh"

namespace grid_wgmma {

using grid::operand_packet;
using grid::operand_word;
using grid::PACKET_WORDS;

constexpr int LANE_UNITS = 6;
constexpr int UNITS = 4 * LANE_UNITS;
constexpr int GROUP_SIZE = (D + UNITS - 1) / UNITS;

// A batch tile is two n-tiles of 8 sequences.
constexpr int N_TILES = 2;
constexpr int COLUMNS = 8 * N_TILES;

constexpr int SUM_PARTS = 2;
constexpr int WARPS = 4 * SUM_PARTS;
constexpr int THREADS = 32 * WARPS;

constexpr int PACKETS = UNITS / LANE_UNITS;
static_assert(PACKET_WORDS * 2 == LANE_UNITS, "a packet is what a lane has of h");

using Order = grid::PacketOrder<GROUP_SIZE, PACKETS, SUM_PARTS, N_TILES>;

__device__ inline int sum_part() { return threadIdx.x / 128; }
__device__ inline int tile_of_warp() { return threadIdx.x / 32 % 4; }

// A step's inputs are loaded one step ahead, and prefetched to the L2 cache this many steps before that.
constexpr int PREFETCHED = 3;

// Elements of two neighbouring units are loaded and stored as one word; D is even.
constexpr int PAIRS = LANE_UNITS / 2;

// What a group computes at a time: BATCH_TILES batch tiles of a head, or those that are left of it.
struct WorkTile {
    int n;
    long long first_sequence;

    __device__ static long long count_of_head(long long B) {
        return (B + BATCH_TILES * COLUMNS - 1) / (BATCH_TILES * COLUMNS);
    }

    __device__ WorkTile(long long index, long long B)
        : n(index / count_of_head(B)),
          first_sequence(index % count_of_head(B) * BATCH_TILES * COLUMNS) {}
};

// The units that a lane owns of a sequence.
struct LaneUnits {
    // The sequence's column in the batch tile, and the packet among the CTA's.
    int column, packet;
    // The problem's sequence, and the first of the units. Both are clamped to ones that the problem has;
    // what is computed of such a repetition is not stored.
    long long sequence, d;
    // Whether the problem has this sequence, and how many pairs of the units.
    bool has_sequence;
    int pairs;

    __device__ LaneUnits(int rank, const WorkTile& work, long long B) {
        const int lane = threadIdx.x % 32;
        const bool has_tile = tile_of_warp() < BATCH_TILES;
        column = lane / 4 + 8 * sum_part();
        packet = lane % 4;
        sequence = work.first_sequence + (has_tile ? tile_of_warp() : 0) * COLUMNS + column;
        d = static_cast<long long>(rank) * UNITS + packet * LANE_UNITS;
        has_sequence = has_tile && sequence < B;
        pairs = d >= D ? 0 : D - d >= LANE_UNITS ? PAIRS : (D - d) / 2;
        if (sequence >= B) sequence = B - 1;
        if (d >= D) d = 0;
    }
};

}  // namespace grid_wgmma
