// A CTA's part of R as the left operand of wgmma, and its product.
//
// The product sums in steps of 16. Of IN_REGISTERS of the STEPS R is in the registers of the warps that
// multiply it, of the others in shared memory. Both kinds are interleaved evenly: a wgmma that reads R
// from shared memory takes longer, and others run meanwhile.
//
// IN_REGISTERS, WARPGROUPS and N_TILES are constants of the plan (problem.cuh).

#include "problem.cuh"
#include "common/mma.cuh"
#include "common/wgmma.cuh"

// R in shared memory: for each warpgroup and step 64 rows of 16 elements, in core matrices of 8 by 8.
constexpr int STEP_BYTES = 64 * 16 * sizeof(Element);

// The descriptor of what lies so many bytes further on, within the same 256 KB.
__device__ inline unsigned long long moved(unsigned long long operand, unsigned bytes) {
    return operand >> 32 << 32 | static_cast<unsigned>(operand) + bytes / 16;
}

template <int STEPS>
struct LeftOperand {
    static constexpr int IN_SHARED = STEPS - IN_REGISTERS;
    // Of shared memory.
    static constexpr int BYTES = WARPGROUPS * IN_SHARED * STEP_BYTES;

    Fragment in_registers[IN_REGISTERS];
    unsigned in_shared;

    __device__ static constexpr int in_registers_before(int step) {
        return step * IN_REGISTERS / STEPS;
    }
    __device__ static constexpr bool is_in_registers(int step) {
        return in_registers_before(step + 1) > in_registers_before(step);
    }

    // `fragment(step)` gives the lane's words of its warp's 16 rows.
    template <typename Make>
    __device__ LeftOperand(unsigned char* shared, const Make& fragment) {
        const int warp = threadIdx.x / 32 % 4, i = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
        unsigned char* const warpgroup = shared + threadIdx.x / 128 * IN_SHARED * STEP_BYTES;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const Fragment made = fragment(step);
            if (is_in_registers(step)) {
                in_registers[in_registers_before(step)] = made;
                continue;
            }
            unsigned char* const to = warpgroup + (step - in_registers_before(step)) * STEP_BYTES;
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const int core_matrix = 2 * (2 * warp + w % 2) + w / 2;
                unsigned char* const word = to + core_matrix * 128 + i * 16 + j * 4;
                *reinterpret_cast<unsigned*>(word) = made.words[w];
            }
        }
        in_shared = shared_address(warpgroup);
    }

    // The warpgroup's sums, of all n-tiles or of some. `right(step)` waits for a step's right operand and
    // gives its descriptor.
    template <int COUNT, typename Right>
    __device__ void multiply(float (&sums)[COUNT], const Right& right) const {
        // Else the compiler computes the descriptors of all steps once, and keeps them in registers. It
        // must know that they are the same for a warp: else it moves each of them.
        unsigned first = in_shared;
        materialize(first);
        const unsigned long long left = operand(__shfl_sync(~0u, first, 0), 128, 256);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const unsigned long long right_operand = right(step);
            const bool add = step > 0;
            if (is_in_registers(step)) {
                wgmma(sums, in_registers[in_registers_before(step)].words, right_operand, add,
                      Operand{});
            } else {
                const int before = step - in_registers_before(step);
                wgmma(sums, moved(left, before * STEP_BYTES), right_operand, add, Operand{});
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
        materialize_all(sums);
    }
};
