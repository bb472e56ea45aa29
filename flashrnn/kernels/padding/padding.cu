// Several tensors with more units, or without them again, in one launch: copies into rows of another length.
//
//     to[i0, i1, i2, i3, :width] = from[i0, i1, i2, i3 < rows ? i3 : 0, :columns]
//
// What is missing behind `columns` are zeros or, where a copy `repeats`, the first element of the row again.
// Elements have 2 or 4 bytes; what is copied to is contiguous. A thread has a piece of 16 bytes at a time or,
// where rows are no whole pieces, an element. A copy has the CTAs from the end of the one before to its own
// `end`.

#include "problem.cuh"
#include "padding/all.cuh"

namespace padding {

struct alignas(16) Piece {
    unsigned words[4];
};

struct Copy {
    const void* from;
    void* to;
    long long stride0, stride1, stride2, stride3, stride4;
    unsigned size1, size2, size3;
    unsigned rows, columns, repeats, of_words, piece_bytes, pieces_a_row, pieces;
    int end;
};

// A piece of elements, of which each is a word.
template <typename Word, typename Piece>
__device__ inline void copy_piece(const Copy& copy, unsigned piece) {
    constexpr unsigned WORDS = sizeof(Piece) / sizeof(Word);
    unsigned row = piece / copy.pieces_a_row;
    const unsigned first = piece % copy.pieces_a_row * WORDS;
    const unsigned i3 = row % copy.size3;
    row /= copy.size3;
    const unsigned i2 = row % copy.size2;
    row /= copy.size2;
    const Word* of_row = static_cast<const Word*>(copy.from) + row / copy.size1 * copy.stride0 +
                         row % copy.size1 * copy.stride1 + i2 * copy.stride2 +
                         (i3 < copy.rows ? i3 : 0) * copy.stride3;
    Word words[WORDS];
#pragma unroll
    for (unsigned i = 0; i < WORDS; ++i) {
        const unsigned column = first + i;
        const bool is_added = column >= copy.columns;
        words[i] = is_added && !copy.repeats ? Word(0) : of_row[is_added ? 0 : column * copy.stride4];
    }
    Piece all;
    memcpy(&all, words, sizeof(Piece));
    static_cast<Piece*>(copy.to)[piece] = all;
}

template <typename Word>
__device__ inline void copy_pieces(const Copy& copy, int begin) {
    const unsigned stride = (copy.end - begin) * THREADS;
    unsigned piece = (blockIdx.x - begin) * THREADS + threadIdx.x;
    if (copy.piece_bytes == sizeof(Word)) {
        for (; piece < copy.pieces; piece += stride) copy_piece<Word, Word>(copy, piece);
    } else {
        for (; piece < copy.pieces; piece += stride) copy_piece<Word, Piece>(copy, piece);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
pad(CALL) {
    const Copy all[] = {COPIES};
    Copy own = all[0];
    int begin = 0;
    // Unrolled, the list is the launch's constants, of which a CTA selects its own.
#pragma unroll
    for (int i = 1; i < MOST; ++i) {
        if (blockIdx.x >= all[i - 1].end) {
            begin = all[i - 1].end;
            own = all[i];
        }
    }
    if (own.of_words) {
        copy_pieces<unsigned>(own, begin);
    } else {
        copy_pieces<unsigned short>(own, begin);
    }
}

}  // namespace padding
