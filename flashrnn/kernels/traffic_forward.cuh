// What the traffic threads of a forward scan do, step after step.
//
// There are lines of a ring of STAGES steps' inputs, of two steps' new states and, where they are saved,
// of two steps' pre-activations; INPUTS, STATES and GATES are their pitches. Before the barrier at the
// end of step t the traffic threads have stored what step t - 1 gave, have asked for the inputs of step
// t + STAGES - 1, into the slot that was read in step t - 1, and have seen those of step t + 1 arrive.
// A barrier before the first step says that its inputs are there.

constexpr int INPUTS = pitch(GW), STATES = pitch(S), GATES = pitch(G);

__device__ inline void carry(Flow<GW, const Element>& input, Flow<S, Element>& output,
                             Flow<G, Element>& output_gates, Element* ring, const Element* states,
                             const Element* gates, long long T) {
    long long fetched = 0;
    int slot = 0;
    const auto fetch_next = [&]() {
        if (fetched++ < T) input.fetch(ring + slot * SEQUENCES * INPUTS);
        close_copy_group();
        input.advance();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    };
    const auto store_next = [&](long long t) {
        const int turn = t % 2 * SEQUENCES;
        output.store(states + turn * STATES);
        output.advance();
        if (SAVE_GATES) {
            output_gates.store(gates + turn * GATES);
            output_gates.advance();
        }
    };
    for (int t = 0; t < STAGES - 1; ++t) fetch_next();
    wait_for_copy_groups<STAGES - 2>();
    meet<THREADS>();
    for (long long t = 0; t < T; ++t) {
        fetch_next();
        if (t > 0) store_next(t - 1);
        wait_for_copy_groups<STAGES - 2>();
        meet<THREADS>();
    }
    store_next(T - 1);
}
