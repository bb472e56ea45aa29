// The all-gather of a step's values: each CTA sends those of its units to the whole group, through
// global memory that stays in the L2 cache. All CTAs of a launch run at once.
//
// A packet is 16 bytes: three words of values and a flag, the number of the exchange. It is stored and
// loaded in one access, so a reader that finds the flag has the values too, without a fence. (NCCL calls
// such a protocol LL.)
//
//     a CTA of the group                buffer k mod 2                     every CTA of the group
//
//     cell step
//     store_flagged(.., flag k)  ---->  | w0 w1 w2 k |  one packet for     load_flagged until each
//                                       | w0 w1 w2 k |  PACKET_UNITS  ---->  flag is k
//                                       |    ...     |  units and a        mma
//                                                       sequence           CTA barrier
//                                                                          cell step
//                                                                          store_flagged(.., flag k + 1)
//
// Each batch tile has two buffers, for even and odd flags, which are enough:
//
// 1. A CTA sends packets of flag k + 1 when it has received those of flag k from every CTA of the group.
// 2. A CTA sent its packets of flag k behind a CTA barrier, and before that barrier all its warps had
//    received the packets of flag k - 1, which are in the buffer that flag k + 1 overwrites.
//
// A call of one step (ONE_STEP) exchanges nothing: every CTA makes the packets for itself (initial_h.cuh).
//
// Polling takes bandwidth of the L2 cache from the CTAs that still send. So a warp loads AHEAD slices at
// once (of interleaved batch tiles, before it computes the tile before), then polls only the first of
// them, and when that is complete loads once more what is missing of the others.

#include "grid/initial_h.cuh"

namespace grid {

static_assert(GROUP_PACKETS == (ONE_STEP ? 0 : INTERLEAVED * 2 * Order::BUFFER),
              "the plan and the kernel lay out the same buffers");

struct Exchange {
    Packet* buffers;

    __device__ Exchange(Packet* global, int group)
        : buffers(global + static_cast<long long>(group) * INTERLEAVED * 2 * Order::BUFFER) {}

    __device__ Packet* buffer(int tile, unsigned flag) const {
        return buffers + (tile * 2 + flag % 2) * Order::BUFFER;
    }

    // The first of the lanes that made a packet sends it.
    __device__ void send(const unsigned (&words)[PACKET_WORDS], int packet, const ThreadElement& element,
                         int tile, unsigned flag) const {
        if (!element.in_packet || threadIdx.x % 32 % PACKET_UNITS != 0) return;
        Packet* to = buffer(tile, flag) + Order::index_of(packet, element.column);
        store_flagged(to, {{words[0], words[1], words[2]}, flag});
    }

    // Without interleaved batch tiles, warps that have no elements do not poll until the other warps
    // of their CTA have sent, and some time after: other CTAs send at about the same moment, and their
    // packets take longer than that to arrive.
    __device__ void signal_sent() const {
        if (INTERLEAVED == 1 && !ONE_STEP && !ThreadElement::ALL_WARPS_HAVE_ANY) named_barrier<THREADS>();
    }

    __device__ void wait_until_sent() const {
        if (INTERLEAVED > 1 || ONE_STEP) return;
        named_barrier<THREADS>();
        nanosleep(100);
    }
};

// The packets of an exchange that a lane multiplies, AHEAD slices of them in registers.
struct ReceivedPackets {
    Packet packets[AHEAD][2][N_TILES];
    const Packet* first;
    unsigned flag;
    // Of a call of one step, in place of an exchange.
    InitialH initial;

    __device__ void begin(const InitialH& of_tile) {
        initial = of_tile;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) load(i);
    }

    // Loads the warp's first slices.
    __device__ void begin(const Exchange& exchange, int tile, unsigned flag_of_exchange) {
        flag = flag_of_exchange;
        first = exchange.buffer(tile, flag) + Order::index(sum_part(), 0, 0) + threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) load(i);
    }

    // Waits for the warp's slice i and gives its words, as the operands of the slice's steps. Then
    // loads slice i + AHEAD in its place.
    __device__ void receive(int i, unsigned (&words)[N_TILES][2 * PACKET_WORDS]) {
        while (!ONE_STEP) {
            bool complete = true;
#pragma unroll
            for (int k = 0; k < 2 * N_TILES; ++k) {
                complete &= packets[i % AHEAD][k / N_TILES][k % N_TILES].flag == expected_flag(i, k);
            }
            if (complete) break;
            load_missing(i, 1);
        }
#pragma unroll
        for (int k = 0; k < N_TILES * 2 * PACKET_WORDS; ++k) {
            const int n_tile = k % N_TILES, step = k / N_TILES / 2, half = k / N_TILES % 2;
            const Packet& packet = packets[i % AHEAD][operand_packet(step, half)][n_tile];
            words[n_tile][2 * step + half] = packet.words[operand_word(step, half)];
        }
        // By now most of the others are complete, which were not when they were loaded.
        if (i == 0 && !ONE_STEP) load_missing(1, AHEAD - 1);
        if (i + AHEAD < Order::SLICES_A_WARP) load(i + AHEAD);
    }

    __device__ void load(int i) {
        if constexpr (ONE_STEP) {
            make(i);
            return;
        }
#pragma unroll
        for (int k = 0; k < 2 * N_TILES; ++k) {
            packets[i % AHEAD][k / N_TILES][k % N_TILES] = load_flagged(address(i, k));
        }
    }

    // Makes slice i of the initial h.
    __device__ void make(int i) {
#pragma unroll
        for (int n_tile = 0; n_tile < N_TILES; ++n_tile) {
            Packet two[2];
            initial.packets(two, packet_of(i, n_tile), 8 * n_tile + threadIdx.x % 32 / 4);
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) packets[i % AHEAD][odd][n_tile] = two[odd];
        }
    }

    // Loads those packets of `count` slices that had no flag yet.
    __device__ void load_missing(int slice, int count) {
#pragma unroll
        for (int i = slice; i < slice + count; ++i) {
            if (i >= Order::SLICES_A_WARP) break;
#pragma unroll
            for (int k = 0; k < 2 * N_TILES; ++k) {
                load_flagged(packets[i % AHEAD][k / N_TILES][k % N_TILES], address(i, k),
                             expected_flag(i, k));
            }
        }
    }

    __device__ unsigned expected_flag(int i, int k) const {
        return Order::flag(packet_of(i, k), (i + 1) * SUM_PARTS, flag);
    }

    // Which packet of its sequence it is.
    __device__ int packet_of(int i, int k) const {
        return Order::even_packet(i * SUM_PARTS + sum_part(), threadIdx.x % 4) + k / N_TILES;
    }

    __device__ const Packet* address(int i, int k) const {
        return first + Order::index(i * SUM_PARTS, k / N_TILES, k % N_TILES);
    }

    // Any packet that the warp has received, loaded once more. It stays in the buffer until the CTA's
    // next barrier.
    __device__ Packet reload(int packet, int column) const {
        if constexpr (ONE_STEP) {
            Packet two[2];
            initial.packets(two, packet / 2 * 2, column);
            return two[packet % 2];
        }
        const int index_of_first = Order::index(sum_part(), 0, 0) + threadIdx.x % 32;
        return load_flagged(first + (Order::index_of(packet, column) - index_of_first));
    }
};

}  // namespace grid
