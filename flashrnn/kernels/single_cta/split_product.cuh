// The product of a head's R and h in float32 by three products of float16 operands, where new h have a
// bound. It takes half the instructions of three tf32 products.
//
// A number x with 2^-14 <= |x| < 2^15 is split in two of float16, x = high + low / 2^11, to a relative
// 2^-22. So each row of R is multiplied by the power of two that brings its largest number to 2^14 or
// above, and h by the one that brings its bound to 2^15; sums are divided by both. Of the four products
// the one of both low parts is too small to matter.
//
// What is out of the range:
//
// - R: where a row's numbers, zeros aside, span more than 29 powers of two, or its largest is below 2^-80,
//   2^60 or more, or not finite, the warp multiplies tf32 operands, as for an h without a bound;
// - h: a step may make a tiny one, and initial states may be of any size. The sums are then computed
//   again, as those of several products, each of the h within 29 powers of two (a layer). So every term
//   is as precise as in the range. Whoever writes such an h marks the step (marked_step() of forward.cu).

#include "single_cta/product.cuh"

namespace single_cta {

constexpr bool SPLITS = NEEDS_CARE<Operand> && H_IS_BOUNDED;

// 2^LEAST_EXPONENT <= |x| < 2^(LEAST_EXPONENT + EXPONENTS).
constexpr int LEAST_EXPONENT = -14, EXPONENTS = 29;
// New h are less than 2^H_EXPONENT in size.
constexpr int H_SCALE = LEAST_EXPONENT + EXPONENTS - H_EXPONENT;

// Of a number's bits: the exponent, 127 for 1, 0 for denormal numbers and 255 for infinite ones and NaN.
__device__ inline int biased_exponent(unsigned bits) { return bits >> 23 & 255; }

// 2^exponent, for exponents from -126 to 127.
__device__ inline float power_of_two(int exponent) { return __int_as_float((127 + exponent) << 23); }

// x * 2^exponent, where 2^exponent may be beyond float32.
__device__ inline float scaled(float x, int exponent) {
    return x * power_of_two(exponent / 2) * power_of_two(exponent - exponent / 2);
}

// Two numbers as pairs of high and of low parts.
__device__ inline void split(unsigned& high, unsigned& low, float first, float second) {
    high = round_pair(first, second, float16{});
    low = round_pair((first - element_of_pair(high, 0, float16{})) * 2048.0f,
                     (second - element_of_pair(high, 1, float16{})) * 2048.0f, float16{});
}

// The warp's R, which may be split. The lane keeps its numbers, so a float16 product sums in another order
// than R's columns: the words 2 j and 2 j + 1 of each half are the columns j and j + 4.
struct SplitMatrix : Matrix {
    // What sums of each gate's products with split h are multiplied by, of the lane's two units.
    float inverse[GR][2];

    // Splits R: the fragments of two steps become one of high parts, in the place of the first, and one of
    // low parts. If a row is out of the range it returns false and leaves R as it is.
    __device__ bool split_rows();
};

__device__ inline bool SplitMatrix::split_rows() {
    // Of the sizes of a row's numbers, as bits: the largest, and twice the least one but 0, less 1.
    unsigned largest[GR][2] = {}, least[GR][2];
#pragma unroll
    for (int i = 0; i < 2 * GR; ++i) least[i / 2][i % 2] = ~0u;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
        const Fragment a = (*this)[f];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const unsigned size = a.words[w] & 0x7fffffffu;
            unsigned &high = largest[f % GR][w % 2], &low = least[f % GR][w % 2];
            if (size > high) high = size;
            if (2 * size - 1 < low) low = 2 * size - 1;
        }
    }
    bool is_in_range = true;
    float scale[GR][2];
#pragma unroll
    for (int i = 0; i < 2 * GR; ++i) {
        unsigned high = largest[i / 2][i % 2], low = least[i / 2][i % 2];
#pragma unroll
        for (int lane = 1; lane < 4; lane *= 2) {
            const unsigned other_high = __shfl_xor_sync(~0u, high, lane);
            const unsigned other_low = __shfl_xor_sync(~0u, low, lane);
            if (other_high > high) high = other_high;
            if (other_low < low) low = other_low;
        }
        const int exponent = biased_exponent(high);
        // Within these both powers of two are numbers, and no sum overflows.
        is_in_range &= !high || (exponent >= 127 - 80 && exponent < 127 + 60 &&
                                 exponent - biased_exponent((low + 1) / 2) < EXPONENTS);
        const int shift = high ? LEAST_EXPONENT + EXPONENTS - 1 - (exponent - 127) : 0;
        scale[i / 2][i % 2] = power_of_two(shift);
        inverse[i / 2][i % 2] = power_of_two(-shift - H_SCALE);
    }
    if (__any_sync(~0u, !is_in_range)) return false;
#pragma unroll
    for (int f = 0; f < FRAGMENTS / 2; ++f) {
        const int at = f / GR * 2 * GR + f % GR;
        const Fragment halves[2] = {(*this)[at], (*this)[at + GR]};
        Fragment high, low;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const Fragment& from = halves[w / 2];
            const float row_scale = scale[f % GR][w % 2];
            split(high.words[w], low.words[w], __uint_as_float(from.words[w % 2]) * row_scale,
                  __uint_as_float(from.words[w % 2 + 2]) * row_scale);
        }
        set(at, high);
        set(at + GR, low);
    }
    return true;
}

