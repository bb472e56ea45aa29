// The all-gather of a step's h of many sequences. Packets, flags and the two buffers are those of
// all_gather.cuh, for each batch tile on its own:
//
//     the partner warps of a tile       buffer k mod 2 of the tile      the tile's partner warps
//     of one CTA                                                        of every CTA of the group
//
//     cell step
//     store_flagged(.., flag k)  ---->  | w0 w1 w2 k |  one packet for  load_flagged until each
//                                       |    ...     |  a lane    ---->   flag is k
//                                                                       wgmma, half of h each
//                                                                       barrier of the two partners
//                                                                       cell step
//                                                                       store_flagged(.., flag k + 1)
//
// Each partner receives the packets of its half of h. Behind their barrier the two have received all of
// flag k, so they may send flag k + 1, which overwrites the packets of flag k - 1: those have been
// received by all warps that have sent a packet of flag k.
//
// With this many sequences, the time to transfer the packets matters more than how long the slowest CTA
// takes to send its own. So a warp polls all of SLICES_AT_ONCE slices until they are complete. Then it
// loads the next ones, which arrive while it multiplies these.

#include "grid/wgmma_tile.cuh"

namespace grid_wgmma {

static_assert(GROUP_PACKETS == BATCH_TILES * 2 * Order::BUFFER,
              "the plan and the kernel lay out the same buffers");

// The buffers of the warp's batch tile.
struct Exchange {
    Packet* buffers;

    __device__ Exchange(Packet* global, int group)
        : buffers(global +
                  (static_cast<long long>(group) * BATCH_TILES + tile_of_warp()) * 2 * Order::BUFFER) {}

    __device__ Packet* buffer(unsigned flag) const { return buffers + flag % 2 * Order::BUFFER; }

    __device__ void send(const unsigned (&words)[PACKET_WORDS], int packet, int column,
                         unsigned flag) const {
        Packet* to = buffer(flag) + Order::index_of(packet, column);
        store_flagged(to, {{words[0], words[1], words[2]}, flag});
    }
};

// SLICES_AT_ONCE slices of an exchange, of which each lane has its packets in registers.
struct ReceivedPackets {
    Packet packets[SLICES_AT_ONCE][2][N_TILES];
    const Packet* first;
    unsigned flag;

    __device__ void begin(const Exchange& exchange, unsigned flag_of_exchange) {
        flag = flag_of_exchange;
        first = exchange.buffer(flag) + Order::index(sum_part(), 0, 0) + threadIdx.x % 32;
    }

    // Loads the warp's slices from this one on.
    __device__ void load(int slice) {
#pragma unroll
        for (int i = 0; i < SLICES_AT_ONCE; ++i) {
#pragma unroll
            for (int k = 0; k < 2 * N_TILES; ++k) {
                if (slice + i >= Order::SLICES_A_WARP) break;
                const int index = Order::index((slice + i) * SUM_PARTS, k / N_TILES, k % N_TILES);
                packets[i][k / N_TILES][k % N_TILES] = load_flagged(first + index);
            }
        }
    }

    // Loads them again until they are complete.
    __device__ void wait(int slice) {
        while (true) {
            bool complete = true;
#pragma unroll
            for (int i = 0; i < SLICES_AT_ONCE; ++i) {
#pragma unroll
                for (int k = 0; k < 2 * N_TILES; ++k) {
                    if (slice + i >= Order::SLICES_A_WARP) break;
                    complete &= packets[i][k / N_TILES][k % N_TILES].flag == expected_flag(slice + i, k);
                }
            }
            if (complete) break;
            load(slice);
        }
    }

    __device__ unsigned expected_flag(int i, int k) const {
        const int slice = i * SUM_PARTS + sum_part();
        const int packet = Order::even_packet(slice, threadIdx.x % 4) + k / N_TILES;
        return Order::flag(packet, (i + 1) * SUM_PARTS, flag);
    }
};

}  // namespace grid_wgmma
