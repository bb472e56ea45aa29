// The copies of copier.cuh for rows that do not begin at multiples of 16 bytes, in smaller pieces.
//
// There are too many pieces for an address of each. A group of threads copies whole rows of a line
// (row_pieces.cuh says which threads have which pieces), and goes from line to line and from row to row
// by adding strides.

#include "common/copier.cuh"
#include "common/row_pieces.cuh"

template <typename Layout, int COUNT, typename T>
struct TiledCopy<Layout, COUNT, T, false, false> {
    using Pieces = RowPieces<Layout::UNITS, Layout::PIECE_BYTES>;
    static_assert(Layout::EXACT);
    // Groups of threads; how many share the rows of a line; lines that all have at once, and of each.
    static constexpr int GROUPS = Layout::PRODUCERS / Pieces::THREADS;
    static constexpr int SHARING = GROUPS < 2 * Layout::LINES       ? 1
                                   : GROUPS / Layout::LINES < COUNT ? GROUPS / Layout::LINES
                                                                    : COUNT;
    static constexpr int LINES_AT_ONCE = GROUPS / SHARING;
    static constexpr int THREAD_LINES = (Layout::LINES + LINES_AT_ONCE - 1) / LINES_AT_ONCE;
    static constexpr int THREAD_ROWS = (COUNT + SHARING - 1) / SHARING;
    static constexpr bool ENDS_APART = Layout::SEQUENCED && RAGGED;

    // The thread's first piece of its first row: at the present step, or, of a sequenced layout, at the
    // tensor's beginning.
    T* origin;
    long long sequence, row, step;
    int pitch, last;
    // Of a sequenced layout: a sequence for each line, the step that is copied next.
    const Sequence* sequences = nullptr;
    int at = 0, direction = 1;

    // As of other rows (copier.cuh). Lines beyond `last` are left as they are.
    __device__ TiledCopy(TensorRows<T> rows, long long step, int pitch, int last)
        : origin(rows.origin + first_row() * rows.row + thread() * Pieces::PIECE),
          sequence(rows.sequence), row(rows.row), step(step), pitch(pitch), last(last) {
        if constexpr (!Layout::SEQUENCED) origin += first_line() * sequence;
    }

    __device__ TiledCopy(TensorRows<T> rows, long long step, int pitch, int last,
                         const Sequence* sequences, int first, int direction)
        : TiledCopy(rows, step, pitch, last) {
        this->sequences = sequences;
        at = first;
        this->direction = direction;
    }

    __device__ static int thread() { return (threadIdx.x - Layout::FIRST_PRODUCER) % Pieces::THREADS; }
    __device__ static int group() { return (threadIdx.x - Layout::FIRST_PRODUCER) / Pieces::THREADS; }
    __device__ static int first_line() { return group() / SHARING; }
    __device__ static int first_row() { return group() % SHARING; }
    __device__ static bool has_row(int i) {
        return COUNT % SHARING == 0 || first_row() + i * SHARING < COUNT;
    }

    // Calls handle(exists, first, line) for each of the thread's lines at the present step, or that of so
    // many ago: whether there is one, its first piece in global memory, and which line it is.
    template <typename Handle>
    __device__ void for_each_line(int steps_ago, const Handle& handle) const {
        T* first = origin - (Layout::SEQUENCED ? 0 : steps_ago * step);
        // Of a sequenced layout one at a time: it needs registers for where a sequence's rows lie.
        constexpr int AT_ONCE = Layout::SEQUENCED ? 1 : 4;
#pragma unroll AT_ONCE
        for (int i = 0; i < THREAD_LINES; ++i) {
            const int line = first_line() + i * LINES_AT_ONCE;
            bool exists = line <= last && (GROUPS % SHARING == 0 || group() < LINES_AT_ONCE * SHARING);
            if constexpr (Layout::SEQUENCED) {
                const Sequence& own = sequences[line <= last ? line : last];
                const int its_step = at - steps_ago * direction;
                if (ENDS_APART) exists &= own.has(its_step);
                handle(exists, origin + own.offset(its_step, sequence, step), line);
            } else {
                handle(exists, first, line);
                first += LINES_AT_ONCE * sequence;
            }
        }
    }

    // Where the thread's first piece of a line lies among the lines.
    __device__ int place(int line) const {
        return line * pitch + first_row() * Layout::ROW_PITCH + thread() * Pieces::PIECE;
    }

    // Calls handle(place, address, unit) for each of the thread's pieces, as RowPieces has them.
    template <typename Handle>
    __device__ void for_each_piece(const Handle& handle) const {
        for_each_line(0, [&](bool exists, T* address, int line) {
            // Where rows have one part, whether the thread has a piece is asked once for all of them.
            if (!exists || (Pieces::PARTS == 1 && !Pieces::exists(0, thread()))) return;
            const int to = place(line);
#pragma unroll
            for (int i = 0; i < THREAD_ROWS; ++i) {
                if (!has_row(i)) break;
                Pieces::for_each(thread(), [&](int offset, int unit) {
                    handle(to + i * SHARING * Layout::ROW_PITCH + offset, address + offset, unit);
                });
                address += SHARING * row;
            }
        });
    }

    __device__ void fetch(Element* lines) const {
        const unsigned to = shared_address(lines);
        for_each_piece([&](int place, const Element* from, int unit) {
            Pieces::fetch(to + place * int(sizeof(Element)), from, unit);
        });
    }

    // Completes what fetch() brought into the lines so many steps ago IN_WORDS, after the thread has
    // waited for its copies. All threads of a warp must call it.
    __device__ void settle(Element* lines, int steps_ago) const {
        for_each_line(steps_ago, [&](bool exists, const Element* first, int line) {
            Element* to = lines + place(line);
            Pieces::template settle<THREAD_ROWS>(
                thread(),
                [&](int i) {
                    return exists && has_row(i) && Pieces::behind_word(first + i * SHARING * row);
                },
                [&](int i) { return to + i * SHARING * Layout::ROW_PITCH; });
        });
    }

    __device__ void store(const Element* lines) const {
        for_each_piece([&](int place, T* to, int unit) {
            Pieces::store(to, lines + place, unit);
        });
    }

    __device__ void advance() {
        if constexpr (Layout::SEQUENCED) {
            at += direction;
        } else {
            origin += step;
        }
    }

    __device__ void clear_rest(long long rows_of_each) {
#pragma unroll 1
        for (at = 0; at < rows_of_each; ++at) {
#pragma unroll 1
            for (int line = first_line(); line <= last; line += LINES_AT_ONCE) {
                const Sequence& own = sequences[line];
                if (at < own.length || group() >= LINES_AT_ONCE * SHARING) continue;
                T* to = origin + own.index * sequence + at * step;
#pragma unroll 1
                for (int i = 0; i < THREAD_ROWS && has_row(i); ++i) {
                    Pieces::for_each(thread(), [&](int offset, int unit) {
                        for (int u = 0; u < Pieces::PIECE; ++u) {
                            if (Pieces::has(unit + u)) round_to(to[i * SHARING * row + offset + u], 0.0f);
                        }
                    });
                }
            }
        }
    }
};
