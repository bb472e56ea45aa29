// The product of a CTA's part of R and of the values that its group has exchanged, by mma.
//
// Warp w multiplies slices w, w + WARPS, ... of the packets (packet_order.cuh) and all rows of the CTA's
// part of R. Its fragments of R are in registers, in shared memory and in global memory
// (common/r_matrix.cuh), in the order in which it multiplies them. The sums of the warps are in shared
// memory, and unit_sums() adds those of a unit and sequence.

#include "grid/all_gather.cuh"
#include "grid/sequences.cuh"
#include "common/r_matrix.cuh"
#include "common/r_words.cuh"

namespace grid {

// The element of R that row `row` of the CTA's product multiplies with element k of a packet's word.
struct PlaceInR {
    bool exists;
    int gate, d, p;

    __device__ PlaceInR(int rank, int row, int packet, int word, int k) {
        // The unit among those of the CTA that sends it.
        const int sent = packet % UNIT_PACKETS * PACKET_UNITS + word * WORD_ELEMENTS + k;
        const int from = packet / PACKETS * UNITS + sent, to = rank * UNITS + row / PRODUCED;
        gate = FORWARD ? row % PRODUCED : packet % PACKETS / UNIT_PACKETS;
        d = FORWARD ? to : from;
        p = FORWARD ? from : to;
        exists = packet < GROUP_SIZE * PACKETS && sent < UNITS && from < D && row < UNITS * PRODUCED &&
                 to < D;
    }

    __device__ const Element* in(const Element* R, int n, int N) const {
        const Element* head = R + (static_cast<long long>(gate) * N + n) * D * D;
        return head + static_cast<long long>(d) * D + p;
    }
};

// That element; 0 where there is none.
__device__ inline Element element_of_R(const Element* R, int n, int N, int rank, int row, int packet,
                                       int word, int k) {
    const PlaceInR place(rank, row, packet, word, k);
    Element found = {};
    if (place.exists) found = *place.in(R, n, N);
    return found;
}

// The warp's fragment f: of its slice f / ROW_TILES / PACKET_WORDS, step f / ROW_TILES % PACKET_WORDS,
// the tile f % ROW_TILES of 16 rows.
__device__ inline Fragment fragment(int f, const Element* R, int n, int N, int rank) {
    const int lane = threadIdx.x % 32;
    const int row_tile = f % ROW_TILES, step = f / ROW_TILES % PACKET_WORDS;
    const int slice = f / ROW_TILES / PACKET_WORDS * SUM_PARTS + sum_part();
    Fragment fragment;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const int packet = Order::even_packet(slice, lane % 4) + operand_packet(step, w / 2);
        const int row = 16 * row_tile + w % 2 * 8 + lane / 4;
        const int word = operand_word(step, w / 2);
        if constexpr (FORWARD && R_HAS_WORDS && UNITS % 2 == 0) {
            const PlaceInR place(rank, row, packet, word, 0);
            fragment.words[w] = place.exists ? load_word(place.in(R, n, N)) : 0;
        } else {
            Element elements[WORD_ELEMENTS] = {};
#pragma unroll
            for (int k = 0; k < WORD_ELEMENTS; ++k) {
                elements[k] = element_of_R(R, n, N, rank, row, packet, word, k);
            }
            memcpy(&fragment.words[w], elements, 4);
        }
        fragment.words[w] = prepare(fragment.words[w], Operand{});
        // Without this, the compiler loads all elements before it makes words of the first ones, and
        // spills registers.
        materialize(fragment.words[w]);
    }
    return fragment;
}

// Whether R can be loaded 8 bytes at a time: those of four units, the first a multiple of 4.
constexpr bool HAS_FOURS = FORWARD && R_HAS_WORDS && D % 4 == 0 && UNITS % 4 == 0;

