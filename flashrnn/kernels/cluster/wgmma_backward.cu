// Backward scan over time, for heads of many sequences that a cluster of CTAs computes by wgmma.
// wgmma_backward_tile.cuh says which CTA and thread has which units and sequences,
// wgmma_backward_exchange.cuh what CTAs send each other, and what orders it.
//
// What lives where:
//
// - registers: R of IN_REGISTERS of the product's steps; the product's sums; in float32, of the thread's
//   elements, the gradients of the states, and of its units the sums of the gates' gradients over time
//   and sequences; the inputs of the next AHEAD elements: the gates' pre-activations, the states before
//   the step that are read, and the gradients given for the first GIVEN states after it;
// - shared memory: the rest of R; the gates' gradients of the CTA's column; the parts of dh;
// - global memory: residuals and gradients, each read or written by the thread that has the element.
//
// In a step, a thread adds up the parts of dh of its elements, computes their gates' gradients and
// stores them. Then all threads of the CTA meet: the tile is sent, and multiplied with those that come
// from the other CTAs. The warp's sums are sent as parts of the dh before. While these are on their way
// the inputs of the next elements are loaded.

#include "cluster/wgmma_backward_product.cuh"
#include "common/gradient_clip.cuh"
#include "common/loads.cuh"

namespace wgmma_backward {

static_assert(!CUT, "without R's part of the gradient there is nothing to multiply");
static_assert(1 <= AHEAD && AHEAD <= ELEMENTS, "the inputs of a step's elements are loaded in turn");
static_assert(EXCHANGE_BYTES + Matrix::BYTES == SHARED_MEMORY,
              "wgmma_backward_plan.py computes another size of shared memory");

// Whether a step's derivative depends on state s before the step.
__device__ constexpr bool is_read(int s) { return READ_STATES >> s & 1; }

// What a step needs of an element.
struct Inputs {
    Loaded gates[G], states[S], given[S];
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
cluster_wgmma_backward(CALL) {
    const int rank = blockIdx.x % GROUP_SIZE, cluster = blockIdx.x / GROUP_SIZE;
    // The cluster's head and first sequence, and the CTA's first unit.
    const int n = cluster % N;
    const long long first = static_cast<long long>(cluster / N) * SEQUENCES;
    const int last = B - 1 - first < SEQUENCES ? B - 1 - first : SEQUENCES - 1;
    const int first_unit = rank * UNITS;
    const long long width = static_cast<long long>(N) * D;

    Exchange exchange(shared_memory(), rank);
    const Matrix matrix(shared_memory() + EXCHANGE_BYTES,
                        [&](int step) { return fragment(R, n, N, exchange, step); });

    // Of how many n-tiles the thread's sequences exist; 0 where its units do not exist. And the units, or
    // in place of those the head's last one.
    const int own_sequence = ThreadElement(0).sequence;
    const int own_tiles = own_sequence <= last ? (last - own_sequence) / 8 + 1 : 0;
    int existing[ELEMENTS_A_TILE], units[ELEMENTS_A_TILE];
#pragma unroll
    for (int e = 0; e < ELEMENTS_A_TILE; ++e) {
        const int unit = first_unit + ThreadElement(e).unit;
        existing[e] = unit < D ? own_tiles : 0;
        units[e] = unit < D ? unit : D - 1;
    }
    const auto exists = [&](int e) { return ThreadElement(e).n_tile < existing[e % ELEMENTS_A_TILE]; };

    // Rows, of G * width or of width elements, are numbered in 32 bits: more of them fit no GPU. This is
    // the first one of the thread's sequence of the first n-tile.
    const int first_row = (first + (own_tiles ? own_sequence : last)) * T;
    // The gradients given for the n-tile that is loaded next: they go from n-tile to n-tile, then to the
    // step before.
    const Element* from_given = d_states + first_row / T * d_states_b + (T - 1) * d_states_t +
                                n * d_states_n + units[0] * d_states_d;
    // Loads the inputs of element e at step t; elements and steps follow one another. In place of
    // n-tiles that do not exist, others are loaded again.
    const auto load = [&](Inputs& inputs, int e, int t) {
        const int n_tile = ThreadElement(e).n_tile, unit = units[e % ELEMENTS_A_TILE];
        const int row = first_row + (n_tile < own_tiles ? 8 * n_tile : 0) * int(T) + t;
        const Element* const from_gates = gates + (row * (G * width) + n * D + unit);
        const Element* const from_states = states + ((row - (t > 0)) * width + n * D + unit);
        const Element* const from = from_given + (unit - units[0]) * d_states_d;
#pragma unroll
        for (int k = 0; k < G; ++k) inputs.gates[k].load(from_gates + k * width);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            if (is_read(s)) inputs.states[s].load(from_states + s * B * T * width);
            if (s < GIVEN) inputs.given[s].load(from + s * d_states_s);
        }
        if ((e + 1) % ELEMENTS_A_TILE) return;
        if (e + 1 == ELEMENTS) {
            from_given -= (own_tiles ? own_tiles - 1 : 0) * 8 * d_states_b + d_states_t;
        } else if (n_tile + 1 < own_tiles) {
            from_given += 8 * d_states_b;
        }
    };
    const auto initial_state = [&](int s, int e) {
        // Else the compiler computes such addresses before the first step, and keeps them in registers.
        unsigned unit = first_unit + ThreadElement(e).unit, sequence = ThreadElement(e).sequence;
        materialize(unit);
        materialize(sequence);
        return initial[s * initial_s + (first + sequence) * initial_b + n * initial_n + unit * initial_d];
    };
    // Prefetches the CTA's rows of the inputs of step t into the L2 cache: their first line, and their
    // last.
    const auto prefetch = [&](long long t) {
        if (t < 0) return;
        constexpr int KINDS = G + S + GIVEN;
        const int last_unit = first_unit + UNITS < D ? first_unit + UNITS - 1 : D - 1;
#pragma unroll 1
        for (int i = threadIdx.x; i < SEQUENCES * KINDS; i += THREADS) {
            const int kind = i % KINDS;
            if (i / KINDS > last || first_unit >= D) continue;
            if (kind >= G && kind < G + S && !is_read(kind - G)) continue;
            const long long row = (first + i / KINDS) * T + t;
            const Element* from = gates + (row * G + kind) * width + n * D;
            long long stride = 1;
            if (kind >= G + S) {
                from = d_states + (kind - G - S) * d_states_s + (first + i / KINDS) * d_states_b +
                       t * d_states_t + n * d_states_n;
                stride = d_states_d;
            } else if (kind >= G) {
                from = states + ((kind - G) * B * T + row - (t > 0)) * width + n * D;
            }
            prefetch_l2(from + first_unit * stride);
            prefetch_l2(from + last_unit * stride);
        }
    };

