// Reduce-scatter of dh in a cluster: dh = dgates R, summed over the gates of all units of the head.
//
// A CTA has the gates' gradients of its own units, and the rows of R that they are multiplied by. Their
// product is a part of dh of all the head's units: the sum over the CTA's own units only. Each CTA is
// sent the parts of dh of its units, in float32, and adds them up always in the same order, that of the
// senders. So a CTA receives GROUP_SIZE numbers for a unit and a sequence, however many gates R feeds;
// if it were sent the gates' gradients instead, it would have to receive those of all units of the
// head.
//
// The two units of a pair belong to one CTA, so a packet (backward_packets.cuh) goes to one as it is. A
// CTA sends to all CTAs in the order of their ranks from its own on, so that they do not all send to one
// at a time.
//
//   CTA X                                          CTA Y, of which X computes parts of dh
//   -----                                          --------------------------------------
//                                                  received[0], barrier[0]: even exchanges
//                                                  received[1], barrier[1]: odd exchanges
//   put_gradients(): elements' warps write
//     gradients[k % 2]
//   barrier of X's threads
//   multiply gradients[k % 2] by R
//   send(k):
//     st.async packet ---------------------------> received[k % 2] += 16 bytes
//                      \-------------------------> barrier[k % 2]: 16 of RECEIVED_BYTES have come
//                                                  wait(k), each warp that has elements:
//                                                    until barrier[k % 2] has all RECEIVED_BYTES
//                                                    one thread re-arms it, for exchange k + 2
//                                                  sum_received(): add up parts, compute gradients
//                                                  put_gradients() of exchange k + 1
//                                                  barrier of Y's threads, and so on
//
// Only the warps that have elements (ThreadElement) wait for exchanges and compute gradients; all warps
// multiply and send. What orders the reuse of buffers:
//
// - Received packets and their barrier: X sends exchange k behind a barrier of its threads, to which
//   the warps with elements come when exchange k - 1 has arrived from all CTAs, Y among them. Y sent
//   that behind a barrier of its threads, to which its warps with elements came when they had added up
//   exchange k - 2, whose packets those of exchange k replace, and when one of them had re-armed that
//   exchange's barrier.
// - Gradients: those of exchange k replace those of exchange k - 2. All warps of the CTA have read
//   these when they come to the barrier of exchange k - 1, and the new ones are written behind that
//   barrier.
//
// A CTA leaves after the last exchange has arrived in it: its warps with elements wait for every
// exchange, so nothing is sent to a CTA that has left. Exchanges are numbered from 1; the parity that a
// wait for exchange k - 1, while `number` is k, expects is (k / 2 + 1) % 2.

#include "cluster/backward_packets.cuh"
#include "cluster/backward_tile.cuh"

namespace cluster_backward {

// Pairs of units of all CTAs. Packets that a CTA receives from one CTA in an exchange.
constexpr int ALL_PAIRS = GROUP_SIZE * PAIRS;
constexpr int PACKETS = PAIRS * SEQUENCES / 2;

// Elements (a unit and a sequence) of a CTA, those that its packets have, in the packets' order, and of
// a thread.
constexpr int CTA_ELEMENTS = 4 * PACKETS;
constexpr int ELEMENTS = (CTA_ELEMENTS + THREADS - 1) / THREADS;

// Row tiles of the product, of 8 pairs each: warp w has the tiles w, w + WARPS, ..., ROW_TILES of them.
constexpr int ROW_TILES = ((ALL_PAIRS + 7) / 8 + WARPS - 1) / WARPS;

// Of the dimension that the product sums, a slice has a chunk for each of the four lanes that have a
// sequence: two steps of mma.
constexpr int SLICES = (UNITS * GR + 4 * CHUNK - 1) / (4 * CHUNK);

// The pair that the lane has in one of the warp's row tiles, and the CTA whose units these are.
struct Pair {
    int rank, pair;
    bool exists;

