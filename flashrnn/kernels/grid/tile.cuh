// How groups of CTAs own heads of which one CTA could not hold R. A group of GROUP_SIZE CTAs has one
// head and INTERLEAVED batch tiles of COLUMNS sequences, for all steps. CTA `rank` of the group has the
// head's units from rank * UNITS on, with all their gates. The group computes a step of one batch tile
// after another: the values of a tile are exchanged while the other tiles are computed.
//
// Forward, a step needs h of all the head's units; backward, the gradients of all their gates that R
// feeds. These are SENT values of a unit and sequence, which the CTA that owns the unit sends to the
// whole group (all_gather.cuh). With them a CTA multiplies its part of R, which has PRODUCED rows a
// unit. Each warp sums over a part of the values, and the sums of the warps are added in shared memory.
//
// A packet holds one value of PACKET_UNITS neighbouring units of a sequence, and as many neighbouring
// lanes make it:
//
//     warp w:   lanes 0 ... PACKET_UNITS - 1      next PACKET_UNITS lanes   ...   last lanes
//               packet w * WARP_PACKETS           packet + 1                      none, if 32 is no
//               of the CTA_PACKETS of a tile                                      multiple
//
// Where a CTA has more packets than its warps make at once, each lane has ELEMENTS units.

#include "problem.cuh"
#include "grid/packet_order.cuh"

namespace grid {

constexpr int GROUP_SIZE = (D + UNITS - 1) / UNITS;
constexpr int COLUMNS = 8 * N_TILES;
constexpr int SUM_PARTS = WARPS;
constexpr int THREADS = 32 * WARPS;

constexpr int SENT = FORWARD ? 1 : GR;
constexpr int PRODUCED = FORWARD ? GR : 1;

constexpr int WORD_ELEMENTS = 4 / sizeof(Element);
constexpr int PACKET_UNITS = PACKET_WORDS * WORD_ELEMENTS;

// A CTA's packets of one value of a sequence, of all values, and of one value of a batch tile.
constexpr int UNIT_PACKETS = (UNITS + PACKET_UNITS - 1) / PACKET_UNITS;
constexpr int PACKETS = SENT * UNIT_PACKETS;
constexpr int CTA_PACKETS = UNIT_PACKETS * COLUMNS;

// What a warp and what the CTA make at once.
constexpr int WARP_PACKETS = 32 / PACKET_UNITS;
constexpr int PACKETS_AT_ONCE = WARPS * WARP_PACKETS;
constexpr int ELEMENTS = (CTA_PACKETS + PACKETS_AT_ONCE - 1) / PACKETS_AT_ONCE;

using Order = PacketOrder<GROUP_SIZE, PACKETS, SUM_PARTS, N_TILES>;

// Tiles of 16 rows of the product: unit by unit PRODUCED of them.
constexpr int ROW_TILES = (UNITS * PRODUCED + 15) / 16;

__device__ inline int sum_part() { return threadIdx.x / 32; }

// Whether a work tile's batch tiles are far apart in the order of the sequences (common/sequence.cuh).
constexpr bool APART = RAGGED && INTERLEAVED > 1;

// What a group computes at a time: INTERLEAVED batch tiles of a head, or those that are left of it.
//
// They are neighbours, unless sequences have lengths of their own. Then a work tile with a longer first
// tile has a shorter second one, so that all work tiles take about as long: of 8 batch tiles, the longest
// first, four work tiles have tiles 0 and 7, 1 and 6, 2 and 5, and 3 and 4.
struct WorkTile {
    int n, tiles;
    long long first_sequence;
    // Of work tiles APART: which of the head's it is, and how many those are.
    int place, count;

    __device__ static long long count_of_head(long long B) {
        return (B + INTERLEAVED * COLUMNS - 1) / (INTERLEAVED * COLUMNS);
    }

    __device__ WorkTile(long long index, long long B)
        : n(index / count_of_head(B)),
          first_sequence(index % count_of_head(B) * (APART ? 1 : INTERLEAVED) * COLUMNS) {
        if constexpr (APART) {
            count = count_of_head(B);
            place = index % count;
            tiles = 1;
            while (tiles < INTERLEAVED && first_of(tiles) < B) ++tiles;
        } else {
            const long long left = (B - first_sequence + COLUMNS - 1) / COLUMNS;
            tiles = INTERLEAVED == 1 ? 1 : left < INTERLEAVED ? left : INTERLEAVED;
        }
    }

