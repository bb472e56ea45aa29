// The backward scan of heads that one CTA owns; see tile.cuh for what each thread owns.
//
// Names with d_ are gradients of the loss. `done` counts the steps that are computed, from the last one
// on: run_step(done) computes step t = T - 1 - done.
//
// What lives where:
//
// - registers of the computing warps: R transposed (product.cuh), the gradients of the states that go
//   on to the step before, and the sums over time of the gates' gradients, which are the bias's; all in
//   float32;
// - shared memory: the fragments of R that registers do not hold; a ring of the next STAGES steps'
//   inputs, a line of which has the gates' pre-activations, the states before the step from FIRST_READ
//   on, those that the derivative reads, and the gradients given for the first GIVEN states after it;
//   two buffers of gates' gradients, the operand of the next product;
// - global memory: producer threads read or write each element of gates, states, d_states and d_gates
//   once, in 16 bytes where addresses allow it, else in 8 or 4 (common/row_pieces.cuh); computing warps
//   read R and the initial states and the last states' gradients, and write those of the initial states
//   and of the bias, one for each sequence.
//
// One barrier of the CTA ends each step, and one comes before the first:
//
//                        producer threads                        computing threads
//     before the first   fetch inputs of STAGES - 1 steps;       load R and the last states' gradients
//                        wait for those of the first
//     ---- barrier ----
//     a step             fetch inputs STAGES - 1 steps ahead,    product of the other buffer; read the
//                        into the slot read one step ago;        step's inputs; write the gates'
//                        store the other buffer of gates'        gradients into the step's buffer,
//                        gradients; wait for the next inputs     done % 2
//     ---- barrier ----
//     after the last     store its gates' gradients              product of its gates' gradients

#include "single_cta/tile.cuh"
#include "single_cta/transposed_product.cuh"
#include "common/row_copier.cuh"

