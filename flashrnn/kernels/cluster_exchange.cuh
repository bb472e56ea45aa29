// How the warps of a cluster send each other a step's h, from registers into the shared memory of all
// its blocks.
//
// A parcel is 16 bytes: of four neighbouring units the h of two neighbouring sequences, 8 bytes each,
// as a lane multiplies them. The lanes that own these values make it up among themselves, and each
// sends it to some of the blocks. A block has two buffers, for odd and even exchanges, and for each a
// barrier that counts the bytes as they arrive.
//
// This orders the warps, those of one block too: a warp sends parcels of exchange k when
// it has those of exchange k - 1 of all warps. Each of these had read exchange k - 2, which they
// replace, before it sent them; and one of each block had armed the buffer's barrier anew.
//
// All warps send all their parcels, those of units and sequences that the problem lacks too. Nobody
// leaves before it has what is sent to it, so nothing is sent to a block that has left. A cluster has
// one item, so its barriers know an exchange by its number; the first is number 0.

// Parcels lie by step, 8 sequences, four units and pair of sequences, so that those which four
// neighbouring lanes send to one block lie together.
constexpr unsigned BUFFER_BYTES = STEPS * BLOCKS * 16 * 16;
constexpr unsigned ARRIVING = TEAM * UNITS / 4 * SEQUENCES / 2 * 16;
static_assert(ARRIVING == BUFFER_BYTES, "an exchange fills its buffer");
constexpr unsigned FIRST_BARRIER = 2 * BUFFER_BYTES;
constexpr int EXCHANGE_BYTES = FIRST_BARRIER + 16;

// Lanes that make up a parcel, and the blocks to which one of them sends it.
constexpr int MAKERS = PADDED == 4 ? 8 : PADDED == 2 ? 4 : 2;
constexpr int SENDS = (TEAM + MAKERS - 1) / MAKERS;

struct Exchange {
    unsigned char* shared;
    unsigned number = 0;
    // Where in shared memory: what arrives; to each of the lane's blocks its parcel for the first 8
    // sequences and the barrier that counts it. Carried along from exchange to exchange.
    unsigned arriving = 0, parcel_there[SENDS], barrier_there[SENDS];

    // All threads of all blocks come here together.
    __device__ Exchange(unsigned char* shared, int rank) : shared(shared) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < 2; ++i) make_barrier(shared + FIRST_BARRIER + 8 * i);
            for (int i = 0; i < 2; ++i) expect_bytes(shared + FIRST_BARRIER + 8 * i, ARRIVING);
        }
        const int lane = threadIdx.x % 32, quads = WARP_UNITS / 4;
        const int quad = rank * (UNITS / 4) + threadIdx.x / 32 * quads + lane / 4 / MAKERS;
        const unsigned place = (quad / 4 * BLOCKS * 4 + quad % 4) * 64 + swizzled(lane % 4 * 16, quad);
#pragma unroll
        for (int i = 0; i < SENDS; ++i) {
            const unsigned there = cluster_address(shared, first_block() + i * MAKERS);
            parcel_there[i] = there + place;
            barrier_there[i] = there + FIRST_BARRIER;
        }
        meet_cluster();
    }

    // (A lane with nothing to send has an address all the same, of a block that is there.)
    __device__ static int first_block() { return threadIdx.x % 32 / 4 % MAKERS % TEAM; }

    // To the next exchange.
    __device__ void advance() {
        const int to_odd = ++number % 2 ? 1 : -1;
        arriving += to_odd * BUFFER_BYTES;
#pragma unroll
        for (int i = 0; i < SENDS; ++i) {
            parcel_there[i] += to_odd * BUFFER_BYTES;
            barrier_there[i] += to_odd * 8;
        }
    }

    // The lane's own h, all of them.
    __device__ void send(const float (&h)[OWNED]) const {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            unsigned words[4];
            make_parcel(words, h, block * OWNED_A_BLOCK);
#pragma unroll
            for (int i = 0; i < SENDS; ++i) {
                if (TEAM % MAKERS && threadIdx.x % 32 / 4 % MAKERS + i * MAKERS >= TEAM) continue;
                send_async(parcel_there[i] + block * 256, words, barrier_there[i]);
            }
        }
    }

    // Returns when all has arrived.
    __device__ void wait() const {
        unsigned char* const barrier = shared + FIRST_BARRIER + number % 2 * 8;
        wait_for_bytes(barrier, number / 2 % 2);
        if (threadIdx.x == 0) expect_bytes(barrier, ARRIVING);
    }

    // Of four units' 64 bytes, so that what a warp reads at once comes from different banks.
    __device__ static unsigned swizzled(unsigned place, int quad) { return place ^ quad / 2 % 2 * 32; }

    // What the lane multiplies of it.
    __device__ Quad operator()(int step, int block) const {
        const int i = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
        const unsigned char* const from = shared + arriving + j * 64 + swizzled(i * 8, j);
        return *reinterpret_cast<const Quad*>(from + (step * BLOCKS + block) * 256);
    }

    // Two words of each sequence, of the lanes' owned numbers from `first` on.
    __device__ static void make_parcel(unsigned (&words)[4], const float (&h)[OWNED], int first) {
        if (PADDED == 4) {
            // Neighbouring units are 8 lanes apart, the two sequences 4.
            const float other = __shfl_xor_sync(~0u, h[first], 8);
            const bool odd = threadIdx.x / 8 % 2;
            const unsigned two = round_pair(odd ? other : h[first], odd ? h[first] : other, Element{});
            unsigned four[2];
            join(four[0], four[1], two, 16);
            join(words[0], words[2], four[0], 4);
            join(words[1], words[3], four[1], 4);
        } else if (PADDED == 2) {
            // Units are 4 lanes apart, the sequences the lane's own.
            const unsigned mine = round_pair(h[first], h[(first + 1) % OWNED], Element{});
            unsigned low, high;
            join(low, high, mine, 4);
            const unsigned two[2] = {low & 0xffffu | high << 16, low >> 16 | high & 0xffff0000u};
            join(words[0], words[1], two[0], 8);
            join(words[2], words[3], two[1], 8);
        } else {
            // Two units and both sequences are.
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float low = h[(first + k) % OWNED], high = h[(first + 2 + k) % OWNED];
                join(words[2 * k], words[2 * k + 1], round_pair(low, high, Element{}), 4);
            }
        }
    }

    // A word of the lane's and of its neighbour's so many lanes apart, in the order of lanes.
    __device__ static void join(unsigned& first, unsigned& second, unsigned mine, int apart) {
        const unsigned other = __shfl_xor_sync(~0u, mine, apart);
        const bool later = threadIdx.x & apart;
        first = later ? other : mine;
        second = later ? mine : other;
    }
};
