// h before each step, where tables.cu has found that it is: [rows, N, D]. A warp copies a head's row.

#include "problem.cuh"

namespace sequence_tables {

struct alignas(16) Piece {
    unsigned words[4];
};

extern "C" __global__ void __launch_bounds__(THREADS)
h_before(CALL) {
    const long long width = static_cast<long long>(N) * D;
    const long long warp = static_cast<long long>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    const long long row = warp / N;
    const int n = warp % N, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const long long of_h = before_rows[(runs_backwards && runs_backwards[n] ? rows : 0) + row];
    const Element* from = (of_h >= 0 ? h + of_h * width : h_starts + (-1 - of_h) * width) + n * D;
    Element* to = before + row * width + n * D;
    if (in_pieces) {
        constexpr int VECTOR = 16 / sizeof(Element);
        for (int i = lane; i < D / VECTOR; i += 32) {
            reinterpret_cast<Piece*>(to)[i] = reinterpret_cast<const Piece*>(from)[i];
        }
    } else {
        for (int i = lane; i < D; i += 32) to[i] = from[i];
    }
}

}  // namespace sequence_tables
