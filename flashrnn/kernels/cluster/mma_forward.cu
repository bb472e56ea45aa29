// Forward scan over time, for heads that a cluster of CTAs computes by mma. mma_tile.cuh says which CTA
// and warp has which units, mma_exchange.cuh how CTAs exchange h.
//
// What lives where:
//
// - registers of the computing warps: the first fragments of R (common/r_matrix.cuh), the bias, the
//   states in float32;
// - shared memory: h of all units, two buffers; the fragments of R that registers have no place for; a
//   ring of the inputs of STAGES steps; new states of two steps, and pre-activations of two where they
//   are saved; with options of sequences, a table of the cluster's;
// - global memory: each element of Wx, states and gates is read or written once, by the producer
//   threads, in 16 bytes. (The host has copied what is not aligned to 16 bytes.)
//
// What orders the steps: a computing warp waits for h of all units, from all warps of all CTAs; no other
// barrier stands between one h and the next. At the end of a step, after h has been sent, all threads of
// the CTA meet at a barrier: by then the computing warps have read the step's inputs and written its
// results, and common/forward_producer.cuh says what the producer threads have done.
//
// All CTAs of a cluster take as many steps as its longest sequence has, since each waits for h of all.
// A sequence that has ended keeps its states, and its h is sent on. After a reset the h of the start is
// sent, while the h before it is stored: which steps are cut from the next is known with their inputs.

#include "cluster/mma_tile.cuh"
#include "cluster/mma_exchange.cuh"
#include "common/copier.cuh"
#include "common/forward_producer.cuh"

