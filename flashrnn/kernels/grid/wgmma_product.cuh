// The product of what a group has exchanged and of a CTA's part of R, by wgmma.
//
// R is in shared memory, as the instruction reads its right operand (common/mma.cuh): for each step of
// 16 summed elements, COLUMNS_OF_R columns in matrices of 8 columns by 8 summed elements, two of them
// for each 8 columns. h goes from packets straight to the registers of the left operand. A lane's sums
// are those of the columns 8 j + 2 (lane % 4) and the next one, for all j. The columns are laid out so
// that these are the lane's LANE_UNITS units with PRODUCED gates each:
//
//     column         0   1   2   3   4   5   6   7   8   9  10 ...
//     of lane        0   0   1   1   2   2   3   3   0   0   1 ...
//     its sum        0   1   0   1   0   1   0   1   2   3   2 ...      sum = unit * PRODUCED + gate

#include "grid/wgmma_exchange.cuh"
#include "common/mma.cuh"
#include "common/wgmma.cuh"

namespace grid_wgmma {

constexpr int PRODUCED = GR;
constexpr int LANE_SUMS = LANE_UNITS * PRODUCED;
constexpr int COLUMNS_OF_R = 4 * LANE_SUMS;

constexpr int WORDS_A_STEP = COLUMNS_OF_R * 8;
constexpr int STEPS = Order::SLICES * PACKET_WORDS;

// Two sums on their way from a warp to its partner.
struct alignas(8) SumPair {
    float values[2];
};

// Shared memory: the CTA's part of R, sums for partner warps, and the bias.
constexpr int MATRIX_BYTES = STEPS * WORDS_A_STEP * 4;
constexpr int PARTNER_SUMS_BYTES = THREADS * LANE_SUMS * 4;
static_assert(MATRIX_BYTES + PARTNER_SUMS_BYTES + 4 * G * UNITS == SHARED_BYTES,
              "the plan and the kernel lay out the same shared memory");

__device__ inline void load_matrix(unsigned* shared, const Element* R, int n, int N, int rank) {
#pragma unroll 8
    for (int i = threadIdx.x; i < STEPS * WORDS_A_STEP; i += THREADS) {
        // The word, of two elements, and the row of a matrix of 8 by 8.
        const int word = i % 4, row = i / 4 % 8, half = i / 32 % 2;
        const int column = i / 64 % (COLUMNS_OF_R / 8) * 8 + row, step = i / WORDS_A_STEP;
        const int sum = column / 8 * 2 + column % 2, unit = column % 8 / 2 * LANE_UNITS + sum / PRODUCED;
        const int d = rank * UNITS + unit, gate = sum % PRODUCED;
        const int odd = operand_packet(step % PACKET_WORDS, half);
        const int packet = Order::even_packet(step / PACKET_WORDS, word) + odd;
        const int p = packet * LANE_UNITS + operand_word(step % PACKET_WORDS, half) * 2;
        const Element* from = R + ((static_cast<long long>(gate) * N + n) * D + d) * D + p;
        shared[i] = d < D && p < D ? *reinterpret_cast<const unsigned*>(from) : 0;
    }
}

// Receives and multiplies the values of an exchange. The lane gets sums of two sequences of its warp's
// tile, 8 apart: two sums of the one, two of the other, and so on. `right` is the shared address of the
// part of R that the warpgroup multiplies.
__device__ inline void multiply(float (&sums)[2 * LANE_SUMS], unsigned right,
                                ReceivedPackets& received) {
    const bool has_tile = tile_of_warp() < BATCH_TILES;
    if (has_tile) received.load(0);
#pragma unroll
    for (int first = 0; first < Order::SLICES_A_WARP; first += SLICES_AT_ONCE) {
        unsigned left[SLICES_AT_ONCE][PACKET_WORDS][4] = {};
        if (has_tile) {
            received.wait(first);
#pragma unroll
            for (int i = 0; i < SLICES_AT_ONCE * PACKET_WORDS * 4; ++i) {
                const int step = i / 4 % PACKET_WORDS, half = i % 4 / 2;
                const Packet(&of_slice)[2][N_TILES] = received.packets[i / 4 / PACKET_WORDS];
                left[i / 4 / PACKET_WORDS][step][i % 4] =
                    of_slice[operand_packet(step, half)][i % 2].words[operand_word(step, half)];
            }
            if (first + SLICES_AT_ONCE < Order::SLICES_A_WARP) received.load(first + SLICES_AT_ONCE);
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < SLICES_AT_ONCE; ++i) {
            if (first + i >= Order::SLICES_A_WARP) break;
#pragma unroll
            for (int step = 0; step < PACKET_WORDS; ++step) {
                const int place = (first + i) * SUM_PARTS * PACKET_WORDS + step;
                wgmma(sums, left[i][step], operand(right + place * WORDS_A_STEP * 4, 128, 256),
                      first + i + step > 0, Operand{});
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
    }
    materialize_all(sums);
}

// The sums over all of h, of the lane's units and sequence. The warp gives its partner its sums of the 8
// sequences that the partner has, and adds to its own what the partner gives. The first warpgroup has
// the first 8 sequences of each tile.
template <bool SECOND>
__device__ inline void add_halves(float (&totals)[LANE_SUMS], const float (&sums)[2 * LANE_SUMS],
                                  SumPair* partner_sums) {
    SumPair* given = partner_sums + threadIdx.x;
    const SumPair* taken = partner_sums + (threadIdx.x ^ 128);
#pragma unroll
    for (int i = 0; i < LANE_SUMS; i += 2) {
        const int other = 2 * i + (SECOND ? 0 : 2);
        given[i / 2 * THREADS] = {sums[other], sums[other + 1]};
    }
    named_barrier_of<64>(1 + tile_of_warp());
#pragma unroll
    for (int i = 0; i < LANE_SUMS; i += 2) {
        const int own = 2 * i + (SECOND ? 2 : 0);
        const SumPair other = taken[i / 2 * THREADS];
        totals[i] = sums[own] + other.values[0];
        totals[i + 1] = sums[own + 1] + other.values[1];
    }
}

}  // namespace grid_wgmma
