// dR[g, n, d, p] = sum over b and t of d_gates[b, t, g, n, d] h[b, t - 1, n, p], in parts.
//
// A thread block computes, of one head, the GATES gates from group * GATES on, as sums over the rows
// (b, t) from part * rows_a_part on; the parts are added afterwards, in a fixed order. Its tile has
// GATES * DD lines of d_gates' units and DD columns of h's. There may be more rows than 32 bits count;
// of a part there are not.
//
// What lives where: the sums in registers, a warp's being 16 lines of every 16 * WARPS and all
// columns; in shared memory a ring of STAGES chunks of CHUNK rows, which all threads fill, as they lie
// in global memory, and from which tensor core operands come transposed.
//
// What orders the chunks is one barrier for each: a thread has waited for its own copies of the chunk
// that comes next, and nobody reads the slot any more that is filled next.

constexpr int DD = (D + 15) / 16 * 16;
constexpr int SHARE = 16 / sizeof(Element);
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNK = 64 / sizeof(Element);
constexpr int LINES = GATES * DD;
constexpr int TILES = (LINES / 16 + WARPS - 1) / WARPS;
constexpr bool ALL_TILES = LINES % (16 * WARPS) == 0;
// 8 elements more: rows of 16-bit elements are then an odd number of 16 bytes apart, and those of 4
// bytes begin 8 banks apart.
constexpr int LINES_PITCH = LINES + 8, COLUMNS_PITCH = DD + 8;
constexpr int SLOT = CHUNK * (LINES_PITCH + COLUMNS_PITCH);
constexpr int PIECE = ALIGNED ? SHARE : 1;
constexpr int PIECES = D / PIECE;

// D elements to shared memory; zeros where there is no row.
__device__ inline void fetch_pieces(Element* to, const Element* from, bool exists, int piece) {
    to += piece * PIECE;
    from += piece * PIECE;
    if (!exists) {
#pragma unroll
        for (int i = 0; i < PIECE; ++i) round_to(to[i], 0.0f);
    } else if constexpr (ALIGNED) {
        copy_async(to, from);
    } else {
        *to = *from;
    }
}

// A 16 by 32 byte operand out of rows of shared memory, the summed dimension running down.
__device__ inline void load_left(unsigned (&words)[4], const Element* corner, int pitch) {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(Element) == 2) {
        const int row = lane / 16 * 8 + lane % 8, column = lane / 8 % 2 * 8;
        load_matrices_transposed(words, shared_address(corner + row * pitch + column));
    } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const int row = lane % 4 + w / 2 * 4, column = lane / 4 + w % 2 * 8;
            words[w] = __float_as_uint(to_float(corner[row * pitch + column]));
            words[w] = prepare(words[w], Operand{});
        }
    }
}

