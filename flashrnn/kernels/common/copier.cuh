// Copies between global memory and lines of shared memory, by a CTA's producer threads.
//
// A line belongs to one sequence and one step. It has COUNT rows, one for each gate or state. In global
// memory a row has Layout::UNITS elements, which are contiguous; where the rows begin is up to the
// tensor's strides. Rows are copied in pieces (row_pieces.cuh). Of pieces of 16 bytes each thread keeps
// the addresses, and advances them from step to step. Of smaller ones there are too many: threads share
// whole rows, and compute where these begin.
//
// A kernel describes its lines by a struct `Layout` of static constants:
//
//     int LINES            sequences of a CTA
//     int UNITS            units that a row of a CTA has at most
//     bool EXACT           whether every CTA's rows have so many
//     int ROW_PITCH        elements from a row of a line to the next
//     int PIECE_BYTES      of RowPieces
//     int FIRST_PRODUCER   the first producer thread; they are the CTA's last threads
//     int PRODUCERS        how many producer threads there are
//     bool SEQUENCED       whether each line has a Sequence of its own, which says where its rows lie

#include "common/loads.cuh"
#include "common/row_pieces.cuh"
#include "common/sequence.cuh"

// Where the rows of a tensor lie: `origin` is the first element of sequence 0's first row, the others
// are strides in elements.
template <typename T>
struct TensorRows {
    T* origin;
    long long sequence, row;
};

// Where a line of a pitch says whether its step is cut off from another: in its last 16 bytes, which
// must be no row's. The producer threads fetch it with the step's inputs.
__device__ inline int* flag_of(Element* lines, int sequence, int pitch) {
    return reinterpret_cast<int*>(lines + (sequence + 1) * pitch - 16 / int(sizeof(Element)));
}

// Fetches whether steps are cut off from those before them. Each of the first producer threads has the
// flags of a line.
template <typename Layout>
struct FlagCopy {
    const int* flag_of_start;
    int line, direction, least, length;

    __device__ FlagCopy(const Sequence* table, const int* flags)
        : line(threadIdx.x - Layout::FIRST_PRODUCER) {
        if (!RESETS || line >= Layout::LINES) return;
        const Sequence own = table[line];
        flag_of_start = flags + own.flag(0);
        direction = own.backwards ? -1 : 1;
        least = own.backwards;
        length = own.length;
    }

    __device__ void fetch(int step, Element* lines, int pitch) const {
        if (line >= Layout::LINES) return;
        int* to = flag_of(lines, line, pitch);
        // As Sequence::may_be_cut and Sequence::flag.
        if (step >= least && step < length) {
            cp_async_word(to, flag_of_start + direction * step);
        } else {
            *to = 0;
        }
    }
};

// The rows of one tensor, step after step. T is const if they are read.
//
// REGULAR, of pieces of 16 bytes and a layout that is not sequenced: a thread copies the same piece of
// the same row of every APART-th sequence. So it keeps one address only: where a thread has many pieces,
// an address for each would take too many registers. Lines beyond the last sequence are left as they are.
template <typename Layout, int COUNT, typename T, bool REGULAR = false>
struct TiledCopy {
    using Pieces = RowPieces<Layout::UNITS, Layout::PIECE_BYTES>;
    // Whether threads keep the addresses of their pieces.
    static constexpr bool KEPT = Layout::PIECE_BYTES == 16;
    static constexpr int PIECE = Pieces::PIECE, ROW_THREADS = Pieces::THREADS;
    // What threads share: each has a piece of a row, or, of smaller pieces, Pieces::PARTS.
    static constexpr int SHARES = Layout::LINES * COUNT * ROW_THREADS;
    // Sequences of which all threads together have a share, and how many threads that takes.
    static constexpr int APART = Layout::PRODUCERS / (COUNT * ROW_THREADS);
    static constexpr int BUSY = REGULAR ? APART * COUNT * ROW_THREADS : Layout::PRODUCERS;
    static constexpr int THREAD_SHARES = (SHARES + BUSY - 1) / BUSY;
    static_assert(!REGULAR || (KEPT && !Layout::SEQUENCED && Layout::EXACT && APART > 0));
    static_assert(KEPT || Layout::EXACT);

