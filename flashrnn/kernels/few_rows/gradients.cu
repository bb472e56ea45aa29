// The gradients that follow from those of the gates, of a call over few rows: of a layer's input and input
// matrix, of R and of the bias.
//
//     dx[r, i]          = sum over c of d_Wx[r, c] W[c, i]
//     dW[c, i]          = sum over r of d_Wx[r, c] x[r, i]
//     dR[s, n, d, p]    = sum over r of d_gates[r, g, n, d] h_before[r, n, p]
//     db[k, n, d]       = sum over b of d_bias[b, g, n, d]
//
// A row r is a step of a sequence, (b, t). d_Wx are the gates' gradients that W feeds, from gate `W_gate`
// on, one behind another in each row: c is a unit of a gate, (g, n, d), of which there are `columns`. g is the
// gate that s or k stands for, and h_before the h of the step before, or the initial one.
//
// The CTAs come in this order: W_ctas, R_ctas and x_ctas, of which W_shares, R_shares and x_shares each share a
// tile of a product, and those of the bias. Those that sum over many rows, and take longest, start first.
// Where a gradient is not asked for there are none.

#include "few_rows/tile.cuh"
#include "common/row_sums.cuh"

namespace few_rows {

// The input: a row for each step of each sequence.
struct StepRows {
    static constexpr bool EVEN = false;

    const Element* first;
    long long of_sequence, of_step;
    unsigned T;

    __device__ float element(unsigned i, int place) const {
        return to_float(first[i / T * of_sequence + i % T * of_step + place]);
    }
    template <typename Position>
    __device__ void fetch(int to, const Position& at, int place, bool exists) const {
        copy_piece(to, from(at, place), exists);
    }
    template <typename Position>
    __device__ Element single(const Position& at, int place) const {
        return *from(at, place);
    }
    template <typename Position>
    __device__ const Element* from(const Position& at, int place) const {
        return first + at.sequence * of_sequence + at.step * of_step + place;
    }
};

// h before each step, of a head.
struct RowsBefore {
    static constexpr bool EVEN = false;

    const Element* h;
    long long pitch;
    const float* initial;
    long long of_sequence, of_unit;
    unsigned T;

    __device__ float element(unsigned i, int place) const {
        return i % T ? to_float(h[(i - 1ll) * pitch + place]) : to_float(rounded(i / T, place));
    }
    __device__ Element rounded(unsigned sequence, int place) const {
        Element x;
        round_to(x, initial[sequence * of_sequence + place * of_unit]);
        return x;
    }
    template <typename Position>
    __device__ void fetch(int to, const Position& at, int place, bool exists) const {
        if (!exists || at.step) {
            copy_piece(to, h + (at.row - 1ll) * pitch + place, exists);
        } else {
#pragma unroll
            for (int j = 0; j < PIECE; ++j) ring()[to + j] = rounded(at.sequence, place + j);
        }
    }
    template <typename Position>
    __device__ Element single(const Position& at, int place) const {
        return at.step ? h[(at.row - 1ll) * pitch + place] : rounded(at.sequence, place);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
few_rows_gradients(CALL) {
    const long long width = static_cast<long long>(N) * D, gates_pitch = G * width;
    const Rows d_Wx = {d_gates + W_gate * width, gates_pitch};
    const StepRows of_x = {x, x_b, x_t, T};
    int cta = blockIdx.x, tile;
    // Counts the CTAs so far that share tiles: these tiles' memory lies in their order.
    long long shared_ctas = 0;
    // Sets `tile`, and returns this CTA's share of it, where so many CTAs share a tile of the product at hand.
    const auto take = [&](int count) {
        tile = cta / count;
        const long long first = shared_ctas + tile * count;
        return Share{cta - tile * count, count, sums + first * (TILE * TILE), counters + first};
    };
    // Leaves a product's CTAs behind.
    const auto pass = [&](int ctas, int count) {
        cta -= ctas;
        if (count > 1) shared_ctas += ctas;
    };
    if (cta < W_ctas) {
        const Share share = take(W_shares);
        const int tiles = tiles_of(I);
        multiply_tile<true, true>(d_Wx, of_x, columns, I, rows, tile / tiles * TILE, tile % tiles * TILE,
                                  [&](long long c, int i) { return d_W + c * I + i; }, share);
        return;
    }
    pass(W_ctas, W_shares);
    if (cta < R_ctas) {
        const Share share = take(R_shares);
        const int tiles = tiles_of(D);
        const int n = tile / (tiles * tiles) % N, s = tile / (tiles * tiles) / N;
        tile %= tiles * tiles;
        int gate = 0;
#pragma unroll
        for (int k = 0; k < GR; ++k) {
            if (k == s) gate = RECURRENT[k];
        }
        const Rows of_gate = {d_gates + gate * width + n * D, gates_pitch};
        const RowsBefore before = {h + n * D, width, h_initial + n * h_initial_n, h_initial_b, h_initial_d, T};
        Element* d_R_of_head = d_R + (static_cast<long long>(s) * N + n) * D * D;
        multiply_tile<true, true>(of_gate, before, D, D, rows, tile / tiles * TILE, tile % tiles * TILE,
                                  [&](int d, int p) { return d_R_of_head + d * D + p; }, share);
        return;
    }
    pass(R_ctas, R_shares);
    if (cta < x_ctas) {
        const Share share = take(x_shares);
        const int tiles = tiles_of(I);
        multiply_tile<false, true>(d_Wx, Rows{W, I}, rows, I, columns, tile / tiles * TILE, tile % tiles * TILE,
                                   [&](long long r, int i) { return d_x + r * I + i; }, share);
        return;
    }
    cta -= x_ctas;
    float* const of_threads = reinterpret_cast<float*>(shared_memory());
    sum_bias<THREADS>(d_b, d_bias, B, width, b_columns, b_shares, cta, of_threads);
}

}  // namespace few_rows
