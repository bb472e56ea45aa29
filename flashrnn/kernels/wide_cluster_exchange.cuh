// How the blocks of a cluster send each other a step's h: each its line, as a whole, into the shared
// memory of all others.
//
// A block takes the others' lines in the order of their ranks from its own on, and waits for PART of them
// at a time, its own among the first: a barrier for each part counts their bytes as they arrive. So each
// block sends first to the one before it, and all send to different ones at a time.
//
// Where there are two BUFFERS of lines, who sends exchange k has all of exchange k - 1, whose senders had
// multiplied exchange k - 2, which it replaces, and armed its barriers anew. Where there is one, blocks
// tell each other that they have multiplied an exchange, by a parcel of which only the arrival matters,
// and wait for that of all others before their next h is written.
//
// Nobody leaves before all have come to the end.

constexpr int PART = TEAM < 4 ? TEAM : 4;
constexpr int PARTS = (TEAM + PART - 1) / PART;

constexpr unsigned BUFFER_BYTES = TEAM * LINE_BYTES;
// After the buffers: where those parcels go; barriers, the last one for them.
constexpr unsigned NOTICE = BUFFERS * BUFFER_BYTES, BARRIERS = NOTICE + 16;
constexpr unsigned EXCHANGE_BYTES = BARRIERS + (BUFFERS * PARTS + 2) / 2 * 16;
constexpr int ROOM = BUFFERS * PARTS;

struct Exchange {
    unsigned char* shared;
    int rank;
    unsigned number = 0;

    // All threads of all blocks come here together.
    __device__ Exchange(unsigned char* shared, int rank) : shared(shared), rank(rank) {
        if (threadIdx.x <= ROOM) make_barrier(barrier(threadIdx.x));
        for (int i = 0; i < BUFFERS; ++i) expect_lines(i);
        expect_notices();
        meet_cluster();
    }

    // In the order in which the block takes lines the number 0 is its own.
    __device__ int sender(int i) const { return rank + i < TEAM ? rank + i : rank + i - TEAM; }

    __device__ unsigned buffer() const { return number % BUFFERS; }
    __device__ Element* line(int sender) const {
        return reinterpret_cast<Element*>(shared + buffer() * BUFFER_BYTES + sender * LINE_BYTES);
    }
    __device__ unsigned char* barrier(int i) const { return shared + BARRIERS + 8 * i; }

    __device__ void expect_lines(int buffer) const {
        const int part = threadIdx.x - buffer * PARTS, left = TEAM - part * PART;
        if (0 <= part && part < PARTS) {
            expect_bytes(barrier(threadIdx.x),
                         ((left < PART ? left : PART) - (part == 0)) * LINE_BYTES);
        }
    }
    __device__ void expect_notices() const {
        if (BUFFERS == 1 && threadIdx.x == ROOM) expect_bytes(barrier(ROOM), (TEAM - 1) * 16);
    }

    // By traffic threads: the block's own line, which others have written and shown to copies.
    __device__ void send() const {
        if (threadIdx.x % 32) return;
        for (int i = 1 + (threadIdx.x - COMPUTING) / 32; i < TEAM; i += TRAFFIC / 32) {
            const int to = rank - i < 0 ? rank - i + TEAM : rank - i;
            send_copy(cluster_address(line(rank), to), line(rank), LINE_BYTES,
                      cluster_address(barrier(buffer() * PARTS + i / PART), to));
        }
    }

    // By traffic threads: that the block has multiplied all lines.
    __device__ void give_notice() const {
        const int to = threadIdx.x - COMPUTING;
        if (BUFFERS == 2 || to >= TEAM || to == rank) return;
        send_async(cluster_address(shared + NOTICE, to), {}, cluster_address(barrier(ROOM), to));
    }

    // For the block's number i.
    __device__ void wait(int i) const {
        if (i % PART) return;
        wait_for_bytes(barrier(buffer() * PARTS + i / PART), number / BUFFERS % 2);
    }

    // Until the next line may be written.
    __device__ void wait_for_room() const {
        if (BUFFERS == 2) return;
        wait_for_bytes(barrier(ROOM), number % 2);
        expect_notices();
    }
};
