// The scan over time, forward, of heads and many sequences whose R is read from global memory at each step, as
// the right operand of wgmma. tile.cuh says which CTA and thread has which units and sequences, exchange.cuh
// what CTAs send each other, and what orders it.
//
// What lives where:
//
// - registers of the computing warps: the product's sums, of a tile;
// - shared memory: a few chunks of R and of h; the bias;
// - global memory: R and h, as they are multiplied; the carried states, in float32, in `last_states`, where the
//   last step leaves them. One thread alone reads and writes each. (The host has copied what is not aligned.)
//
// In a step of a tile, the computing warps multiply chunk by chunk, as R and h arrive. Then each thread computes
// the cells of its elements, piece by piece; it loads the inputs of the next pieces meanwhile. Of the producing
// warps one copies R, which is the same in all steps: its first chunks are there before h is. Another copies h,
// and prefetches Wx into the L2 cache. (There are four since registers are given by whole warpgroups.)
//
// CTAs wait for each other, so the launch is a cooperative one.

#include "streamed/numbers.cuh"
#include "streamed/product.cuh"
#include "streamed/stripes.cuh"

namespace streamed {

// The barrier of the computing warps.
constexpr int COMPUTED = 1;

// The chunks for which the ring has room before any is multiplied.
constexpr int FIRST_CHUNKS = CHUNKS < STAGES ? CHUNKS : STAGES;

// A piece's inputs of a step.
struct Inputs {
    Elements gates[G];
    Floats states[S];
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
streamed_forward(CALL) {
    const int rank = blockIdx.x % CLUSTER_SIZE, cluster = blockIdx.x / CLUSTER_SIZE, clusters = groups;
    const Exchange exchange(shared_memory(), packets, R_in_memory, rank, B, N);
    const long long width = static_cast<long long>(N) * D;
    const int work_tiles = WorkTile::count(B, N), ctas = clusters * CLUSTER_SIZE;

    write_stripes(exchange, R, initial, initial_b, initial_n, initial_d, B, N, ctas);
    __syncthreads();
    if (threadIdx.x == 0) add_release(exchange.counters, 1);

    // The same for a warp, as the compiler must know to have products run asynchronously.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp >= WARPS) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        // Prefetches a tile's Wx: of each row and gate the line that its first unit lies in, and as many behind it
        // as its units fill.
        const auto prefetch = [&](const WorkTile& work, long long t) {
            const int first_unit = work.unit_tile * UNITS, units = D - first_unit < UNITS ? D - first_unit : UNITS;
            constexpr int LINE = 128 / sizeof(Element), LINES = UNITS / LINE + 1;
#pragma unroll 1
            for (int i = threadIdx.x % 32; i < SEQUENCES * LINES; i += 32) {
                const long long row = static_cast<long long>(work.row_tile) * SEQUENCES + i / LINES;
                if (row >= B) break;
                const int unit = i % LINES * LINE < units ? i % LINES * LINE : units - 1;
                const Element* const from = Wx + row * Wx_b + t * Wx_t + work.n * Wx_n + first_unit + unit;
#pragma unroll
                for (int k = 0; k < GW; ++k) prefetch_l2(from + k * Wx_g);
            }
        };
        Slot slot;
        if (warp == WARPS) {
            exchange.wait_for_all(ctas);
            for (long long t = 0; t < T; ++t) {
                for (int index = cluster; index < work_tiles; index += clusters) {
                    const WorkTile work(index, rank, N);
                    const unsigned char* const from = exchange.stripes_of_R(work.n, work.unit_tile);
                    for (int chunk = 0; chunk < CHUNKS; ++chunk, slot.advance()) {
                        const int stripes = chunk < CHUNKS - 1 ? CHUNK_STRIPES : LAST_STRIPES;
                        exchange.copy_R(slot, from + chunk * R_CHUNK, stripes);
                    }
                }
            }
        } else if (warp == WARPS + 1) {
            exchange.wait_for_all(ctas);
            for (long long t = 0; t < T; ++t) {
                for (int index = cluster; index < work_tiles; index += clusters) {
                    const WorkTile work(index, rank, N);
                    exchange.wait_for_h(work, t);
                    const unsigned char* const from = exchange.stripes_of_h(t, work.n, work.row_tile);
                    for (int chunk = 0; chunk < CHUNKS; ++chunk, slot.advance()) {
                        const int stripes = chunk < CHUNKS - 1 ? CHUNK_STRIPES : LAST_STRIPES;
                        exchange.copy_h(slot, from + chunk * H_CHUNK, stripes);
                        if (chunk == FIRST_CHUNKS - 1) prefetch(work, t);
                    }
                }
            }
        }
        cluster_barrier();
        return;
    }

