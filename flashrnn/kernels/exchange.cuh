// How a team's blocks send each other a step's values, and multiply them with R.
//
// A parcel is 16 bytes: three words of values and a tag, the number of the exchange. It is written
// and read as a whole, so whoever sees the tag has the values, and no other word orders anything.
// Parcels lie in the order in which the product takes them: parcel q of a sequence (TEAM * PARCELS of
// them, block by block) belongs to slice q / 8, and within it to the lanes that hold column
// `sequence` of the tensor core's right operand, of these to number q % 8 / 2. A lane asks for
// its own parcels again and again until they have the tag, and multiplies them out of its registers.
//
// There are two buffers, for odd and even tags. A block sends parcels of tag k when it has those of
// tag k - 1 of the whole team; by then the whole team has read those of tag k - 2, which they
// replace.

constexpr int SLICES = (TEAM * PARCELS + 7) / 8;
constexpr int BUFFER = SLICES * 2 * BLOCKS * 32;

// Where the parcel of a sequence lies in a buffer.
__device__ inline int parcel_place(int parcel, int column) {
    const int lane = column % 8 * 4 + parcel % 8 / 2;
    return ((parcel / 8 * 2 + parcel % 2) * BLOCKS + column / 8) * 32 + lane;
}

// In the lane that makes it, a parcel of its own value and the next lanes'.
__device__ inline Parcel make_parcel(float value, unsigned tag) {
    Element rounded;
    round_to(rounded, value);
    unsigned word = 0;
    memcpy(&word, &rounded, sizeof(Element));
    if (A_WORD == 2) word |= __shfl_down_sync(~0u, word, 1) << 16;
    return {{word, __shfl_down_sync(~0u, word, A_WORD), __shfl_down_sync(~0u, word, 2 * A_WORD)}, tag};
}

// Warp w multiplies slices w, w + WARPS, ...; a slice is three of the tensor core's steps.
constexpr int SLICES_A_WARP = (SLICES + WARPS - 1) / WARPS;
constexpr int FRAGMENTS = SLICES_A_WARP * 3 * TILES;
constexpr int STREAMED = FRAGMENTS - HELD - SPARED;

struct alignas(16) Fragment {
    unsigned words[4];
};

// The warp's part of R as the tensor core's left operand: the first HELD fragments in registers, the
// next SPARED in shared memory, the rest in global memory, where each lane finds what it has put.
struct Matrix {
    Fragment held[HELD];
    Fragment *spared, *streamed;

    __device__ Matrix(Fragment* shared, Fragment* global)
        : spared(shared + threadIdx.x / 32 * SPARED * 32 + threadIdx.x % 32),
          streamed(global + (static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32) *
                                STREAMED * 32 +
                   threadIdx.x % 32) {}

    __device__ void load(const Element* R, int n, int N, int rank) {
#pragma unroll
        for (int f = 0; f < HELD; ++f) held[f] = fragment(f, R, n, N, rank);
        for (int f = 0; f < SPARED; ++f) spared[f * 32] = fragment(HELD + f, R, n, N, rank);
        for (int f = 0; f < STREAMED; ++f) {
            streamed[f * 32] = fragment(HELD + SPARED + f, R, n, N, rank);
        }
    }

    // Fragment f is of tile f % TILES, step f / TILES % 3 and the warp's slice f / TILES / 3.
    __device__ Fragment operator[](int f) const {
        if (f < HELD) return held[f < HELD ? f : 0];
        return f < HELD + SPARED ? spared[(f - HELD) * 32] : streamed[(f - HELD - SPARED) * 32];
    }

