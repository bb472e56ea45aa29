// Copies between global memory and lines of shared memory, by a CTA's producer threads.
//
// A line belongs to one sequence and one step. It has COUNT rows, one for each gate or state. In global
// memory a row has Layout::UNITS elements, which are contiguous; where the rows begin is up to the
// tensor's strides. Rows that begin and end at multiples of 16 bytes are copied in pieces of so many:
// each thread keeps the addresses of its own and advances them from step to step. row_copier.cuh has
// the copies of other rows.
//
// A kernel describes its lines by a struct `Layout` of static constants:
//
//     int LINES            sequences of a CTA
//     int UNITS            units that a row of a CTA has at most
//     bool EXACT           whether every CTA's rows have so many
//     int ROW_PITCH        elements from a row of a line to the next
//     int PIECE_BYTES      16, or what RowPieces is told
//     int FIRST_PRODUCER   the first producer thread; they are the CTA's last threads
//     int PRODUCERS        how many producer threads there are
//     bool SEQUENCED       whether each line has a Sequence of its own, which says where its rows lie

#include "common/loads.cuh"
#include "common/sequence.cuh"

// Where the rows of a tensor lie: `origin` is the first element of sequence 0's first row, the others
// are strides in elements.
template <typename T>
struct TensorRows {
    T* origin;
    long long sequence, row;
};

// Where a line of a pitch says which steps are cut off from those before them: in its last 16 bytes, which
// must be no row's. The producer threads fetch it with the step's inputs.
__device__ inline int* flags_of(Element* lines, int sequence, int pitch) {
    return reinterpret_cast<int*>(lines + (sequence + 1) * pitch - 16 / int(sizeof(Element)));
}

// Fetches whether steps are cut off from those before them: of each line COUNT flags, those of a step and of
// the next ones in `order`, 1 or -1. Each of the first producer threads has one of them.
template <typename Layout, int COUNT = 1>
struct FlagCopy {
    static_assert(Layout::LINES * COUNT <= Layout::PRODUCERS && COUNT <= 4);

    const int* flag_of_start;
    // The flag's step is a line's step and so many after it; steps from `least` on have `count` flags.
    int line, flag, direction, after, least, count;

    __device__ FlagCopy(const Sequence* table, const int* flags, int order = 1)
        : line((threadIdx.x - Layout::FIRST_PRODUCER) / COUNT),
          flag((threadIdx.x - Layout::FIRST_PRODUCER) % COUNT), after(order * flag) {
        if (!RESETS || line >= Layout::LINES) return;
        const Sequence own = table[line];
        flag_of_start = flags + own.flag(0);
        direction = own.backwards ? -1 : 1;
        // As Sequence::may_be_cut.
        least = own.backwards;
        count = own.length > least ? own.length - least : 0;
    }

    // `step` is that of the first flag.
    __device__ void fetch(int step, Element* lines, int pitch) const {
        if (line >= Layout::LINES) return;
        step += after;
        const bool exists = static_cast<unsigned>(step - least) < static_cast<unsigned>(count);
        cp_async_word(flags_of(lines, line, pitch) + flag, flag_of_start + direction * step, exists);
    }
};

// The rows of one tensor, step after step. T is const if they are read.
//
// REGULAR, of a layout that is not sequenced: a thread copies the same piece of the same row of every
// APART-th sequence. So it keeps one address only: where a thread has many pieces, an address for each
// would take too many registers. Lines beyond the last sequence are left as they are.
template <typename Layout, int COUNT, typename T, bool REGULAR = false,
          bool IN_16_BYTES = Layout::PIECE_BYTES == 16>
struct TiledCopy {
    static constexpr int PIECE = 16 / sizeof(Element);
    static constexpr int ROW_PIECES = Layout::UNITS / PIECE;
    static constexpr int PIECES = Layout::LINES * COUNT * ROW_PIECES;
    // Sequences of which all threads together have a piece, and how many threads that takes.
    static constexpr int APART = Layout::PRODUCERS / (COUNT * ROW_PIECES);
    static constexpr int BUSY = REGULAR ? APART * COUNT * ROW_PIECES : Layout::PRODUCERS;
    static constexpr int THREAD_PIECES = (PIECES + BUSY - 1) / BUSY;
    static_assert(!REGULAR || (!Layout::SEQUENCED && Layout::EXACT && APART > 0));

    TensorRows<T> rows;
    long long step;
    int pitch, last, units;
    // Of a sequenced layout: a sequence for each line, the stride of rows, the step that is copied next.
    const Sequence* sequences = nullptr;
    long long row_stride = 0;
    int at = 0, direction = 1;
    T* addresses[REGULAR ? 1 : THREAD_PIECES];
    // Where sequences are ragged, how many steps that of each piece has.
    static constexpr bool ENDS_APART = Layout::SEQUENCED && RAGGED;
    int lengths[ENDS_APART ? THREAD_PIECES : 1];

