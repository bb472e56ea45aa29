// The forward scan of heads that one CTA owns; see tile.cuh for what each thread owns.
//
// What lives where:
//
// - registers of the computing warps: R (product.cuh, split_product.cuh), the bias, the carried states in
//   float32;
// - shared memory: the fragments of R that registers do not hold; a ring of the next STAGES steps'
//   inputs; two buffers, of even and odd steps, of new states, whose h is the next product's operand;
//   two buffers of pre-activations, where they are saved;
// - global memory: producer threads read or write each element of Wx, states and gates once, in 16 bytes
//   where addresses allow it, else in 8 or 4 (common/row_pieces.cuh); computing warps read R, b and the
//   initial states and write the last ones.
//
// One barrier of the CTA ends each step. Before it the computing warps have read the inputs of step t
// and written its states; the next product reads their h after it. The diagram in
// common/forward_producer.cuh shows what the producer threads do meanwhile.

#include "single_cta/tile.cuh"
#include "single_cta/split_product.cuh"
#include "common/row_copier.cuh"
#include "common/forward_producer.cuh"

namespace single_cta {

// Behind a reset, h as the next step reads it has a row of its own behind the new states: what is stored
// is the h before the reset.
constexpr int H_ROW = RESETS ? S : 0;
constexpr int INPUT_PITCH = pitch(GW), STATE_PITCH = pitch(S + RESETS), GATE_PITCH = pitch(G);

// What common/forward_producer.cuh asks for.
struct ForwardLayout : CopyLayout {
    static constexpr int CTA_THREADS = THREADS;
    static constexpr int RING_STAGES = STAGES;
    static constexpr int INPUT_PITCH = single_cta::INPUT_PITCH;
    static constexpr int STATE_PITCH = single_cta::STATE_PITCH;
    static constexpr int GATE_PITCH = single_cta::GATE_PITCH;
    // The states that are stored are the first so many.
    static constexpr bool STORES = STORED > 0;
};

// Elements of the ring, of one buffer of states and of one of pre-activations.
constexpr int RING = STAGES * SEQUENCES * INPUT_PITCH;
constexpr int STATES = SEQUENCES * STATE_PITCH;
constexpr int GATES = SEQUENCES * GATE_PITCH;

// A plan for a problem that needs a gradient has room for pre-activations even if they are not saved.
constexpr int LAYOUT_BYTES = FRAGMENT_BYTES +
                             (RING + 2 * STATES + (SAVE_GATES ? 2 * GATES : 0)) * int(sizeof(Element)) +
                             TABLE_BYTES;
static_assert(SAVE_GATES ? LAYOUT_BYTES == SHARED_MEMORY : LAYOUT_BYTES <= SHARED_MEMORY,
              "plan.py computes the same layout");

// Where a buffer of states says which step last wrote an h that split_product() cannot split, in the
// padding of its first line. -1 stands for the initial states, which count as such.
__device__ inline int* marked_step(Element* states) {
    return reinterpret_cast<int*>(states + STATE_PITCH - VECTOR);
}

// What an element's states go back to before a step.
__device__ inline float start(int s, int e, int step, const ThreadElements& elements,
                              const Sequence* table, const ResetStates& starts) {
    const int unit = elements.unit(e);
    return STARTS && unit < D ? starts.value(s, table[elements.sequence(e)], step, unit) : 0.0f;
}

// All steps of the scan, of a computing warp. RECOMPUTE: elements whose pre-activations are NaN are
// computed once more with scalar products. Otherwise R is split where it SPLITS.
template <bool RECOMPUTE>
__device__ inline void run_steps(float (&carried)[S][ELEMENTS], const float (&bias)[G][ELEMENTS],
                                 const SplitMatrix& matrix, const ThreadElements& elements,
                                 const Element* ring, Element* new_states, Element* saved,
                                 const Element* R, int n, int N, long long T, const Clips& clips,
                                 const Sequence* table, const ResetStates& starts) {
    // The pre-activations of element e that R feeds, with scalar products of R and `h`, the lines of
    // states.
    const auto recompute = [&](float (&gates)[G], int e, const Element* inputs, const Element* h) {
        const int unit = elements.unit(e), sequence = elements.sequence(e);
#pragma unroll
        for (int s = 0; s < GR; ++s) {
            const int k = RECURRENT[s];
            const Element* input = inputs + sequence * INPUT_PITCH + FED_WX[k] * BLOCK_D + unit;
            gates[k] = (FED_WX[k] >= 0 ? to_float(*input) : 0.0f) + bias[k][e] +
                       scalar_product<true>(R, n, N, s, unit, h + sequence * STATE_PITCH);
        }
    };
    int lengths[ELEMENTS];
    if constexpr (RAGGED) {
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) lengths[e] = table[elements.sequence(e)].length;
    }
    const unsigned line = matrix_line(new_states, STATE_PITCH, elements);
    constexpr unsigned BUFFER_BYTES = STATES * sizeof(Element);
    // The row of h before the step: that of its own at step 0, and where a sequence of the CTA is cut.
    int h_row = H_ROW;
    const auto run = [&](int begin, long long end, bool some_ended) {
        for (int t = begin, slot = begin % STAGES; t < end; ++t) {
            float sums[GR][4], preactivations[G][ELEMENTS];
            const unsigned h_before =
                line + (t + 1) % 2 * BUFFER_BYTES + h_row * BLOCK_D * int(sizeof(Element));
            bool in_layers = false;
            if constexpr (SPLITS && !RECOMPUTE) {
                in_layers = *marked_step(new_states + (t + 1) % 2 * STATES) == t - 1;
                split_product(sums, matrix, h_before);
            } else {
                recurrent_product(sums, matrix, h_before);
            }
            // This does not depend on the product, so it runs while the tensor core is busy.
            const Element* inputs = ring + slot * SEQUENCES * INPUT_PITCH;
            slot = slot + 1 == STAGES ? 0 : slot + 1;
#pragma unroll
            for (int k = 0; k < G; ++k) {
                float input[ELEMENTS] = {};
                if (FED_WX[k] >= 0) {
                    load_elements(input, inputs + FED_WX[k] * BLOCK_D, INPUT_PITCH, elements);
                }
#pragma unroll
                for (int e = 0; e < ELEMENTS; ++e) preactivations[k][e] = input[e] + bias[k][e];
            }
            if constexpr (SPLITS && !RECOMPUTE) {
                if (__any_sync(~0u, in_layers)) {
                    multiply_in_layers(sums, matrix, h_before);
                }
            }
            // Whether the next step of a sequence starts anew. All of the CTA's are asked, so that its
            // warps agree on the row of h. Few steps are cut.
            const auto is_cut = [&](int sequence) {
                return *flags_of(const_cast<Element*>(inputs), sequence, INPUT_PITCH) != 0;
            };
            const bool some_are_cut = RESETS && __any_sync(~0u, is_cut(threadIdx.x % SEQUENCES));
#pragma unroll
            for (int s = 0; s < GR; ++s) {
#pragma unroll
                for (int e = 0; e < ELEMENTS; ++e) {
                    preactivations[RECURRENT[s]][e] += elements.sum(sums[s], e);
                }
            }
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) {
                float gates[G], before[S], after[S];
#pragma unroll
                for (int k = 0; k < G; ++k) gates[k] = preactivations[k][e];
#pragma unroll
                for (int s = 0; s < S; ++s) before[s] = carried[s][e];
                step(before, gates, after, clips.forward);
                if constexpr (RECOMPUTE) {
                    // The sum is NaN if any of them is. The test runs beside the step, which is rarely
                    // repeated.
                    float all = 0.0f;
#pragma unroll
                    for (int s = 0; s < GR; ++s) all += gates[RECURRENT[s]];
                    if (all != all) {
                        recompute(gates, e, inputs,
                                  new_states + (t + 1) % 2 * STATES + h_row * BLOCK_D);
#pragma unroll
                        for (int k = 0; k < G; ++k) preactivations[k][e] = gates[k];
                        step(before, gates, after, clips.forward);
                    }
                }
                // Past its end a sequence keeps its last states.
                if (RAGGED && some_ended && t >= lengths[e]) continue;
#pragma unroll
                for (int s = 0; s < S; ++s) carried[s][e] = after[s];
            }
            Element* to = new_states + t % 2 * STATES;
#pragma unroll
            for (int s = 0; s < S; ++s) {
                store_elements(to + s * BLOCK_D, STATE_PITCH, carried[s], elements);
            }
            if (SAVE_GATES) {
                Element* gates_to = saved + t % 2 * GATES;
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    store_elements(gates_to + k * BLOCK_D, GATE_PITCH, preactivations[k], elements);
                }
            }
            h_row = 0;
            if (some_are_cut) {
                h_row = H_ROW;
#pragma unroll
                for (int i = 0; i < S * ELEMENTS; ++i) {
                    const int s = i / ELEMENTS, e = i % ELEMENTS;
                    if (!is_cut(elements.sequence(e))) continue;
                    carried[s][e] = start(s, e, t + 1, elements, table, starts);
                }
                store_elements(to + H_ROW * BLOCK_D, STATE_PITCH, carried[0], elements);
            }
            if constexpr (SPLITS) {
                bool is_marked = false;
#pragma unroll
                for (int e = 0; e < ELEMENTS; ++e) {
                    is_marked |= is_out_of_range(carried[0][e]) & (D == BLOCK_D || elements.unit(e) < D);
                }
                if (is_marked) *marked_step(to) = t;
            }
            named_barrier<THREADS>();
        }
    };
    // Up to the end of the shortest sequence, the last line's, a step is as long as one of a plain call.
    // Not in float32 (see backward.cu), nor with resets, where a second loop's registers are spilled.
    constexpr bool TWO_COPIES = RAGGED && !RESETS && sizeof(Element) == 2;
    const int shortest = TWO_COPIES ? table[SEQUENCES - 1].length : 0;
    if (TWO_COPIES) run(0, shortest, false);
    run(shortest, T, RAGGED);
}

extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE)
single_cta_forward(CALL) {
    Fragment* in_shared = reinterpret_cast<Fragment*>(shared_memory());
    Element* ring = reinterpret_cast<Element*>(shared_memory() + FRAGMENT_BYTES);
    Element* new_states = ring + RING;
    Element* saved = new_states + 2 * STATES;

    const int n = blockIdx.x % N;
    const long long first = static_cast<long long>(blockIdx.x / N) * SEQUENCES;
    const int last = B - 1 - first < SEQUENCES ? B - 1 - first : SEQUENCES - 1;
    const long long width = static_cast<long long>(N) * D;

    Sequence* table = reinterpret_cast<Sequence*>(shared_memory() + LAYOUT_BYTES - TABLE_BYTES);
    long long steps = T;
    if (SEQUENCED) {
        steps = fill_table<SEQUENCES, THREADS>(table, first, last, T, sequence_order, sequence_rows,
                                               sequence_lengths, runs_backwards, n);
    }
    const long long all_rows = PACKED ? T : B * T;

    // Threads of units beyond D run the cell too: on zeros, which nothing overwrites. So do those of
    // lines that copies leave as they are.
    if (D != BLOCK_D || (LEAVES_LINES && last < SEQUENCES - 1)) {
        for (int i = threadIdx.x; i < RING; i += THREADS) round_to(ring[i], 0.0f);
        __syncthreads();
    }

    if (threadIdx.x >= 32 * COMPUTING) {
        if (SHIFT_REGISTERS) setmaxnreg_dec<PRODUCER_REGISTERS>();
        if constexpr (SEQUENCED) {
            TiledCopy<ForwardLayout, GW, const Element> input({Wx + n * Wx_n, Wx_b, Wx_g}, Wx_t,
                                                              INPUT_PITCH, last, table, 0, 1);
            TiledCopy<ForwardLayout, STORED ? STORED : 1, Element> output(
                {states + n * D, T * width, all_rows * width}, width, STATE_PITCH, last, table, 0, 1);
            TiledCopy<ForwardLayout, G, Element> output_gates({gates + n * D, T * G * width, width},
                                                              G * width, GATE_PITCH, last, table, 0, 1);
            // With the inputs of a step it is known whether the next one starts anew.
            const FlagCopy<ForwardLayout> flags(table, reset_flags);
            const auto fetch_next_flags = [&](int step, Element* lines) {
                if (RESETS) flags.fetch(step + 1, lines, INPUT_PITCH);
            };
            run_forward_producer(input, output, output_gates, ring, new_states, saved, steps,
                                 fetch_next_flags);
            if (RAGGED && !PACKED && STORED) output.clear_rest(T);
        } else {
            const long long head = first * T * width + n * D;
            const long long head_gates = first * T * G * width + n * D;
            TiledCopy<ForwardLayout, GW, const Element, REGULAR> input(
                {Wx + first * Wx_b + n * Wx_n, Wx_b, Wx_g}, Wx_t, INPUT_PITCH, last);
            TiledCopy<ForwardLayout, STORED ? STORED : 1, Element, REGULAR> output(
                {states + head, T * width, B * T * width}, width, STATE_PITCH, last);
            TiledCopy<ForwardLayout, G, Element, REGULAR> output_gates(
                {gates + head_gates, T * G * width, width}, G * width, GATE_PITCH, last);
            run_forward_producer(input, output, output_gates, ring, new_states, saved, T,
                                 [](long long, Element*) {});
        }
        return;
    }

    if (SHIFT_REGISTERS) setmaxnreg_inc<COMPUTING_REGISTERS>();
    const ThreadElements elements;
    SplitMatrix matrix;
    matrix.load<true>(R, n, N, elements, in_shared);
    // Which of the batch a line's sequence is.
    const auto index_of = [&](int line) { return SEQUENCED ? table[line].index : first + line; };
    const ResetStates starts = {STARTS ? reset_states + n * reset_states_n : nullptr,
                                reset_states_s, reset_states_b, reset_states_t, reset_states_d};
    float carried[S][ELEMENTS];
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const bool exists = elements.unit(e) < D && elements.sequence(e) <= last;
        const float* from = initial + index_of(elements.sequence(e)) * initial_b + n * initial_n +
                            elements.unit(e) * initial_d;
#pragma unroll
        for (int s = 0; s < S; ++s) carried[s][e] = exists ? from[s * initial_s] : 0.0f;
        if constexpr (RESETS) {
            const Sequence& own = table[elements.sequence(e)];
            const bool is_cut = own.may_be_cut(0) && reset_flags[own.flag(0)];
#pragma unroll
            for (int s = 0; s < (is_cut ? S : 0); ++s) {
                carried[s][e] = start(s, e, 0, elements, table, starts);
            }
        }
    }
    float bias[G][ELEMENTS];