namespace single_cta {

constexpr int READ = S - FIRST_READ;
constexpr int INPUT_PITCH = pitch(G + READ + GIVEN), GATE_PITCH = pitch(G);

// Elements of the ring, and of one buffer of gates' gradients.
constexpr int RING = STAGES * SEQUENCES * INPUT_PITCH;
constexpr int GATES = SEQUENCES * GATE_PITCH;

constexpr int LINES_BYTES = (RING + 2 * GATES) * sizeof(Element);
constexpr int LARGEST_RING = STAGES * SEQUENCES * pitch(G + 2 * S);
static_assert(FRAGMENT_BYTES + (LARGEST_RING + 2 * GATES) * sizeof(Element) + TABLE_BYTES == SHARED_MEMORY,
              "plan.py computes the same layout, with all states read and gradients given for all");

// Of the rows of a step; T is const if they are read.
template <int COUNT, typename T>
using Copy = TiledCopy<CopyLayout, COUNT, T, REGULAR>;
using StateCopy = Copy<READ ? READ : 1, const Element>;
using GivenCopy = Copy<GIVEN ? GIVEN : 1, const Element>;

// Whether there are two kinds of steps: those that are like a plain call's, and the others, in which a
// sequence of the CTA has no step yet, has its last one, or is cut. Each kind has a copy of the step's
// code. All sequences together decide, so that no warp's threads part. Which kind the next step is, is
// known before the barrier that ends a step.
constexpr bool TWO_KINDS = RESETS || RAGGED;

// In float32 all steps take the second kind's code. There the compiler fuses other products and sums in
// one copy than in the other, and a sequence's bits would depend on where others are cut or end.
constexpr bool TWO_COPIES = TWO_KINDS && sizeof(Element) == 2;

// Whether the step computed first, which has no gradient through R, stands before the loop as a copy of
// its own. Not where R takes so many registers that addresses would be spilled, nor where it is of the
// second kind: there it multiplies what the other buffer happens to hold, and nothing is added. A branch
// around the product would keep the compiler from moving the cell's work up beside it.
constexpr bool FIRST_STEP_APART = WARPS < 8 && !TWO_KINDS;

// The flags of a line: whether the step computed before is cut, its own, and the two computed next.
enum { WAS_CUT, IS_CUT, NEXT_IS_CUT, FLAGS = 4 };

// What the producer threads do, step after step, as the diagram says.
// `fetch_step_flags(step, lines)` fetches what else belongs to a step's lines of inputs.
template <typename FetchFlags>
__device__ inline void run_backward_producer(Copy<G, const Element>& input_gates,
                                             StateCopy& input_states, GivenCopy& input_given,
                                             Copy<G, Element>& output,
                                             Element* ring, const Element* gradients, long long T,
                                             const FetchFlags& fetch_step_flags) {
    long long to_fetch = T;
    int slot = 0;
    const auto fetch_next = [&]() {
        Element* to = ring + slot * SEQUENCES * INPUT_PITCH;
        if (to_fetch > 0) {
            input_gates.fetch(to);
            if (GIVEN) input_given.fetch(to + (G + READ) * BLOCK_D);
            fetch_step_flags(to_fetch - 1, to);
        }
        // Step 0 has the initial states before it, which the computing threads read themselves.
        if (READ && to_fetch > 1) input_states.fetch(to + G * BLOCK_D);
        --to_fetch;
        cp_async_commit();
        input_gates.advance();
        input_states.advance();
        input_given.advance();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    };
    // Waits for the inputs of the step whose slot is read next.
    const auto wait_for_next = [&]() {
        cp_async_wait<STAGES - 2>();
        if constexpr (PIECE_BYTES < 4) {
            const int next = slot + 1 == STAGES ? 0 : slot + 1;
            Element* lines = ring + next * SEQUENCES * INPUT_PITCH;
            input_gates.settle(lines, STAGES - 1);
            if (READ) input_states.settle(lines + G * BLOCK_D, STAGES - 1);
            if (GIVEN) input_given.settle(lines + (G + READ) * BLOCK_D, STAGES - 1);
        }
    };
    const auto store_next = [&](int done) {
        output.store(gradients + done % 2 * GATES);
        output.advance();
    };
    for (int i = 0; i < STAGES - 1; ++i) fetch_next();
    wait_for_next();
    named_barrier<THREADS>();
    for (int done = 0; done < T; ++done) {
        fetch_next();
        if (done > 0) store_next(done - 1);
        wait_for_next();
        named_barrier<THREADS>();
    }
    if (!RAGGED || T > 0) store_next(T - 1);
}

extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE)
single_cta_backward(CALL) {
    Fragment* in_shared = reinterpret_cast<Fragment*>(shared_memory());
    Element* ring = reinterpret_cast<Element*>(shared_memory() + FRAGMENT_BYTES);
    Element* gradients = ring + RING;

    const int n = blockIdx.x % N;
    const long long first = static_cast<long long>(blockIdx.x / N) * SEQUENCES;
    const int last = B - 1 - first < SEQUENCES ? B - 1 - first : SEQUENCES - 1;
    const long long width = static_cast<long long>(N) * D;

    Sequence* table = reinterpret_cast<Sequence*>(shared_memory() + FRAGMENT_BYTES + LINES_BYTES);
    long long steps = T;
    if (SEQUENCED) {
        steps = fill_table<SEQUENCES, THREADS>(table, first, last, T, sequence_order, sequence_rows,
                                               sequence_lengths, runs_backwards, n);
    }
    const long long all_rows = PACKED ? T : B * T;
    const Element* const states_read = states + FIRST_READ * all_rows * width + n * D;

    // Threads of units beyond D run the cell too: on zeros, which nothing overwrites. So do those of
    // lines that copies leave as they are.
    if (D != BLOCK_D || (LEAVES_LINES && last < SEQUENCES - 1)) {
        for (int i = threadIdx.x; i < RING; i += THREADS) round_to(ring[i], 0.0f);
        __syncthreads();
    }
    // Where a buffer says which step last wrote a gradient of a tile that was infinite before it was
    // rounded: in the padding of the tile's first line. -1 stands for none.
    const auto infinite_step = [](Element* lines, int first_sequence) {
        return reinterpret_cast<int*>(lines + (first_sequence + 1) * GATE_PITCH - VECTOR);
    };
    if (CONTAINS<Operand>) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            if (threadIdx.x < 2) *infinite_step(gradients + threadIdx.x * GATES, tile * COLUMNS) = -1;
        }
        __syncthreads();
    }

    if (threadIdx.x >= 32 * COMPUTING) {
        if (SHIFT_REGISTERS) setmaxnreg_dec<PRODUCER_REGISTERS>();
        if constexpr (SEQUENCED) {
            const int begin = steps - 1;
            Copy<G, const Element> input_gates(
                {gates + n * D, T * G * width, width}, G * width, INPUT_PITCH, last, table, begin, -1);
            // The states before a step are those of the step before.
            StateCopy input_states({states_read, T * width, all_rows * width}, width, INPUT_PITCH,
                                   last, table, begin - 1, -1);
            GivenCopy input_given({d_states + n * d_states_n, d_states_b, d_states_s},
                                  d_states_t, INPUT_PITCH, last, table, begin, -1);
            Copy<G, Element> output({d_gates + n * D, T * G * width, width},
                                                     G * width, GATE_PITCH, last, table, begin, -1);
            const FlagCopy<CopyLayout, FLAGS> flags(table, reset_flags, -1);
            const auto fetch_step_flags = [&](int step, Element* lines) {
                if (RESETS) flags.fetch(step + 1, lines, INPUT_PITCH);
            };
            run_backward_producer(input_gates, input_states, input_given, output, ring, gradients, steps,
                                  fetch_step_flags);
            if (RAGGED && !PACKED) output.clear_rest(T);
        } else {
            const long long at_states = (first * T + T - 2) * width;
            const long long at_gates = (first * T + T - 1) * G * width + n * D;
            const long long at_given = first * d_states_b + (T - 1) * d_states_t + n * d_states_n;
            Copy<G, const Element> input_gates(
                {gates + at_gates, T * G * width, width}, -G * width, INPUT_PITCH, last);
            // The states before a step are those of the step before.
            StateCopy input_states({states_read + at_states, T * width, all_rows * width}, -width,
                                   INPUT_PITCH, last);
            GivenCopy input_given({d_states + at_given, d_states_b, d_states_s},
                                  -d_states_t, INPUT_PITCH, last);
            Copy<G, Element> output({d_gates + at_gates, T * G * width, width},
                                                     -G * width, GATE_PITCH, last);
            run_backward_producer(input_gates, input_states, input_given, output, ring, gradients, T,
                                  [](long long, Element*) {});
        }
        return;
    }

    if (SHIFT_REGISTERS) setmaxnreg_inc<COMPUTING_REGISTERS>();
    const ThreadElements elements;
    Matrix matrix;
    if (!CUT) matrix.load<false>(R, n, N, elements, in_shared);
    // Which of the batch a line's sequence is.
    const auto index_of = [&](int line) { return SEQUENCED ? table[line].index : first + line; };
    const ResetStates starts = {STARTS ? reset_states + n * reset_states_n : nullptr,
                                reset_states_s, reset_states_b, reset_states_t, reset_states_d};
    // The initial states wait in registers until step 0 needs them. To load them there takes a branch
    // and their addresses, which costs a step of a small head a fifth of its instructions.
    float initial_states[S][ELEMENTS], d_carried[S][ELEMENTS];
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const bool exists = elements.unit(e) < D && elements.sequence(e) <= last;
        const float* from = initial + index_of(elements.sequence(e)) * initial_b + n * initial_n +
                            elements.unit(e) * initial_d;