    // `step` is the tensor's stride from one step to the next, `pitch` the number of elements from one
    // line to the next, `last` the last sequence that exists, `units` the number of units of this CTA's
    // rows. Lines beyond `last` are filled with its rows and never written back.
    __device__ TiledCopy(TensorRows<T> rows, long long step, int pitch, int last,
                         int units = Layout::UNITS)
        : rows(rows), step(step), pitch(pitch), last(last), units(units) {
        if constexpr (REGULAR) {
            addresses[0] = address(index(0));
        } else {
#pragma unroll
            for (int i = 0; i < THREAD_PIECES; ++i) addresses[i] = address(index(i));
        }
    }

    // Of a sequenced layout: `step` is the tensor's stride from row to row, `first` the step that is
    // copied first, and `direction` 1 or -1, to the steps after it or before it.
    __device__ TiledCopy(TensorRows<T> rows, long long step, int pitch, int last,
                         const Sequence* sequences, int first, int direction,
                         int units = Layout::UNITS)
        : rows(rows), step(direction * sequences->advance(step)), pitch(pitch), last(last),
          units(units), sequences(sequences), row_stride(step), at(first), direction(direction) {
#pragma unroll
        for (int i = 0; i < THREAD_PIECES; ++i) {
            addresses[i] = address(index(i));
            if (ENDS_APART) {
                lengths[ENDS_APART ? i : 0] =
                    exists(index(i)) ? sequences[sequence(index(i))].length : 0;
            }
        }
    }

    // Of the thread's piece i among all pieces.
    __device__ static int index(int i) {
        return threadIdx.x - Layout::FIRST_PRODUCER + i * BUSY;
    }
    __device__ static int sequence(int index) { return index / (ROW_PIECES * COUNT); }
    __device__ bool exists(int index) const {
        return (PIECES % Layout::PRODUCERS == 0 || index < PIECES) &&
               (Layout::EXACT || index % ROW_PIECES * PIECE < units);
    }

    __device__ T* address(int index) const {
        const int b = sequence(index) < last ? sequence(index) : last;
        long long of_sequence = b * rows.sequence;
        if constexpr (Layout::SEQUENCED) {
            of_sequence = sequences[b].offset(at, rows.sequence, row_stride);
        }
        return rows.origin + of_sequence + index / ROW_PIECES % COUNT * rows.row +
               index % ROW_PIECES * PIECE;
    }

    // Whether the sequence of the thread's piece i has the present step.
    __device__ bool has_step(int i) const {
        if constexpr (!ENDS_APART) return true;
        else return at < lengths[i];
    }

    // Where the piece lies among the lines.
    __device__ int place(int index) const {
        return sequence(index) * pitch + index / ROW_PIECES % COUNT * Layout::ROW_PITCH +
               index % ROW_PIECES * PIECE;
    }

    // Calls copy(i, address) for each of the thread's pieces of a regular copy.
    template <typename Copy>
    __device__ void for_each(const Copy& copy) const {
        const bool busy = BUSY == Layout::PRODUCERS || index(0) < BUSY;
        const int left = busy ? last - sequence(index(0)) : -1;
        T* at = addresses[0];
#pragma unroll
        for (int i = 0; i < THREAD_PIECES; ++i) {
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
        } else {
#pragma unroll
            for (int i = 0; i < THREAD_PIECES; ++i) addresses[i] += step;
        }
        if constexpr (Layout::SEQUENCED) at += direction;
    }

    // Of a sequenced layout: writes zeros to the rows of each sequence that are no step's, of so many.
    __device__ void clear_rest(long long rows_of_each) {
#pragma unroll 1
        for (int i = 0; i < THREAD_PIECES; ++i) {
            if (!exists(index(i)) || sequence(index(i)) > last) continue;
            const Sequence& own = sequences[sequence(index(i))];
            at = 0;
            T* to = address(index(i)) - own.time(0) * row_stride;
#pragma unroll 1
            for (long long t = own.length; t < rows_of_each; ++t) {
                *reinterpret_cast<uint4*>(to + t * row_stride) = uint4{};
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
        } else {
#pragma unroll
            for (int i = 0; i < THREAD_PIECES; ++i) {
                if (exists(index(i)) && has_step(i)) cp_async(lines + place(index(i)), addresses[i]);
            }
        }
    }

    // row_copier.cuh has something to do here.
    __device__ void settle(Element*, int) const {}

    // Copies the lines to the present step's rows.
    __device__ void store(const Element* lines) const {
        if constexpr (REGULAR) {
            const Element* first = lines + place(index(0));
            for_each([&](int i, T* to) {
                const Element* from = first + i * APART * pitch;
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
            });
        } else {
#pragma unroll
            for (int i = 0; i < THREAD_PIECES; ++i) {
                if (exists(index(i)) && sequence(index(i)) <= last && has_step(i)) {
                    *reinterpret_cast<uint4*>(addresses[i]) =
                        *reinterpret_cast<const uint4*>(lines + place(index(i)));
                }
            }
        }
    }
};
