// A warp's part of a head's R as the left operand of tensor cores, and its product with h.
//
// A fragment holds 16 rows of the matrix by 32 bytes of the summed dimension. Row i of a fragment is
// unit 2 i of the warp for i < 8, unit 2 (i - 8) + 1 otherwise: this gives a lane the sums of two
// neighbouring units. Of a warp's FRAGMENTS the first IN_REGISTERS stay in registers; the others lie in
// shared memory, where each lane stores and reads its own 16 bytes of them. Where a CTA has several
// tiles, the warps of the first tile store them, and the warps of all tiles read those of their units.

#include "common/mma.cuh"
#include "common/r_words.cuh"
#include "single_cta/tile.cuh"

namespace single_cta {

// Instructions that sum over a row.
constexpr int STEPS = BLOCK_D * sizeof(Element) / 32;
constexpr int FRAGMENTS = GR * STEPS;
constexpr int IN_SHARED = FRAGMENTS - IN_REGISTERS;
constexpr int FRAGMENT_BYTES = WARPS * IN_SHARED * 32 * sizeof(Fragment);

// The lane's part of fragment f, that of recurrent gate f % GR and step f / GR. FORWARD: its rows are
// units that R produces, and the sum runs over units that R reads; backward the other way round.
template <bool FORWARD>
__device__ inline Fragment fragment(int f, const Element* R, int n, int N,
                                    const ThreadElements& elements) {
    const Element* matrix = R + (static_cast<long long>(f % GR) * N + n) * D * D;
    const int first_unit = elements.first_unit + 2 * elements.i;
    const int first_summed = f / GR * 2 * VECTOR + elements.j * (4 / sizeof(Element));
    Fragment fragment;
    if constexpr (R_HAS_WORDS) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int summed = first_summed + half * VECTOR;
            const bool exists = first_unit < D && summed < D;
            unsigned loaded[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int row = FORWARD ? first_unit + k : summed + k;
                loaded[k] = exists ? load_word(matrix + row * D + (FORWARD ? summed : first_unit)) : 0;
            }
            fragment.words[2 * half] = FORWARD ? loaded[0] : low_halves(loaded[0], loaded[1]);
            fragment.words[2 * half + 1] = FORWARD ? loaded[1] : high_halves(loaded[0], loaded[1]);
        }
    } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            constexpr int WORD = 4 / sizeof(Element);
            const int unit = first_unit + w % 2, summed = first_summed + w / 2 * VECTOR;
            Element word[WORD] = {};
#pragma unroll
            for (int k = 0; k < WORD; ++k) {
                if (unit < D && summed + k < D) {
                    word[k] = FORWARD ? matrix[unit * D + summed + k] : matrix[(summed + k) * D + unit];
                }
            }
            memcpy(&fragment.words[w], word, 4);
        }
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        fragment.words[w] = prepare(fragment.words[w], Operand{});
        // Otherwise the compiler loads the elements of all words first, and registers spill.
        materialize(fragment.words[w]);
    }
    return fragment;
}

// The lane's parts of the fragments of two neighbouring steps, of a recurrent gate, forward.
__device__ inline void two_fragments(Fragment (&fragments)[2], int first_step, int gate, const Element* R,
                                     int n, int N, const ThreadElements& elements) {
    const Element* matrix = R + (static_cast<long long>(gate) * N + n) * D * D;
    const int first_unit = elements.first_unit + 2 * elements.i;
    const int first_summed = first_step * 2 * VECTOR + elements.j * VECTOR;
    const bool exists = first_unit < D && first_summed < D;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        unsigned words[4];
        load_chunk(words, matrix + (first_unit + k) * D + first_summed, exists);
        deal_words(words);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            fragments[w / 2].words[w % 2 * 2 + k] = words[w];
            materialize(fragments[w / 2].words[w % 2 * 2 + k]);
        }
    }
}

// The warp's fragments.
struct Matrix {
    Fragment in_registers[IN_REGISTERS];
    Fragment* in_shared;

    template <bool FORWARD>
    __device__ void load(const Element* R, int n, int N, const ThreadElements& elements,
                         Fragment* shared) {
        unsigned offset = elements.warp_of_tile() * IN_SHARED * 32 + threadIdx.x % 32;
        materialize(offset);
        Fragment* own = shared + offset;
        in_shared = own;
        const auto keep = [&](int f, const Fragment& loaded) {
            if (f < IN_REGISTERS) in_registers[f < IN_REGISTERS ? f : 0] = loaded;
            else if (TILES == 1 || elements.tile() == 0) own[(f - IN_REGISTERS) * 32] = loaded;
        };
        if constexpr (FORWARD && R_HAS_CHUNKS) {
#pragma unroll
            for (int f = 0; f < FRAGMENTS; ++f) {
                const int step = f / GR, gate = f % GR;
                if (step % 2) continue;
                Fragment loaded[2];
                two_fragments(loaded, step, gate, R, n, N, elements);
                keep(f, loaded[0]);
                if (step + 1 < STEPS) keep(f + GR, loaded[1]);
            }
        } else {
#pragma unroll
            for (int f = 0; f < FRAGMENTS; ++f) keep(f, fragment<FORWARD>(f, R, n, N, elements));
        }
    }

