// All-gather of h in a cluster: each CTA copies its tile of h, as a whole, into the shared memory of
// all other CTAs (cp.async.bulk). Of two parts of the sequences each has an exchange of its own.
//
//   producer threads of CTA X                      each other CTA Y
//   -------------------------                      ----------------
//                                                  BUFFERS buffers, each with the tiles of all CTAs
//                                                  and a barrier for each TILES_A_BARRIER of them
//   send(k), X's own tile being complete:
//     cp.async.bulk tile ------------------------> buffer[k % BUFFERS].tile[X], of tile_bytes
//                        \-----------------------> this tile's barrier, which counts these bytes
//                                                  multiply(k): for all tiles, from its own on:
//                                                    wait(i) until the barrier of the i-th is complete
//                                                    multiply that tile
//                                                  expect_tiles(): arm the barriers again
//   with one buffer only:
//     CONSUMED_BARRIER of X <--------------------- signal_consumed(): an empty packet (st.async)
//     wait_until_consumed(), then write
//     and send exchange k + 1
//
// A CTA multiplies the tiles in the order of their ranks, from its own on, and each sends first to the
// CTA before it, then to the one before that, and so on: all CTAs send to different ones at a time, and
// what is multiplied first is sent first.
//
// Why a tile of exchange k never overwrites one that is still read, and never arrives at a barrier that
// is not armed:
//
// - Two buffers: X sends exchange k after it has multiplied exchange k - 1, the tile of every CTA Y
//   among it. Y sent that tile after it had multiplied all of exchange k - 2, out of the same buffer,
//   and armed its barriers again; a barrier of Y's threads lies between. For the same reason X's copies
//   of exchange k - 2, which read X's own tile, are complete when X writes its tile of exchange k.
// - One buffer: X writes its own tile of exchange k after all other CTAs have sent the packet by which
//   they say that they have multiplied exchange k - 1 and armed its barriers again. (The packet's
//   content is never read: only its arrival counts.) By then X's copies of exchange k - 1, which read
//   X's own tile, are complete too.
//
// Exchanges are numbered from 0. At the end of the scan all CTAs meet at a barrier of the cluster: none
// leaves while another may still send to it, or read what it sends.

#include "cluster/wgmma_tile.cuh"

namespace cluster_wgmma {

constexpr int TILES_A_BARRIER = GROUP_SIZE < 4 ? GROUP_SIZE : 4;
constexpr int BARRIERS_A_BUFFER = (GROUP_SIZE + TILES_A_BARRIER - 1) / TILES_A_BARRIER;

constexpr int CONSUMED_BARRIER = BUFFERS * BARRIERS_A_BUFFER;

// Shared memory of a part's exchange, in bytes: the buffers; where the packets that say "consumed" arrive,
// all in one place; the buffers' barriers, and the one that counts those packets.
__device__ constexpr unsigned tile_bytes(int part) { return tile_of(part) * sizeof(Element); }
__device__ constexpr unsigned buffer_bytes(int part) { return GROUP_SIZE * tile_bytes(part); }
__device__ constexpr unsigned exchange_bytes(int part) {
    return BUFFERS * buffer_bytes(part) + 16 + (CONSUMED_BARRIER + 2) / 2 * 16;
}

struct Exchange {
    unsigned char* shared;
    int rank, part;
    unsigned number = 0;

    __device__ Exchange(unsigned char* shared, int rank, int part)
        : shared(shared), rank(rank), part(part) {}

    // Called by all threads of all CTAs of the cluster, before a barrier of the cluster.
    __device__ void begin() const {
        if (threadIdx.x <= CONSUMED_BARRIER) mbarrier_init(barrier(threadIdx.x));
        for (int i = 0; i < BUFFERS; ++i) expect_tiles(i);
        expect_consumed_packets();
    }

    __device__ unsigned buffer() const { return number % BUFFERS; }
    __device__ Element* tile(int sender) const {
        return reinterpret_cast<Element*>(shared + buffer() * buffer_bytes(part) +
                                          sender * tile_bytes(part));
    }
    __device__ unsigned char* consumed_packets() const { return shared + BUFFERS * buffer_bytes(part); }
    __device__ unsigned char* barrier(int i) const { return consumed_packets() + 16 + 8 * i; }

    // Arms a buffer's barriers, each by the thread that has its number. The CTA's own tile does not
    // arrive.
    __device__ void expect_tiles(int buffer) const {
        const int i = threadIdx.x - buffer * BARRIERS_A_BUFFER;
        const int left = GROUP_SIZE - i * TILES_A_BARRIER;
        if (0 <= i && i < BARRIERS_A_BUFFER) {
            const int tiles = (left < TILES_A_BARRIER ? left : TILES_A_BARRIER) - (i == 0);
            mbarrier_expect_bytes(barrier(threadIdx.x), tiles * tile_bytes(part));
        }
    }
    __device__ void expect_consumed_packets() const {
        if (BUFFERS == 1 && threadIdx.x == CONSUMED_BARRIER) {
            mbarrier_expect_bytes(barrier(CONSUMED_BARRIER), (GROUP_SIZE - 1) * 16);
        }
    }

    // By the producer threads: sends the CTA's own tile, which the computing threads have written
    // before a fence_proxy_async and a barrier.
    __device__ void send() const {
        if (threadIdx.x % 32) return;
        constexpr int WARPS = PRODUCERS / 32;
#pragma unroll
        for (int first = 1; first < GROUP_SIZE; first += WARPS) {
            const int i = first + (threadIdx.x - COMPUTING) / 32;
            if (i >= GROUP_SIZE) break;
            const int to = rank - i < 0 ? rank - i + GROUP_SIZE : rank - i;
            cp_async_bulk(mapa(tile(rank), to), tile(rank), tile_bytes(part),
                          mapa(barrier(buffer() * BARRIERS_A_BUFFER + i / TILES_A_BARRIER), to));
        }
    }

    // By the producer threads: tells the other CTAs that this one has multiplied all tiles.
    __device__ void signal_consumed() const {
        const int to = threadIdx.x - COMPUTING;
        if (BUFFERS == 2 || to >= GROUP_SIZE || to == rank) return;
        st_async(mapa(consumed_packets(), to), {}, mapa(barrier(CONSUMED_BARRIER), to));
    }

    // Returns when the i-th tile has arrived, and those that share its barrier.
    __device__ void wait(int i) const {
        mbarrier_wait(barrier(buffer() * BARRIERS_A_BUFFER + i / TILES_A_BARRIER), number / BUFFERS % 2);
    }

    // Returns when the CTA's tile of the next exchange may be written and sent.
    __device__ void wait_until_consumed() const {
        if (BUFFERS == 2) return;
        mbarrier_wait(barrier(CONSUMED_BARRIER), number % 2);
        expect_consumed_packets();
    }
};

}  // namespace cluster_wgmma
