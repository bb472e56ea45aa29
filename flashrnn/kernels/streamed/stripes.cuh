// R and the initial h, as wgmma reads them: in stripes (tile.cuh).

#include "streamed/exchange.cuh"

namespace streamed {

// Whether operands are rounded: float32 elements, of which wgmma reads 19 bits.
constexpr bool ROUNDS = sizeof(Element) == 4;

__device__ inline void round_words(uint4& words) {
    words = {round_to_tf32(words.x), round_to_tf32(words.y), round_to_tf32(words.z), round_to_tf32(words.w)};
}

// Writes R and the initial h as stripes: all CTAs of the launch together. Zeros stand for what does not exist and
// would be multiplied by what does.
__device__ inline void write_stripes(const Exchange& exchange, const Element* R, const float* initial,
                                    long long initial_b, long long initial_n, long long initial_d, long long B,
                                    int N, int ctas) {
    const long long first = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    const long long stride = static_cast<long long>(ctas) * THREADS;
    const long long of_R = static_cast<long long>(N) * UNIT_TILES * STRIPES * COLUMNS;
    for (long long i = first; i < of_R; i += stride) {
        const int stripe = i / COLUMNS % STRIPES, tile = i / COLUMNS / STRIPES;
        const Column column(i % COLUMNS);
        const int n = tile / UNIT_TILES, d = tile % UNIT_TILES * UNITS + column.unit;
        uint4 found = {};
        if (d < D && stripe * SPAN < D) {
            const long long row = (static_cast<long long>(column.gate) * N + n) * D + d;
            found = *reinterpret_cast<const uint4*>(R + row * D + stripe * SPAN);
            if constexpr (ROUNDS) round_words(found);
        }
        reinterpret_cast<uint4*>(exchange.of_R)[i] = found;
    }
    const long long of_h = static_cast<long long>(N) * exchange.row_tiles * STRIPES * SEQUENCES;
    for (long long i = first; i < of_h; i += stride) {
        const int stripe = i / SEQUENCES % STRIPES, tile = i / SEQUENCES / STRIPES;
        const int n = tile / exchange.row_tiles;
        const long long b = tile % exchange.row_tiles * SEQUENCES + i % SEQUENCES;
        uint4 found = {};
        if (b < B && stripe * SPAN < D) {
            const float* const from = initial + b * initial_b + n * initial_n + stripe * SPAN * initial_d;
            Element rounded[SPAN];
#pragma unroll
            for (int k = 0; k < SPAN; ++k) round_to(rounded[k], from[k * initial_d]);
            memcpy(&found, rounded, sizeof(found));
            if constexpr (ROUNDS) round_words(found);
        }
        uint4* const to = reinterpret_cast<uint4*>(exchange.of_h) + i;
        *to = found;
        // Nobody writes there later.
        if (stripe * SPAN >= D) to[of_h] = uint4{};
    }
}

}  // namespace streamed