    __device__ Fragment operator[](int f) const {
        return f < IN_REGISTERS ? in_registers[f < IN_REGISTERS ? f : 0]
                                : in_shared[(f - IN_REGISTERS) * 32];
    }

    // Of a CTA of one tile.
    __device__ void set(int f, const Fragment& fragment) {
        if (f < IN_REGISTERS) in_registers[f < IN_REGISTERS ? f : 0] = fragment;
        else in_shared[(f - IN_REGISTERS) * 32] = fragment;
    }
};

// The shared address that the lane passes to ldmatrix for the tile's lines.
__device__ inline unsigned matrix_line(const Element* lines, int pitch,
                                       const ThreadElements& elements) {
    const int lane = threadIdx.x % 32;
    const Element* of_tile = lines + elements.first_sequence * pitch;
    return shared_address(of_tile + lane % COLUMNS * pitch + lane / 8 * VECTOR);
}

// The right operands of two steps, from a row of the lines. Behind the last step the row ends, and what
// lies there may be written meanwhile.
__device__ inline void load_right(unsigned (&right)[4], unsigned row, int step) {
    if (step + 1 < STEPS) {
        ldmatrix(right, row + step * 32);
    } else {
        unsigned last[2];
        ldmatrix(last, row + step * 32);
        right[0] = last[0], right[1] = last[1], right[2] = right[3] = 0;
    }
}

// One pass of a fragment's product; `half` says which of the two steps in `right`.
template <typename Number>
__device__ inline void multiply(int pass, float (&sums)[4], const Fragment& a,
                                const unsigned (&right)[4], int half, Number) {
    mma_pass(pass, sums, a.words[0], a.words[1], a.words[2], a.words[3], right[2 * half],
             right[2 * half + 1], Number{});
}

// An mma waits for the one before that adds to the same sum. So sums are split into chains, which are
// added at the end, and consecutive instructions belong to different chains or gates.
constexpr int CHAINS_FORWARD = GR < 3 ? 2 : 1;

// For each recurrent gate, the product of R and the first row of the lines, which is h. `line` is
// matrix_line()'s result.
__device__ inline void recurrent_product(float (&sums)[GR][4], const Matrix& matrix, unsigned line) {
    float chains[CHAINS_FORWARD][GR][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step += 2) {
        unsigned right[4];
        load_right(right, line, step);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (step + half == STEPS) break;
#pragma unroll
            for (int pass = 0; pass < PASSES<Operand>; ++pass) {
#pragma unroll
                for (int s = 0; s < GR; ++s) {
                    const Fragment a = matrix[(step + half) * GR + s];
                    multiply(pass, chains[half % CHAINS_FORWARD][s], a, right, half, Operand{});
                }
            }
        }
    }
#pragma unroll
    for (int s = 0; s < GR; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums[s][i] = chains[0][s][i];
            if (CHAINS_FORWARD > 1) sums[s][i] += chains[CHAINS_FORWARD - 1][s][i];
        }
    }
}

// One element of either direction's product, in scalar float32 arithmetic and with R from global
// memory: where the tensor cores' split factors gave NaN (NEEDS_CARE). FORWARD: what R produces for
// recurrent gate s at the unit; backward: the gradient of what R reads there, of all gates. `line` is
// the sequence's line. Not inlined, it stays out of the loop over time.
template <bool FORWARD>
__device__ __noinline__ float scalar_product(const Element* R, int n, int N, int s, int unit,
                                             const Element* line) {
    float sum = 0.0f;
    if (unit >= D) return sum;
#pragma unroll
    for (int gate = FORWARD ? s : 0; gate < (FORWARD ? s + 1 : GR); ++gate) {
        const Element* matrix = R + (static_cast<long long>(gate) * N + n) * D * D;
        const Element* factors = line + (FORWARD ? 0 : RECURRENT[gate] * BLOCK_D);
#pragma unroll 1
        for (int j = 0; j < D; ++j) {
            sum += to_float(matrix[FORWARD ? unit * D + j : j * D + unit]) * to_float(factors[j]);
        }
    }
    return sum;
}

}  // namespace single_cta
