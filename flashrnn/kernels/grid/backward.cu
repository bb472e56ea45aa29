// The scan over time, backward, of heads that a group of CTAs owns (tile.cuh), by mma.
//
// What lives where:
//
// - registers: fragments of R transposed, as many as fit (product.cuh); in float32, the carried
//   gradients of the thread's elements of the current batch tile, and the sums of their gates'
//   gradients over time and batch tiles; the next inputs, which are loaded while the group exchanges
//   gradients: gates' pre-activations, states before the step and gradients given for the first GIVEN
//   states after it;
// - shared memory: more fragments of R; the sums of the warps, of two products; with interleaved batch
//   tiles, the carried gradients of all of them; with options of sequences, where their rows lie;
// - global memory: the remaining fragments of R; packets; residuals and gradients, which each thread
//   loads or stores for its own elements.
//
// What orders the steps is as in forward.cu: the group exchanges the gradients of the gates that R
// feeds, and the product is what step t + 1 adds to the gradient of h after step t. So step t begins
// with the product, and a last iteration, t = -1, is the product alone: it completes the gradient of
// the initial h.
//
// Batch tiles may have different numbers of steps; those that have fewer come in later, and
// sequences.cuh says why the exchange stays right. A sequence past its end sends zeros, and keeps the
// gradients of its last states until its own last step. A step that starts anew gives its gradients to
// what it started with, and the step before it gets none.

#include "grid/product.cuh"
#include "common/loads.cuh"
#include "common/gradient_clip.cuh"

