// What the producer threads of a forward scan do, step after step.
//
// Lines of shared memory (copier.cuh) hold a ring of STAGES steps' inputs and two buffers, of even and
// odd steps, of new states and, where they are saved, of pre-activations. All threads of the CTA meet
// at a barrier before step 0 and at the end of each step:
//
//                        producer threads                          computing threads
//     before step 0      fetch inputs of steps 0 .. STAGES - 2;    load R, the bias and the initial
//                        wait for those of step 0 (and             states
//                        settle them, row_copier.cuh)
//     ---- barrier ----
//     step t             fetch inputs of step t + STAGES - 1       read inputs of step t from slot
//                        into the slot read in step t - 1;         t % STAGES; write states and
//                        store states and pre-activations of       pre-activations of step t into
//                        step t - 1; wait for inputs of t + 1      the buffers t % 2
//     ---- barrier ----
//     after the last     store what step T - 1 wrote
//
// In addition to what copier.cuh asks for, `Layout` has these constants:
//
//     int CTA_THREADS                           threads of the CTA
//     int RING_STAGES                           slots of the ring
//     int INPUT_PITCH, STATE_PITCH, GATE_PITCH  elements from a line to the next, of each kind
//     bool STORES                               whether states of every step are stored
//
// `fetch_flags(step, lines)` fetches what else belongs to a step's lines of inputs.
//
// SAVE_GATES is a constant of every forward scan (problem.cuh).

#include "common/copier.cuh"

template <typename Layout, int STORED, bool REGULAR, typename FetchFlags>
__device__ inline void run_forward_producer(TiledCopy<Layout, GW, const Element, REGULAR>& input,
                                            TiledCopy<Layout, STORED, Element, REGULAR>& output,
                                            TiledCopy<Layout, G, Element, REGULAR>& output_gates,
                                            Element* ring, const Element* states, const Element* gates,
                                            long long T, const FetchFlags& fetch_flags) {
    constexpr int STAGES = Layout::RING_STAGES;
    long long fetched = 0;
    int slot = 0;
    const auto fetch_next = [&]() {
        if (fetched++ < T) {
            Element* lines = ring + slot * Layout::LINES * Layout::INPUT_PITCH;
            input.fetch(lines);
            fetch_flags(fetched - 1, lines);
        }
        cp_async_commit();
        input.advance();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    };
    // Waits for the inputs of the step whose slot is read next.
    const auto wait_for_next = [&]() {
        cp_async_wait<STAGES - 2>();
        if constexpr (Layout::PIECE_BYTES < 4) {
            const int next = slot + 1 == STAGES ? 0 : slot + 1;
            input.settle(ring + next * Layout::LINES * Layout::INPUT_PITCH, STAGES - 1);
        }
    };
    const auto store_next = [&](long long t) {
        const int first_line = t % 2 * Layout::LINES;
        if constexpr (Layout::STORES) {
            output.store(states + first_line * Layout::STATE_PITCH);
            output.advance();
        }
        if (SAVE_GATES) {
            output_gates.store(gates + first_line * Layout::GATE_PITCH);
            output_gates.advance();
        }
    };
    for (int t = 0; t < STAGES - 1; ++t) fetch_next();
    wait_for_next();
    named_barrier<Layout::CTA_THREADS>();
    for (long long t = 0; t < T; ++t) {
        fetch_next();
        if (t > 0) store_next(t - 1);
        wait_for_next();
        named_barrier<Layout::CTA_THREADS>();
    }
    if (!Layout::SEQUENCED || T > 0) store_next(T - 1);
}
