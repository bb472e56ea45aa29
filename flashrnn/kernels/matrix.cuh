// A block's part of R, shared out among its warps.
//
// A fragment is 16 rows of R and what one step of the tensor core sums. Of a warp's fragments the
// first HELD are in registers, the next SPARED in shared memory, the last STREAMED in global memory,
// where each lane finds what it has put.

struct Matrix {
    Fragment held[HELD];
    Fragment *spared, *streamed;

    __device__ Matrix(void* shared, Fragment* global)
        : spared(static_cast<Fragment*>(shared) + threadIdx.x / 32 * SPARED * 32 + threadIdx.x % 32),
          streamed(global + (static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32) *
                                STREAMED * 32 +
                   threadIdx.x % 32) {}

    // `make` gives the lane's part of the warp's fragment f.
    template <typename Make>
    __device__ void load(const Make& make) {
#pragma unroll
        for (int f = 0; f < HELD; ++f) held[f] = make(f);
        for (int f = 0; f < SPARED; ++f) spared[f * 32] = make(HELD + f);
        for (int f = 0; f < STREAMED; ++f) streamed[f * 32] = make(HELD + SPARED + f);
    }

    __device__ Fragment operator[](int f) const {
        if (f < HELD) return held[f < HELD ? f : 0];
        return f < HELD + SPARED ? spared[(f - HELD) * 32] : streamed[(f - HELD - SPARED) * 32];
    }
};
