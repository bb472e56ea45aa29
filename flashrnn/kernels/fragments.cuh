// A head's recurrent matrix as the left operand of tensor cores, a warp's 16 rows of it, and its
// product with what lies in shared memory.
//
// A fragment is a 16 by 32 byte piece of the matrix, its row i (of the tensor core's order) being
// the unit 2 i for i < 8 and the unit 2 (i - 8) + 1 for the others. The first HELD fragments stay in
// registers, the others in shared memory, where a lane finds its 16 bytes of each.

constexpr int STEPS = DD * sizeof(Element) / 32;
constexpr int FRAGMENTS = GR * STEPS;
constexpr int SPARED = FRAGMENTS - HELD;

// Fragment f belongs to recurrent gate f % GR and to the summed units of step f / GR. FORWARD: rows are
// the units that R produces; else those that it reads, and what it produces is summed.
template <bool FORWARD>
__device__ inline Fragment fragment(int f, const Element* R, int n, int N, const Lane& lane) {
    const Element* block = R + (static_cast<long long>(f % GR) * N + n) * D * D;
    Fragment fragment;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        constexpr int A_WORD = 4 / sizeof(Element);
        const int unit = lane.first_unit + 2 * lane.i + w % 2;
        const int summed = f / GR * 2 * SHARE + w / 2 * SHARE + lane.j * A_WORD;
        Element word[A_WORD] = {};
#pragma unroll
        for (int k = 0; k < A_WORD; ++k) {
            if (unit < D && summed + k < D) {
                word[k] = FORWARD ? block[unit * D + summed + k] : block[(summed + k) * D + unit];
            }
        }
        memcpy(&fragment.words[w], word, 4);
        fragment.words[w] = prepare(fragment.words[w], Operand{});
        // Else all elements are loaded before the first two become one word.
        settle(fragment.words[w]);
    }
    return fragment;
}

struct Matrix {
    Fragment held[HELD];
    const Fragment* spared;

    template <bool FORWARD>
    __device__ void load(const Element* R, int n, int N, const Lane& lane, Fragment* spare) {
        unsigned place = threadIdx.x / 32 * SPARED * 32 + threadIdx.x % 32;
        settle(place);
        Fragment* mine = spare + place;
        spared = mine;
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) {
            const Fragment made = fragment<FORWARD>(f, R, n, N, lane);
            if (f < HELD) held[f < HELD ? f : 0] = made;
            else mine[(f - HELD) * 32] = made;
        }
    }

    __device__ Fragment operator[](int f) const {
        return f < HELD ? held[f < HELD ? f : 0] : spared[(f - HELD) * 32];
    }
};

// The shared address that the lane gives load_matrices for the first block of 8 sequences.
__device__ inline unsigned matrix_line(const Element* lines, int pitch) {
    const int lane = threadIdx.x % 32;
    return shared_address(lines + lane % COLUMNS * pitch + lane / 8 * SHARE);
}

template <typename Number>
__device__ inline void multiply(int pass, float (&sums)[BLOCKS][4], const Fragment& a,
                                const unsigned (&right)[BLOCKS][4], int half, Number) {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
        mma_pass(pass, sums[block], a.words[0], a.words[1], a.words[2], a.words[3],
                 right[block][2 * half], right[block][2 * half + 1], Number{});
    }
}

// An instruction waits for the one before that adds to the same sum. So there are several chains of
// them, and in each loop neighbours belong to different ones.
constexpr int CHAINS_FORWARD = GR * BLOCKS < 3 ? 2 : 1;
constexpr int CHAINS_BACKWARD = BLOCKS > 1 ? 2 : PASSES<Operand> == 1 ? 4 : 6;

// What R produces from the lines' first row, for each recurrent gate. `line` is matrix_line's.
__device__ inline void recurrent_product(float (&sums)[GR][BLOCKS][4], const Matrix& matrix,
                                         unsigned line, int pitch) {
    float chains[CHAINS_FORWARD][GR][BLOCKS][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step += 2) {
        unsigned right[BLOCKS][4];
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            load_matrices(right[block], line + 8 * block * pitch * sizeof(Element) + step * 32);
        }
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
        for (int i = 0; i < 4 * BLOCKS; ++i) {
            sums[s][i / 4][i % 4] = chains[0][s][i / 4][i % 4];
            if (CHAINS_FORWARD > 1) {
                sums[s][i / 4][i % 4] += chains[CHAINS_FORWARD - 1][s][i / 4][i % 4];
            }
        }
    }
}

// The gradient of what R reads, from the lines' rows of gates, which it may have to contain.
template <typename Number>
__device__ inline void transposed_product(float (&sums)[BLOCKS][4], const Matrix& matrix,
                                          unsigned line, int pitch, bool contain) {
    float chains[CHAINS_BACKWARD][BLOCKS][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step += 2) {
#pragma unroll
        for (int s = 0; s < GR; ++s) {
            unsigned right[BLOCKS][4];
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block) {
                const int offset = 8 * block * pitch + RECURRENT[s] * DD;
                load_matrices(right[block], line + offset * sizeof(Element) + step * 32);
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    if (contain) right[block][w] = contained(right[block][w], Number{});
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (step + half == STEPS) break;
                const Fragment a = matrix[(step + half) * GR + s];
#pragma unroll
                for (int pass = 0; pass < PASSES<Operand>; ++pass) {
                    const int chain = (2 * s + half) * PASSES<Operand> + pass;
                    multiply(pass, chains[chain % CHAINS_BACKWARD], a, right, half, Number{});
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4 * BLOCKS; ++i) {
        sums[i / 4][i % 4] = chains[0][i / 4][i % 4];
#pragma unroll
        for (int c = 1; c < CHAINS_BACKWARD; ++c) sums[i / 4][i % 4] += chains[c][i / 4][i % 4];
    }
}

// One number of either of them, with care and out of R itself: what R produces of its gate s at a unit, or
// the gradient of what it reads there. `line` is the sequence's row. A function of its own keeps
// it out of the loop over time.
template <bool FORWARD>
__device__ __noinline__ float careful_product(const Element* R, int n, int N, int s, int unit,
                                        const Element* line) {
    float sum = 0.0f;
    if (unit >= D) return sum;
#pragma unroll
    for (int gate = FORWARD ? s : 0; gate < (FORWARD ? s + 1 : GR); ++gate) {
        const Element* of_gate = R + (static_cast<long long>(gate) * N + n) * D * D;
        const Element* factors = line + (FORWARD ? 0 : RECURRENT[gate] * DD);
#pragma unroll 1
        for (int j = 0; j < D; ++j) {
            sum += to_float(of_gate[FORWARD ? unit * D + j : j * D + unit]) * to_float(factors[j]);
        }
    }
    return sum;
}