namespace grid {

extern "C" __global__ void __launch_bounds__(THREADS, 1)
grid_backward(CALL) {
    const int rank = blockIdx.x % GROUP_SIZE, group = blockIdx.x / GROUP_SIZE;
    const Exchange exchange(static_cast<Packet*>(packets), group);
    Partial* partial = reinterpret_cast<Partial*>(shared_memory());
    Carried d_carried(reinterpret_cast<float*>(partial + 2));
    WorkSequences sequences = {reinterpret_cast<Sequence*>(shared_memory() + SEQUENCES_OFFSET), T};
    Matrix matrix(shared_memory() + MATRIX_OFFSET, static_cast<Fragment*>(R_in_memory));
    ReceivedPackets received;

    const long long width = static_cast<long long>(N) * D;
    // The rows of all sequences are those of so many lines.
    const long long lines = PACKED ? 1 : B;
    const long long work_tiles = N * WorkTile::count_of_head(B);
    unsigned flag = 0, products = 0;
    int loaded_head = -1;

    for (long long index = group; index < work_tiles; index += groups) {
        const WorkTile work(index, B);
        if (!CUT && work.n != loaded_head) load_matrix(matrix, R, work.n, N, rank);
        loaded_head = work.n;
        sequences.begin(work, B, sequence_order, sequence_rows, sequence_lengths, runs_backwards);
        const ResetStates starts = {STARTS ? reset_states + work.n * reset_states_n : nullptr,
                                    reset_states_s, reset_states_b, reset_states_t, reset_states_d};

        float d_bias_sums[ELEMENTS][G] = {};
        Loaded input_gates[ELEMENTS][G] = {}, input_states[ELEMENTS][S] = {}, given[ELEMENTS][S] = {};
        const auto fetch_inputs = [&](int tile, long long t) {
            const long long steps_earlier = t > PREFETCHED ? PREFETCHED : 0;
            const long long before = t > 0 ? t - 1 : 0;
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) {
                const ThreadElement element(e, rank, work, tile, B);
                const Sequence own = sequences.of(element, tile);
                if (RAGGED && !own.has(t)) continue;
                const long long earlier = SEQUENCED ? own.advance(steps_earlier) : steps_earlier;
                const long long place = work.n * D + element.d;
                const Element* from_gates =
                    gates + (SEQUENCED ? own.row(t) : element.sequence * T + t) * G * width + place;
                const Element* from_states =
                    states + (SEQUENCED ? own.row(before) : element.sequence * T + before) * width + place;
                const long long of_given = SEQUENCED ? own.offset(t, d_states_b, d_states_t)
                                                     : element.sequence * d_states_b + t * d_states_t;
                const Element* from_given = d_states + of_given + work.n * d_states_n +
                                            element.d * d_states_d;
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    input_gates[e][k].load(from_gates + k * width);
                    prefetch_l2(from_gates + (k - earlier * G) * width);
                }
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    input_states[e][s].load(from_states + s * lines * T * width);
                    prefetch_l2(from_states + (s * lines * T - earlier) * width);
                    if (s >= GIVEN) continue;
                    given[e][s].load(from_given + s * d_states_s);
                    prefetch_l2(from_given + s * d_states_s - earlier * d_states_t);
                }
            }
        };
        // Whether each element starts anew at a step, and at the one computed before. They are asked for
        // beside the inputs, while the group exchanges gradients, so that no step begins with a look at
        // where its sequences lie.
        unsigned is_cut[ELEMENTS], was_cut[ELEMENTS];
        const auto fetch_flags = [&](int tile, long long t) {
#pragma unroll
            for (int e = 0; e < (RESETS ? ELEMENTS : 0); ++e) {
                const ThreadElement element(e, rank, work, tile, B);
                const Sequence own = sequences.of(element, tile);
                is_cut[e] = own.is_cut(t, reset_flags);
                was_cut[e] = own.is_cut(t + 1, reset_flags);
            }
        };
        for (int tile = 0; tile < work.tiles; ++tile) {
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) {
                const ThreadElement element(e, rank, work, tile, B);
                const Sequence own = sequences.of(element, tile);
                const long long batch_index = SEQUENCED ? own.index : element.sequence;
                const float* from =
                    d_last + batch_index * d_last_b + work.n * d_last_n + element.d * d_last_d;
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    d_carried.now[e][s] = GIVEN_LAST && element.exists ? from[s * d_last_s] : 0.0f;
                }
            }
            d_carried.store(tile);
        }
        const long long steps = RAGGED ? sequences.steps(0) : T;
        fetch_inputs(0, steps - 1);
        fetch_flags(0, steps - 1);

        // t = -1 has a product and no cell step. It is part of the loop, as a second copy of the product
        // would be as long again as the loop. It sends no packets, so the loop ends before `flag` counts
        // another exchange.
        int tiles = RAGGED ? 0 : work.tiles;
        // So many steps have all tiles.
        const int common_steps = RAGGED ? sequences.steps(work.tiles - 1) : 0;
        for (long long t = steps - 1;; --t, ++flag) {
            if constexpr (RAGGED) {
                while (tiles < work.tiles && sequences.steps(tiles) > t) ++tiles;
            }
            for (int tile = 0; tile < tiles; ++tile) {
                const bool last = tile + 1 == tiles;
                const int next = last ? 0 : tile + 1;
                // Whether the group has computed a step of the tile.
                const bool has_begun =
                    RAGGED ? t + 1 < common_steps || t + 1 < sequences.steps(tile) : t + 1 < T;
                if (!CUT && has_begun) {
                    if (INTERLEAVED == 1) received.begin(exchange, tile, flag);
                    multiply<Operand>(partial[++products % 2], matrix, received, R, work.n, N, rank);
                }
                // The next batch tile's packets have been sent while the group computed other tiles.
                // They arrive while the warp computes its elements of this one.
                if (!CUT && INTERLEAVED > 1) received.begin(exchange, next, flag + last);
                if (!CUT && has_begun) named_barrier<THREADS>();
                if (!ThreadElement::warp_has_any()) {
                    if (!CUT && t >= 0) exchange.wait_until_sent();
                    continue;
                }

                d_carried.load(tile);
                if (!CUT && has_begun) {
#pragma unroll
                    for (int e = 0; e < ELEMENTS; ++e) {
                        const ThreadElement element(e, rank, work, tile, B);
                        if (!element.exists) continue;
                        const float d_h = unit_sums(partial[products % 2], element).values[0];
                        const float sum = d_carried.now[e][0] + clipped(d_h, clips.gradient);
                        // Nothing comes back to a sequence's last step.
                        const bool comes_back = !RAGGED || sequences.of(element, tile).has(t + 1);
                        d_carried.now[e][0] = comes_back ? sum : d_carried.now[e][0];
                    }
                }
                if constexpr (RESETS) {
#pragma unroll
                    for (int e = 0; e < ELEMENTS; ++e) {
                        if (!was_cut[e]) continue;
                        // The gradients are those of what the states were reset to, and of nothing
                        // before it.
                        const ThreadElement element(e, rank, work, tile, B);
                        const long long of_start = sequences.of(element, tile).offset_of_start(
                            t + 1, d_reset_states_b, d_reset_states_t);
                        float* to = d_reset_states + of_start + work.n * D + element.d;
#pragma unroll
                        for (int s = 0; s < S; ++s) {
                            // Only this thread adds to it.
                            if (STARTS && d_reset_states && element.exists) {
                                to[s * d_reset_states_s] += d_carried.now[e][s];
                            }
                            d_carried.now[e][s] = 0.0f;
                        }
                    }
                }
                if (t < 0) {
                    d_carried.store(tile);
                    if (INTERLEAVED > 1) fetch_flags(next, t);
                    continue;
                }
                float d_preactivations[ELEMENTS][G];
#pragma unroll
                for (int e = 0; e < ELEMENTS; ++e) {
                    const ThreadElement element(e, rank, work, tile, B);
                    const Sequence own = sequences.of(element, tile);
                    const long long batch_index = SEQUENCED ? own.index : element.sequence;
                    float preactivations[G], before[S], d_after[S], d_before[S];
#pragma unroll
                    for (int k = 0; k < G; ++k) preactivations[k] = input_gates[e][k].value();
#pragma unroll
                    for (int s = 0; s < S; ++s) {
                        before[s] = input_states[e][s].value();
                        if (t == 0 && element.exists) {
                            before[s] = initial[s * initial_s + batch_index * initial_b +
                                                work.n * initial_n + element.d * initial_d];
                        }
                        if (RESETS && is_cut[e]) before[s] = starts.value(s, own, t, element.d);
                        const float carried = d_carried.now[e][s];
                        d_after[s] = s < GIVEN ? carried + given[e][s].value() : carried;
                    }
                    derivative(before, preactivations, d_after, d_before, d_preactivations[e],
                               clips.forward);
                    if constexpr (RAGGED) {
                        // The gradients of the last states wait for the sequence's last step.
                        if (!own.has(t)) {
#pragma unroll
                            for (int s = 0; s < S; ++s) d_before[s] = d_carried.now[e][s];
#pragma unroll
                            for (int k = 0; k < G; ++k) d_preactivations[e][k] = 0.0f;
                        }
                    }
#pragma unroll
                    for (int k = 0; k < G; ++k) {
                        if (element.exists) d_bias_sums[e][k] += d_preactivations[e][k];
                    }
#pragma unroll
                    for (int s = 0; s < S; ++s) d_carried.now[e][s] = d_before[s];
                }
                if (!CUT) {
#pragma unroll
                    for (int e = 0; e < ELEMENTS; ++e) {
                        const ThreadElement element(e, rank, work, tile, B);
#pragma unroll
                        for (int s = 0; s < SENT; ++s) {
                            const float d_gate = d_preactivations[e][RECURRENT[s]];
                            unsigned words[PACKET_WORDS];
                            make_packet(words, element.exists ? contained(d_gate, Element{}) : 0.0f);
                            const int packet = rank * PACKETS + s * UNIT_PACKETS + element.packet;
                            exchange.send(words, packet, element, tile, flag + 1);
                        }
                    }
                    exchange.signal_sent();
                }
                // What follows overlaps with the exchange.
                d_carried.store(tile);
                fetch_inputs(next, last && t > 0 ? t - 1 : t);
                fetch_flags(next, last ? t - 1 : t);
#pragma unroll
                for (int e = 0; e < ELEMENTS; ++e) {
                    const ThreadElement element(e, rank, work, tile, B);
                    const Sequence own = sequences.of(element, tile);
                    if (!element.exists || (RAGGED && !own.has(t))) continue;
                    const long long place = work.n * D + element.d;
                    Element* to =
                        d_gates + (SEQUENCED ? own.row(t) : element.sequence * T + t) * G * width + place;
#pragma unroll
                    for (int k = 0; k < G; ++k) round_to(to[k * width], d_preactivations[e][k]);
                }
            }
            if (t < 0) break;
        }
        for (int tile = 0; tile < work.tiles; ++tile) {
            d_carried.load(tile);
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) {
                const ThreadElement element(e, rank, work, tile, B);
                if (!element.exists) continue;
                const Sequence own = sequences.of(element, tile);
                const long long batch_index = SEQUENCED ? own.index : element.sequence;
                const long long place = work.n * D + element.d;
                float* to = d_initial + batch_index * width + place;
#pragma unroll
                for (int s = 0; s < S; ++s) to[s * B * width] = d_carried.now[e][s];
                // The sums are over all batch tiles: the first tile's sequences get them.
                float* to_bias = d_bias + batch_index * G * width + place;
#pragma unroll
                for (int k = 0; k < G; ++k) to_bias[k * width] = tile ? 0.0f : d_bias_sums[e][k];
                if constexpr (RAGGED && !PACKED) {
                    // Rows past the end.
                    for (long long t = own.length; t < T; ++t) {
                        Element* to = d_gates + (own.first_row + t) * G * width + place;
#pragma unroll
                        for (int k = 0; k < G; ++k) round_to(to[k * width], 0.0f);
                    }
                }
            }
        }
    }
}

}  // namespace grid
