// The scan over time, forward, for heads and many sequences that a cluster owns; see wide_cluster.cuh for
// who owns what.
//
// What lives where:
//
// - registers of the computing warps: R as far as they hold it, the product's sums, the carried states in
//   float32;
// - shared memory: the rest of R; h of all units; a line for each gate, where Wx comes and from where
//   pre-activations go, and for each other state; the bias;
// - global memory: each element of Wx, states and gates read or written once, by the traffic threads, in
//   16 bytes, to multiples of which rows are aligned.
//
// What orders the steps: products wait for the lines that they multiply. A block's threads meet when all
// sums are there and the step's Wx is: from then on lines are written. They meet again when they are:
// while the next product waits, traffic threads send h, store lines, and ask for Wx in their place. What
// orders the blocks, wide_cluster_exchange.cuh says.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
wide_cluster_forward(const Element* __restrict__ Wx, const Element* __restrict__ R,
                     const Element* __restrict__ b, const float* __restrict__ initial,
                     Element* __restrict__ states, float* __restrict__ last_states,
                     Element* __restrict__ gates, long long Wx_b, long long Wx_t, long long Wx_g,
                     long long Wx_n, long long Wx_d, long long initial_s, long long initial_b,
                     long long initial_n, long long initial_d, long long T, long long B, int N,
                     Clips clips) {
    const int rank = blockIdx.x % TEAM, cluster = blockIdx.x / TEAM;
    // The cluster's head and first sequence, and the block's first unit.
    const int n = cluster % N;
    const long long first = static_cast<long long>(cluster / N) * SEQUENCES;
    const int last = B - 1 - first < SEQUENCES ? B - 1 - first : SEQUENCES - 1;
    const int first_unit = rank * UNITS;
    const int units = D - first_unit < UNITS ? D - first_unit : UNITS;
    const long long width = static_cast<long long>(N) * D;

    Exchange exchange(shared_memory(), rank);
    Element* const lines = reinterpret_cast<Element*>(shared_memory() + EXCHANGE_BYTES);
    float* const bias = reinterpret_cast<float*>(lines + LINES * LINE);

    if (threadIdx.x >= COMPUTING) {
        if (SHIFT_REGISTERS) keep_registers<TRAFFIC_REGISTERS>();
        // Sequences that are not there are read as the last one.
        const auto fetch_inputs = [&](long long t) {
#pragma unroll 1
            for (int i = threadIdx.x - COMPUTING; i < PIECES; i += TRAFFIC) {
                const Piece piece(i);
                if (piece.eight * EIGHT >= units) continue;
                const int sequence = piece.sequence < last ? piece.sequence : last;
                const Element* from = Wx + (first + sequence) * Wx_b + t * Wx_t + n * Wx_n +
                                      first_unit + piece.eight * EIGHT;
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    if (FED_WX[k] < 0) continue;
                    copy_async(lines + k * LINE + piece.place(), from + FED_WX[k] * Wx_g);
                }
            }
            close_copy_group();
            wait_for_copy_groups<0>();
        };
        const auto store_outputs = [&](long long t) {
#pragma unroll 1
            for (int i = threadIdx.x - COMPUTING; i < PIECES; i += TRAFFIC) {
                const Piece piece(i);
                if (piece.eight * EIGHT >= units || piece.sequence > last) continue;
                const auto store = [&](Element* to, const Element* line) {
                    *reinterpret_cast<uint4*>(to) =
                        *reinterpret_cast<const uint4*>(line + piece.place());
                };
                const long long unit = n * D + first_unit + piece.eight * EIGHT;
                const long long row = (first + piece.sequence) * T + t;
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    store(states + (s * B * T + row) * width + unit,
                          s == 0 ? exchange.line(rank) : lines + (G - 1 + s) * LINE);
                }
                if (!SAVE_GATES) continue;
#pragma unroll
                for (int k = 0; k < G; ++k) {
                    store(gates + (row * G + k) * width + unit, lines + k * LINE);
                }
            }
        };
        meet<THREADS>();
        for (long long t = 0; t < T; ++t) {
            exchange.send();
            // The very thread that has stored a piece asks for what replaces it.
            if (t > 0) store_outputs(t - 1);
            fetch_inputs(t);
            meet<THREADS>();
            exchange.give_notice();
            ++exchange.number;
            meet<THREADS>();
        }
        store_outputs(T - 1);
        meet_cluster();
        return;
    }

    if (SHIFT_REGISTERS) take_registers<COMPUTING_REGISTERS>();
    const Matrix matrix(reinterpret_cast<unsigned char*>(bias + G * UNITS), R, n, N, rank);
    for (int i = threadIdx.x; i < G * UNITS; i += COMPUTING) {
        const int k = i / UNITS, unit = i % UNITS;
        const long long row = static_cast<long long>(FED_B[k]) * N + n;
        bias[i] = FED_B[k] >= 0 && unit < units ? to_float(b[row * D + first_unit + unit]) : 0.0f;
    }
    float carried[OWNED][S];
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Owned owned(e);
        const bool exists = owned.unit < units && owned.sequence <= last;
        const float* from = initial + (first + owned.sequence) * initial_b + n * initial_n +
                            (first_unit + owned.unit) * initial_d;
#pragma unroll
        for (int s = 0; s < S; ++s) carried[e][s] = exists ? from[s * initial_s] : 0.0f;
    }
    const auto write_h = [&] {
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            const Owned owned(e);
            // R has zeros for units that are not there, which times infinity would be none.
            const float h = owned.unit < units ? carried[e][0] : 0.0f;
            round_to(exchange.line(rank)[place(owned.unit, owned.sequence)], h);
        }
        show_to_products();
        meet<THREADS>();
    };
    write_h();
    for (long long t = 0; t < T; ++t) {
        float sums[4 * BLOCKS];
        multiply(sums, matrix, exchange);
        exchange.expect_lines(exchange.buffer());
        meet<THREADS>();
        const Recurrent recurrent([&](int block, int i) { return sums[4 * block + i]; });
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            const Owned owned(e);
            Element* const mine = lines + place(owned.unit, owned.sequence);
            float preactivations[G], after[S];
#pragma unroll
            for (int k = 0; k < G; ++k) {
                preactivations[k] = bias[k * UNITS + owned.unit];
                if (FED_WX[k] >= 0) preactivations[k] += to_float(mine[k * LINE]);
                if (FED_R[k] >= 0) {
                    preactivations[k] += recurrent.gates[e][FED_R[k] < 0 ? 0 : FED_R[k]];
                }
                if (SAVE_GATES) round_to(mine[k * LINE], preactivations[k]);
            }
            step(carried[e], preactivations, after, clips.forward);
#pragma unroll
            for (int s = 0; s < S; ++s) {
                carried[e][s] = after[s];
                if (s > 0) round_to(mine[(G - 1 + s) * LINE], after[s]);
            }
        }
        exchange.wait_for_room();
        ++exchange.number;
        write_h();
    }
#pragma unroll
    for (int e = 0; e < OWNED; ++e) {
        const Owned owned(e);
        if (owned.unit >= units || owned.sequence > last) continue;
        float* to = last_states + (first + owned.sequence) * width + n * D + first_unit + owned.unit;
#pragma unroll
        for (int s = 0; s < S; ++s) to[s * B * width] = carried[e][s];
    }
    meet_cluster();
}