    __device__ static Fragment fragment(int f, const Element* R, int n, int N, int rank) {
        const int lane = threadIdx.x % 32, slice = f / TILES / 3 * WARPS + threadIdx.x / 32;
        Fragment fragment;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            // Of the six words that a lane has of a slice.
            const int word = f / TILES % 3 * 2 + w / 2;
            const int parcel = slice * 8 + lane % 4 * 2 + word / 3;
            const int row = f % TILES * 16 + w % 2 * 8 + lane / 4;
            Element elements[A_WORD] = {};
#pragma unroll
            for (int k = 0; k < A_WORD; ++k) {
                // Among the units of the block that sends it.
                const int sent = parcel % UNIT_PARCELS * A_PARCEL + word % 3 * A_WORD + k;
                const int from = parcel / PARCELS * UNITS + sent, to = rank * UNITS + row / PRODUCED;
                const int gate = FORWARD ? row % PRODUCED : parcel % PARCELS / UNIT_PARCELS;
                const bool exists = parcel < TEAM * PARCELS && sent < UNITS && from < D &&
                                    row < UNITS * PRODUCED && to < D;
                const Element* head = R + (static_cast<long long>(gate) * N + n) * D * D;
                if (exists) {
                    const int d = FORWARD ? to : from, p = FORWARD ? from : to;
                    elements[k] = head[static_cast<long long>(d) * D + p];
                }
            }
            memcpy(&fragment.words[w], elements, 4);
            fragment.words[w] = prepare(fragment.words[w], Operand{});
            // Else all elements are loaded before the first become words.
            settle(fragment.words[w]);
        }
        return fragment;
    }
};

// The parcels that a lane has of AHEAD slices: what is asked for at once.
struct Batch {
    Parcel parcels[AHEAD][2][BLOCKS];

    // Asks for those of slices first, first + 1, ... of the warp's that have not arrived yet.
    __device__ void ask(const Parcel* buffer, int first, unsigned tag) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block) {
                    const int slice = (first + i) * WARPS + threadIdx.x / 32;
                    const Parcel* from = buffer + (slice * 2 + half) * BLOCKS * 32 + block * 32;
                    look_up(parcels[i][half][block], from + threadIdx.x % 32, tag);
                }
            }
        }
    }

    // Those that nobody sends are there, and zero.
    __device__ void begin(const Parcel* buffer, int first, unsigned tag) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int slice = (first + i) * WARPS + threadIdx.x / 32;
                const bool sent = slice * 8 + threadIdx.x % 4 * 2 + half < TEAM * PARCELS;
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block) {
                    parcels[i][half][block] = {{0, 0, 0}, sent && first + i < SLICES_A_WARP ? 0 : tag};
                }
            }
        }
        ask(buffer, first, tag);
    }

    __device__ void wait(const Parcel* buffer, int first, unsigned tag) {
        while (true) {
            bool complete = true;
#pragma unroll
            for (int i = 0; i < AHEAD * 2 * BLOCKS; ++i) {
                complete &= parcels[i / (2 * BLOCKS)][i / BLOCKS % 2][i % BLOCKS].tag == tag;
            }
            if (complete) return;
            ask(buffer, first, tag);
        }
    }
};

// The product of the block's part of R and the parcels of a tag, the warp's part of the sum.
__device__ inline void team_product(float (&sums)[TILES][BLOCKS][4], const Matrix& matrix,
                                    const Parcel* buffer, unsigned tag) {
#pragma unroll
    for (int i = 0; i < TILES * BLOCKS * 4; ++i) sums[i / BLOCKS / 4][i / 4 % BLOCKS][i % 4] = 0.0f;
    Batch next;
    next.begin(buffer, 0, tag);
#pragma unroll
    for (int first = 0; first < SLICES_A_WARP; first += AHEAD) {
        next.wait(buffer, first, tag);
        const Batch now = next;
        if (first + AHEAD < SLICES_A_WARP) next.begin(buffer, first + AHEAD, tag);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (first + i == SLICES_A_WARP) break;
#pragma unroll
            for (int step = 0; step < 3; ++step) {
#pragma unroll
                for (int pass = 0; pass < PASSES<Operand>; ++pass) {
#pragma unroll
                    for (int tile = 0; tile < TILES; ++tile) {
                        const Fragment a = matrix[((first + i) * 3 + step) * TILES + tile];
#pragma unroll
                        for (int block = 0; block < BLOCKS; ++block) {
                            const auto word = [&](int w) {
                                return now.parcels[i][w / 3][block].words[w % 3];
                            };
                            mma_pass(pass, sums[tile][block], a.words[0], a.words[1], a.words[2],
                                     a.words[3], word(2 * step), word(2 * step + 1), Operand{});
                        }
                    }
                }
            }
        }
    }
}

// Puts the warp's sums where total() finds them.
__device__ inline void store_sums(Partial& partial, const float (&sums)[TILES][BLOCKS][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = 8 * block + 2 * (lane % 4) + i % 2;
                partial[threadIdx.x / 32][column][16 * tile + lane / 4 + 8 * (i / 2)] =
                    sums[tile][block][i];
            }
        }
    }
}
