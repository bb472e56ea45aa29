// One step of the recurrence, backward: product, derivative and stores in one launch.
//
// A thread block computes UNITS units of a head for COLUMNS sequences; the rows of its product
// are its units, and the summed dimension has a segment for each gate that R feeds, so R comes
// transposed, [N, D summed over by the step, GR, D]. What lives where:
//
// - global memory: the gates' gradients of the step after, which are `d_gates` itself; the
//   carried gradients in float32, each read and written by the one thread that owns the unit, in
//   `d_carried`, which the last launch leaves as the gradients of the initial states;
// - shared memory: the warps' partial sums of the product;
// - registers: everything else.
//
// Steps are launches in turn, t from T - 1 to 0 and then -1, which only adds what reaches the
// initial h through R. Each lets the next one start at once, which fetches R, the residuals and
// the given gradients and then waits until this one is complete: only then does it read d_gates.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
step_backward(const Call* __restrict__ call, int ahead, int N, int D) {
    start_dependent_launch();
    __shared__ float partial[WARPS][COLUMNS][PITCH];

    const Tile tile(N, D);
    const int B = static_cast<int>(call->B);
    const int n = tile.n, lane = threadIdx.x % 32;
    const long long T = call->T, t = T - 1 - (call->done + ahead);
    const long long width = static_cast<long long>(N) * D;
    Element* d_gates = pointer<Element>(call->d_gates);
    float* d_carried = pointer<float>(call->d_carried);
    const Clips clips = clips_of(call->clips);
    // The last step has none after it, and with CUT none is heard of.
    const bool recurrent = !CUT && t + 1 < T;

    // The lane's first unit and sequence in the product.
    const long long unit = tile.first_unit + lane / 4, sequence = tile.first_sequence + lane / 4;
    Product product;
    product.D = D;
    product.rows.first = pointer<const Element>(call->R) + (n * D + unit) * GR * D;
    product.rows.apart = 8 * GR * D;
    product.rows.count = !recurrent ? 0 : unit + 8 < D ? 2 : unit < D ? 1 : 0;
    product.columns.first = d_gates + (sequence * T + t + 1) * G * width + n * D;
    product.columns.apart = 8 * T * G * width;
    product.columns.count = recurrent ? blocks_within(sequence, B) : 0;
    if (!CUT) product.fetch_left();
    // A launch serves all batches up to a size. Asked when R is on its way, and not before.
    if (tile.first_sequence >= B) return;

    // All that is fetched is asked for before any of it is used.
    Element from_gates[OWNED][G] = {}, from_states[OWNED][S] = {}, given[OWNED][S] = {};
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Unit unit(tile, e, B, D);
        const Element* saved =
            pointer<const Element>(call->gates) + (unit.b * T + t) * G * width + unit.place;
        const Element* states =
            pointer<const Element>(call->states) + (unit.b * T + t - 1) * width + unit.place;
        const Element* d_states = pointer<const Element>(call->d_states) + unit.b * call->d_states_b +
                                  t * call->d_states_t + n * call->d_states_n + unit.d * call->d_states_d;
        const long long states_s = B * T * width, d_states_s = call->d_states_s;
        settle(saved);
        settle(states);
        settle(d_states);
#pragma unroll
        for (int k = 0; k < G; ++k) {
            if (unit.exists && t >= 0) from_gates[e][k] = saved[k * width];
        }
#pragma unroll
        for (int s = 0; s < S; ++s) {
            if (unit.exists && t > 0) from_states[e][s] = states[s * states_s];
            if (unit.exists && t >= 0) given[e][s] = d_states[s * d_states_s];
        }
    }

    // Where the step after is read, found before it is complete: see step_forward.cu.
    const float* from[OWNED];
    long long from_s = B * width;
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Unit unit(tile, e, B, D);
        from[e] = d_carried + unit.b * width + unit.place;
    }
    if (t == T - 1) {
        from_s = call->d_last_s;
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            const Unit unit(tile, e, B, D);
            from[e] = pointer<const float>(call->d_last) + unit.b * call->d_last_b + n * call->d_last_n +
                      unit.d * call->d_last_d;
        }
    }
    settle(product.columns.first);
#pragma unroll
    for (int e = 0; e < OWNED; ++e) settle(from[e]);

    float gates[OWNED][G], before[OWNED][S], gradients[OWNED][S];
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Unit unit(tile, e, B, D);
#pragma unroll
        for (int k = 0; k < G; ++k) gates[e][k] = to_float(from_gates[e][k]);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            before[e][s] = to_float(from_states[e][s]);
            gradients[e][s] = to_float(given[e][s]);
            if (unit.exists && t == 0) {
                const float* initial = pointer<const float>(call->initial);
                before[e][s] = initial[s * call->initial_s + unit.b * call->initial_b +
                                       n * call->initial_n + unit.d * call->initial_d];
            }
        }
    }

    wait_for_launch_before();
    float carried[OWNED][S];
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Unit unit(tile, e, B, D);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            carried[e][s] = unit.exists ? __ldcg(from[e] + s * from_s) : 0.0f;
        }
    }
    if (!CUT) {
        product.run(partial, [=](int segment) {
            long long offset = 0;
#pragma unroll
            for (int s = 0; s < SEGMENTS; ++s) {
                if (s == segment) offset = RECURRENT[s] * width;
            }
            return offset;
        });
    }

#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Unit unit(tile, e, B, D);
        if (unit.exists) {
#pragma unroll
            for (int s = 0; s < S; ++s) gradients[e][s] += carried[e][s];
            if (recurrent) {
                gradients[e][0] += clipped(total(partial, unit.column, unit.row), clips.gradient);
            }
            float d_before[S], d_preactivations[G];
            if (t >= 0) {
                derivative(before[e], gates[e], gradients[e], d_before, d_preactivations, clips.forward);
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    round_to(d_gates[((unit.b * T + t) * G + k) * width + unit.place],
                             d_preactivations[k]);
                }
            }
#pragma unroll
            for (int s = 0; s < S; ++s) {
                d_carried[row_of(s, unit.b, B) * width + unit.place] = t >= 0 ? d_before[s] : gradients[e][s];
            }
        }
    }
}
