// Forward scans: each warp multiplies the rows of R of all gates of its own units, so it can compute these
// units' new states without data of another warp of its CTA.
//
// A warp has WARP_UNITS units and 16 rows of R: PADDED rows for each unit, one for each gate that R
// feeds (of three gates, the fourth row is zero). A product gives lane 4 i + j the sums of the rows i
// and i + 8 for the columns, which are sequences, 2 j and 2 j + 1 of each n-tile. The rows are ordered
// so that these are:
//
//   gates fed by R | rows i and i + 8 of the warp's tile         | the lane's elements in an n-tile
//   1              | the units 2 i and 2 i + 1                   | 2 units x 2 sequences
//   2              | the two gates of unit i                     | 1 unit x 2 sequences
//   3 or 4         | the gates i % 2 and i % 2 + 2 of unit i / 2 | 1 unit x 1 sequence
//
// In the last case lanes 4 i + j and 4 (i ^ 1) + j have two gates each of one unit and two sequences.
// They exchange sums, after which each has all gates of one sequence: 2 j + i % 2.

#include "problem.cuh"
#include "common/mma.cuh"
#include "common/r_words.cuh"

namespace gates_in_warp {

constexpr int SEQUENCES = 8 * N_TILES;

constexpr int PADDED = GR <= 2 ? GR : 4;
constexpr int WARP_UNITS = 16 / PADDED;
static_assert(1 <= GR && GR <= 4, "a unit's rows belong to one lane or to two");

// Elements (a unit and a sequence) of a thread: in each n-tile, and in all.
constexpr int ELEMENTS_A_TILE = 4 / PADDED;
constexpr int ELEMENTS = ELEMENTS_A_TILE * N_TILES;

// The thread's element e: its unit among those of the warps, its sequence among those of the n-tiles.
struct ThreadElement {
    int unit, sequence;

    __device__ explicit ThreadElement(int e) {
        const int i = threadIdx.x % 32 / 4, j = threadIdx.x % 4, k = e % ELEMENTS_A_TILE;
        const int warp_unit = PADDED == 4 ? i / 2 : PADDED == 2 ? i : 2 * i + k / 2;
        unit = threadIdx.x / 32 * WARP_UNITS + warp_unit;
        sequence = e / ELEMENTS_A_TILE * 8 + 2 * j + (PADDED == 4 ? i : k) % 2;
    }
};

// The rows of R of which a lane has words of a left operand: of the warp's 16 rows, i and i + 8.
struct LaneRows {
    const Element* rows[2];
    // Of each row: D, or 0 where it does not exist.
    int columns[2];

    // `rank` numbers what has UNITS units each: the CTA, or the cluster.
    __device__ LaneRows(const Element* R, int n, int N, int rank) {
        const int i = threadIdx.x % 32 / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int warp_unit = PADDED == 4 ? i / 2 : PADDED == 2 ? i : 2 * i + half;
            const int gate = PADDED == 4 ? i % 2 + 2 * half : PADDED == 2 ? half : 0;
            const long long d = rank * UNITS + threadIdx.x / 32 * WARP_UNITS + warp_unit;
            rows[half] = R + ((static_cast<long long>(gate) * N + n) * D + d) * D;
            columns[half] = gate < GR && d < D ? D : 0;
            // Else the compiler computes the addresses of all loads at once, which takes more registers
            // than there are.
            materialize(rows[half]);
        }
    }

    // The lane's words of 16 columns. `column(half, k)` gives the column of element k of the words w with
    // w / 2 == half: that of element 0 is even, that of element 1 the next one.
    template <typename Column>
    __device__ Fragment words(const Column& column) const {
        Fragment fragment;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const Element* const row = rows[w % 2];
            if constexpr (R_HAS_WORDS) {
                const int p = column(w / 2, 0);
                fragment.words[w] = p < columns[w % 2] ? load_word(row + p) : 0;
            } else {
                Element elements[2] = {};
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int p = column(w / 2, k);
                    if (p < columns[w % 2]) elements[k] = row[p];
                }
                memcpy(&fragment.words[w], elements, 4);
            }
            // Without this the compiler loads all elements before it packs any of them, and spills.
            materialize(fragment.words[w]);
        }
        return fragment;
    }
};

// R h of the thread's elements of so many n-tiles, for each gate that R feeds.
template <int TILES>
struct RecurrentSums {
    float gates[ELEMENTS_A_TILE * TILES][GR];

    // `sum(n_tile, i)` gives the four sums that the product left in the lane for an n-tile.
    template <typename Sum>
    __device__ explicit RecurrentSums(const Sum& sum) {
#pragma unroll
        for (int n_tile = 0; n_tile < TILES; ++n_tile) {
            float sums[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[i] = sum(n_tile, i);
            if (PADDED == 4) {
                // The even lane keeps the first sequence and gives away the sums of the second.
                const bool odd = threadIdx.x / 4 % 2;
                const float first = __shfl_xor_sync(~0u, odd ? sums[0] : sums[1], 4);
                const float second = __shfl_xor_sync(~0u, odd ? sums[2] : sums[3], 4);
                const float all[4] = {odd ? first : sums[0], odd ? sums[1] : first,
                                      odd ? second : sums[2], odd ? sums[3] : second};
#pragma unroll
                for (int k = 0; k < GR; ++k) gates[n_tile * ELEMENTS_A_TILE][k] = all[k];
                continue;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int e = PADDED == 2 ? i % 2 : i, gate = PADDED == 2 ? i / 2 : 0;
                gates[(n_tile * ELEMENTS_A_TILE + e) % (ELEMENTS_A_TILE * TILES)][gate % GR] = sums[i];
            }
        }
    }
};

}  // namespace gates_in_warp
