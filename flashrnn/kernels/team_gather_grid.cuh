// How a team's blocks send each other a step's values through the L2 cache, all blocks of a launch
// running at once.
//
// A parcel is 16 bytes: three words of values and a tag, the number of the exchange. It is written
// and read as a whole, so whoever sees the tag has the values. A lane multiplies its parcels out of its
// registers. It asks for AHEAD slices once (where tiles take turns, a turn early), then for the first one
// again and again until that has the tag, then once more for the others, and so on: who asks without end
// keeps the L2 cache from those who send, so nobody does for more than a slice.
//
// There are two buffers for each turn, for odd and even tags. A block sends parcels of tag k when it
// has those of tag k - 1 of the whole team. Each of these was sent behind a barrier of its block,
// before which the block's warps had the parcels of tag k - 2 in registers: it is them that those of
// tag k replace.

static_assert(PARCEL_WORDS == 3, "the fourth word is the tag");

// Shared memory that it takes.
constexpr int EXCHANGE_BYTES = 0;

struct Exchange {
    Parcel* buffers;

    __device__ Exchange(unsigned char*, Parcel* global, int team)
        : buffers(global + static_cast<long long>(team) * TURNS * 2 * BUFFER) {}

    __device__ Parcel* buffer(int turn, unsigned tag) const {
        return buffers + (turn * 2 + tag % 2) * BUFFER;
    }

    __device__ void send(const unsigned (&words)[PARCEL_WORDS], int parcel, const Owned& owned,
                         int turn, unsigned tag) const {
        if (!owned.in_parcel || threadIdx.x % 32 % A_PARCEL != 0) return;
        Parcel* to = buffer(turn, tag) + parcel_place(parcel, owned.column);
        publish(to, {{words[0], words[1], words[2]}, tag});
    }

    // Where tiles take no turns, warps that own no units stand by until their block has sent its own.
    // Other blocks send at about the same time, and what they send takes longer than the pause to
    // come: to ask for it before would only keep the L2 cache from those who send.
    __device__ void sent() const {
        if (TURNS == 1 && Owned::SOME_WARPS_DO_NOT) meet<THREADS>();
    }

    __device__ void stand_by() const {
        if (TURNS > 1) return;
        meet<THREADS>();
        pause(100);
    }
};

// The parcels of a turn's tag that a lane multiplies, of AHEAD slices at a time.
struct Arrivals {
    Parcel parcels[AHEAD][2][BLOCKS];
    const Parcel* mine;
    unsigned tag;

    __device__ void look_for(const Exchange& exchange, int turn, unsigned tag_to_come) {
        tag = tag_to_come;
        mine = exchange.buffer(turn, tag) + sum_part() * 2 * BLOCKS * 32 + threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) expect(i);
    }

    // Waits for slice i of the warp's; its place is then the slice's that comes AHEAD later.
    __device__ void take(int i, unsigned (&words)[BLOCKS][2 * PARCEL_WORDS]) {
        while (true) {
            bool complete = true;
#pragma unroll
            for (int k = 0; k < 2 * BLOCKS; ++k) {
                complete &= parcels[i % AHEAD][k / BLOCKS][k % BLOCKS].tag == tag_of(i, k);
            }
            if (complete) break;
            ask(i, 1);
        }
#pragma unroll
        for (int k = 0; k < BLOCKS * 2 * PARCEL_WORDS; ++k) {
            const int block = k % BLOCKS, step = k / BLOCKS / 2, half = k / BLOCKS % 2;
            const Parcel& parcel = parcels[i % AHEAD][parcel_of(step, half)][block];
            words[block][2 * step + half] = parcel.words[word_of(step, half)];
        }
        // Where the first has come others have, asked for in vain before.
        if (i == 0) ask(1, AHEAD - 1);
        if (i + AHEAD < SLICES_A_WARP) expect(i + AHEAD);
    }

    // Asks for slice i.
    __device__ void expect(int i) {
#pragma unroll
        for (int k = 0; k < 2 * BLOCKS; ++k) {
            parcels[i % AHEAD][k / BLOCKS][k % BLOCKS] = look_up(place(i, k));
        }
    }

    // Asks for those of slice i and the next ones that have not arrived yet.
    __device__ void ask(int first, int count) {
#pragma unroll
        for (int i = first; i < first + count; ++i) {
            if (i >= SLICES_A_WARP) break;
#pragma unroll
            for (int k = 0; k < 2 * BLOCKS; ++k) {
                look_up(parcels[i % AHEAD][k / BLOCKS][k % BLOCKS], place(i, k), tag_of(i, k));
            }
        }
    }

    // Parcels that nobody sends are all zeros. Of the first slices somebody sends all.
    __device__ unsigned tag_of(int i, int k) const {
        const int parcel = (i * SUM_PARTS + sum_part()) * 8 + threadIdx.x % 4 * 2 + k / BLOCKS;
        return (i + 1) * SUM_PARTS * 8 <= TEAM * PARCELS || parcel < TEAM * PARCELS ? tag : 0;
    }

    __device__ const Parcel* place(int i, int k) const {
        return mine + (i * SUM_PARTS * 2 * BLOCKS + k) * 32;
    }

    // A parcel that has come, and lies there until the block sends what its next step gives.
    __device__ Parcel again(int parcel, int column) const {
        const int first = sum_part() * 2 * BLOCKS * 32 + threadIdx.x % 32;
        return look_up(mine + (parcel_place(parcel, column) - first));
    }
};