#pragma unroll
        for (int s = FIRST_READ; s < S; ++s) {
            initial_states[s][e] = exists ? from[s * initial_s] : 0.0f;
        }
    }
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const bool exists = GIVEN_LAST && elements.unit(e) < D && elements.sequence(e) <= last;
        const float* from = d_last + index_of(elements.sequence(e)) * d_last_b + n * d_last_n +
                            elements.unit(e) * d_last_d;
#pragma unroll
        for (int s = 0; s < S; ++s) d_carried[s][e] = exists ? from[s * d_last_s] : 0.0f;
    }
    named_barrier<THREADS>();

    // How many steps are computed before a sequence's last one.
    int ends[ELEMENTS];
#pragma unroll
    for (int e = 0; e < (RAGGED ? ELEMENTS : 0); ++e) {
        ends[e] = steps - table[elements.sequence(e)].length;
    }
    const int last_end = RAGGED ? steps - table[SEQUENCES - 1].length : 0;
    const unsigned line = matrix_line(gradients, GATE_PITCH, elements);
    constexpr unsigned BUFFER_BYTES = GATES * sizeof(Element);
    // Adds the gradient that reaches h through R from the step computed last. `plain`: to a step like a
    // plain call's.
    const auto add_recurrent_gradient = [&](int done, bool plain) {
        if (CUT) return;
        const int buffer = (done + 1) % 2;
        Element* const read = gradients + buffer * GATES;
        float sums[4];
        // Infinities that are no result of rounding stay infinite.
        const bool contain = CONTAINS<Operand> && *infinite_step(read, elements.first_sequence) != done;
        transposed_product<Operand>(sums, matrix, line + buffer * BUFFER_BYTES, contain);
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            float d_h = elements.sum(sums, e);
            if (NEEDS_CARE<Operand> && d_h != d_h) {
                const Element* line = read + elements.sequence(e) * GATE_PITCH;
                d_h = scalar_product<false>(R, n, N, 0, elements.unit(e), line);
            }
            // Nothing comes back to a sequence's last step.
            if (RAGGED && !plain && done <= ends[e]) continue;
            if (FIRST_STEP_APART || (TWO_KINDS && plain) || done > 0) {
                d_carried[0][e] += clipped(d_h, clips.gradient);
            }
        }
    };
    // From which states the present step starts anew, and the gradients that the step computed last left
    // to its start.
    float anew[S][ELEMENTS] = {}, left[S][ELEMENTS];
    const auto load_starts = [&](const bool (&cut)[ELEMENTS], int step) {
#pragma unroll
        for (int i = FIRST_READ * ELEMENTS; i < S * ELEMENTS; ++i) {
            const int s = i / ELEMENTS, e = i % ELEMENTS, unit = elements.unit(e);
            if (!cut[e] || unit >= D) continue;
            anew[s][e] = starts.value(s, table[elements.sequence(e)], step, unit);
        }
    };
    // `was_cut`: whether the step computed last starts anew.
    const auto leave_cut_steps = [&](const bool (&was_cut)[ELEMENTS]) {
#pragma unroll
        for (int i = 0; i < S * ELEMENTS; ++i) {
            const int s = i / ELEMENTS, e = i % ELEMENTS;
            left[s][e] = d_carried[s][e];
            d_carried[s][e] = was_cut[e] ? 0.0f : d_carried[s][e];
        }
    };
    // `step` is that of was_cut.
    const auto give_to_starts = [&](const bool (&was_cut)[ELEMENTS], int step) {
#pragma unroll
        for (int i = 0; i < S * ELEMENTS; ++i) {
            const int s = i / ELEMENTS, e = i % ELEMENTS, unit = elements.unit(e);
            const int sequence = elements.sequence(e);
            if (!was_cut[e] || unit >= D || sequence > last) continue;
            // Only this thread adds to it.
            d_reset_states[table[sequence].offset_of_start(step, d_reset_states_b, d_reset_states_t) +
                           s * d_reset_states_s + n * D + unit] += left[s][e];
        }
    };
    // Whether a step of each element is cut, asked where no line has its flag.
    const auto ask_flags = [&](bool (&cut)[ELEMENTS], int step) {
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            const Sequence& own = table[elements.sequence(e)];
            cut[e] = own.may_be_cut(step) && reset_flags[own.flag(step)];
        }
    };
    const auto read_flags = [&](bool (&cut)[ELEMENTS], const Element* inputs, int flag) {
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            cut[e] = flags_of(const_cast<Element*>(inputs), elements.sequence(e), INPUT_PITCH)[flag];
        }
    };
    if (STARTS) {
        bool is_cut[ELEMENTS];
        ask_flags(is_cut, steps - 1);
        load_starts(is_cut, steps - 1);
    }
    // Whether the step computed next is like a plain call's.
    const auto next_is_plain = [&](int done, const Element* inputs) {
        if (!RESETS) return done >= last_end;
        // A lane reads one flag. Those of the next step are a place further on; what it starts from is
        // loaded a step ahead.
        constexpr int READ_FLAGS = STARTS ? 3 : 2;
        const int lane = threadIdx.x % 32;
        const Element* of_line = inputs + lane / READ_FLAGS % SEQUENCES * INPUT_PITCH;
        const int* flags = flags_of(const_cast<Element*>(of_line), 0, INPUT_PITCH);
        const bool any = __any_sync(~0u, flags[1 + lane % READ_FLAGS]);
        return !any && (!RAGGED || done >= last_end);
    };
    // Called before the barrier that lets the next product start.
    const auto record_infinity = [&](const float (&of_gates)[G][ELEMENTS], int done) {
        if (!CONTAINS<Operand>) return;
        bool infinite = false;
#pragma unroll
        for (int i = 0; i < GR * ELEMENTS; ++i) {
            const int e = i % ELEMENTS;
            const float d_gate = of_gates[RECURRENT[i / ELEMENTS]][e];
            // Of a line that copies leave as it is, gradients mean nothing.
            const bool exists = elements.unit(e) < D && (!LEAVES_LINES || elements.sequence(e) <= last);
            infinite |= exists && !is_finite(d_gate);
        }
        Element* const read = gradients + (done + 1) % 2 * GATES;
        if (infinite) *infinite_step(read, elements.first_sequence) = done;
    };
    float d_bias_sums[G][ELEMENTS] = {};
    int slot = 0;
    // Returns whether the next step is like a plain call's, as this one is if it is `plain`.
    const auto run_step = [&](int done, bool plain) {
        const Element* inputs = ring + slot * SEQUENCES * INPUT_PITCH;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        const bool plain_follows = TWO_COPIES && next_is_plain(done, inputs);
        bool was_cut[ELEMENTS] = {}, is_cut[ELEMENTS] = {};
        if (RESETS && !plain) {
            read_flags(was_cut, inputs, WAS_CUT);
            read_flags(is_cut, inputs, IS_CUT);
            leave_cut_steps(was_cut);
        }
        // The pre-activations, and then their gradients.
        float preactivations[G][ELEMENTS], before[S][ELEMENTS] = {}, given[S][ELEMENTS];
#pragma unroll
        for (int k = 0; k < G; ++k) {
            load_elements(preactivations[k], inputs + k * BLOCK_D, INPUT_PITCH, elements);
        }
#pragma unroll
        for (int s = 0; s < S; ++s) {
            if (s >= FIRST_READ) {
                const Element* row = inputs + (G + s - FIRST_READ) * BLOCK_D;
                load_elements(before[s], row, INPUT_PITCH, elements);
            }
            if (s >= GIVEN) continue;
            load_elements(given[s], inputs + (G + READ + s) * BLOCK_D, INPUT_PITCH, elements);
        }
#pragma unroll
        for (int i = FIRST_READ * ELEMENTS; i < S * ELEMENTS; ++i) {
            float& state = before[i / ELEMENTS][i % ELEMENTS];
            state = done == steps - 1 ? initial_states[i / ELEMENTS][i % ELEMENTS] : state;
        }
#pragma unroll
        for (int i = FIRST_READ * ELEMENTS; i < (RESETS && !plain ? S * ELEMENTS : 0); ++i) {
            const int s = i / ELEMENTS, e = i % ELEMENTS;
            before[s][e] = is_cut[e] ? anew[s][e] : before[s][e];
        }
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            float gate[G], state[S], d_after[S], d_before[S], d_gate[G];
#pragma unroll
            for (int k = 0; k < G; ++k) gate[k] = preactivations[k][e];
#pragma unroll
            for (int s = 0; s < S; ++s) {
                state[s] = before[s][e];
                d_after[s] = d_carried[s][e];
                if (s < GIVEN) d_after[s] += given[s][e];
            }
            derivative(state, gate, d_after, d_before, d_gate, clips.forward);
            if (RAGGED && !plain && done < ends[e]) {
                // The gradients of the last states wait for the sequence's last step.
#pragma unroll
                for (int s = 0; s < S; ++s) d_before[s] = d_carried[s][e];
#pragma unroll
                for (int k = 0; k < G; ++k) d_gate[k] = 0.0f;
            }
#pragma unroll
            for (int k = 0; k < G; ++k) {
                preactivations[k][e] = d_gate[k];
                d_bias_sums[k][e] += d_gate[k];
            }
#pragma unroll
            for (int s = 0; s < S; ++s) d_carried[s][e] = d_before[s];
        }
        Element* to = gradients + done % 2 * GATES;
