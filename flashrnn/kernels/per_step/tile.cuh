// Which part of a step a CTA computes, and which of its numbers a thread does.

#include "problem.cuh"

namespace per_step {

// Of the product: rows are gates of units (forward) or units (backward), columns are sequences.
constexpr int ROWS = 16 * TILES;
constexpr int COLUMNS = 8 * N_TILES;

// A work tile: UNITS units of one head for COLUMNS sequences.
struct Tile {
    int n, first_unit;
    long long first_sequence;

    __device__ Tile(int N, int D) {
        const int unit_tiles = (D + UNITS - 1) / UNITS;
        const int others = blockIdx.x / unit_tiles;
        first_unit = blockIdx.x % unit_tiles * UNITS;
        n = others % N;
        first_sequence = static_cast<long long>(others / N) * COLUMNS;
    }
};

// How many elements of the tile a thread has, a unit of a sequence each, whose cell step it computes.
constexpr int ELEMENTS = (UNITS * COLUMNS + THREADS - 1) / THREADS;

// The thread's element e. Within the tile: its unit, `row`, and its sequence, `column`. Within the
// problem: its sequence b, its unit d of the head, and `place`, the offset within [N, D].
struct ThreadElement {
    int row, column;
    long long b, d, place;
    // Whether the problem has it.
    bool exists;

    __device__ ThreadElement(const Tile& tile, int e, int B, int D) {
        const int index = threadIdx.x + e * THREADS;
        row = index % UNITS;
        column = index / UNITS;
        b = tile.first_sequence + column;
        d = tile.first_unit + row;
        place = static_cast<long long>(tile.n) * D + d;
        exists = index < UNITS * COLUMNS && b < B && d < D;
    }
};

// The row of state s of sequence b, of [S, B].
__device__ inline long long row_of(int s, long long b, int B) {
    return static_cast<long long>(s) * B + b;
}

// For how many of the tile's n-tiles the problem has a sequence; the first one's is `sequence`.
__device__ inline int n_tiles_within(long long sequence, int B) {
    const long long rest = B - sequence;
    return rest <= 0 ? 0 : rest > 8 * (N_TILES - 1) ? N_TILES : int((rest + 7) / 8);
}

}  // namespace per_step