    __device__ Pair(int tile, int own_rank) {
        const int all = 8 * (tile * WARPS + threadIdx.x / 32) + threadIdx.x % 32 / 4;
        rank = (own_rank + all / PAIRS) % GROUP_SIZE;
        pair = all % PAIRS;
        exists = 8 * ROW_TILES * WARPS == ALL_PAIRS || all < ALL_PAIRS;
    }
};

// The thread's element e. The CTA's elements are numbered in the order in which packets have them:
//
//   element's number / 4: the packet, of a pair and two sequences
//   element's number / 2 % 2: the unit of the pair
//   element's number % 2: the sequence
//
// and element e of a thread has the number e * THREADS + threadIdx.x.
struct ThreadElement {
    // The sequence among the cluster's, the unit and its pair among the CTA's.
    int cluster_sequence, unit, pair;
    // Whether the thread has this element and the problem this unit and sequence.
    bool exists;
    // The sequence and the unit in the problem, clamped to those that exist: threads without an element
    // load what another lane of the warp loads, so that loads need no condition.
    long long sequence, d;

    __device__ ThreadElement(int e, int rank, const WorkTile& work, long long B) {
        const int first = e * THREADS + threadIdx.x / 32 * 32;
        int number = first + threadIdx.x % 32;
        const bool in_packets = number < CTA_ELEMENTS;
        if (!in_packets) number = first < CTA_ELEMENTS ? first : CTA_ELEMENTS - 1;
        pair = number / 4 % PAIRS;
        unit = 2 * pair + number / 2 % 2;
        cluster_sequence = number / 4 / PAIRS * 2 + number % 2;
        sequence = work.first_sequence + cluster_sequence;
        d = static_cast<long long>(rank) * UNITS + unit;
        exists = in_packets && unit < UNITS && d < D && sequence < B;
        if (sequence >= B) sequence = B - 1;
        if (d >= D) d = D - 1;
    }

    // Whether a thread of the warp has an element.
    __device__ static bool any_in_warp() { return threadIdx.x / 32 * 32 < CTA_ELEMENTS; }
};

// Shared memory, in bytes: the received packets of two exchanges; the gradients of two; the two
// barriers.
constexpr unsigned RECEIVED_BYTES = GROUP_SIZE * PACKETS * sizeof(Words);
constexpr unsigned GRADIENT_BYTES = SLICES * N_TILES * 32 * sizeof(Words);
constexpr unsigned FIRST_GRADIENTS = 2 * RECEIVED_BYTES;
constexpr unsigned FIRST_BARRIER = FIRST_GRADIENTS + 2 * GRADIENT_BYTES;
constexpr int EXCHANGE_BYTES = FIRST_BARRIER + 16;

struct Exchange {
    unsigned char* shared;
    // The exchange whose gradients are written and multiplied, and whose packets are sent. The one
    // before it is the one that is received.
    unsigned number = 1;
    // Offsets in shared memory and addresses for the present exchange, updated by advance() so that
    // none is computed between a step's product and its sending: the gradients; for each row tile, in
    // the CTA that has the units, where the lane's packet of the first n-tile goes and the barrier that
    // counts it; the packets that are received, and the barrier that counts these.
    unsigned gradients = FIRST_GRADIENTS + GRADIENT_BYTES;
    unsigned packet_address[ROW_TILES], barrier_address[ROW_TILES];
    unsigned received = 0, barrier = FIRST_BARRIER;

    // Called by all threads of all CTAs of the cluster.
    __device__ Exchange(unsigned char* shared, int rank) : shared(shared) {
        // Gradients of elements that do not exist are never written.
        Words* const words = reinterpret_cast<Words*>(shared + FIRST_GRADIENTS);
        for (int i = threadIdx.x; i < 2 * SLICES * N_TILES * 32; i += THREADS) words[i] = {};
        if (threadIdx.x == 0) {
            for (int i = 0; i < 2; ++i) mbarrier_init(shared + FIRST_BARRIER + 8 * i);
            for (int i = 0; i < 2; ++i) {
                mbarrier_expect_bytes(shared + FIRST_BARRIER + 8 * i, RECEIVED_BYTES);
            }
        }
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            const Pair pair(tile, rank);
            const int index = rank * PACKETS + packet_index(0, pair.pair, threadIdx.x % 4);
            const unsigned base = mapa(shared, pair.rank);
            packet_address[tile] = base + RECEIVED_BYTES + index * sizeof(Words);
            barrier_address[tile] = base + FIRST_BARRIER + 8;
        }
        cluster_barrier();
    }