    TensorRows<T> rows;
    long long step;
    int pitch, last, units;
    // Of a sequenced layout: a sequence for each line, the stride of rows, the step that is copied next.
    const Sequence* sequences = nullptr;
    long long row_stride = 0;
    int at = 0, direction = 1;
    T* addresses[KEPT && !REGULAR ? THREAD_SHARES : 1];
    // Where sequences are ragged, how many steps that of each piece has.
    static constexpr bool ENDS_APART = Layout::SEQUENCED && RAGGED;
    int lengths[KEPT && ENDS_APART ? THREAD_SHARES : 1];

    // `step` is the tensor's stride from one step to the next, `pitch` the number of elements from one
    // line to the next, `last` the last sequence that exists, `units` the number of units of this CTA's
    // rows. Lines beyond `last` are filled with its rows and never written back.
    __device__ TiledCopy(TensorRows<T> rows, long long step, int pitch, int last,
                         int units = Layout::UNITS)
        : rows(rows), step(step), pitch(pitch), last(last), units(units) {
        if constexpr (REGULAR) {
            addresses[0] = address(index(0));
        } else if constexpr (KEPT) {
#pragma unroll
            for (int i = 0; i < THREAD_SHARES; ++i) addresses[i] = address(index(i));
        }
    }

    // Of a sequenced layout: `step` is the tensor's stride from row to row, `first` the step that is
    // copied first, and `direction` 1 or -1, to the steps after it or before it.
    __device__ TiledCopy(TensorRows<T> rows, long long step, int pitch, int last,
                         const Sequence* sequences, int first, int direction,
                         int units = Layout::UNITS)
        : rows(rows), step(direction * sequences->advance(step)), pitch(pitch), last(last),
          units(units), sequences(sequences), row_stride(step), at(first), direction(direction) {
        if constexpr (KEPT) {
#pragma unroll
            for (int i = 0; i < THREAD_SHARES; ++i) {
                addresses[i] = address(index(i));
                if (ENDS_APART) {
                    lengths[ENDS_APART ? i : 0] =
                        exists(index(i)) ? sequences[sequence(index(i))].length : 0;
                }
            }
        }
    }

    // Of the thread's share i among all.
    __device__ static int index(int i) {
        return threadIdx.x - Layout::FIRST_PRODUCER + i * BUSY;
    }
    __device__ static int sequence(int index) { return index / (ROW_THREADS * COUNT); }
    // Which of the row's threads it is.
    __device__ static int thread() { return index(0) % ROW_THREADS; }
    __device__ bool exists(int index) const {
        return (SHARES % Layout::PRODUCERS == 0 || index < SHARES) &&
               (Layout::EXACT || index % ROW_THREADS * PIECE < units);
    }

    // Of the piece, or, of smaller ones, of the row's first element, at the present step or so many ago.
    __device__ T* address(int index, int steps_ago = 0) const {
        const int b = sequence(index) < last ? sequence(index) : last;
        long long offset = b * rows.sequence;
        if constexpr (Layout::SEQUENCED) {
            offset = sequences[b].offset(at - steps_ago * direction, rows.sequence, row_stride);
        } else {
            offset -= steps_ago * step;
        }
        return rows.origin + offset + index / ROW_THREADS % COUNT * rows.row +
               (KEPT ? index % ROW_THREADS * PIECE : 0);
    }

    // Whether the sequence of the thread's share i has the present step, or that of so many ago.
    __device__ bool has_step(int i, int steps_ago = 0) const {
        if constexpr (!ENDS_APART) return true;
        else if constexpr (KEPT) return at < lengths[i];
        else return sequences[sequence(index(i))].has(at - steps_ago * direction);
    }

    // Where that lies among the lines.
    __device__ int place(int index) const {
        return sequence(index) * pitch + index / ROW_THREADS % COUNT * Layout::ROW_PITCH +
               (KEPT ? index % ROW_THREADS * PIECE : 0);
    }

    // Calls copy(i, address) for each of the thread's pieces of a regular copy.
    template <typename Copy>
    __device__ void for_each(const Copy& copy) const {
        const bool busy = BUSY == Layout::PRODUCERS || index(0) < BUSY;
        const int left = busy ? last - sequence(index(0)) : -1;
        T* at = addresses[0];
#pragma unroll
        for (int i = 0; i < THREAD_SHARES; ++i) {
            if (left >= i * APART) copy(i, at);
            at += APART * rows.sequence;
            // Otherwise each address is computed from the first, by products of 64 bits.
            materialize(at);
        }
    }