namespace cluster_mma {

constexpr int INPUTS = line_pitch(GW), STATES = line_pitch(S), GATES = line_pitch(G);

// What common/copier.cuh and common/forward_producer.cuh ask for.
struct ForwardLayout {
    static constexpr int LINES = SEQUENCES;
    static constexpr int UNITS = ::UNITS;
    static constexpr bool EXACT = D % ::UNITS == 0;
    static constexpr int ROW_PITCH = ::UNITS;
    static constexpr int PIECE_BYTES = 16;
    static constexpr int FIRST_PRODUCER = 32 * COMPUTING;
    static constexpr int PRODUCERS = ::PRODUCERS;
    static constexpr bool SEQUENCED = ::SEQUENCED;
    // The states that are stored are the first so many.
    static constexpr bool STORES = STORED > 0;
    static constexpr int CTA_THREADS = THREADS;
    static constexpr int RING_STAGES = STAGES;
    static constexpr int INPUT_PITCH = INPUTS, STATE_PITCH = STATES, GATE_PITCH = GATES;
};

// Shared memory, in bytes, in this order.
constexpr int MATRIX_BYTES = WARPS * IN_SHARED * 32 * sizeof(Fragment);
constexpr int RING_BYTES = STAGES * SEQUENCES * INPUTS * sizeof(Element);
constexpr int RESULT_BYTES = 2 * SEQUENCES * (STATES + GATES) * sizeof(Element);
constexpr int TABLE_BYTES = SEQUENCED ? SEQUENCES * int(sizeof(Sequence)) : 0;
constexpr int TABLE = EXCHANGE_BYTES + MATRIX_BYTES + RING_BYTES + RESULT_BYTES;
static_assert(TABLE + TABLE_BYTES == SHARED_MEMORY,
              "mma_plan.py computes another size of shared memory");
static_assert(IN_REGISTERS + IN_SHARED == STEPS, "mma_plan.py counts other fragments of R");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
cluster_mma_forward(CALL) {
    const int rank = blockIdx.x % GROUP_SIZE, cluster = blockIdx.x / GROUP_SIZE;
    Exchange exchange(shared_memory(), rank);
    Matrix matrix(shared_memory() + EXCHANGE_BYTES, nullptr);
    Element* ring = reinterpret_cast<Element*>(shared_memory() + EXCHANGE_BYTES + MATRIX_BYTES);
    Element* new_states = ring + STAGES * SEQUENCES * INPUTS;
    Element* saved = new_states + 2 * SEQUENCES * STATES;

    // The cluster's head and first sequence, and the CTA's first unit.
    const int n = cluster % N;
    const long long first = static_cast<long long>(cluster / N) * SEQUENCES;
    const int last = B - 1 - first < SEQUENCES ? B - 1 - first : SEQUENCES - 1;
    const int first_unit = rank * UNITS, units = D - first_unit < UNITS ? D - first_unit : UNITS;
    const long long width = static_cast<long long>(N) * D;

    Sequence* table = reinterpret_cast<Sequence*>(shared_memory() + TABLE);
    long long steps = T;
    if (SEQUENCED) {
        steps = fill_table<SEQUENCES, THREADS>(table, first, last, T, sequence_order, sequence_rows,
                                               sequence_lengths, runs_backwards, n);
    }

    if (threadIdx.x >= 32 * COMPUTING) {
        if constexpr (SEQUENCED) {
            const long long unit = n * D + first_unit, all_rows = PACKED ? T : B * T;
            TiledCopy<ForwardLayout, GW, const Element> input(
                {Wx + n * Wx_n + first_unit * Wx_d, Wx_b, Wx_g}, Wx_t, INPUTS, last, table, 0, 1,
                units);
            TiledCopy<ForwardLayout, STORED ? STORED : 1, Element> output(
                {states + unit, T * width, all_rows * width}, width, STATES, last, table, 0, 1, units);
            TiledCopy<ForwardLayout, G, Element> output_gates(
                {gates + unit, T * G * width, width}, G * width, GATES, last, table, 0, 1, units);
            const FlagCopy<ForwardLayout> flags(table, reset_flags);
            const auto fetch_next_flags = [&](int step, Element* lines) {
                if (RESETS) flags.fetch(step + 1, lines, INPUTS);
            };
            run_forward_producer(input, output, output_gates, ring, new_states, saved, steps,
                                 fetch_next_flags);
            if (RAGGED && !PACKED && STORED) output.clear_rest(T);
            return;
        }
        const long long row = first * T * width + n * D + first_unit;
        const long long row_of_gates = first * T * G * width + n * D + first_unit;
        const Element* from_Wx = Wx + first * Wx_b + n * Wx_n + first_unit * Wx_d;
        TiledCopy<ForwardLayout, GW, const Element> input(
            {from_Wx, Wx_b, Wx_g}, Wx_t, INPUTS, last, units);
        TiledCopy<ForwardLayout, STORED ? STORED : 1, Element> output(
            {states + row, T * width, B * T * width}, width, STATES, last, units);
        TiledCopy<ForwardLayout, G, Element> output_gates(
            {gates + row_of_gates, T * G * width, width}, G * width, GATES, last, units);
        run_forward_producer(input, output, output_gates, ring, new_states, saved, T,
                             [](long long, Element*) {});
        return;
    }

    const LaneRows rows(R, n, N, rank);
    matrix.load([&](int step) { return fragment(step, rows); });
    // Which of the batch a line's sequence is.
    const auto index_of = [&](int line) { return SEQUENCED ? table[line].index : first + line; };
    const ResetStates starts = {
        STARTS ? reset_states + n * reset_states_n + first_unit * reset_states_d : nullptr,
        reset_states_s, reset_states_b, reset_states_t, reset_states_d};
    float bias[ELEMENTS][G], carried[ELEMENTS][S];
    bool exists[ELEMENTS];
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(e);
        const long long d = first_unit + element.unit, sequence = index_of(element.sequence);
        exists[e] = element.unit < units && element.sequence <= last;
        const float* from = initial + sequence * initial_b + n * initial_n + d * initial_d;
#pragma unroll
        for (int s = 0; s < S; ++s) carried[e][s] = exists[e] ? from[s * initial_s] : 0.0f;
        if (RESETS && exists[e]) {
            const Sequence& own = table[element.sequence];
            if (own.may_be_cut(0) && reset_flags[own.flag(0)]) {
#pragma unroll
                for (int s = 0; s < S; ++s) carried[e][s] = starts.value(s, own, 0, element.unit);
            }
        }
#pragma unroll
        for (int k = 0; k < G; ++k) {
            const long long row = static_cast<long long>(FED_B[k]) * N + n;
            bias[e][k] = FED_B[k] >= 0 && element.unit < units ? to_float(b[row * D + d]) : 0.0f;
        }
    }
    // Whether the next step of an element starts anew, and from what.
    bool is_cut[ELEMENTS] = {};
    float start[ELEMENTS][S];
    const auto send_h = [&] {
        float h[ELEMENTS];
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            h[e] = RESETS && is_cut[e] ? start[e][0] : carried[e][0];
            // For units beyond D, R has zeros: 0 times an infinite h would be NaN.
            h[e] = exists[e] ? h[e] : 0.0f;
        }
        exchange.send(h);
    };
    // Nobody waits for it where no sequence has a step.
    if (!SEQUENCED || steps > 0) send_h();
    named_barrier<THREADS>();

    int slot = 0;
    for (long long t = 0; t < steps; ++t) {
        float preactivations[ELEMENTS][G];
        const Element* inputs = ring + slot * SEQUENCES * INPUTS;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            const ThreadElement element(e);
            const Element* input = inputs + element.sequence * INPUTS + element.unit;
#pragma unroll
            for (int k = 0; k < G; ++k) {
                preactivations[e][k] = bias[e][k];
                if (FED_WX[k] >= 0) preactivations[e][k] += to_float(input[FED_WX[k] * UNITS]);
                // Read before the wait, not where it is used.
                materialize(preactivations[e][k]);
            }
            if (RESETS) {
                is_cut[e] = exists[e] && *flags_of(const_cast<Element*>(inputs), element.sequence, INPUTS);
                if (!is_cut[e]) continue;
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    start[e][s] = starts.value(s, table[element.sequence], t + 1, element.unit);
                }
            }
        }
        exchange.wait();
        const RecurrentSums<N_TILES> recurrent = multiply(matrix, exchange);
        exchange.advance();
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
#pragma unroll
            for (int k = 0; k < G; ++k) {
                if (FED_R[k] >= 0) {
                    preactivations[e][k] += recurrent.gates[e][FED_R[k] < 0 ? 0 : FED_R[k]];
                }
            }
            float after[S];
            step(carried[e], preactivations[e], after, clips.forward);
            // Past its end a sequence keeps its last states.
            if (RAGGED && !table[ThreadElement(e).sequence].has(t)) continue;
#pragma unroll
            for (int s = 0; s < S; ++s) carried[e][s] = after[s];
        }
        if (t + 1 < steps) send_h();
        // What follows is done while h is on its way.
        const int first_row = t % 2 * SEQUENCES;
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            const ThreadElement element(e);
            Element* to = new_states + (first_row + element.sequence) * STATES + element.unit;
#pragma unroll
            for (int s = 0; s < S; ++s) round_to(to[s * UNITS], carried[e][s]);
            if (SAVE_GATES) {
                Element* to_gates = saved + (first_row + element.sequence) * GATES + element.unit;
#pragma unroll
                for (int k = 0; k < G; ++k) round_to(to_gates[k * UNITS], preactivations[e][k]);
            }
            if (RESETS && is_cut[e]) {
#pragma unroll
                for (int s = 0; s < S; ++s) carried[e][s] = start[e][s];
            }
        }
        named_barrier<THREADS>();
    }
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const ThreadElement element(e);
        if (!exists[e]) continue;
        float* to = last_states + index_of(element.sequence) * width + n * D + first_unit + element.unit;
#pragma unroll
        for (int s = 0; s < S; ++s) to[s * B * width] = carried[e][s];
    }
}

}  // namespace cluster_mma
