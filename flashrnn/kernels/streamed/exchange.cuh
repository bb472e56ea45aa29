// What passes between CTAs: R and h, which are copied into shared memory chunk by chunk.
//
// A ring in shared memory has STAGES slots, of a chunk of R and one of h each. One producing warp copies R and
// another h, in the order in which the computing warps multiply them:
//
//   producing warps of CTA X                        computing warps of X and of the other CTAs of its cluster
//   ------------------------                        ---------------------------------------------------------
//   wait until a slot is free   <-----------------  signal_multiplied(), each warp to all CTAs of the cluster
//   copy R: a part of the chunk, which goes to
//           all CTAs of the cluster (multicast)
//   copy h: that of X's own sequences
//                               ----------------->  wait_for_chunk(): all of R and h is there
//                                                   multiply
//
// - A CTA's part of R arrives in all CTAs of the cluster, so that its slot must be free in all of them. It is
//   when the warps of all of them have multiplied what was in it. By then the other CTAs' copies into that
//   slot are complete as well, since each warp has waited for them.
// - A barrier of a full slot counts the bytes of R from all CTAs of the cluster and those of h. They may
//   arrive before the CTA's own producing warps have said how many there will be: the phase ends only when
//   these have.
//
// h goes through global memory: two buffers, in turn. Exchange k is h before step k.
//
//   computing warps of X, step t                    producing warp of Y, of the same row of tiles
//   ----------------------------                    ---------------------------------------------
//   multiply h of exchange t
//   write h to buffer (t + 1) % 2
//   barrier of X's computing warps
//   send(): add 1 to the row's counter  --------->  wait_for_h(): until all UNIT_TILES CTAs have added t + 1
//                                                   proxy fence: h was written by ordinary stores
//                                                   copy h of exchange t + 1
//
// Before X writes to a buffer, it has multiplied what all CTAs of its row have sent last; and before they sent
// that, they had multiplied what was in this buffer before.
//
// Before the first step all CTAs write R and the first h as they are copied here, and count themselves.

#include "streamed/tile.cuh"

namespace streamed {

// Shared memory, in bytes: slots of R, then of h; the bias; barriers of full slots, then of free ones.
constexpr int R_CHUNK = CHUNK_STRIPES * R_STRIPE, H_CHUNK = CHUNK_STRIPES * H_STRIPE;
constexpr int FIRST_H = STAGES * R_CHUNK, BIAS = FIRST_H + STAGES * H_CHUNK;
constexpr int BIAS_BYTES = G * UNITS * int(sizeof(float));
constexpr int BARRIERS = BIAS + BIAS_BYTES, FREE = STAGES;
static_assert(BARRIERS + 2 * STAGES * 8 == SHARED_MEMORY, "streamed/plan.py computes the same size");

// A slot and how often it was used before, which tell what its barriers' phases are. Chunks are numbered over
// all steps and work tiles.
struct Slot {
    int number = 0;
    unsigned round = 0;

    __device__ void advance() {
        if (++number < STAGES) return;
        number = 0, ++round;
    }
};

struct Exchange {
    unsigned char *shared, *of_R, *of_h;
    // How many CTAs have written R and the first h; then each row of tiles' counter.
    unsigned* counters;
    int rank, N, row_tiles;

    // Called by all threads of all CTAs of the cluster.
    __device__ Exchange(unsigned char* shared, void* packets, void* memory, int rank, long long B, int N)
        : shared(shared),
          of_R(static_cast<unsigned char*>(memory)),
          of_h(of_R + static_cast<long long>(N) * UNIT_TILES * STRIPES * R_STRIPE),
          counters(static_cast<unsigned*>(packets)),
          rank(rank),
          N(N),
          row_tiles(WorkTile::row_tiles(B)) {
        if (threadIdx.x < STAGES) {
            mbarrier_init(barrier(threadIdx.x), 2);
            mbarrier_init(barrier(FREE + threadIdx.x), CLUSTER_SIZE * WARPS);
        }
        cluster_barrier();
    }

    __device__ unsigned char* barrier(int i) const { return shared + BARRIERS + 8 * i; }
    __device__ unsigned char* R_slot(int i) const { return shared + i * R_CHUNK; }
    __device__ unsigned char* h_slot(int i) const { return shared + FIRST_H + i * H_CHUNK; }

    // Where stripes of a tile begin in global memory: those of R, and those of h of an exchange.
    __device__ unsigned char* stripes_of_R(int n, int unit_tile) const {
        return of_R + (static_cast<long long>(n) * UNIT_TILES + unit_tile) * STRIPES * R_STRIPE;
    }
    __device__ unsigned char* stripes_of_h(long long exchange, int n, int row_tile) const {
        const long long buffer = exchange % 2 * N + n;
        return of_h + (buffer * row_tiles + row_tile) * STRIPES * H_STRIPE;
    }
    __device__ unsigned* counter(int n, int row_tile) const {
        return counters + 1 + n * row_tiles + row_tile;
    }

    // ---- by the producing warps

    // Until all CTAs of the launch have written R and the first h.
    __device__ void wait_for_all(unsigned ctas) const {
        while (load_acquire(counters) < ctas) {
        }
        fence_proxy_async_global();
    }

    __device__ void wait_until_free(const Slot& slot) const {
        if (slot.round > 0) mbarrier_wait(barrier(FREE + slot.number), (slot.round - 1) % 2);
        // No lane falls behind by a phase while another one copies.
        __syncwarp();
    }

    // Copies the chunk of R from `from` on: this CTA's part of its stripes, to all CTAs of the cluster.
    __device__ void copy_R(const Slot& slot, const unsigned char* from, int stripes) const {
        wait_until_free(slot);
        if (threadIdx.x % 32) return;
        mbarrier_expect_bytes(barrier(slot.number), stripes * R_STRIPE);
        const int bytes = stripes / CLUSTER_SIZE * R_STRIPE, first = rank * bytes;
        unsigned char* const to = R_slot(slot.number) + first;
        cp_async_bulk_multicast(to, from + first, bytes, barrier(slot.number), (1 << CLUSTER_SIZE) - 1);
    }

    __device__ void copy_h(const Slot& slot, const unsigned char* from, int stripes) const {
        wait_until_free(slot);
        if (threadIdx.x % 32) return;
        mbarrier_expect_bytes(barrier(slot.number), stripes * H_STRIPE);
        cp_async_bulk_global(h_slot(slot.number), from, stripes * H_STRIPE, barrier(slot.number));
    }

    // Until all units of the tile's sequences are there for a step.
    __device__ void wait_for_h(const WorkTile& work, long long t) const {
        const unsigned complete = static_cast<unsigned>(t) * UNIT_TILES;
        const unsigned* const counted = counter(work.n, work.row_tile);
        while (static_cast<int>(load_acquire(counted) - complete) < 0) {
        }
        fence_proxy_async_global();
    }

    // ---- by the computing warps

    __device__ void wait_for_chunk(const Slot& slot) const {
        mbarrier_wait(barrier(slot.number), slot.round % 2);
    }

    // The warp has multiplied what is in a slot.
    __device__ void signal_multiplied(int slot) const {
        const int to = threadIdx.x % 32;
        if (to < CLUSTER_SIZE) mbarrier_arrive(mapa(barrier(FREE + slot), to));
    }

    // Behind a barrier of the computing warps, which have written h.
    __device__ void send(const WorkTile& work) const {
        if (threadIdx.x == 0) add_release(counter(work.n, work.row_tile), 1);
    }
};

}  // namespace streamed