    // To the next exchange.
    __device__ void advance() {
        const int to_odd = ++number % 2 ? 1 : -1;
        gradients += to_odd * GRADIENT_BYTES;
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            packet_address[tile] += to_odd * RECEIVED_BYTES;
            barrier_address[tile] += to_odd * 8;
        }
        received -= to_odd * RECEIVED_BYTES;
        barrier -= to_odd * 8;
    }

    // Writes the gates' gradients of an element.
    __device__ void put_gradients(const float (&values)[GR], const ThreadElement& element) const {
        if (!element.exists) return;
#pragma unroll
        for (int first = 0; first < GR; first += NEIGHBOURS) {
            PackedGates packed;
#pragma unroll
            for (int i = 0; i < NEIGHBOURS; ++i) round_to(packed.values[i], values[first + i]);
            const int summed = element.unit * GR + first, chunk = summed / CHUNK;
            const int n_tile = element.cluster_sequence / 8;
            const int lane = element.cluster_sequence % 8 * 4 + chunk % 4;
            const unsigned offset = ((chunk / 4 * N_TILES + n_tile) * 32 + lane) * 16 +
                                    summed % CHUNK * sizeof(Element);
            *reinterpret_cast<PackedGates*>(shared + (gradients + offset)) = packed;
        }
    }

    // A lane's words of the right operand: those of both steps of a slice.
    __device__ Words operand(int slice, int n_tile, int lane) const {
        const unsigned offset = gradients + lane * 16;
        return reinterpret_cast<const Words*>(shared + offset)[(slice * N_TILES + n_tile) * 32];
    }

    // Sends the sums of the warp's product to the CTAs that have the units.
    __device__ void send(const float (&sums)[ROW_TILES][N_TILES][4], int rank) const {
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            if (!Pair(tile, rank).exists) continue;
#pragma unroll
            for (int n_tile = 0; n_tile < N_TILES; ++n_tile) {
                unsigned words[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) words[i] = __float_as_uint(sums[tile][n_tile][i]);
                const unsigned offset = n_tile * PAIRS * 4 * sizeof(Words);
                st_async(packet_address[tile] + offset, words, barrier_address[tile]);
            }
        }
    }

    // Returns when all packets of the exchange before `number` have arrived.
    __device__ void wait() const {
        mbarrier_wait(shared + barrier, (number / 2 + 1) % 2);
        if (threadIdx.x == 0) mbarrier_expect_bytes(shared + barrier, RECEIVED_BYTES);
    }

    // dh of an element: the sum of all CTAs' parts.
    __device__ float sum_received(const ThreadElement& element) const {
        const int n_tile = element.cluster_sequence / 8, j = element.cluster_sequence % 8 / 2;
        const int packet = packet_index(n_tile, element.pair, j);
        const unsigned offset = (4 * packet + element.unit % 2 * 2 + element.cluster_sequence % 2) * 4;
        const float* from = reinterpret_cast<const float*>(shared + (received + offset));
        float sums[GROUP_SIZE];
#pragma unroll
        for (int i = 0; i < GROUP_SIZE; ++i) sums[i] = from[i * 4 * PACKETS];
        // As a binary tree: an addition waits for the two before it, so the chain is short.
#pragma unroll
        for (int apart = 1; apart < GROUP_SIZE; apart *= 2) {
#pragma unroll
            for (int i = 0; i + apart < GROUP_SIZE; i += 2 * apart) sums[i] += sums[i + apart];
        }
        return sums[0];
    }
};

}  // namespace cluster_backward
