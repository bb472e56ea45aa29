// The exchanges of a step, in a cluster whose CTAs stand in rows and columns (wgmma_backward_tile.cuh):
// an all-gather of the gates' gradients in each column, by bulk copies of whole tiles, and a
// reduce-scatter of dh in each row, by packets of 16 bytes. There is one buffer for either.
//
//   CTA X                                    CTA Y of its column           CTA Z of its row
//   -----                                    -------------------           ----------------
//   wait_for_parts(): of exchange k - 1
//   wait_until_tiles_are_consumed() <------- signal_tiles_consumed()
//   write its own tile of exchange k
//   barrier of X's threads
//   send_tile():
//     cp.async.bulk -----------------------> tile[row of X]
//   signal_parts_added() --------------------------------------------> wait_until_parts_are_added()
//   multiply its own tile, then the others:
//     wait_for_tile(i) <-------------------- its tile
//   signal_tiles_consumed() ---------------> wait_until_tiles_are_consumed(), of exchange k + 1
//   wait_until_parts_are_added() <------------------------------------ signal_parts_added()
//   send_parts():
//     st.async packets ----------------------------------------------> parts[column of X]
//   next exchange: wait_for_parts() <--------------------------------- its packets
//
// Signals are empty packets (their content is never read: only their arrival counts). Why nothing is
// overwritten that is still read, and nothing arrives at a barrier that is not armed:
//
// - X writes and sends its tile of exchange k when all warps of all CTAs of its column, X's own among
//   them, have signalled that they have multiplied exchange k - 1, after one thread of each CTA had armed
//   the barriers of its tiles again. By then X's copies of exchange k - 1, which read X's own tile, are complete too.
// - A warp of X sends parts of exchange k to Z when Z has signalled that it has added up those of
//   exchange k - 1. Z does so behind the barrier of its threads, to which they come when they have added
//   up these parts, and one of them when it has armed the barrier again. To X itself a warp sends
//   behind X's barrier, which says the same.
// - No wait misses its phase, for the next one needs what is sent behind the wait: Y's next signal all of
//   X's tile, Z's next signal the parts of all warps that wait for it. (So each CTA of the row has a
//   barrier of its own for its signals: warps do not send to all of them.) For the same reason the one
//   thread that arms a barrier of signals again does it in time.
//
// Both signals are sent long before they are waited for: that tiles are consumed while parts arrive,
// that parts are added while tiles arrive.
//
// A CTA leaves when it has waited for all that is sent to it: parts and both signals, the last of these
// at the end. Exchanges are numbered from 0.

#include "cluster/wgmma_backward_tile.cuh"

namespace wgmma_backward {

// Packets of parts that a CTA receives from each CTA of its row, itself among them.
constexpr int PACKETS = PAIRS * SEQUENCES / 2;
constexpr unsigned SENDER_BYTES = PACKETS * sizeof(Words);

// Shared memory, in bytes: tiles; parts; where signals arrive, all in one place; barriers.
constexpr unsigned FIRST_PART = ROWS * TILE_BYTES;
constexpr unsigned SIGNALS = FIRST_PART + COLUMNS * SENDER_BYTES, BARRIERS = SIGNALS + 16;
// The barriers 1 to ROWS - 1 are those of tiles. The last ones are those of signals of each column.
constexpr int PARTS = 0, TILES_CONSUMED = ROWS, PARTS_ADDED = ROWS + 1;
constexpr unsigned EXCHANGE_BYTES = BARRIERS + (ROWS + COLUMNS + 2) / 2 * 16;

// From each warp of the column.
constexpr unsigned CONSUMED_BYTES = ROWS * WARPS * 16;

// Row tiles of 16 units of a CTA: as many warps of a CTA send it parts.
constexpr int ROW_TILES = UNITS / 16;

// A thread writes the gates' gradients of an element in so many pieces (backward_packets.cuh).
constexpr int PIECES = GR / NEIGHBOURS;

struct Exchange {
    unsigned char* shared;
    int row, column;
    unsigned number = 0;
    // Offsets in shared memory for the thread's elements of the first n-tile, so that none is computed
    // in a step: the first sender's part of dh; the pieces of the gates' gradients.
    unsigned part[ELEMENTS_A_TILE], pieces[ELEMENTS_A_TILE][PIECES];

    // Called by all threads of all CTAs of the cluster.
    __device__ Exchange(unsigned char* shared, int rank)
        : shared(shared), row(rank / COLUMNS), column(rank % COLUMNS) {
        // What the first step adds up.
        Words* const parts = reinterpret_cast<Words*>(shared + FIRST_PART);
        for (int i = threadIdx.x; i < COLUMNS * PACKETS; i += THREADS) parts[i] = {};
#pragma unroll
        for (int e = 0; e < ELEMENTS_A_TILE; ++e) {
            const ThreadElement element(e);
            const int packet = packet_index(0, element.unit / 2, element.j);
            part[e] = FIRST_PART + packet * 16 + element.unit % 2 * 8 + element.sequence % 2 * 4;
            materialize(part[e]);
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                const int summed = element.unit * GR + i * NEIGHBOURS;
                pieces[e][i] = row * TILE_BYTES + summed / CHUNK * CHUNKS_BYTES +
                               element.sequence * 16 + summed % CHUNK * 2;
                materialize(pieces[e][i]);
            }
        }
        if (threadIdx.x == 0) {
            for (int i = 0; i < PARTS_ADDED + COLUMNS; ++i) mbarrier_init(barrier(i));
            expect_tiles();
            mbarrier_expect_bytes(barrier(PARTS), COLUMNS * SENDER_BYTES);
            mbarrier_expect_bytes(barrier(TILES_CONSUMED), CONSUMED_BYTES);
            for (int i = 0; i < COLUMNS; ++i) mbarrier_expect_bytes(barrier(PARTS_ADDED + i), 16);
        }
        cluster_barrier();
    }

