// One step of the recurrence, forward: product, cell and stores in one launch.
//
// A thread block computes UNITS units of a head for COLUMNS sequences, all gates of each: the
// rows of its product are 8 units' gates, gate by gate. What lives where:
//
// - global memory: h of the step before, which is `states` itself; the carried states in float32,
//   each read and written by the one thread that owns the unit, in `carried`, which the last step
//   leaves as the last states;
// - shared memory: the warps' partial sums of the product;
// - registers: everything else.
//
// Steps are launches in turn. Each lets the next one start at once, which fetches its R, Wx and
// b and then waits until this one is complete: only then does it read states.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
step_forward(const Call* __restrict__ call, int ahead, int N, int D) {
    start_dependent_launch();
    __shared__ float partial[WARPS][COLUMNS][PITCH];

    const Tile tile(N, D);
    const int B = static_cast<int>(call->B);
    const int n = tile.n, lane = threadIdx.x % 32;
    const long long T = call->T, t = call->done + ahead;
    const long long width = static_cast<long long>(N) * D;
    Element* states = pointer<Element>(call->states);
    float* carried = pointer<float>(call->carried);

    // The lane's unit and first sequence in the product.
    const long long unit = tile.first_unit + lane / 4, sequence = tile.first_sequence + lane / 4;
    Product product;
    product.D = D;
    product.rows.first = pointer<const Element>(call->R) + (n * D + unit) * D;
    product.rows.apart = width * D;
    product.rows.count = unit < D ? GR : 0;
    // Fetched at every step: see `from`.
    const Element* h_initial = pointer<const Element>(call->h_initial);
    settle(h_initial);
    const Element* h = t == 0 ? h_initial : states + (t - 1) * width;
    const long long h_apart = t == 0 ? width : T * width;
    product.columns.first = h + sequence * h_apart + n * D;
    product.columns.apart = 8 * h_apart;
    product.columns.count = blocks_within(sequence, B);
    product.fetch_left();
    // A launch serves all batches up to a size. Asked when R is on its way, and not before.
    if (tile.first_sequence >= B) return;

    // All that is fetched is asked for before any of it is used.
    Element from_Wx[OWNED][G] = {}, from_b[OWNED][G] = {};
    const long long Wx_g = call->Wx_g;
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Unit unit(tile, e, B, D);
        const Element* Wx = pointer<const Element>(call->Wx) + unit.b * call->Wx_b + t * call->Wx_t +
                            n * call->Wx_n + unit.d * call->Wx_d;
        const Element* bias = pointer<const Element>(call->b) + unit.place;
        settle(Wx);
        settle(bias);
#pragma unroll
        for (int k = 0; k < G; ++k) {
            if (unit.exists && FED_WX[k] >= 0) from_Wx[e][k] = Wx[FED_WX[k] * Wx_g];
            if (unit.exists && FED_B[k] >= 0) from_b[e][k] = bias[FED_B[k] * width];
        }
    }

    // Where the step before is read, found before it is complete: afterwards there is but one wait for
    // memory. An address that is still on its way then would be waited for together with whatever
    // is asked for meanwhile.
    const float* from[OWNED];
    long long from_s = B * width;
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Unit unit(tile, e, B, D);
        from[e] = carried + unit.b * width + unit.place;
    }
    if (t == 0) {
        from_s = call->initial_s;
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            const Unit unit(tile, e, B, D);
            from[e] = pointer<const float>(call->initial) + unit.b * call->initial_b +
                      n * call->initial_n + unit.d * call->initial_d;
        }
    }
    settle(product.columns.first);
#pragma unroll
    for (int e = 0; e < OWNED; ++e) settle(from[e]);

    float gates[OWNED][G], before[OWNED][S];
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
#pragma unroll
        for (int k = 0; k < G; ++k) {
            gates[e][k] = to_float(from_Wx[e][k]);
            if (FED_B[k] >= 0) gates[e][k] += to_float(from_b[e][k]);
        }
    }

    wait_for_launch_before();
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Unit unit(tile, e, B, D);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            before[e][s] = unit.exists ? __ldcg(from[e] + s * from_s) : 0.0f;
        }
    }
    product.run(partial, [](int) { return 0; });

#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Unit unit(tile, e, B, D);
        if (unit.exists) {
#pragma unroll
            for (int k = 0; k < G; ++k) {
                if (FED_R[k] >= 0) {
                    gates[e][k] += total(partial, unit.column, FED_R[k] * UNITS + unit.row);
                }
            }
            float after[S];
            step(before[e], gates[e], after, clips_of(call->clips).forward);
#pragma unroll
            for (int s = 0; s < S; ++s) {
                carried[row_of(s, unit.b, B) * width + unit.place] = after[s];
                round_to(states[(row_of(s, unit.b, B) * T + t) * width + unit.place], after[s]);
            }
            if (SAVE_GATES) {
                Element* saved = pointer<Element>(call->gates);
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    round_to(saved[((unit.b * T + t) * G + k) * width + unit.place], gates[e][k]);
                }
            }
        }
    }
}
