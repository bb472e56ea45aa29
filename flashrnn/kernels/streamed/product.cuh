// The product of a tile, by the computing warps: chunk by chunk, each warpgroup for its 64 sequences.
//
// The products of a chunk run while the warp waits for the next one. When the next one's have been started it waits
// for those before, and says that their slot is free.

#include "streamed/exchange.cuh"

namespace streamed {

template <int STEPS>
__device__ inline void multiply_chunk(float (&sums)[COLUMNS / 2], const Exchange& exchange, int slot,
                                      bool add) {
    const int warpgroup = threadIdx.x / 128;
    unsigned of_h = shared_address(exchange.h_slot(slot)) + warpgroup * 64 * 16;
    unsigned of_R = shared_address(exchange.R_slot(slot));
    // The same for all lanes, as the compiler must know.
    const unsigned long long left = operand(__shfl_sync(~0u, of_h, 0), H_STRIPE, 128);
    const unsigned long long right = operand(__shfl_sync(~0u, of_R, 0), R_STRIPE, 128);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        wgmma(sums, left + step * 2 * H_STRIPE / 16, right + step * 2 * R_STRIPE / 16, add || step > 0,
              Operand{});
    }
    wgmma_commit();
}

// The tile's sums over all units of h.
__device__ inline void multiply(float (&sums)[COLUMNS / 2], const Exchange& exchange, Slot& slot) {
    int before = 0;
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS - 1; ++chunk) {
        exchange.wait_for_chunk(slot);
        multiply_chunk<CHUNK_STRIPES / 2>(sums, exchange, slot.number, chunk > 0);
        wgmma_wait<1>();
        if (chunk > 0) exchange.signal_multiplied(before);
        before = slot.number;
        slot.advance();
    }
    exchange.wait_for_chunk(slot);
    multiply_chunk<LAST_STRIPES / 2>(sums, exchange, slot.number, CHUNKS > 1);
    wgmma_wait<0>();
    materialize_all(sums);
    if (CHUNKS > 1) exchange.signal_multiplied(before);
    exchange.signal_multiplied(slot.number);
    slot.advance();
}

}  // namespace streamed