    __device__ unsigned char* barrier(int i) const { return shared + BARRIERS + 8 * i; }

    // The row of the CTA whose tile is multiplied as the i-th; the own one is number 0.
    __device__ int row_of(int i) const { return row + i < ROWS ? row + i : row + i - ROWS; }
    __device__ unsigned char* tile(int of_row) const { return shared + of_row * TILE_BYTES; }

    __device__ void expect_tiles() const {
        for (int i = 1; i < ROWS; ++i) mbarrier_expect_bytes(barrier(i), TILE_BYTES);
    }

    // Of the exchange before `number`. Thread 0 arms the barriers again.
    __device__ void wait_for_parts() const {
        mbarrier_wait(barrier(PARTS), (number - 1) % 2);
        if (threadIdx.x == 0) mbarrier_expect_bytes(barrier(PARTS), COLUMNS * SENDER_BYTES);
    }
    __device__ void wait_until_tiles_are_consumed() const {
        mbarrier_wait(barrier(TILES_CONSUMED), (number - 1) % 2);
        if (threadIdx.x == 0) mbarrier_expect_bytes(barrier(TILES_CONSUMED), CONSUMED_BYTES);
    }

    // By each warp: that the CTA to which it sends parts has added up those before; of the first
    // exchange these are zeros.
    __device__ void wait_until_parts_are_added() const {
        const int to = receiving_column();
        if (to == column) return;
        mbarrier_wait(barrier(PARTS_ADDED + to), number % 2);
        if (threadIdx.x % (32 * ROW_TILES) == 0) mbarrier_expect_bytes(barrier(PARTS_ADDED + to), 16);
    }

    // dh of the thread's element e: the sum of the parts of its row's CTAs, always in the same order.
    __device__ float sum_parts(int e) const {
        const unsigned offset = part[e % ELEMENTS_A_TILE] + ThreadElement(e).n_tile * PAIRS * 64;
        float sums[COLUMNS];
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
            sums[i] = *reinterpret_cast<const float*>(shared + (offset + i * SENDER_BYTES));
        }
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; ++i) sums[i] += sums[i + COLUMNS / 2];
        return COLUMNS == 2 ? sums[0] : sums[0] + sums[1];
    }

    // An empty packet.
    __device__ void signal(int rank, int of_barrier) const {
        st_async(mapa(shared + SIGNALS, rank), {}, mapa(barrier(of_barrier), rank));
    }

    // Writes the gates' gradients of the thread's element e to the CTA's own tile.
    __device__ void put_gradients(const float (&values)[GR], int e) const {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            PackedGates packed;
#pragma unroll
            for (int k = 0; k < NEIGHBOURS; ++k) round_to(packed.values[k], values[i * NEIGHBOURS + k]);
            const unsigned offset = pieces[e % ELEMENTS_A_TILE][i] + ThreadElement(e).n_tile * 128;
            *reinterpret_cast<PackedGates*>(shared + offset) = packed;
        }
    }

    // Sends the CTA's own tile, which its threads have written before a fence_proxy_async and a barrier:
    // first to the CTA that multiplies it first.
    __device__ void send_tile() const {
        if (threadIdx.x % 32) return;
#pragma unroll
        for (int first = 1; first < ROWS; first += WARPS) {
            const int i = first + threadIdx.x / 32;
            if (i >= ROWS) break;
            const int to = row - i < 0 ? row - i + ROWS : row - i;
            const int rank = to * COLUMNS + column;
            cp_async_bulk(mapa(tile(row), rank), tile(row), TILE_BYTES, mapa(barrier(i), rank));
        }
    }

    // Behind the same barrier: tells the CTAs of the row that the parts before are added up.
    __device__ void signal_parts_added() const {
        const int to = threadIdx.x;
        if (to >= COLUMNS || to == column) return;
        signal(row * COLUMNS + to, PARTS_ADDED + column);
    }

    __device__ void wait_for_tile(int i) const { mbarrier_wait(barrier(i), number % 2); }

    // By each warp, when it has multiplied all tiles: tells all CTAs of the column, its own too.
    __device__ void signal_tiles_consumed() const {
        if (threadIdx.x == 0) expect_tiles();
        if (threadIdx.x % 32) return;
        for (int i = 0; i < ROWS; ++i) signal(i * COLUMNS + column, TILES_CONSUMED);
    }

    // The column of the CTA of the row that has the units of the warp's product.
    __device__ static int receiving_column() { return threadIdx.x / 32 / ROW_TILES; }

    // Sends the sums of the warp's product to this CTA.
    __device__ void send_parts(const float (&sums)[4 * N_TILES]) const {
        const int warp = threadIdx.x / 32, rank = row * COLUMNS + receiving_column();
        const int pair = warp % ROW_TILES * 8 + threadIdx.x % 32 / 4;
        const unsigned to = mapa(shared + FIRST_PART + column * SENDER_BYTES, rank) +
                            packet_index(0, pair, threadIdx.x % 4) * sizeof(Words);
        const unsigned counted = mapa(barrier(PARTS), rank);
#pragma unroll
        for (int n_tile = 0; n_tile < N_TILES; ++n_tile) {
            unsigned words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) words[i] = __float_as_uint(sums[4 * n_tile + i]);
            st_async(to + n_tile * PAIRS * 4 * sizeof(Words), words, counted);
        }
    }
};

}  // namespace wgmma_backward