#pragma unroll
        for (int k = 0; k < G; ++k) {
            store_elements(to + k * BLOCK_D, GATE_PITCH, preactivations[k], elements);
        }
        record_infinity(preactivations, done + 1);
        if (STARTS && !plain) {
            // What reads and writes memory stands under one branch, which the whole warp takes or not.
            bool next_is_cut[ELEMENTS], any = false;
            read_flags(next_is_cut, inputs, NEXT_IS_CUT);
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) any |= was_cut[e] || next_is_cut[e];
            if (__any_sync(~0u, any)) {
                give_to_starts(was_cut, steps - done);
                load_starts(next_is_cut, steps - 2 - done);
            }
        }
        named_barrier<THREADS>();
        return plain_follows;
    };
    if constexpr (TWO_KINDS) {
        bool is_plain = false;
        for (int done = 0; done < steps;) {
            for (; done < steps && !is_plain; ++done) {
                add_recurrent_gradient(done, false);
                is_plain = run_step(done, false);
            }
            for (; done < steps && is_plain; ++done) {
                add_recurrent_gradient(done, true);
                is_plain = run_step(done, true);
            }
        }
    } else {
        if (FIRST_STEP_APART) run_step(0, true);
        for (int done = FIRST_STEP_APART ? 1 : 0; done < steps; ++done) {
            add_recurrent_gradient(done, true);
            run_step(done, true);
        }
    }
    if (!RAGGED || steps > 0) add_recurrent_gradient(steps, false);
    if constexpr (RESETS) {
        bool was_cut[ELEMENTS];
        ask_flags(was_cut, 0);
        leave_cut_steps(was_cut);
        if (STARTS) give_to_starts(was_cut, 0);
    }
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        if (elements.unit(e) >= D || elements.sequence(e) > last) continue;
        float* to = d_initial + index_of(elements.sequence(e)) * width + n * D + elements.unit(e);
#pragma unroll
        for (int s = 0; s < S; ++s) to[s * B * width] = d_carried[s][e];
        float* to_bias =
            d_bias + index_of(elements.sequence(e)) * G * width + n * D + elements.unit(e);
#pragma unroll
        for (int k = 0; k < G; ++k) to_bias[k * width] = d_bias_sums[k][e];
    }
}

}  // namespace single_cta
