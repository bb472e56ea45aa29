// The scan over time, forward, for heads that take a team of thread blocks; see team.cuh for who
// owns what.
//
// What lives where:
//
// - registers: R as far as they hold it (team_product.cuh), the bias, and in float32 the carried
//   states of the lane's own units and of the tile whose turn it is; the next turn's Wx, on its way
//   while the team exchanges h;
// - shared memory: fragments of R that registers do not hold; the warps' sums, of two products in
//   turn; carried states of other turns; in a cluster the parcels, of two exchanges of each tile;
// - global memory: what even shared memory does not hold of R; the parcels, but in a cluster; Wx,
//   states and gates, of which the lane that owns an element reads or writes it.
//
// What orders the steps: a warp waits for the parcels that it multiplies, and so the block for the
// whole team; and one barrier, between the warps' sums and their use. (Where some warps own nothing
// there is another, at which they stand by.) What waits for each other runs at once: the blocks of a
// cluster do, and else the launch is a cooperative one.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
team_forward(const Element* __restrict__ Wx, const Element* __restrict__ R,
             const Element* __restrict__ b, const float* __restrict__ initial,
             Element* __restrict__ states, float* __restrict__ last_states,
             Element* __restrict__ gates, Parcel* parcels, Fragment* streamed, long long Wx_b,
             long long Wx_t, long long Wx_g, long long Wx_n, long long Wx_d, long long initial_s,
             long long initial_b, long long initial_n, long long initial_d, long long T, long long B,
             int N, Clips clips, int teams) {
    const int rank = blockIdx.x % TEAM, team = blockIdx.x / TEAM;
    const Exchange exchange(shared_memory(), parcels, team);
    Partial* partial = reinterpret_cast<Partial*>(shared_memory() + EXCHANGE_BYTES);
    Carried carried(reinterpret_cast<float*>(partial + 2));
    Matrix matrix(shared_memory() + EXCHANGE_BYTES + 2 * sizeof(Partial) + Carried::BYTES, streamed);
    Arrivals arrivals;

    const long long width = static_cast<long long>(N) * D, items = N * Item::count_of_head(B);
    unsigned tag = 1, products = 0;
    int loaded = -1;

    for (long long number = team; number < items; number += teams) {
        const Item item(number, B);
        if (item.n != loaded) load_matrix(matrix, R, item.n, N, rank);
        loaded = item.n;

        float bias[OWNED][G];
        Loaded input[OWNED][GW];
        const auto fetch_input = [&](int turn, long long t) {
            const long long later = t + PREFETCHED < T ? PREFETCHED * Wx_t : 0;
#pragma unroll
            for (int e = 0; e < OWNED; ++e) {
                const Owned owned(e, rank, item, turn, B);
                const Element* from =
                    Wx + owned.sequence * Wx_b + t * Wx_t + item.n * Wx_n + owned.d * Wx_d;
#pragma unroll
                for (int k = 0; k < GW; ++k) {
                    input[e][k].load(from + k * Wx_g);
                    prefetch(from + k * Wx_g + later);
                }
            }
        };
        const auto send_h = [&](int turn, unsigned tag) {
#pragma unroll
            for (int e = 0; e < OWNED; ++e) {
                const Owned owned(e, rank, item, turn, B);
                unsigned words[PARCEL_WORDS];
                make_parcel(words, owned.exists ? carried.now[e][0] : 0.0f);
                exchange.send(words, rank * PARCELS + owned.parcel, owned, turn, tag);
            }
        };
#pragma unroll
        for (int e = 0; e < OWNED; ++e) {
            const Owned owned(e, rank, item, 0, B);
#pragma unroll
            for (int k = 0; k < G; ++k) {
                const long long row = static_cast<long long>(FED_B[k]) * N + item.n;
                bias[e][k] = FED_B[k] >= 0 && owned.exists ? to_float(b[row * D + owned.d]) : 0.0f;
            }
        }
        for (int turn = 0; turn < item.turns; ++turn) {
#pragma unroll
            for (int e = 0; e < OWNED; ++e) {
                const Owned owned(e, rank, item, turn, B);
                const float* from =
                    initial + owned.sequence * initial_b + item.n * initial_n + owned.d * initial_d;
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    carried.now[e][s] = owned.exists ? from[s * initial_s] : 0.0f;
                }
            }
            carried.put(turn);
            send_h(turn, tag);
        }
        fetch_input(0, 0);
        if (TURNS > 1) arrivals.look_for(exchange, 0, tag);

        for (long long t = 0; t < T; ++t, ++tag) {
            for (int turn = 0; turn < item.turns; ++turn, ++products) {
                const bool last = turn + 1 == item.turns;
                const int next = last ? 0 : turn + 1;
                if (TURNS == 1) arrivals.look_for(exchange, turn, tag);
                multiply<Operand>(partial[products % 2], matrix, arrivals, R, item.n, N, rank);
                // Sent before other tiles had their turns, it comes while the warp computes its units.
                if (TURNS > 1) arrivals.look_for(exchange, next, tag + last);
                meet<THREADS>();
                if (!Owned::any()) {
                    exchange.stand_by();
                    continue;
                }

                carried.take(turn);
                float preactivations[OWNED][G];
#pragma unroll
                for (int e = 0; e < OWNED; ++e) {
                    const Owned owned(e, rank, item, turn, B);
                    Rows recurrent = {};
                    if (owned.exists) recurrent = total(partial[products % 2], owned);
#pragma unroll
                    for (int k = 0; k < G; ++k) {
                        float sum = bias[e][k];
                        if (FED_WX[k] >= 0) sum += input[e][FED_WX[k] < 0 ? 0 : FED_WX[k]].value();
                        if (FED_R[k] >= 0) sum += recurrent.values[FED_R[k] < 0 ? 0 : FED_R[k]];
                        preactivations[e][k] = sum;
                    }
                    float after[S];
                    step(carried.now[e], preactivations[e], after, clips.forward);
#pragma unroll
                    for (int s = 0; s < S; ++s) carried.now[e][s] = after[s];
                }
                if (t + 1 < T) send_h(turn, tag + 1);
                exchange.sent();
                // All that follows hides behind the exchange.
                carried.put(turn);
                fetch_input(next, last && t + 1 < T ? t + 1 : t);
#pragma unroll
                for (int e = 0; e < OWNED; ++e) {
                    const Owned owned(e, rank, item, turn, B);
                    if (!owned.exists) continue;
                    const long long place = item.n * D + owned.d;
#pragma unroll
                    for (int s = 0; s < S; ++s) {
                        Element* to = states + ((s * B + owned.sequence) * T + t) * width + place;
                        round_to(*to, carried.now[e][s]);
                    }
                    if (SAVE_GATES) {
                        Element* to = gates + (owned.sequence * T + t) * G * width + place;
#pragma unroll
                        for (int k = 0; k < G; ++k) round_to(to[k * width], preactivations[e][k]);
                    }
                }
            }
        }
        for (int turn = 0; turn < item.turns; ++turn) {
            carried.take(turn);
#pragma unroll
            for (int e = 0; e < OWNED; ++e) {
                const Owned owned(e, rank, item, turn, B);
                if (!owned.exists) continue;
                float* to = last_states + owned.sequence * width + item.n * D + owned.d;
#pragma unroll
                for (int s = 0; s < S; ++s) to[s * B * width] = carried.now[e][s];
            }
        }
    }
}
