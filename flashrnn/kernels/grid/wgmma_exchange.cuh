// The exchanges of a turn, that is a step of one batch tile: an all-gather of h in the group, through global
// memory, and a reduce-scatter of the product's sums in each cluster, through shared memory.
//
//   computing and copying warps of CTA X  its cluster           receiving warp of a CTA Y of the group
//   ------------------------------------  -----------           --------------------------------------
//   cell step, into the tile of h
//   barrier of both
//   write h to buffer k % 2
//   barrier of the copying warps
//   send(): add to the counters of ----------------------->     receive(): wait until Y has multiplied exchange
//           the slices that have X's units                      k - 1 and, but for a work tile's first one,
//                                                               sent exchange k, of its own units; poll the
//                                                               counters of Y's slices; cp.async.bulk of each
//                                                               slice that is complete, counted on the slice's
//                                                               barrier
//                                                                   |
//   multiply: wait for each slice    <------------------------------+
//   give_sums(): st.async     ------->    slot of X, of
//                                         turn % 2
//   add_sums()                <-------    their sums
//   cell step, then exchange k + 1
//
// The exchanges of each batch tile are numbered from 0 on, and the numbers go on from work tile to work tile.
// Counters only grow: exchange k of a slice is complete when each CTA whose cluster has units in it has added 1
// for each of these steps k + 1 times.
//
// Why nothing is overwritten that is still read:
//
// - h in global memory. Before X writes exchange k, it has added up sums over all parts of h of exchange k - 1.
//   So each CTA of the group had sent exchange k - 1, and before that had added up sums of exchange k - 2, for
//   which its cluster had copied all that it reads of that exchange.
// - h in shared memory: Y's receiving warp waits until each of Y's computing warps has multiplied it.
// - Sums. X gives sums of turn i + 2 behind those of turn i + 1, which its thread has got from all CTAs of
//   the cluster: each thread there sent them when it had added up those of turn i.
//
// h is written by ordinary stores, and read by bulk copies, of another proxy: so the receiving warp has a
// proxy fence behind the load that acquires the counter.

#include "grid/wgmma_tile.cuh"

namespace grid_wgmma {

// Global memory of a group: two buffers of h of all parts for each batch tile, then a counter for each of
// the slices, all zeros at first.
constexpr unsigned BUFFER_BYTES = CLUSTER_SIZE * H_BYTES;
constexpr unsigned COUNTERS_BYTES = (BATCH_TILES * CLUSTER_SIZE * SLICES + 3) / 4 * 16;
static_assert(GROUP_PACKETS * 16 == BATCH_TILES * 2 * BUFFER_BYTES + COUNTERS_BYTES,
              "the plan and the kernel lay out the same buffers");

struct alignas(16) Sums {
    float of[4];
};

// Shared memory, in bytes: h of each batch tile; two buffers of the sums of the other CTAs; barriers: one
// for each slice of each batch tile; one for each batch tile, on which the computing warps say that they have
// multiplied an exchange, and the copying ones that they have sent the next; two for sums.
constexpr unsigned SLOT_BYTES = OWN_N_TILES * COMPUTING * sizeof(Sums);
constexpr unsigned SUMS_BYTES = (CLUSTER_SIZE - 1) * SLOT_BYTES;
constexpr unsigned FIRST_SUMS = BATCH_TILES * H_BYTES, BARRIERS = FIRST_SUMS + 2 * SUMS_BYTES;
constexpr int DONE = BATCH_TILES * SLICES, GIVEN = DONE + BATCH_TILES;
constexpr unsigned EXCHANGE_BYTES = BARRIERS + (GIVEN + 3) / 2 * 16;

struct Exchange {
    unsigned char *shared, *global;
    unsigned* counters;
    int cluster, rank;

    // Called by all threads of all CTAs of the cluster.
    __device__ Exchange(unsigned char* shared, void* packets, int group, int cluster, int rank)
        : shared(shared),
          global(static_cast<unsigned char*>(packets) + static_cast<long long>(group) * GROUP_PACKETS * 16),
          counters(reinterpret_cast<unsigned*>(global + BATCH_TILES * 2 * BUFFER_BYTES)),
          cluster(cluster),
          rank(rank) {
        const int i = threadIdx.x;
        if (i < GIVEN + 2) mbarrier_init(barrier(i), i >= DONE && i < GIVEN ? WARPS + 1 : 1);
        cluster_barrier();
    }

    __device__ unsigned char* barrier(int i) const { return shared + BARRIERS + 8 * i; }
    __device__ unsigned char* h(int tile) const { return shared + tile * H_BYTES; }
    __device__ unsigned char* buffer(int tile, unsigned number) const {
        return global + (tile * 2 + number % 2) * BUFFER_BYTES;
    }
    __device__ unsigned* counter(int tile, int part, int slice) const {
        return counters + (tile * CLUSTER_SIZE + part) * SLICES + slice;
    }

    // ---- by the copying warps

    // Where an exchange has 8 units of a sequence of the batch tile, from one of the cluster's units on.
    __device__ uint4* place(int tile, unsigned number, int unit, int sequence) const {
        const unsigned octet = (cluster * UNITS + unit) / 8;
        return reinterpret_cast<uint4*>(buffer(tile, number) + octet * OCTET_BYTES + sequence * 16);
    }

