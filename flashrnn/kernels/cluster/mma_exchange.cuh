// All-gather of h in a cluster: each warp sends h of its own units from registers into the shared
// memory of all CTAs, as packets of 16 bytes (st.async).
//
// A packet has h of four neighbouring units and two neighbouring sequences. Its elements belong to
// PACKET_LANES lanes, which first exchange them by shuffles until each has the whole packet; then each
// sends it to every PACKET_LANES-th CTA of the cluster.
//
//   warp of CTA X                                  each CTA Y of the cluster, X among them
//   -------------                                  ---------------------------------------
//                                                  buffer[0], barrier[0]: even exchanges
//                                                  buffer[1], barrier[1]: odd exchanges
//   send(k):
//     shuffle h into packets
//     st.async packet ---------------------------> buffer[k % 2] += 16 bytes
//                      \-------------------------> barrier[k % 2]: 16 of ARRIVING bytes have come
//                                                  wait(k), each warp:
//                                                    until barrier[k % 2] has all ARRIVING bytes
//                                                    one thread re-arms it, for exchange k + 2
//                                                  multiply from buffer[k % 2]
//                                                  send(k + 1)
//
// Why a packet of exchange k never overwrites one of exchange k - 2 that is still read, and never
// arrives at a barrier that is not armed: a warp sends exchange k after it has received exchange k - 1
// from all warps of all CTAs. Each of those had multiplied exchange k - 2, out of the same buffer,
// before it sent exchange k - 1, and the thread that re-arms the CTA's barrier had done so before its
// warp sent. This holds between the warps of one CTA too: the exchange needs no barrier of the CTA.
//
// Every exchange has the same number of bytes: warps also send the units and sequences that the problem
// does not have. A CTA leaves after the last exchange has arrived in it, so nothing is sent to a CTA
// that has left. Exchanges are numbered from 0; the parity that a wait expects is k / 2 % 2.

#include "cluster/mma_tile.cuh"

namespace cluster_mma {

// The order of packets in a buffer: step of the product, n-tile, four units, pair of sequences. So four
// neighbouring lanes send 64 neighbouring bytes to a CTA.
constexpr unsigned BUFFER_BYTES = STEPS * N_TILES * 16 * 16;
constexpr unsigned ARRIVING = GROUP_SIZE * UNITS / 4 * SEQUENCES / 2 * 16;
static_assert(ARRIVING == BUFFER_BYTES, "an exchange fills its buffer");
constexpr unsigned FIRST_BARRIER = 2 * BUFFER_BYTES;
constexpr int EXCHANGE_BYTES = FIRST_BARRIER + 16;

// Lanes whose elements make up a packet, and the CTAs to which one of them sends it.
constexpr int PACKET_LANES = PADDED == 4 ? 8 : PADDED == 2 ? 4 : 2;
constexpr int RECEIVERS = (GROUP_SIZE + PACKET_LANES - 1) / PACKET_LANES;

struct Exchange {
    unsigned char* shared;
    unsigned number = 0;
    // Addresses for the present exchange, updated by advance() so that none is computed between a step's
    // result and its sending: the offset of the buffer that is received; of each CTA that the lane sends
    // to, where the lane's packet of the first n-tile goes and the barrier that counts it.
    unsigned received = 0, packet_address[RECEIVERS], barrier_address[RECEIVERS];

    // Called by all threads of all CTAs of the cluster.
    __device__ Exchange(unsigned char* shared, int rank) : shared(shared) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < 2; ++i) mbarrier_init(shared + FIRST_BARRIER + 8 * i);
            for (int i = 0; i < 2; ++i) mbarrier_expect_bytes(shared + FIRST_BARRIER + 8 * i, ARRIVING);
        }
        const int lane = threadIdx.x % 32, warp_quads = WARP_UNITS / 4;
        const int quad = rank * (UNITS / 4) + threadIdx.x / 32 * warp_quads + lane / 4 / PACKET_LANES;
        const unsigned offset = (quad / 4 * N_TILES * 4 + quad % 4) * 64 + swizzled(lane % 4 * 16, quad);