    // The first sequence of a batch tile.
    __device__ long long first_of(int tile) const {
        if constexpr (!APART) return first_sequence + tile * COLUMNS;
        return static_cast<long long>(tile * count + (tile % 2 ? count - 1 - place : place)) * COLUMNS;
    }
};

// The thread's element e of a batch tile: a unit of a sequence.
struct ThreadElement {
    // In the CTA: the packet among those of the sequence, the sequence, the unit.
    int packet, column, unit;
    // Whether the lane takes part in a packet, and whether the problem has this unit and sequence.
    bool in_packet, exists;
    // In the problem. Where it has no such element, the indices are clamped to ones that it has, so
    // that loads need no condition. A lane without a packet repeats loads of its own warp: when all such
    // lanes loaded the same element, 1x768 took 1.81 ms forward instead of 1.32.
    long long sequence, d;

    __device__ ThreadElement(int e, int rank, const WorkTile& work, int tile, long long B) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int first = e * PACKETS_AT_ONCE + warp * WARP_PACKETS;
        int index = first + lane / PACKET_UNITS;
        in_packet = lane < WARP_PACKETS * PACKET_UNITS && index < CTA_PACKETS;
        if (!in_packet) index = first < CTA_PACKETS ? first : CTA_PACKETS - 1;
        packet = index % UNIT_PACKETS;
        column = index / UNIT_PACKETS;
        unit = packet * PACKET_UNITS + lane % PACKET_UNITS;
        sequence = work.first_of(tile) + column;
        d = static_cast<long long>(rank) * UNITS + unit;
        exists = in_packet && unit < UNITS && d < D && sequence < B;
        if (sequence >= B) sequence = B - 1;
        if (d >= D) d = D - 1;
    }

    // Whether lanes of this warp have elements.
    __device__ static bool warp_has_any() { return threadIdx.x / 32 * WARP_PACKETS < CTA_PACKETS; }
    static constexpr bool ALL_WARPS_HAVE_ANY = (WARPS - 1) * WARP_PACKETS < CTA_PACKETS;
};

// What a thread carries from a step of a batch tile to the next one: S numbers of each of its elements.
// They stay in registers if there is one batch tile. With interleaved batch tiles, each thread keeps
// those of all tiles in shared memory, and has those of the current tile in registers.
struct Carried {
    float now[ELEMENTS][S];
    float* kept;

    static constexpr int BYTES =
        INTERLEAVED == 1 ? 0 : INTERLEAVED * ELEMENTS * S * THREADS * sizeof(float);

    __device__ explicit Carried(float* shared) : kept(shared + threadIdx.x) {}

    __device__ void load(int tile) {
        if (INTERLEAVED == 1) return;
#pragma unroll
        for (int i = 0; i < ELEMENTS * S; ++i) {
            now[i / S][i % S] = kept[(tile * ELEMENTS * S + i) * THREADS];
        }
    }

    __device__ void store(int tile) const {
        if (INTERLEAVED == 1) return;
#pragma unroll
        for (int i = 0; i < ELEMENTS * S; ++i) {
            kept[(tile * ELEMENTS * S + i) * THREADS] = now[i / S][i % S];
        }
    }
};

// The packet of the lane's value and its neighbours', in each of the lanes that make it.
__device__ inline void make_packet(unsigned (&words)[PACKET_WORDS], float value) {
    Element rounded;
    round_to(rounded, value);
    unsigned word = 0;
    memcpy(&word, &rounded, sizeof(Element));
    if (WORD_ELEMENTS == 2) word |= __shfl_down_sync(~0u, word, 1) << 16;
    const int first = threadIdx.x % 32 / PACKET_UNITS * PACKET_UNITS;
#pragma unroll
    for (int i = 0; i < PACKET_WORDS; ++i) {
        words[i] = __shfl_sync(~0u, word, first + i * WORD_ELEMENTS);
    }
}

}  // namespace grid
