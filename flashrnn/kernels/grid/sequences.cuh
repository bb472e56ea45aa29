// The sequences of a group's work tile, of calls with options of sequences (common/sequence.cuh).
//
// The sequences of a batch tile are neighbours in the order of the host, which has the longest first, and
// interleaved tiles come in that order (tile.cuh). So the first sequence of a tile says how many steps
// the group computes of it, and of interleaved tiles each has as many steps as the next one or more:
// those that have a step are always the first ones.
// CTAs wait for each other's packets of a tile at each of its steps. They agree on the steps, since all
// of them read the same lengths.
//
// Flags count the steps of the first tile, tile 0, also where another tile has none, so that each flag
// is larger than all before it. Packets of tile 0 lie in its even and odd buffers by turns, as
// all_gather.cuh wants it. Those of other tiles must do so too, from one work tile to the next:
//
//     forward       tile 0     t = 0    1    2    3    4  | t = 0 ...      the next work tile
//                   tile 1     t = 0    1    2            | t = 0 ...
//                   flag           k  k+1  k+2  k+3  k+4  |   k+5 ...
//
//     backward      tile 0     t = 4    3    2    1    0  | t = 4 ...
//                   tile 1               2    1    0      |         2 ...
//
// A tile goes without as many flags as it has steps less than tile 0. If that number is even, its next
// packets lie in the other buffer than its last ones, whose flag all CTAs have sent, and in which those
// before the last lay, which all CTAs have received. If it is odd, the next packets would overwrite the
// last ones, which a slow CTA may not have received yet. So the group then computes one more step of the
// tile, at which all of its sequences are past their end.
//
// A work tile may lack a tile, which then goes without all of that work tile's flags.
// That is right for any number of them: since its last packets each CTA has sent packets of tile 0, and
// before those it had received all of the work tile before. (If tile 0 has no step either, no CTA sends
// anything, and the flags do not count on.)

#include "grid/tile.cuh"
#include "common/sequence.cuh"

namespace grid {

struct WorkSequences {
    // Where sequences have T rows each and no head runs backwards, nothing has to be looked up.
    static constexpr bool TABULATED = RAGGED || REVERSE;
    static constexpr int COUNT = INTERLEAVED * COLUMNS;
    static constexpr int BYTES = TABULATED ? COUNT * int(sizeof(Sequence)) : 0;

    // In shared memory.
    Sequence* table;
    long long T;

    // Begins a work tile. Sequences beyond the batch are as its last one.
    __device__ void begin(const WorkTile& work, long long B, const int* order, const int* rows,
                          const int* lengths, const int* backwards) {
        if (!TABULATED) return;
        __syncthreads();
        if constexpr (APART) {
            for (int i = threadIdx.x; i < COUNT; i += THREADS) {
                const long long place = work.first_of(i / COLUMNS) + i % COLUMNS;
                table[i] = sequence_at(place < B ? place : B - 1, T, order, rows, lengths, backwards,
                                       work.n);
            }
            __syncthreads();
            return;
        }
        const long long left = B - work.first_sequence;
        fill_table<COUNT, THREADS>(table, work.first_sequence, left < COUNT ? left - 1 : COUNT - 1, T,
                                   order, rows, lengths, backwards, work.n);
    }

    __device__ Sequence of(const ThreadElement& element, int tile) const {
        if constexpr (TABULATED) return table[tile * COLUMNS + element.column];
        if constexpr (!SEQUENCED) return Sequence{};
        const int index = element.sequence, steps = T;
        return {index, index * steps, steps, 0};
    }

    // Where sequences have lengths of their own: the steps that the group computes of a tile.
    __device__ int steps(int tile) const {
        const int longest = table[tile * COLUMNS].length;
        return longest + (table[0].length - longest) % 2;
    }
};

}  // namespace grid
