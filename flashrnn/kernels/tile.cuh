// Which part of a step a thread block computes, and which units a thread owns.

constexpr int ROWS = 16 * TILES;
constexpr int COLUMNS = 8 * BLOCKS;

template <typename T>
__device__ inline T* pointer(long long address) {
    return reinterpret_cast<T*>(address);
}

// One head's UNITS units for COLUMNS sequences.
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

// How many of the tile's units a thread owns.
constexpr int OWNED = (UNITS * COLUMNS + THREADS - 1) / THREADS;

// The thread's unit number `owned`: of the tile the row (of the first gate) and the column, of the
// problem the sequence b and the place in [N, D].
struct Unit {
    int row, column;
    long long b, d, place;
    bool exists;

    __device__ Unit(const Tile& tile, int owned, int B, int D) {
        const int index = threadIdx.x + owned * THREADS;
        row = index % UNITS;
        column = index / UNITS;
        b = tile.first_sequence + column;
        d = tile.first_unit + row;
        place = static_cast<long long>(tile.n) * D + d;
        exists = index < UNITS * COLUMNS && b < B && d < D;
    }
};

// The row of state s of sequence b, of [S, B].
__device__ inline long long row_of(int s, long long b, int B) { return static_cast<long long>(s) * B + b; }

// How many of sequence, sequence + 8, ... the tile has within the problem.
__device__ inline int blocks_within(long long sequence, int B) {
    const long long rest = B - sequence;
    return rest <= 0 ? 0 : rest > 8 * (BLOCKS - 1) ? BLOCKS : int((rest + 7) / 8);
}
