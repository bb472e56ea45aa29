// How threads copy a row of contiguous elements between global and shared memory, in pieces.
//
// A piece has 16, 8 or 4 bytes: the most at whose multiples all rows of a call begin and end. Rows of
// an odd number of 16-bit elements begin anywhere, every other one between two words of 4 bytes. Such a
// row is copied IN_WORDS, all those that have an element of it. To shared memory they come as they lie
// in global memory; once they are there, settle() moves the row's elements to their places. A row of
// D elements takes (D + 1) / 2 words wherever it begins, as long as D is odd.

#include "types.cuh"

// A row of UNITS elements. BYTES is the size of a piece; that of an element of 16 bits stands for rows
// that begin anywhere. In shared memory rows begin at multiples of a piece.
template <int UNITS, int BYTES>
struct RowPieces {
    static constexpr bool IN_WORDS = BYTES < 4;
    static constexpr int COPIED = IN_WORDS ? 4 : BYTES;
    static_assert(IN_WORDS ? UNITS % 2 == 1 : UNITS * sizeof(Element) % BYTES == 0,
                  "the host copies other tensors first");
    // Elements of a piece, and pieces of a row.
    static constexpr int PIECE = COPIED / sizeof(Element);
    static constexpr int PIECES = (UNITS + PIECE - 1) / PIECE;

    // Threads that share a row, next to each other in a warp, and pieces of each. Of 16 bytes each
    // thread has one.
    __device__ static constexpr int threads() {
        int threads = 1;
        while (threads < PIECES && threads < 32) threads *= 2;
        return BYTES == 16 ? PIECES : threads;
    }
    static constexpr int THREADS = threads();
    static constexpr int PARTS = (PIECES + THREADS - 1) / THREADS;

    // Which piece a part of a thread is, and whether there is such a piece. `thread` counts those of
    // the row.
    __device__ static int piece(int part, int thread) { return part * THREADS + thread; }
    __device__ static bool exists(int part, int thread) {
        return (part + 1) * THREADS <= PIECES || piece(part, thread) < PIECES;
    }

    // Calls handle(offset, unit) for each of the thread's pieces: how many elements it lies behind the
    // thread's first one, and its first unit.
    template <typename Handle>
    __device__ static void for_each(int thread, const Handle& handle) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            if (exists(part, thread)) handle(part * THREADS * PIECE, piece(part, thread) * PIECE);
        }
    }

    // Whether a unit of a piece is one of the row.
    __device__ static bool has(int unit) { return !IN_WORDS || unit < UNITS; }

    // By how many bytes a row begins behind a word of 4 bytes: 0, or, between two words, 2. Any of the
    // row's pieces tells that.
    __device__ static unsigned behind_word(const Element* from) {
        return IN_WORDS ? static_cast<unsigned>(reinterpret_cast<unsigned long long>(from)) & 2 : 0;
    }

    template <typename T>
    __device__ static T* begin_of_word(T* at) {
        return reinterpret_cast<T*>(reinterpret_cast<unsigned long long>(at) & ~3ull);
    }

    // Starts copying a piece of a row to an address of shared memory: the piece that begins with `unit`.
    // The copy belongs to the group that the thread commits next. IN_WORDS it is the word that has this
    // unit, with the next one or, where the row begins between two words, with the one before; settle()
    // must follow.
    __device__ static void fetch(unsigned to, const Element* from, int unit) {
        if constexpr (IN_WORDS) {
            // The second half of the last word may be behind the row. It becomes 0.
            if (behind_word(from) || unit + 1 < UNITS) {
                cp_async_piece<4>(to, begin_of_word(from));
            } else {
                cp_async_half_word(to, begin_of_word(from));
            }
        } else {
            cp_async_piece<BYTES>(to, from);
        }
    }

    // Stores a piece likewise.
    __device__ static void store(Element* to, const Element* from, int unit) {
        if constexpr (IN_WORDS) {
            struct alignas(4) Word {
                Element first, second;
            };
            const unsigned behind = behind_word(to);
            const bool has_first = !behind || unit > 0, has_second = behind || unit + 1 < UNITS;
            to = begin_of_word(to);
            from = reinterpret_cast<const Element*>(reinterpret_cast<const char*>(from) - behind);
            Element first, second;
            if (has_first) first = from[0];
            if (has_second) second = from[1];
            if (has_first && has_second) *reinterpret_cast<Word*>(to) = {first, second};
            if (!has_second) to[0] = first;
            if (!has_first) to[1] = second;
        } else {
            struct alignas(BYTES) Piece {
                Element of[PIECE];
            };
            *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(from);
        }
    }

    // Moves ROWS rows of a thread, IN_WORDS, that have arrived to their places, those between two words
    // by one element. `moves(i)` says whether row i is one of these, `row_of(i)` where in shared
    // memory the thread's first piece of it is. All threads of a warp must call it. Each reads and writes
    // only words that it has copied itself.
    template <int ROWS, typename Moves, typename RowOf>
    __device__ static void settle(int thread, const Moves& moves, const RowOf& row_of) {
        // So many rows at once, since each waits for shared memory and for other threads.
        constexpr int MOST = PARTS < 8 ? 8 / PARTS : 1, AT_ONCE = ROWS < MOST ? ROWS : MOST;
        const int lane = threadIdx.x % 32;
        const int next_lane = lane - lane % THREADS + (lane + 1) % THREADS;
#pragma unroll 1
        for (int begin = 0; begin < ROWS; begin += AT_ONCE) {
            bool is_moved[AT_ONCE];
            unsigned* rows[AT_ONCE];
            unsigned words[AT_ONCE][PARTS];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                is_moved[i] = (ROWS % AT_ONCE == 0 || begin + i < ROWS) && moves(begin + i);
                rows[i] = reinterpret_cast<unsigned*>(row_of(begin + i));
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    words[i][part] = 0;
                    if (is_moved[i] && exists(part, thread)) words[i][part] = rows[i][part * THREADS];
                }
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                // The first thread's next part follows the last thread's, and nothing the last word.
                unsigned next[PARTS + 1];
                next[PARTS] = 0;
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    next[part] = __shfl_sync(~0u, words[i][part], next_lane);
                }
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    const bool is_last = part * THREADS + THREADS <= PIECES && thread == THREADS - 1;
                    const unsigned follows = is_last ? next[part + 1] : next[part];
                    if (is_moved[i] && exists(part, thread)) {
                        rows[i][part * THREADS] = words[i][part] >> 16 | follows << 16;
                    }
                }
            }
        }
    }
};
