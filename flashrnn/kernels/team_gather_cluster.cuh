// How a team's blocks send each other a step's values where they are a cluster: into the shared
// memory of each.
//
// A parcel is 16 bytes of values. For each turn a block has two buffers for those of the whole team,
// for odd and even exchanges, and for each a barrier that counts the bytes as they arrive. A block
// sends the parcels of exchange k when it has those of exchange k - 1 of the whole team; by then the
// whole team has read those of exchange k - 2, which they replace, and has armed the buffer's barrier
// again.
//
// Nobody leaves before it has what is sent to it, so nothing is sent to a block that has left. A
// cluster has one item, so its barriers know an exchange by its number.

static_assert(PARCEL_WORDS == 4, "nothing but values");

struct alignas(16) Words {
    unsigned words[4];
};

constexpr int EXCHANGE_BYTES = TURNS * 2 * (BUFFER * sizeof(Words) + 8);
// What arrives at a block in an exchange.
constexpr unsigned ARRIVING = TEAM * PARCELS * COLUMNS * sizeof(Words);

struct Exchange {
    Words* buffers;
    unsigned char* barriers;

    // All threads of all blocks of the team come here together.
    __device__ Exchange(unsigned char* shared, Parcel*, int)
        : buffers(reinterpret_cast<Words*>(shared)),
          barriers(shared + TURNS * 2 * BUFFER * sizeof(Words)) {
        // Parcels that nobody sends are zero.
        for (int i = threadIdx.x; i < TURNS * 2 * BUFFER; i += THREADS) buffers[i] = {};
        if (threadIdx.x == 0) {
            for (int i = 0; i < TURNS * 2; ++i) make_barrier(barriers + 8 * i);
            for (int i = 0; i < TURNS * 2; ++i) expect_bytes(barriers + 8 * i, ARRIVING);
        }
        meet_cluster();
    }

    __device__ Words* buffer(int turn, unsigned tag) const {
        return buffers + (turn * 2 + tag % 2) * BUFFER;
    }

    __device__ unsigned char* barrier(int turn, unsigned tag) const {
        return barriers + (turn * 2 + tag % 2) * 8;
    }

    __device__ void send(const unsigned (&words)[PARCEL_WORDS], int parcel, const Owned& owned,
                         int turn, unsigned tag) const {
        if (!owned.in_parcel) return;
        const Words* to = buffer(turn, tag) + parcel_place(parcel, owned.column);
        // All lanes that make up the parcel have it, and each sends it to some of the team.
        for (int rank = threadIdx.x % 32 % A_PARCEL; rank < TEAM; rank += A_PARCEL) {
            send_async(to, words, barrier(turn, tag), rank);
        }
    }

    // Who waits at a barrier is in nobody's way.
    __device__ void sent() const {}
    __device__ void stand_by() const {}
};

// The parcels of a turn's exchange.
struct Arrivals {
    const Words* mine;
    unsigned char* barrier;
    unsigned tag;

    __device__ void look_for(const Exchange& exchange, int turn, unsigned tag_to_come) {
        tag = tag_to_come;
        mine = exchange.buffer(turn, tag) + sum_part() * 2 * BLOCKS * 32 + threadIdx.x % 32;
        barrier = exchange.barrier(turn, tag);
    }

    // Slice i of the warp's. All slices come with the first.
    __device__ void take(int i, unsigned (&words)[BLOCKS][2 * PARCEL_WORDS]) const {
        if (i == 0) {
            wait_for_bytes(barrier, (tag - 1) / 2 % 2);
            if (threadIdx.x == 0) expect_bytes(barrier, ARRIVING);
        }
        Words parcels[2][BLOCKS];
#pragma unroll
        for (int k = 0; k < 2 * BLOCKS; ++k) {
            parcels[k / BLOCKS][k % BLOCKS] = mine[(i * SUM_PARTS * 2 * BLOCKS + k) * 32];
        }
#pragma unroll
        for (int k = 0; k < BLOCKS * 2 * PARCEL_WORDS; ++k) {
            const int block = k % BLOCKS, step = k / BLOCKS / 2, half = k / BLOCKS % 2;
            const Words& parcel = parcels[parcel_of(step, half)][block];
            words[block][2 * step + half] = parcel.words[word_of(step, half)];
        }
    }

    // A parcel that has come, and lies there until the block sends what its next step gives.
    __device__ Words again(int parcel, int column) const {
        const int first = sum_part() * 2 * BLOCKS * 32 + threadIdx.x % 32;
        return mine[parcel_place(parcel, column) - first];
    }
};