#pragma unroll
        for (int i = 0; i < RECEIVERS; ++i) {
            const unsigned base = mapa(shared, first_receiver() + i * PACKET_LANES);
            packet_address[i] = base + offset;
            barrier_address[i] = base + FIRST_BARRIER;
        }
        cluster_barrier();
    }

    // The lane's first receiver; of a lane that sends nothing, a CTA that exists, for mapa.
    __device__ static int first_receiver() { return threadIdx.x % 32 / 4 % PACKET_LANES % GROUP_SIZE; }

    // To the next exchange.
    __device__ void advance() {
        const int to_odd = ++number % 2 ? 1 : -1;
        received += to_odd * BUFFER_BYTES;
#pragma unroll
        for (int i = 0; i < RECEIVERS; ++i) {
            packet_address[i] += to_odd * BUFFER_BYTES;
            barrier_address[i] += to_odd * 8;
        }
    }

    // Sends h of the thread's elements.
    __device__ void send(const float (&h)[ELEMENTS]) const {
#pragma unroll
        for (int n_tile = 0; n_tile < N_TILES; ++n_tile) {
            unsigned words[4];
            gather_packet(words, h, n_tile * ELEMENTS_A_TILE);
#pragma unroll
            for (int i = 0; i < RECEIVERS; ++i) {
                const int receiver = threadIdx.x % 32 / 4 % PACKET_LANES + i * PACKET_LANES;
                if (GROUP_SIZE % PACKET_LANES && receiver >= GROUP_SIZE) continue;
                st_async(packet_address[i] + n_tile * 256, words, barrier_address[i]);
            }
        }
    }

    // Returns when all packets of the exchange have arrived.
    __device__ void wait() const {
        unsigned char* const barrier = shared + FIRST_BARRIER + number % 2 * 8;
        mbarrier_wait(barrier, number / 2 % 2);
        if (threadIdx.x == 0) mbarrier_expect_bytes(barrier, ARRIVING);
    }

    // Swaps the halves of the 64 bytes of every other two quads of units: the 32 lanes of a warp then
    // read from different banks.
    __device__ static unsigned swizzled(unsigned offset, int quad) { return offset ^ quad / 2 % 2 * 32; }

    // The lane's part of the right operand.
    __device__ HFragment operator()(int step, int n_tile) const {
        const int i = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
        const unsigned char* const from = shared + received + j * 64 + swizzled(i * 8, j);
        return *reinterpret_cast<const HFragment*>(from + (step * N_TILES + n_tile) * 256);
    }

    // The packet that the lane sends, of the elements from `first` on of PACKET_LANES lanes: four units
    // of one sequence in two words, then of the next sequence.
    __device__ static void gather_packet(unsigned (&words)[4], const float (&h)[ELEMENTS], int first) {
        if (PADDED == 4) {
            // A lane has one element. The next unit is 8 lanes away, the other sequence 4.
            const float other = __shfl_xor_sync(~0u, h[first], 8);
            const bool odd = threadIdx.x / 8 % 2;
            const unsigned two = round_pair(odd ? other : h[first], odd ? h[first] : other, Element{});
            unsigned four[2];
            exchange_words(four[0], four[1], two, 16);
            exchange_words(words[0], words[2], four[0], 4);
            exchange_words(words[1], words[3], four[1], 4);
        } else if (PADDED == 2) {
            // A lane has both sequences of one unit. The next unit is 4 lanes away.
            const unsigned own = round_pair(h[first], h[(first + 1) % ELEMENTS], Element{});
            unsigned low, high;
            exchange_words(low, high, own, 4);
            const unsigned two[2] = {low & 0xffffu | high << 16, low >> 16 | high & 0xffff0000u};
            exchange_words(words[0], words[1], two[0], 8);
            exchange_words(words[2], words[3], two[1], 8);
        } else {
            // A lane has both sequences of two units. The next two units are 4 lanes away.
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float low = h[(first + k) % ELEMENTS], high = h[(first + 2 + k) % ELEMENTS];
                exchange_words(words[2 * k], words[2 * k + 1], round_pair(low, high, Element{}), 4);
            }
        }
    }

    // The lane's word and that of the lane `apart` lanes away, in the order of the lanes.
    __device__ static void exchange_words(unsigned& first, unsigned& second, unsigned own, int apart) {
        const unsigned other = __shfl_xor_sync(~0u, own, apart);
        const bool later = threadIdx.x & apart;
        first = later ? other : own;
        second = later ? own : other;
    }
};

}  // namespace cluster_mma
