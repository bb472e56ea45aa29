// Copies between global memory and lines of shared memory, by a CTA's producer threads.
//
// A line belongs to one sequence and one step. It has COUNT rows, one for each gate or state. In global
// memory a row has Layout::UNITS elements; where the rows begin is up to the tensor's strides. Where
// rows are ALIGNED, their elements are contiguous and begin at multiples of 16 bytes: each thread keeps
// the addresses of its pieces of 16 bytes and advances them from step to step. Otherwise it copies
// single elements and computes their addresses.
//
// A kernel describes its lines by a struct `Layout` of static constants:
//
//     int LINES            sequences of a CTA
//     int UNITS            units that a row of a CTA has at most
//     bool EXACT           whether every CTA's rows have so many
//     int ROW_PITCH        elements from a row of a line to the next
//     bool ALIGNED         see above
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
    long long sequence, row, unit;
};

// Where a line of a pitch says whether its step is cut off from another: in its last 16 bytes, which
// must be no row's. The producer threads fetch it with the step's inputs.
__device__ inline int* flag_of(Element* lines, int sequence, int pitch) {
    return reinterpret_cast<int*>(lines + (sequence + 1) * pitch - 16 / int(sizeof(Element)));
}

// Fetches whether a step of each sequence is cut off from the one before it.
template <typename Layout>
__device__ inline void fetch_flags(int step, Element* lines, int pitch, const Sequence* table,
                                   const int* flags) {
    const int line = threadIdx.x - Layout::FIRST_PRODUCER;
    if (line >= Layout::LINES) return;
    int* to = flag_of(lines, line, pitch);
    if (table[line].may_be_cut(step)) {
        cp_async_word(to, flags + table[line].flag(step));
    } else {
        *to = 0;
    }
}

// The rows of one tensor, step after step. T is const if they are read.
template <typename Layout, int COUNT, typename T>
struct TiledCopy {
    static constexpr int PIECE = Layout::ALIGNED ? 16 / sizeof(Element) : 1;
    static constexpr int ROW_PIECES = Layout::UNITS / PIECE;
    static constexpr int PIECES = Layout::LINES * COUNT * ROW_PIECES;
    static constexpr int THREAD_PIECES = (PIECES + Layout::PRODUCERS - 1) / Layout::PRODUCERS;

    TensorRows<T> rows;
    long long step;
    int pitch, last, units;
    // Of a sequenced layout: a sequence for each line, the stride of rows, the step that is copied next.
    const Sequence* sequences = nullptr;
    long long row_stride = 0;
    int at = 0, direction = 1;
    T* addresses[Layout::ALIGNED ? THREAD_PIECES : 1];

    // `step` is the tensor's stride from one step to the next, `pitch` the number of elements from one
    // line to the next, `last` the last sequence that exists, `units` the number of units of this CTA's
    // rows. Lines beyond `last` are filled with its rows and never written back.
    __device__ TiledCopy(TensorRows<T> rows, long long step, int pitch, int last,
                         int units = Layout::UNITS)
        : rows(rows), step(step), pitch(pitch), last(last), units(units) {
        if constexpr (Layout::ALIGNED) {
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
        if constexpr (Layout::ALIGNED) {
#pragma unroll
            for (int i = 0; i < THREAD_PIECES; ++i) addresses[i] = address(index(i));
        }
    }

    // Of the thread's piece i among all pieces.
    __device__ static int index(int i) {
        return threadIdx.x - Layout::FIRST_PRODUCER + i * Layout::PRODUCERS;
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
               index % ROW_PIECES * PIECE * (Layout::ALIGNED ? 1 : rows.unit);
    }

    // Whether the piece's sequence has the present step.
    __device__ bool has_step(int index) const {
        if constexpr (!Layout::SEQUENCED) return true;
        else return sequences[sequence(index)].has(at);
    }

    // Where the piece lies among the lines.
    __device__ int place(int index) const {
        return sequence(index) * pitch + index / ROW_PIECES % COUNT * Layout::ROW_PITCH +
               index % ROW_PIECES * PIECE;
    }

    // Goes on to the next step.
    __device__ void advance() {
        if constexpr (Layout::ALIGNED) {
#pragma unroll
            for (int i = 0; i < THREAD_PIECES; ++i) addresses[i] += step;
        } else if constexpr (!Layout::SEQUENCED) {
            rows.origin += step;
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
                if constexpr (Layout::ALIGNED) {
                    *reinterpret_cast<uint4*>(to + t * row_stride) = uint4{};
                } else {
                    round_to(to[t * row_stride], 0.0f);
                }
            }
        }
    }

    // Starts copying the present step's rows into the lines. Where rows are aligned, the copies belong
    // to the group that the thread commits next.
    __device__ void fetch(Element* lines) const {
        if constexpr (Layout::ALIGNED) {
#pragma unroll
            for (int i = 0; i < THREAD_PIECES; ++i) {
                if (exists(index(i)) && has_step(index(i))) cp_async(lines + place(index(i)), addresses[i]);
            }
        } else {
#pragma unroll 4
            for (int i = 0; i < THREAD_PIECES; ++i) {
                if (exists(index(i)) && has_step(index(i))) {
                    lines[place(index(i))] = load_element(address(index(i)));
                }
            }
        }
    }

    // Copies the lines to the present step's rows.
    __device__ void store(const Element* lines) const {
        if constexpr (Layout::ALIGNED) {
#pragma unroll
            for (int i = 0; i < THREAD_PIECES; ++i) {
                if (exists(index(i)) && sequence(index(i)) <= last && has_step(index(i))) {
                    *reinterpret_cast<uint4*>(addresses[i]) =
                        *reinterpret_cast<const uint4*>(lines + place(index(i)));
                }
            }
        } else {
#pragma unroll 4
            for (int i = 0; i < THREAD_PIECES; ++i) {
                if (exists(index(i)) && sequence(index(i)) <= last && has_step(index(i))) {
                    *address(index(i)) = lines[place(index(i))];
                }
            }
        }
    }
};