    // Behind a barrier of the copying warps, which have written h.
    __device__ void send(int tile) const {
        const int i = threadIdx.x - COMPUTING - RECEIVING;
        if (i >= UNIT_STEPS) return;
        const int step = cluster * UNIT_STEPS + i;
        add_release(counter(tile, step / STEPS, step % STEPS / SLICE_STEPS), 1);
    }

    // The next h, if there is one, has been sent.
    __device__ void signal_sent(int tile) const {
        if (threadIdx.x == COMPUTING + RECEIVING) mbarrier_expect_bytes(barrier(DONE + tile), 0);
    }

    // ---- by the computing warps

    __device__ void wait_for_slice(int tile, int slice, unsigned number) const {
        mbarrier_wait(barrier(tile * SLICES + slice), number % 2);
    }

    // The warp has multiplied an exchange.
    __device__ void signal_multiplied(int tile) const {
        if (threadIdx.x % 32 == 0) mbarrier_expect_bytes(barrier(DONE + tile), 0);
    }

    // Gives each other CTA the thread's sums of its n-tiles.
    __device__ void give_sums(const float (&sums)[4 * N_TILES], unsigned turn) const {
#pragma unroll
        for (int i = 0; i < CLUSTER_SIZE; ++i) {
            if (i == rank) continue;
            const unsigned to = mapa(slot(rank, i, turn), i), counted = mapa(barrier(GIVEN + turn % 2), i);
#pragma unroll
            for (int j = 0; j < OWN_N_TILES; ++j) {
                unsigned words[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) words[k] = __float_as_uint(sums[4 * (i * OWN_N_TILES + j) + k]);
                st_async(to + j * COMPUTING * sizeof(Sums), words, counted);
            }
        }
    }

    // Of the thread's own n-tiles the sums over all parts, always added in the same order.
    __device__ void add_sums(float (&totals)[4 * OWN_N_TILES], const float (&sums)[4 * N_TILES],
                             unsigned turn) const {
        if (threadIdx.x == 0) mbarrier_expect_bytes(barrier(GIVEN + turn % 2), SUMS_BYTES);
        float own[4 * OWN_N_TILES];
#pragma unroll
        for (int i = 0; i < CLUSTER_SIZE; ++i) {
#pragma unroll
            for (int k = 0; k < 4 * OWN_N_TILES; ++k) {
                if (i == 0 || i == rank) own[k] = sums[4 * i * OWN_N_TILES + k];
            }
        }
        mbarrier_wait(barrier(GIVEN + turn % 2), turn / 2 % 2);
#pragma unroll
        for (int j = 0; j < OWN_N_TILES; ++j) {
#pragma unroll
            for (int i = 0; i < CLUSTER_SIZE; ++i) {
                const bool is_own = i == rank;
                Sums given = {};
                if (!is_own) {
                    given = *reinterpret_cast<const Sums*>(slot(i, rank, turn) + j * COMPUTING * sizeof(Sums));
                }
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float part = is_own ? own[4 * j + k] : given.of[k];
                    totals[4 * j + k] = i == 0 ? part : totals[4 * j + k] + part;
                }
            }
        }
    }

    // Where the thread's sums of one CTA lie in another one's shared memory.
    __device__ unsigned char* slot(int from, int to, unsigned turn) const {
        const int place = from < to ? from : from - 1;
        return shared + FIRST_SUMS + turn % 2 * SUMS_BYTES + place * SLOT_BYTES + threadIdx.x * sizeof(Sums);
    }

    // ---- by the receiving warp

    // Copies an exchange of a batch tile into shared memory, each slice as soon as it is complete.
    __device__ void receive(int tile, unsigned number) const {
        const int slice = threadIdx.x % 32;
        if (slice >= SLICES) return;
        if (number > 0) {
            mbarrier_wait(barrier(DONE + tile), (number - 1) % 2);
            // Polling hinders CTAs that have not sent yet. What they send takes longer than this to arrive.
            nanosleep(100);
        }
        const int first = rank * STEPS + slice * SLICE_STEPS, steps = steps_of_slice(slice);
        // Beyond all units nobody sends anything, and zeros are copied.
        const int left = ALL_STEPS - first, sent = left < 0 ? 0 : left < steps ? left : steps;
        const unsigned complete = (number + 1) * sent * CLUSTER_SIZE;
        const unsigned* const counted = counter(tile, rank, slice);
        // The copy is within the loop: behind it each lane would wait for all.
        for (bool waits = true; waits;) {
            if (static_cast<int>(load_acquire(counted) - complete) < 0) continue;
            waits = false;
            fence_proxy_async_global();
            unsigned char* const arrived = barrier(tile * SLICES + slice);
            mbarrier_expect_bytes(arrived, steps * STEP_H_BYTES);
            cp_async_bulk_global(h(tile) + slice * SLICE_STEPS * STEP_H_BYTES,
                                 buffer(tile, number) + first * STEP_H_BYTES, steps * STEP_H_BYTES, arrived);
        }
    }
};

}  // namespace grid_wgmma