    setmaxnreg_inc<COMPUTING_REGISTERS>();
    float* const bias = reinterpret_cast<float*>(shared_memory() + BIAS);
    Slot slot;
    int biased = -1;
    for (long long t = 0; t < T; ++t) {
        for (int index = cluster; index < work_tiles; index += clusters) {
            const WorkTile work(index, rank, N);
            const int first_unit = work.unit_tile * UNITS, place = work.n * UNIT_TILES + work.unit_tile;
            const long long first_b = static_cast<long long>(work.row_tile) * SEQUENCES;
            if (place != biased) {
                // All have read what it replaces.
                named_barrier_of<COMPUTING>(COMPUTED);
                for (int i = threadIdx.x; i < G * UNITS; i += COMPUTING) {
                    const int k = i / UNITS, unit = first_unit + i % UNITS;
                    const long long row = static_cast<long long>(FED_B[k]) * N + work.n;
                    bias[i] = FED_B[k] >= 0 && unit < D ? to_float(b[row * D + unit]) : 0.0f;
                }
                named_barrier_of<COMPUTING>(COMPUTED);
                biased = place;
            }
            const int last_row = B - 1 - first_b < SEQUENCES ? B - 1 - first_b : SEQUENCES - 1;
            const int units = D - first_unit < UNITS ? D - first_unit : UNITS;
            const auto exists = [&](int i) {
                const Piece piece(i);
                return piece.sequence <= last_row && piece.unit < units;
            };
            // Where the tile's first unit of the thread's first sequence lies, and how far from there a piece is.
            const long long first_row = first_b + Piece(0).sequence;
            const int place_in_row = work.n * D + first_unit;
            const auto to_piece = [](int i, long long of_row) { return i % 2 * 8 * of_row + Piece(i).unit; };
            const Element* const inputs_of_step =
                Wx + first_row * Wx_b + t * Wx_t + work.n * Wx_n + first_unit;
            float* const of_states = last_states + first_row * width + place_in_row;
            const auto carried = [&](int s, int i) { return of_states + s * B * width + to_piece(i, width); };
            if (t == 0) {
#pragma unroll 1
                for (int i = 0; i < PIECES; ++i) {
                    const Piece piece(i);
                    if (!exists(i)) continue;
                    const float* const from = initial + (first_b + piece.sequence) * initial_b +
                                              work.n * initial_n + (first_unit + piece.unit) * initial_d;
                    for (int s = 0; s < S; ++s) {
                        if (!(READ >> s & 1)) continue;
                        float* const to = carried(s, i);
                        for (int v = 0; v < piece.width; ++v) {
                            const float state = from[s * initial_s + v * initial_d];
                            // It is loaded by assembly, behind which the compiler may move an ordinary store.
                            store_bytes<4>(to + v, &state);
                        }
                    }
                }
            }
            Inputs inputs[2];
            const auto load_inputs = [&](int i) {
                if (!exists(i)) return;
                Inputs& own = inputs[i % 2];
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    if (FED_WX[g] < 0) continue;
                    load(own.gates[g], inputs_of_step + FED_WX[g] * Wx_g + to_piece(i, Wx_b), Piece(i).width);
                }
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    if (READ >> s & 1) load(own.states[s], carried(s, i), Piece(i).width);
                }
            };

            load_inputs(0);
            float sums[COLUMNS / 2];
            multiply(sums, exchange, slot);
            unsigned char* const to_h =
                exchange.stripes_of_h(t + 1, work.n, work.row_tile) + first_unit / SPAN * H_STRIPE;
            const long long row = first_row * T + t;
            Element* const to_states = states + row * width + place_in_row;
            Element* const to_gates = gates + row * G * width + place_in_row;
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                if (i + 1 < PIECES) load_inputs(i + 1);
                if (!exists(i)) continue;
                const Inputs& own = inputs[i % 2];
                const Piece piece(i);
                Elements saved[G], stored[S];
                Floats after[S];
#pragma unroll
                for (int v = 0; v < WIDTH; v += 2) {
                    if (v >= width_of(i / 2)) continue;
                    float preactivations[2][G];
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        float before[S], then[S];
#pragma unroll
                        for (int g = 0; g < G; ++g) {
                            float sum = FED_WX[g] >= 0 ? own.gates[g].of(v + k) : 0.0f;
                            if (FED_B[g] >= 0) sum += bias[g * UNITS + piece.unit + v + k];
                            if (FED_R[g] >= 0) sum += sums[Piece::sum(i, FED_R[g] >= 0 ? FED_R[g] : 0, v + k)];
                            preactivations[k][g] = sum;
                        }
#pragma unroll
                        for (int s = 0; s < S; ++s) before[s] = READ >> s & 1 ? own.states[s].of[v + k] : 0.0f;
                        step(before, preactivations[k], then, clips.forward);
#pragma unroll
                        for (int s = 0; s < S; ++s) after[s].of[v + k] = then[s];
                    }
#pragma unroll
                    for (int g = 0; g < G; ++g) {
                        saved[g].round(v, preactivations[0][g], preactivations[1][g]);
                    }
#pragma unroll
                    for (int s = 0; s < S; ++s) {
                        stored[s].round(v, after[s].of[v], after[s].of[v + 1]);
                    }
                }
                const int stripe = piece.unit / SPAN;
                const int place = piece.sequence * 16 + piece.unit % SPAN * int(sizeof(Element));
                Elements sent = stored[0];
                if constexpr (ROUNDS) {
#pragma unroll
                    for (unsigned& word : sent.words) word = round_to_tf32(word);
                }
                store(to_h + stripe * H_STRIPE + place, sent, piece.width);
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    if ((READ >> s & 1) || t == T - 1) store(carried(s, i), after[s], piece.width);
                    if (s < STORED) store(to_states + s * B * T * width + to_piece(i, T * width), stored[s], piece.width);
                }
#pragma unroll
                for (int g = 0; g < G && SAVE_GATES; ++g) {
                    store(to_gates + g * width + to_piece(i, T * G * width), saved[g], piece.width);
                }
            }
            named_barrier_of<COMPUTING>(COMPUTED);
            exchange.send(work);
        }
    }
    cluster_barrier();
}

}  // namespace streamed
