// The sums that complete the gradients of R and of the bias:
//
//     dR[s, n, d, p] = sum over i of parts[i, s, n, d, p]
//     db[k, n, d]    = sum over b of d_bias[b, g, n, d], where g is the gate that b[k] feeds
//
// Both are sums over rows of equal columns, in float32, rounded once. The first R_ctas CTAs have the
// columns of dR, the others those of db. So many threads share a column, each the sum of every so many
// rows; the first one of them adds the others' sums, one after another. So the order is fixed.

#include "problem.cuh"

namespace completion {

extern "C" __global__ void __launch_bounds__(THREADS)
gradient_sums(CALL) {
    __shared__ float sums[THREADS];
    const bool of_R = blockIdx.x < R_ctas;
    const int shares = of_R ? R_shares : b_shares, neighbours = THREADS / shares;
    const int own = threadIdx.x % neighbours, share = threadIdx.x / neighbours;
    const long long cta = of_R ? blockIdx.x : blockIdx.x - R_ctas, column = cta * neighbours + own;
    const long long columns = of_R ? R_columns : b_columns;

    const float* from = parts + column;
    long long rows = R_rows, pitch = R_columns;
    if (!of_R) {
        const long long width = static_cast<long long>(N) * D, place = column / width;
        int gate = 0;
#pragma unroll
        for (int k = 0; k < G; ++k) {
            if (FED_B[k] == place) gate = k;
        }
        from = d_bias + gate * width + column % width;
        rows = B;
        pitch = G * width;
    }
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 8
        for (long long row = share; row < rows; row += shares) sum += from[row * pitch];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (share || column >= columns) return;
    for (int other = 1; other < shares; ++other) sum += sums[own + other * neighbours];
    round_to((of_R ? d_R : d_b)[column], sum);
}

}  // namespace completion