// Two of 8 columns each: words 0 and 1, 2 and 3.
__device__ inline void load_right(unsigned (&words)[4], const Element* corner, int pitch) {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(Element) == 2) {
        const int row = lane % 16, column = lane / 16 * 8;
        load_matrices_transposed(words, shared_address(corner + row * pitch + column));
    } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const int row = lane % 4 + w % 2 * 4, column = lane / 4 + w / 2 * 8;
            words[w] = __float_as_uint(to_float(corner[row * pitch + column]));
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
recurrent_gradient(const Element* __restrict__ d_gates, const Element* __restrict__ h_initial,
                   const Element* __restrict__ h, float* __restrict__ parts, int rows_a_part,
                   unsigned T, long long B, int N) {
    Element* ring = reinterpret_cast<Element*>(shared_memory());
    constexpr int GROUPS = (GR + GATES - 1) / GATES;
    const int n = blockIdx.x % N, group = blockIdx.x / N % GROUPS, part = blockIdx.x / N / GROUPS;
    const long long width = static_cast<long long>(N) * D;
    // The part's first row, of its sequence and of all; from here on rows are counted in the part.
    const long long begin = static_cast<long long>(part) * rows_a_part, left = B * T - begin;
    const int rows = left < rows_a_part ? left : rows_a_part, chunks = (rows + CHUNK - 1) / CHUNK;
    // Where a row lies: it is told from the row before, since a division takes longer than all else of
    // an address. That of the chunk fetched next is carried from chunk to chunk.
    struct Place {
        long long sequence;
        unsigned step;

        __device__ void move(int rows, unsigned T) {
            step += rows;
            if (step < T) return;
            sequence += step / T;
            step %= T;
        }
    } next = {begin / T, static_cast<unsigned>(begin % T)};
    const Element* gates_of_part = d_gates + begin * G * width + n * D;
    // One step earlier.
    const Element* h_of_part = h + (begin - 1) * width + n * D;

    const auto fetch = [&](int chunk) {
        Element* lines = ring + chunk % STAGES * SLOT;
        Element* columns = lines + CHUNK * LINES_PITCH;
        const int first = chunk * CHUNK;
        // Trips are counted without the thread, so that loops can be unrolled; by more than two, and
        // registers spill.
        constexpr int ALL = CHUNK * GATES * PIECES;
#pragma unroll 2
        for (int trip = 0; trip < (ALL + THREADS - 1) / THREADS; ++trip) {
            const int i = threadIdx.x + trip * THREADS;
            if (ALL % THREADS && i >= ALL) break;
            const int piece = i % PIECES, s = i / PIECES % GATES, row = i / PIECES / GATES;
            int gate = 0;
#pragma unroll
            for (int k = 0; k < GR; ++k) {
                if (k == group * GATES + s) gate = RECURRENT[k];
            }
            const int line = (first + row) * G + gate;
            const Element* from = gates_of_part + static_cast<long long>(line) * (N * D);
            fetch_pieces(lines + row * LINES_PITCH + s * DD, from, first + row < rows, piece);
        }
#pragma unroll 2
        for (int trip = 0; trip < (CHUNK * PIECES + THREADS - 1) / THREADS; ++trip) {
            const int i = threadIdx.x + trip * THREADS;
            if (CHUNK * PIECES % THREADS && i >= CHUNK * PIECES) break;
            const int piece = i % PIECES, row = i / PIECES;
            Place place = next;
            place.move(row, T);
            const Element* from = place.step
                                      ? h_of_part + static_cast<long long>(first + row) * (N * D)
                                      : h_initial + place.sequence * width + n * D;
            fetch_pieces(columns + row * COLUMNS_PITCH, from, first + row < rows, piece);
        }
        next.move(CHUNK, T);
    };
    for (int chunk = 0; chunk < STAGES - 1; ++chunk) {
        if (chunk < chunks) fetch(chunk);
        close_copy_group();
    }

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sums[TILES][DD / 8][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
        wait_for_copy_groups<STAGES - 2>();
        __syncthreads();
        if (chunk + STAGES - 1 < chunks) fetch(chunk + STAGES - 1);
        close_copy_group();
        const Element* lines = ring + chunk % STAGES * SLOT;
        const Element* columns = lines + CHUNK * LINES_PITCH;
#pragma unroll
        for (int row = 0; row < CHUNK; row += 2 * SHARE) {
            unsigned left[TILES][4];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const int line = 16 * (warp + tile * WARPS);
                if (ALL_TILES || line < LINES) {
                    load_left(left[tile], lines + row * LINES_PITCH + line, LINES_PITCH);
                }
            }
#pragma unroll
            for (int pair = 0; pair < DD / 16; ++pair) {
                unsigned right[4];
                load_right(right, columns + row * COLUMNS_PITCH + 16 * pair, COLUMNS_PITCH);
#pragma unroll
                for (int pass = 0; pass < PASSES<Operand>; ++pass) {
#pragma unroll
                    for (int tile = 0; tile < TILES; ++tile) {
                        if (!ALL_TILES && 16 * (warp + tile * WARPS) >= LINES) continue;
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            mma_pass(pass, sums[tile][2 * pair + half], left[tile][0], left[tile][1],
                                     left[tile][2], left[tile][3], right[2 * half],
                                     right[2 * half + 1], Operand{});
                        }
                    }
                }
            }
        }
    }

    bool needs_care = false;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int block = 0; block < DD / 8; ++block) {
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                const int line = 16 * (warp + tile * WARPS) + lane / 4 + v / 2 * 8;
                const int s = group * GATES + line / DD, d = line % DD;
                const int p = 8 * block + 2 * (lane % 4) + v % 2;
                if (line < LINES && s < GR && d < D && p < D) {
                    const long long block_of = (static_cast<long long>(part) * GR + s) * N + n;
                    const float sum = sums[tile][block][v];
                    parts[(block_of * D + d) * D + p] = sum;
                    needs_care |= sum != sum;
                }
            }
        }
    }
    if (!NEEDS_CARE<Operand> || !__syncthreads_or(needs_care)) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < GATES * D * D; i += THREADS) {
        const int s = group * GATES + i / (D * D), d = i / D % D, p = i % D;
        if (s >= GR) break;
        float& fast = parts[(((static_cast<long long>(part) * GR + s) * N + n) * D + d) * D + p];
        if (is_finite(fast)) continue;
        int gate = 0;
#pragma unroll
        for (int k = 0; k < GR; ++k) {
            if (k == s) gate = RECURRENT[k];
        }
        float sum = 0.0f;
#pragma unroll 1
        for (long long row = begin; row < begin + rows; ++row) {
            const Element* before = row % T ? h + (row - 1) * width : h_initial + row / T * width;
            sum += to_float(d_gates[(row * G + gate) * width + n * D + d]) *
                   to_float(before[n * D + p]);
        }
        fast = sum;
    }
}