// The columns of a row of R, as words, that a lane multiplies with its even packet's words and then with
// those of its odd one; zeros if the row does not exist.
__device__ inline void words_of_packets(unsigned (&words)[2 * PACKET_WORDS], const Element* row,
                                        bool row_exists, int even) {
    // Four units that a CTA sends: their words in the row.
    const auto load_four = [&](unsigned& low, unsigned& high, int packet, int sent) {
        const int from = packet / PACKETS * UNITS + sent;
        const bool exists = row_exists && packet < Order::SENT && sent < UNITS && from < D;
        const WordVector<2> four = exists ? load_words(reinterpret_cast<const WordVector<2>*>(row + from))
                                          : WordVector<2>{};
        low = four.of[0], high = four.of[1];
    };
    if constexpr (NEIGHBOURS) {
#pragma unroll
        for (int w = 0; w < 2 * PACKET_WORDS; w += 2) {
            load_four(words[w], words[w + 1], even, even % PACKETS * PACKET_UNITS + 2 * w);
        }
    } else {
        static_assert(PACKET_WORDS == 3, "six units, of which the first is even, are part of eight");
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int sent = (even + odd) % PACKETS * PACKET_UNITS;
            unsigned eight[4];
            load_four(eight[0], eight[1], even + odd, sent / 4 * 4);
            load_four(eight[2], eight[3], even + odd, sent / 4 * 4 + 4);
#pragma unroll
            for (int w = 0; w < PACKET_WORDS; ++w) {
                words[odd * PACKET_WORDS + w] = sent % 4 == 0 ? eight[w] : eight[w + 1];
            }
        }
    }
}

// The lane's fragments of all steps of a slice, if R HAS_FOURS.
__device__ inline void fragments_of_slice(Fragment (&fragments)[PACKET_WORDS], int slice, int row_tile,
                                          const Element* R, int n, int N, int rank) {
    const int lane = threadIdx.x % 32;
    const int even = Order::even_packet(slice * SUM_PARTS + sum_part(), lane % 4);
    const unsigned zero = opaque_zero();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = 16 * row_tile + half * 8 + lane / 4, d = rank * UNITS + row / PRODUCED;
        const bool exists = row < UNITS * PRODUCED && d < D;
        const Element* const head = R + (static_cast<long long>(row % PRODUCED) * N + n) * D * D;
        unsigned words[2 * PACKET_WORDS];
        words_of_packets(words, head + static_cast<long long>(d) * D, exists, even);
#pragma unroll
        for (int k = 0; k < 2 * PACKET_WORDS; ++k) {
            const int step = k / 2, of_step = k % 2;
            const int word = operand_packet(step, of_step) * PACKET_WORDS + operand_word(step, of_step);
            fragments[step].words[2 * of_step + half] = words[word] | zero;
            // See fragment().
            materialize(fragments[step].words[2 * of_step + half]);
        }
    }
}

__device__ inline void load_matrix(Matrix& matrix, const Element* R, int n, int N, int rank) {
    if constexpr (HAS_FOURS) {
#pragma unroll
        for (int i = 0; i < Order::SLICES_A_WARP * ROW_TILES; ++i) {
            const int slice = i / ROW_TILES, row_tile = i % ROW_TILES;
            Fragment fragments[PACKET_WORDS];
            fragments_of_slice(fragments, slice, row_tile, R, n, N, rank);
#pragma unroll
            for (int step = 0; step < PACKET_WORDS; ++step) {
                matrix.keep((slice * PACKET_WORDS + step) * ROW_TILES + row_tile, fragments[step]);
            }
        }
    } else {
        matrix.load([&](int f) { return fragment(f, R, n, N, rank); });
    }
}

// The sums of the CTA's warps. Those of a sequence are PITCH apart from those of the next one, so that a
// warp stores to 32 different banks. There are two of these, used by alternate products: warps store the
// sums of a product while others still read those of the product before.
constexpr int PITCH = 16 * ROW_TILES + 4;
using Partial = float[SUM_PARTS][COLUMNS][PITCH];

// Shared memory: the sums of two products, what threads carry, the sequences, and fragments of R.
constexpr int SEQUENCES_OFFSET = 2 * sizeof(Partial) + Carried::BYTES;
constexpr int MATRIX_OFFSET = SEQUENCES_OFFSET + WorkSequences::BYTES;
static_assert(MATRIX_OFFSET + WARPS * IN_SHARED * 32 * sizeof(Fragment) == SHARED_BYTES,
              "the plan and the kernel lay out the same shared memory");

// An mma waits for the previous one that adds to the same registers. With few sums, CHAINS copies of
// them are summed independently and added at the end.
constexpr int CHAINS = ROW_TILES * N_TILES == 1 ? 4 : ROW_TILES * N_TILES == 2 ? 2 : 1;

// Whether a step is computed by two instructions of half the summed elements. An mma needs b0 and b1 in
// neighbouring registers, but in the last step they are words of two packets, and the compiler would
// wait for both loads to move them. (Operands of float32 are copied in any case, when they are split
// into their high and low bits.)
__device__ constexpr bool splits(int step) {
    return sizeof(Element) == 2 && PACKET_WORDS % 2 && step == PACKET_WORDS - 1;
}