#pragma unroll
    for (int k = 0; k < G; ++k) {
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            const bool fed = FED_B[k] >= 0 && elements.unit(e) < D;
            const long long row = static_cast<long long>(FED_B[k]) * N + n;
            bias[k][e] = fed ? to_float(b[row * D + elements.unit(e)]) : 0.0f;
        }
    }
    // Step 0 reads h from the buffer of odd steps.
    Element* const h = new_states + STATES + H_ROW * BLOCK_D;
    store_elements(h, STATE_PITCH, carried[0], elements);
    if (SPLITS && threadIdx.x < 2) *marked_step(new_states + threadIdx.x * STATES) = -1;
    const bool needs_care = product_needs_care(matrix);
    named_barrier<THREADS>();

    if (needs_care) {
        run_steps<true>(carried, bias, matrix, elements, ring, new_states, saved, R, n, N, steps, clips,
                        table, starts);
    } else {
        run_steps<false>(carried, bias, matrix, elements, ring, new_states, saved, R, n, N, steps, clips,
                         table, starts);
    }
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        if (elements.unit(e) >= D || elements.sequence(e) > last) continue;
        float* to = last_states + index_of(elements.sequence(e)) * width + n * D + elements.unit(e);
#pragma unroll
        for (int s = 0; s < S; ++s) to[s * B * width] = carried[s][e];
    }
}

}  // namespace single_cta