    // Goes on to the next step.
    __device__ void advance() {
        if constexpr (REGULAR) {
            addresses[0] += step;
        } else if constexpr (KEPT) {
#pragma unroll
            for (int i = 0; i < THREAD_SHARES; ++i) addresses[i] += step;
        } else if constexpr (!Layout::SEQUENCED) {
            rows.origin += step;
        }
        if constexpr (Layout::SEQUENCED) at += direction;
    }

    // Of a sequenced layout: writes zeros to the rows of each sequence that are no step's, of so many.
    __device__ void clear_rest(long long rows_of_each) {
#pragma unroll 1
        for (int i = 0; i < THREAD_SHARES; ++i) {
            if (!exists(index(i)) || sequence(index(i)) > last) continue;
            const Sequence& own = sequences[sequence(index(i))];
            at = 0;
            T* to = address(index(i)) - own.time(0) * row_stride;
#pragma unroll 1
            for (long long t = own.length; t < rows_of_each; ++t) {
                if constexpr (KEPT) {
                    *reinterpret_cast<uint4*>(to + t * row_stride) = uint4{};
                } else {
                    T* row = to + t * row_stride;
                    Pieces::for_each(thread(), [&](int first) {
                        for (int unit = first; unit < first + PIECE; ++unit) {
                            if (Pieces::has(unit)) round_to(row[unit], 0.0f);
                        }
                    });
                }
            }
        }
    }

    // Starts copying the present step's rows into the lines. The copies belong to the group that the
    // thread commits next.
    __device__ void fetch(Element* lines) const {
        if constexpr (REGULAR) {
            const unsigned first = shared_address(lines) + place(index(0)) * int(sizeof(Element));
            for_each([&](int i, T* from) {
                cp_async(first + i * APART * pitch * int(sizeof(Element)), from);
            });
        } else if constexpr (KEPT) {
#pragma unroll
            for (int i = 0; i < THREAD_SHARES; ++i) {
                if (exists(index(i)) && has_step(i)) cp_async(lines + place(index(i)), addresses[i]);
            }
        } else {
#pragma unroll 4
            for (int i = 0; i < THREAD_SHARES; ++i) {
                if (!exists(index(i)) || !has_step(i)) continue;
                Element* to = lines + place(index(i));
                const Element* from = address(index(i));
                const bool between = Pieces::is_between(from);
                Pieces::for_each(thread(), [&](int first) {
                    Pieces::fetch(to + first, from + first, first, between);
                });
            }
        }
    }

    // Completes what fetch() brought into the lines so many steps ago IN_WORDS, after the thread has waited
    // for its copies. All threads of a warp must call it.
    __device__ void settle(Element* lines, int steps_ago) const {
        Pieces::template settle<THREAD_SHARES>(thread(), [&](int i) -> Element* {
            if (!exists(index(i)) || !has_step(i, steps_ago)) return nullptr;
            const bool moves = Pieces::is_between(address(index(i), steps_ago));
            return moves ? lines + place(index(i)) : nullptr;
        });
    }

    // Copies the lines to the present step's rows.
    __device__ void store(const Element* lines) const {
        if constexpr (REGULAR) {
            const Element* first = lines + place(index(0));
            for_each([&](int i, T* to) {
                const Element* from = first + i * APART * pitch;
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
            });
        } else if constexpr (KEPT) {
#pragma unroll
            for (int i = 0; i < THREAD_SHARES; ++i) {
                if (exists(index(i)) && sequence(index(i)) <= last && has_step(i)) {
                    *reinterpret_cast<uint4*>(addresses[i]) =
                        *reinterpret_cast<const uint4*>(lines + place(index(i)));
                }
            }
        } else {
#pragma unroll 4
            for (int i = 0; i < THREAD_SHARES; ++i) {
                if (!exists(index(i)) || sequence(index(i)) > last || !has_step(i)) continue;
                T* to = address(index(i));
                const Element* from = lines + place(index(i));
                const bool between = Pieces::is_between(to);
                Pieces::for_each(thread(), [&](int first) {
                    Pieces::store(to + first, from + first, first, between);
                });
            }
        }
    }
};
