// The sums that complete the gradients of R and of the bias:
//
//     dR[s, n, d, p] = sum over i of parts[i, s, n, d, p]
//     db[k, n, d]    = sum over b of d_bias[b, g, n, d], where g is the gate that b[k] feeds
//
// The first R_ctas CTAs have the columns of dR, the others those of db.

#include "problem.cuh"
#include "common/row_sums.cuh"

namespace completion {

extern "C" __global__ void __launch_bounds__(THREADS)
gradient_sums(CALL) {
    __shared__ float sums[THREADS];
    if (blockIdx.x < R_ctas) {
        const auto of_column = [&](long long column) { return parts + column; };
        sum_rows<THREADS>(d_R, of_column, R_rows, R_columns, R_columns, R_shares, blockIdx.x, sums);
    } else {
        const long long width = static_cast<long long>(N) * D, cta = blockIdx.x - R_ctas;
        sum_bias<THREADS>(d_b, d_bias, B, width, b_columns, b_shares, cta, sums);
    }
}

}  // namespace completion