// Unrolled, the product of a wide head in float32 takes many seconds to compile. So its slices are then
// computed in loops, one over those with all fragments in shared memory and one over those with all
// in global memory, but for some at the ends: a turn takes CHAINS slices, and behind the last slice
// none is loaded.
constexpr int FRAGMENTS_A_SLICE = PACKET_WORDS * ROW_TILES;
constexpr int PRODUCTS = Order::SLICES_A_WARP * FRAGMENTS_A_SLICE * N_TILES * PASSES<Operand>;
constexpr bool LOOPS = PASSES<Operand> > 1 && PRODUCTS > MOST_UNROLLED && AHEAD == 1;

// A loop's slices, of those whose fragments are all from `first_fragment` to before `end_fragment`.
struct SliceLoop {
    int first, end;

    __device__ constexpr SliceLoop(int first_fragment, int end_fragment)
        : first((first_fragment + FRAGMENTS_A_SLICE - 1) / FRAGMENTS_A_SLICE), end(first) {
        const int whole = end_fragment / FRAGMENTS_A_SLICE;
        const int most = whole < Order::SLICES_A_WARP ? whole : Order::SLICES_A_WARP - 1;
        if (LOOPS && most > first) end += (most - first) / CHAINS * CHAINS;
    }

    __device__ constexpr bool has(int i) const { return first <= i && i < end; }
};

// The row and column, in the CTA's product, of a lane's sum i of a tile of 16 rows and an n-tile.
struct SumPlace {
    int row, column;

    __device__ SumPlace(int row_tile, int n_tile, int i)
        : row(16 * row_tile + threadIdx.x % 32 / 4 + 8 * (i / 2)),
          column(8 * n_tile + 2 * (threadIdx.x % 4) + i % 2) {}
};

// Computes again, in float32 and from R itself, those of the warp's sums that are not finite. The finite
// ones are kept, so that no sequence's bits depend on another's values. It is for float32, whose words
// have an element each.
__device__ inline void careful_product(float (&sums)[ROW_TILES][N_TILES][4],
                                       const ReceivedPackets& received, const Element* R, int n, int N,
                                       int rank) {
#pragma unroll 1
    for (int j = 0; j < ROW_TILES * N_TILES * 4; ++j) {
        const SumPlace place(j / (4 * N_TILES), j / 4 % N_TILES, j % 4);
        float sum = 0.0f;
#pragma unroll 1
        for (int q = 0; q < 8 * Order::SLICES_A_WARP; ++q) {
            const int packet = (q / 8 * SUM_PARTS + sum_part()) * 8 + q % 8;
            const Packet from = received.reload(packet, place.column);
#pragma unroll
            for (int word = 0; word < PACKET_WORDS; ++word) {
                const Element factor = element_of_R(R, n, N, rank, place.row, packet, word, 0);
                sum += to_float(factor) * __uint_as_float(from.words[word]);
            }
        }
#pragma unroll
        for (int k = 0; k < ROW_TILES * N_TILES * 4; ++k) {
            float& fast = sums[k / (4 * N_TILES)][k / 4 % N_TILES][k % 4];
            if (k == j && !is_finite(fast)) fast = sum;
        }
    }
}

// Receives and multiplies slice i of the warp. `fragment_of(f)` is the warp's fragment f. Its first step
// adds to chain `chain` % CHAINS.
template <typename Number, typename FragmentOf>
__device__ inline void multiply_slice(float (&sums)[CHAINS][ROW_TILES][N_TILES][4], int i, int chain,
                                      const FragmentOf& fragment_of, ReceivedPackets& received) {
    unsigned words[N_TILES][2 * PACKET_WORDS];
    received.receive(i, words);
#pragma unroll
    for (int step = 0; step < PACKET_WORDS; ++step) {
#pragma unroll
        for (int pass = 0; pass < (splits(step) ? 2 : PASSES<Operand>); ++pass) {
#pragma unroll
            for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
                const Fragment a = fragment_of((i * PACKET_WORDS + step) * ROW_TILES + row_tile);
#pragma unroll
                for (int n_tile = 0; n_tile < N_TILES; ++n_tile) {
                    const unsigned* b = &words[n_tile][2 * step];
                    float(&sum)[4] = sums[(chain + step) % CHAINS][row_tile][n_tile];
                    if constexpr (sizeof(Element) == 2) {
                        if (splits(step)) {
                            mma_half(sum, a.words[2 * pass], a.words[2 * pass + 1], b[pass],
                                     Number{});
                            continue;
                        }
                    }
                    mma_pass(pass, sum, a.words[0], a.words[1], a.words[2], a.words[3], b[0],
                             b[1], Number{});
                }
            }
        }
    }
}

