// The input product of a layer over few rows:
//
//     Wx[r, c] = bias[c] + sum over i of x[r, i] W[c, i]
//
// Where `bias` is null nothing is added.
//
// A row r is a step of a sequence, in the order in which x has them; c is a unit of a gate, (g, n, d), of
// which there are `columns`. A CTA has a tile of both.

#include "few_rows/tile.cuh"

namespace few_rows {

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
few_rows_product(CALL) {
    const int tiles = tiles_of(columns);
    const int m = blockIdx.x / tiles * TILE, n = blockIdx.x % tiles * TILE;
    multiply_tile<false, false>(Rows{x, x_pitch}, Rows{W, I}, rows, columns, I, m, n,
                                [&](long long r, int c) { return Wx + r * columns + c; }, Share{},
                                [&](int c) { return bias ? to_float(bias[c]) : 0.0f; });
}

}  // namespace few_rows