    float d_carried[ELEMENTS][S], d_bias_sums[ELEMENTS_A_TILE][G] = {};
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const float* const from = d_last + (first + ThreadElement(e).sequence) * d_last_b +
                                  n * d_last_n + units[e % ELEMENTS_A_TILE] * d_last_d;
#pragma unroll
        for (int s = 0; s < S; ++s) {
            d_carried[e][s] = GIVEN_LAST && exists(e) ? from[s * d_last_s] : 0.0f;
        }
    }
    Inputs inputs[AHEAD];
#pragma unroll
    for (int e = 0; e < AHEAD; ++e) load(inputs[e], e, T - 1);

    for (int t = T - 1; t >= 0; --t) {
        if (exchange.number > 0) {
            exchange.wait_for_parts();
            exchange.wait_until_tiles_are_consumed();
        }
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            Inputs& own = inputs[e % AHEAD];
            float preactivations[G], before[S], d_after[S], d_preactivations[G];
#pragma unroll
            for (int k = 0; k < G; ++k) preactivations[k] = own.gates[k].value();
#pragma unroll
            for (int s = 0; s < S; ++s) {
                before[s] = is_read(s) ? own.states[s].value() : 0.0f;
                if (is_read(s) && t == 0 && exists(e)) before[s] = initial_state(s, e);
                d_after[s] = d_carried[e][s];
                if (s < GIVEN) d_after[s] += own.given[s].value();
            }
            d_after[0] += clipped(exchange.sum_parts(e), clips.gradient);
            if (e + AHEAD < ELEMENTS) load(own, e + AHEAD, t);
            derivative(before, preactivations, d_after, d_carried[e], d_preactivations, clips.forward);

            float recurrent[GR];
#pragma unroll
            for (int k = 0; k < GR; ++k) {
                recurrent[k] = exists(e) ? contained(d_preactivations[RECURRENT[k]], Element{}) : 0.0f;
            }
            exchange.put_gradients(recurrent, e);
            if (!exists(e)) continue;
            const int row = first_row + 8 * ThreadElement(e).n_tile * int(T) + t;
            Element* const to = d_gates + (row * (G * width) + n * D + units[e % ELEMENTS_A_TILE]);
#pragma unroll
            for (int k = 0; k < G; ++k) {
                round_to(to[k * width], d_preactivations[k]);
                d_bias_sums[e % ELEMENTS_A_TILE][k] += d_preactivations[k];
            }
        }
        fence_proxy_async();
        named_barrier<THREADS>();
        exchange.send_tile();
        exchange.signal_parts_added();
        float sums[4 * N_TILES];
        multiply(sums, matrix, exchange);
        exchange.signal_tiles_consumed();
        exchange.wait_until_parts_are_added();
        exchange.send_parts(sums);
        ++exchange.number;
        if (t == 0) break;
#pragma unroll
        for (int e = 0; e < AHEAD; ++e) load(inputs[e], e, t - 1);
        prefetch(t - 1 - PREFETCHED);
    }
    exchange.wait_for_parts();
    exchange.wait_until_tiles_are_consumed();
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        if (!exists(e)) continue;
        d_carried[e][0] += clipped(exchange.sum_parts(e), clips.gradient);
        const long long sequence = first + ThreadElement(e).sequence;
        const int column = n * D + units[e % ELEMENTS_A_TILE];
#pragma unroll
        for (int s = 0; s < S; ++s) d_initial[(s * B + sequence) * width + column] = d_carried[e][s];
        // The sums are over all n-tiles: the first one's sequences get them.
        float* const to = d_bias + sequence * G * width + column;
#pragma unroll
        for (int k = 0; k < G; ++k) {
            to[k * width] = ThreadElement(e).n_tile ? 0.0f : d_bias_sums[e % ELEMENTS_A_TILE][k];
        }
    }
}

}  // namespace wgmma_backward
