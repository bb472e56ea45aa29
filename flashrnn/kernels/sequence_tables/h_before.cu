// h before each step, as the product that gives R's gradient reads it: [rows, repeated, N, D]. With
// `before_rows` it is where tables.cu has found that it is; else h of the row before or, at the first of a
// sequence's T rows, the initial h, which is rounded as h is. A warp copies a head's row.

#include "problem.cuh"

namespace sequence_tables {

struct alignas(16) Piece16 {
    unsigned words[4];
};

struct alignas(8) Piece8 {
    unsigned words[2];
};

// Writes a row to as many places as asked, which lie `apart` elements from each other: of each piece of it
// what `load` gives. Several loads are on their way before the first is stored.
template <typename Piece, typename Load>
__device__ inline void write_row(Element* to, int D, int repeated, long long apart, const Load& load) {
    constexpr int ELEMENTS = sizeof(Piece) / sizeof(Element), AHEAD = 4;
    const int count = D / ELEMENTS;
    for (int first = threadIdx.x % 32; first < count; first += 32 * AHEAD) {
        Piece pieces[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            if (first + 32 * k < count) pieces[k] = load(first + 32 * k);
        }
        for (int place = 0; place < repeated; ++place) {
            Piece* row = reinterpret_cast<Piece*>(to + place * apart);
#pragma unroll
            for (int k = 0; k < AHEAD; ++k) {
                if (first + 32 * k < count) row[first + 32 * k] = pieces[k];
            }
        }
    }
}

template <typename Piece>
__device__ inline void copy_row(Element* to, const Element* from, int D, int repeated, long long apart) {
    const Piece* pieces = reinterpret_cast<const Piece*>(from);
    write_row<Piece>(to, D, repeated, apart, [&](int i) { return pieces[i]; });
}

extern "C" __global__ void __launch_bounds__(THREADS)
h_before(CALL) {
    const long long width = static_cast<long long>(N) * D;
    const long long warp = static_cast<long long>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    const long long row = warp / N;
    const int n = warp % N;
    if (row >= rows) return;
    Element* to = before + row * repeated * width + n * D;
    const Element* from = h + (row - 1) * width + n * D;
    if (before_rows) {
        const long long of_h = before_rows[(runs_backwards && runs_backwards[n] ? rows : 0) + row];
        from = (of_h >= 0 ? h + of_h * width : h_starts + (-1 - of_h) * width) + n * D;
    } else if (row % T == 0) {
        const float* first = h_initial + row / T * h_initial_b + n * h_initial_n;
        write_row<Element>(to, D, repeated, width, [&](int i) {
            Element rounded;
            round_to(rounded, first[i * h_initial_d]);
            return rounded;
        });
        return;
    }
    if (piece_bytes == 16) {
        copy_row<Piece16>(to, from, D, repeated, width);
    } else if (piece_bytes == 8) {
        copy_row<Piece8>(to, from, D, repeated, width);
    } else {
        copy_row<Element>(to, from, D, repeated, width);
    }
}

}  // namespace sequence_tables
