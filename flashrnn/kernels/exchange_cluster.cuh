// How a team's blocks send each other a step's values where they are a cluster: into the shared
// memory of each.
//
// A parcel is 16 bytes of values. A block has two buffers for those of the whole team, for odd and
// even exchanges, and for each a barrier that counts the bytes as they arrive. A block sends the
// parcels of exchange k when it has those of exchange k - 1 of the whole team; by then the whole team
// has read those of exchange k - 2, which they replace, and has armed the buffer's barrier again.
//
// Nobody leaves before it has what is sent to it, so nothing is sent to a block that has left.

static_assert(PARCEL_WORDS == 4, "nothing but values");

struct alignas(16) Words {
    unsigned words[4];
};

constexpr int EXCHANGE_BYTES = 2 * BUFFER * sizeof(Words) + 16;
// What arrives at a block in an exchange.
constexpr unsigned ARRIVING = TEAM * PARCELS * COLUMNS * sizeof(Words);

struct Exchange {
    Words* buffers;
    unsigned char* barriers;

    // All threads of all blocks of the team come here together.
    __device__ Exchange(unsigned char* shared, Parcel*, int)
        : buffers(reinterpret_cast<Words*>(shared)), barriers(shared + 2 * BUFFER * sizeof(Words)) {
        // Parcels that nobody sends are zero.
        for (int i = threadIdx.x; i < 2 * BUFFER; i += THREADS) buffers[i] = {};
        if (threadIdx.x == 0) {
            for (int turn = 0; turn < 2; ++turn) make_barrier(barriers + 8 * turn);
            for (int turn = 0; turn < 2; ++turn) expect_bytes(barriers + 8 * turn, ARRIVING);
        }
        meet_cluster();
    }

    __device__ void send(const unsigned (&words)[PARCEL_WORDS], int parcel, const Owned& owned,
                         unsigned tag) const {
        if (!owned.in_parcel) return;
        const Words* to = buffers + tag % 2 * BUFFER + parcel_place(parcel, owned.column);
        // All lanes that make up the parcel have it, and each sends it to some of the team.
        for (int rank = threadIdx.x % 32 % A_PARCEL; rank < TEAM; rank += A_PARCEL) {
            send_async(to, words, barriers + tag % 2 * 8, rank);
        }
    }
};

// The parcels of an exchange.
struct Arrivals {
    const Words* mine;

    __device__ Arrivals(const Exchange& exchange, unsigned tag) {
        mine = exchange.buffers + tag % 2 * BUFFER + sum_part() * 2 * BLOCKS * 32 + threadIdx.x % 32;
        unsigned char* barrier = exchange.barriers + tag % 2 * 8;
        wait_for_bytes(barrier, (tag - 1) / 2 % 2);
        if (threadIdx.x == 0) expect_bytes(barrier, ARRIVING);
    }

    // Slice i of the warp's.
    __device__ void take(int i, unsigned (&words)[BLOCKS][2 * PARCEL_WORDS]) const {
#pragma unroll
        for (int k = 0; k < 2 * BLOCKS; ++k) {
            const Words parcel = mine[(i * SUM_PARTS * 2 * BLOCKS + k) * 32];
#pragma unroll
            for (int w = 0; w < PARCEL_WORDS; ++w) {
                words[k % BLOCKS][k / BLOCKS * PARCEL_WORDS + w] = parcel.words[w];
            }
        }
    }
};
