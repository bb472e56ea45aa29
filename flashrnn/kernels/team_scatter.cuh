// How a team that is a cluster exchanges the product of a backward step, in place of its factors.
//
// A block multiplies the gates' gradients of its own units by its part of R. That gives part of dh of
// all the head's units, a sum over the block's own. Each block is sent the parts of its units, in
// float32, and adds them up in the order of their blocks. So a unit and sequence cost a block TEAM
// numbers, however many gates R feeds, where a gather (team_gather.cuh) costs it all units' gradients.
//
// The product's rows are the head's units, by twos: rows i and i + 8 of a tile of 16 are the two units
// of a pair. So what a lane of the tensor core gets of a tile, two units of two neighbouring sequences,
// is all one block's, and a parcel of 16 bytes as it is. Blocks send to all others in turn, each
// beginning with itself, so that not all send to one at a time.
//
// A parcel goes into the shared memory of the block that owns its units. That has two buffers for what
// it is sent, for odd and even exchanges, and for each a barrier that counts the bytes as they arrive;
// and two for its own gradients. What orders the accesses, block X sending exchange k to block Y:
//
// - X sends behind a barrier of its block, to which its owning warps come when they have exchange
//   k - 1 of the whole team, Y among it. Y sent that behind a barrier of its own, to which its owning
//   warps came when they had added up exchange k - 2: it is this that exchange k replaces. Before the
//   same barrier Y had armed the buffer's barrier for exchange k.
// - A block puts its gradients of exchange k where those of k - 2 were. Its warps have read these when
//   they come to the barrier of exchange k - 1, and the gradients are put down behind it.
//
// Nobody leaves before it has what is sent to it, so nothing is sent to a block that has left: the
// owning warps wait for all bytes of every exchange. A cluster has one item, so its barriers know an
// exchange by its number; the first is number 1.

static_assert(TURNS == 1, "a cluster has one tile");

struct alignas(16) Words {
    unsigned words[4];
};

// Pairs of a block's units, of all blocks', and a block's parcels of an exchange.
constexpr int PAIRS = (UNITS + 1) / 2;
constexpr int ALL_PAIRS = TEAM * PAIRS;
constexpr int PARCELS = PAIRS * COLUMNS / 2;

// What a lane owns: the parcels' numbers one by one, as they lie.
constexpr int OWNED_NUMBERS = 4 * PARCELS;
constexpr int OWNED = (OWNED_NUMBERS + THREADS - 1) / THREADS;

// Tiles of the product's rows, 8 pairs each, of which warp w takes the numbers w, w + WARPS, ...
constexpr int TILES = ((ALL_PAIRS + 7) / 8 + WARPS - 1) / WARPS;

// What the product sums: a unit's gates together, unit by unit. 16 bytes of it, for one sequence, are
// a share, and a slice has a share for each lane of a sequence: two steps of the tensor core.
constexpr int SHARE = 16 / sizeof(Element);
constexpr int SLICES = (UNITS * GR + 4 * SHARE - 1) / (4 * SHARE);

// Where the parcel of a pair and of the columns 2 j and 2 j + 1 of a block of 8 lies. Parcels that a
// warp sends at once lie together, and numbers that it adds up are in 32 different banks.
__device__ inline int parcel_place(int block, int pair, int j) {
    return (block * PAIRS + pair) * 4 + (j ^ pair / 2 % 4);
}

// The pair that the lane has in the warp's tile, and whose it is.
struct Pair {
    int rank, pair;
    bool exists;

    __device__ Pair(int tile, int own_rank) {
        const int all = 8 * (tile * WARPS + threadIdx.x / 32) + threadIdx.x % 32 / 4;
        rank = (own_rank + all / PAIRS) % TEAM;
        pair = all % PAIRS;
        exists = 8 * TILES * WARPS == ALL_PAIRS || all < ALL_PAIRS;
    }
};

// The lane's owned number e.
struct Owned {
    int column, unit, pair;
    // Whether the problem has this unit and sequence, and the lane it.
    bool exists;
    // Of the problem in any case: where it lacks the lane's own, something that the warp reads anyway.
    long long sequence, d;

    __device__ Owned(int e, int rank, const Item& item, long long B) {
        const int first = e * THREADS + threadIdx.x / 32 * 32;
        int index = first + threadIdx.x % 32;
        const bool in_parcels = index < OWNED_NUMBERS;
        if (!in_parcels) index = first < OWNED_NUMBERS ? first : OWNED_NUMBERS - 1;
        pair = index / 4 % PAIRS;
        unit = 2 * pair + index / 2 % 2;
        column = index / 4 / PAIRS * 2 + index % 2;
        sequence = item.first_sequence + column;
        d = static_cast<long long>(rank) * UNITS + unit;
        exists = in_parcels && unit < UNITS && d < D && sequence < B;
        if (sequence >= B) sequence = B - 1;
        if (d >= D) d = D - 1;
    }

    // Whether the warp's lanes have something to own.
    __device__ static bool any() { return threadIdx.x / 32 * 32 < OWNED_NUMBERS; }
};