template <typename Number, typename FragmentOf>
__device__ inline void multiply_slices(float (&sums)[CHAINS][ROW_TILES][N_TILES][4],
                                       const SliceLoop& slices, const FragmentOf& fragment_of,
                                       ReceivedPackets& received) {
#pragma unroll 1
    for (int i = slices.first; i < slices.end; i += CHAINS) {
#pragma unroll
        for (int k = 0; k < CHAINS; ++k) {
            multiply_slice<Number>(sums, i + k, (slices.first + k) * PACKET_WORDS, fragment_of,
                                   received);
        }
    }
}

// Receives and multiplies the values of an exchange, and stores the warp's sums. It is a template
// because mma_half exists for elements of 16 bits only. `R` is what the matrix was loaded from.
template <typename Number>
__device__ inline void multiply(Partial& partial, const Matrix& matrix, ReceivedPackets& received,
                                const Element* R, int n, int N, int rank) {
    constexpr SliceLoop in_shared(IN_REGISTERS, IN_REGISTERS + IN_SHARED);
    constexpr SliceLoop in_memory(IN_REGISTERS + IN_SHARED, IN_REGISTERS + IN_SHARED + IN_MEMORY);
    float sums[CHAINS][ROW_TILES][N_TILES][4] = {};
#pragma unroll
    for (int i = 0; i < Order::SLICES_A_WARP; ++i) {
        if (in_shared.has(i)) {
            if (i == in_shared.first) {
                multiply_slices<Number>(sums, in_shared, [&](int f) { return matrix.shared(f); },
                                        received);
            }
        } else if (in_memory.has(i)) {
            if (i == in_memory.first) {
                multiply_slices<Number>(sums, in_memory, [&](int f) { return matrix.memory(f); },
                                        received);
            }
        } else {
            multiply_slice<Number>(sums, i, i * PACKET_WORDS, [&](int f) { return matrix[f]; },
                                   received);
        }
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES * N_TILES * 4; ++i) {
#pragma unroll
        for (int chain = 1; chain < CHAINS; ++chain) {
            sums[0][i / (4 * N_TILES)][i / 4 % N_TILES][i % 4] +=
                sums[chain][i / (4 * N_TILES)][i / 4 % N_TILES][i % 4];
        }
    }
    if constexpr (NEEDS_CARE<Number>) {
        bool needs_care = false;
#pragma unroll
        for (int i = 0; i < ROW_TILES * N_TILES * 4; ++i) {
            const float sum = sums[0][i / (4 * N_TILES)][i / 4 % N_TILES][i % 4];
            needs_care |= sum != sum;
        }
        if (__any_sync(~0u, needs_care)) careful_product(sums[0], received, R, n, N, rank);
    }
#pragma unroll
    for (int j = 0; j < ROW_TILES * N_TILES * 4; ++j) {
        const int row_tile = j / (4 * N_TILES), n_tile = j / 4 % N_TILES;
        const SumPlace place(row_tile, n_tile, j % 4);
        partial[sum_part()][place.column][place.row] = sums[0][row_tile][n_tile][j % 4];
    }
}

// The sums of a unit and sequence: forward of its gates that R feeds, backward the gradient of h.
struct alignas(PRODUCED % 4 == 0 ? 16 : PRODUCED % 2 == 0 ? 8 : 4) UnitSums {
    float values[PRODUCED];
};

// Those of a thread's element, after a CTA barrier behind multiply().
__device__ inline UnitSums unit_sums(const Partial& partial, const ThreadElement& element) {
    UnitSums sum = {};
#pragma unroll
    for (int part = 0; part < SUM_PARTS; ++part) {
        const float* from = &partial[part][element.column][element.unit * PRODUCED];
        const UnitSums of_part = *reinterpret_cast<const UnitSums*>(from);
#pragma unroll
        for (int i = 0; i < PRODUCED; ++i) sum.values[i] += of_part.values[i];
    }
    return sum;
}

}  // namespace grid