// Whether sums of the product may come out as NaN although they are none (NEEDS_CARE). If not, R is split
// where it SPLITS.
__device__ inline bool product_needs_care(SplitMatrix& matrix) {
    if (!SPLITS) return NEEDS_CARE<Operand>;
    return !matrix.split_rows();
}

// Products of two high parts and those of a high and a low part add to different sums, the latter to two
// where there are few gates, for the reason that product.cuh gives.
constexpr int LOW_SUMS = GR < 3 ? 2 : 1;

// As recurrent_product(), of a matrix that is split. scale(word) brings an h of the lines into the range.
// `high_only`: low parts are left out.
template <typename Scale>
__device__ inline void split_product(float (&sums)[GR][4], const SplitMatrix& matrix, unsigned line,
                                     const Scale& scale, bool high_only) {
    float chains[1 + LOW_SUMS][CHAINS_FORWARD][GR][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step += 2) {
        unsigned words[4], high[2], low[2];
        ldmatrix(words, line + step * 32);
        split(high[0], low[0], scale(words[0]), scale(words[1]));
        split(high[1], low[1], scale(words[2]), scale(words[3]));
#pragma unroll
        for (int pass = 0; pass < 3; ++pass) {
            // Low parts of R, none, low parts of h.
            if (pass != 1 && high_only) continue;
            const int chain = pass == 1 ? 0 : 1 + pass / 2 % LOW_SUMS;
            const unsigned(&right)[2] = pass == 2 ? low : high;
#pragma unroll
            for (int s = 0; s < GR; ++s) {
                const Fragment a = matrix[(step + (pass == 0)) * GR + s];
                mma(chains[chain][step / 2 % CHAINS_FORWARD][s], a.words[0], a.words[1], a.words[2],
                    a.words[3], right[0], right[1], float16{});
            }
        }
    }
#pragma unroll
    for (int s = 0; s < GR; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float parts[1 + LOW_SUMS];
#pragma unroll
            for (int c = 0; c <= LOW_SUMS; ++c) {
                parts[c] = chains[c][0][s][i];
                if (CHAINS_FORWARD > 1) parts[c] += chains[c][CHAINS_FORWARD - 1][s][i];
            }
            const float low = LOW_SUMS > 1 ? parts[1] + parts[LOW_SUMS] : parts[1];
            sums[s][i] = (parts[0] + low * (1.0f / 2048)) * matrix.inverse[s][i / 2];
        }
    }
}

// Of h that all are in the range.
__device__ inline void split_product(float (&sums)[GR][4], const SplitMatrix& matrix, unsigned line) {
    const auto scale = [](unsigned word) { return __uint_as_float(word) * power_of_two(H_SCALE); };
    split_product(sums, matrix, line, scale, false);
}

// Whether h is out of the range. NaN is not: every product with it is NaN.
__device__ inline bool is_out_of_range(float h) {
    constexpr int LEAST = LEAST_EXPONENT - H_SCALE;
    const float size = fabsf(h);
    // Without branches.
    return (size < power_of_two(LEAST) & size != 0.0f) | size >= power_of_two(LEAST + EXPONENTS);
}

// Layers are numbered from tiny to large h. The last one is of numbers that are not finite.
constexpr int LAYER_OF_RANGE = 6, INFINITE_LAYER = 12;

// A bit for the layer of h; none for 0.
__device__ inline unsigned layer_bit(unsigned h) {
    const int exponent = biased_exponent(h);
    const int above = exponent - 127 + H_SCALE - LEAST_EXPONENT + LAYER_OF_RANGE * EXPONENTS;
    const int layer = exponent == 255 ? INFINITE_LAYER : above / EXPONENTS;
    return 2 * h ? 1u << layer : 0u;
}

// Changes what split_product() gave to the sums of h of any size. Sequences whose h all are in the range
// keep their bits.
__device__ inline void multiply_in_layers(float (&sums)[GR][4], const SplitMatrix& matrix,
                                          unsigned line) {
    unsigned layers = 0;
#pragma unroll 1
    for (int step = 0; step < STEPS; step += 2) {
        unsigned words[4];
        ldmatrix(words, line + step * 32);
#pragma unroll
        for (int w = 0; w < 4; ++w) layers |= layer_bit(words[w]);
    }
#pragma unroll
    for (int lane = 1; lane < 32; lane *= 2) layers |= __shfl_xor_sync(~0u, layers, lane);
    if (!(layers & ~(1u << LAYER_OF_RANGE))) return;
#pragma unroll
    for (int i = 0; i < 4 * GR; ++i) sums[i / 4][i % 4] = 0.0f;
#pragma unroll 1
    for (int layer = 0; layer <= INFINITE_LAYER; ++layer) {
        if (!(layers >> layer & 1)) continue;
        const bool is_infinite = layer == INFINITE_LAYER;
        const int above = is_infinite ? 0 : (layer - LAYER_OF_RANGE) * EXPONENTS;
        const auto scale = [&](unsigned word) {
            const bool is_part = layer_bit(word) == 1u << layer;
            return is_part ? scaled(__uint_as_float(word), H_SCALE - above) : 0.0f;
        };
        float of_layer[GR][4];
        split_product(of_layer, matrix, line, scale, is_infinite);
#pragma unroll
        for (int i = 0; i < 4 * GR; ++i) sums[i / 4][i % 4] += scaled(of_layer[i / 4][i % 4], above);
    }
}

}  // namespace single_cta
