// Sums over the rows of a matrix, one for each column: in float32, rounded once.
//
// `shares` threads of a CTA share a column. Each adds up every `shares`-th row; then the first of them
// adds the others' sums, one after another. So the order of additions is fixed.

#include "problem.cuh"

// A CTA's columns of to[column] = sum over rows of of_column(column)[row * pitch].
//
// The CTA has CTA_THREADS threads, and `sums` room for an element of each. `cta` counts the CTAs of this
// sum.
template <int CTA_THREADS, typename OfColumn>
__device__ inline void sum_rows(Element* to, OfColumn of_column, long long rows, long long pitch,
                                long long columns, int shares, long long cta, float* sums) {
    const int neighbours = CTA_THREADS / shares;
    const int own = threadIdx.x % neighbours, share = threadIdx.x / neighbours;
    const long long column = cta * neighbours + own;
    float sum = 0.0f;
    if (column < columns) {
        const float* from = of_column(column);
#pragma unroll 8
        for (long long row = share; row < rows; row += shares) sum += from[row * pitch];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (share || column >= columns) return;
    for (int other = 1; other < shares; ++other) sum += sums[own + other * neighbours];
    round_to(to[column], sum);
}

// The same for db[k, n, d] = sum over b of d_bias[b, g, n, d], where g is the gate that b[k] feeds. A gate
// has `width` columns.
template <int CTA_THREADS>
__device__ inline void sum_bias(Element* d_b, const float* d_bias, long long B, long long width,
                                long long columns, int shares, long long cta, float* sums) {
    const auto of_column = [&](long long column) {
        const long long place = column / width;
        int gate = 0;
#pragma unroll
        for (int k = 0; k < G; ++k) {
            if (FED_B[k] == place) gate = k;
        }
        return d_bias + gate * width + column % width;
    };
    sum_rows<CTA_THREADS>(d_b, of_column, B, G * width, columns, shares, cta, sums);
}