// Shared memory, in bytes: the parcels of two exchanges, the gradients of two, the parcels' barriers.
constexpr unsigned RECEIVED_BYTES = TEAM * PARCELS * sizeof(Words);
constexpr unsigned GRADIENT_BYTES = SLICES * BLOCKS * 32 * sizeof(Words);
constexpr unsigned FIRST_GRADIENTS = 2 * RECEIVED_BYTES;
constexpr unsigned FIRST_BARRIER = FIRST_GRADIENTS + 2 * GRADIENT_BYTES;
constexpr int EXCHANGE_BYTES = FIRST_BARRIER + 16;

// As many gradients as lie side by side in a share, whatever the unit.
constexpr int TOGETHER = (GR & -GR) < SHARE ? GR & -GR : SHARE;
struct alignas(TOGETHER * sizeof(Element)) Together {
    Element values[TOGETHER];
};

struct Exchange {
    unsigned char* shared;
    // The exchange whose gradients are put down and multiplied, and whose parcels are sent. That before
    // is the one which arrives.
    unsigned number = 1;
    // Where in shared memory, carried along so that nothing has to be computed on the way: the gradients;
    // of each tile the place of the lane's parcel for the first 8 sequences and the barrier that counts
    // it, both with their owner; what arrives, and the barrier that counts that.
    unsigned gradients = FIRST_GRADIENTS + GRADIENT_BYTES;
    unsigned parcel_there[TILES], barrier_there[TILES];
    unsigned received = 0, barrier = FIRST_BARRIER;

    // All threads of all blocks of the team come here together.
    __device__ Exchange(unsigned char* shared, int rank) : shared(shared) {
        // Gradients that nobody puts there are zero.
        Words* const words = reinterpret_cast<Words*>(shared + FIRST_GRADIENTS);
        for (int i = threadIdx.x; i < 2 * SLICES * BLOCKS * 32; i += THREADS) words[i] = {};
        if (threadIdx.x == 0) {
            for (int i = 0; i < 2; ++i) make_barrier(shared + FIRST_BARRIER + 8 * i);
            for (int i = 0; i < 2; ++i) expect_bytes(shared + FIRST_BARRIER + 8 * i, RECEIVED_BYTES);
        }
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const Pair pair(tile, rank);
            const int place = rank * PARCELS + parcel_place(0, pair.pair, threadIdx.x % 4);
            const unsigned there = cluster_address(shared, pair.rank);
            parcel_there[tile] = there + RECEIVED_BYTES + place * sizeof(Words);
            barrier_there[tile] = there + FIRST_BARRIER + 8;
        }
        meet_cluster();
    }

    // To the next exchange.
    __device__ void advance() {
        const int to_odd = ++number % 2 ? 1 : -1;
        gradients += to_odd * GRADIENT_BYTES;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            parcel_there[tile] += to_odd * RECEIVED_BYTES;
            barrier_there[tile] += to_odd * 8;
        }
        received -= to_odd * RECEIVED_BYTES;
        barrier -= to_odd * 8;
    }

    // The gradients of an owned unit's gates and sequence.
    __device__ void put(const float (&values)[GR], const Owned& owned) const {
        if (!owned.exists) return;
#pragma unroll
        for (int first = 0; first < GR; first += TOGETHER) {
            Together together;
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) round_to(together.values[i], values[first + i]);
            const int summed = owned.unit * GR + first, share = summed / SHARE;
            const int lane = owned.column % 8 * 4 + share % 4;
            const unsigned place = ((share / 4 * BLOCKS + owned.column / 8) * 32 + lane) * 16 +
                                   summed % SHARE * sizeof(Element);
            *reinterpret_cast<Together*>(shared + (gradients + place)) = together;
        }
    }

    // A slice of them, as the tensor core has it of a lane.
    __device__ Words operand(int slice, int block, int lane) const {
        const unsigned place = gradients + lane * 16;
        return reinterpret_cast<const Words*>(shared + place)[(slice * BLOCKS + block) * 32];
    }

    // The sums of the warp's product, to their owners.
    __device__ void send(const float (&sums)[TILES][BLOCKS][4], int rank) const {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            if (!Pair(tile, rank).exists) continue;
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block) {
                unsigned words[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) words[i] = __float_as_uint(sums[tile][block][i]);
                const unsigned further = block * PAIRS * 4 * sizeof(Words);
                send_async(parcel_there[tile] + further, words, barrier_there[tile]);
            }
        }
    }

    // Returns when all has arrived.
    __device__ void wait() const {
        wait_for_bytes(shared + barrier, (number / 2 + 1) % 2);
        if (threadIdx.x == 0) expect_bytes(shared + barrier, RECEIVED_BYTES);
    }

    // The sum of what has arrived for an owned unit and sequence.
    __device__ float total(const Owned& owned) const {
        const int parcel = parcel_place(owned.column / 8, owned.pair, owned.column % 8 / 2);
        const unsigned place = (4 * parcel + owned.unit % 2 * 2 + owned.column % 2) * 4;
        const float* from = reinterpret_cast<const float*>(shared + (received + place));
        float sums[TEAM];
#pragma unroll
        for (int i = 0; i < TEAM; ++i) sums[i] = from[i * 4 * PARCELS];
        // Neighbours, then their neighbours, and so on: additions wait for each other.
#pragma unroll
        for (int apart = 1; apart < TEAM; apart *= 2) {
#pragma unroll
            for (int i = 0; i + apart < TEAM; i += 2 * apart) sums[i] += sums[i + apart];
        }
        return sums[0];
    }
};
