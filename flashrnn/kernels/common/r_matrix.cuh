// A CTA's part of R, as fragments that belong to its warps.
//
// A fragment is a left operand of mma(): 16 rows of R and the columns that one instruction sums. Of a
// warp's fragments the first IN_REGISTERS lie in registers, the next IN_SHARED in shared memory, the
// last IN_MEMORY in global memory. Each lane stores and reads its own 16 bytes of each.
//
// IN_REGISTERS, IN_SHARED, IN_MEMORY and WARPS are constants of the plan (problem.cuh).

#include "problem.cuh"
#include "common/mma.cuh"

struct Matrix {
    Fragment in_registers[IN_REGISTERS];
    Fragment *in_shared, *in_memory;

    __device__ Matrix(void* shared, Fragment* global)
        : in_shared(static_cast<Fragment*>(shared) + threadIdx.x / 32 * IN_SHARED * 32 +
                    threadIdx.x % 32),
          in_memory(global + (static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32) *
                                 IN_MEMORY * 32 +
                    threadIdx.x % 32) {}

    // Fills it with fragments 0, 1, ... of the warp; make(f) returns the lane's part of fragment f.
    template <typename Make>
    __device__ void load(const Make& make) {
#pragma unroll
        for (int f = 0; f < IN_REGISTERS; ++f) in_registers[f] = make(f);
        for (int f = 0; f < IN_SHARED; ++f) in_shared[f * 32] = make(IN_REGISTERS + f);
        for (int f = 0; f < IN_MEMORY; ++f) in_memory[f * 32] = make(IN_REGISTERS + IN_SHARED + f);
    }

    // Makes it the warp's fragment f.
    __device__ void keep(int f, const Fragment& fragment) {
        if (f < IN_REGISTERS) in_registers[f < IN_REGISTERS ? f : 0] = fragment;
        else if (f < IN_REGISTERS + IN_SHARED) in_shared[(f - IN_REGISTERS) * 32] = fragment;
        else in_memory[(f - IN_REGISTERS - IN_SHARED) * 32] = fragment;
    }

    __device__ Fragment operator[](int f) const {
        if (f < IN_REGISTERS) return in_registers[f < IN_REGISTERS ? f : 0];
        return f < IN_REGISTERS + IN_SHARED ? shared(f) : memory(f);
    }

    // Fragments of which is known where they lie.
    __device__ Fragment shared(int f) const { return in_shared[(f - IN_REGISTERS) * 32]; }
    __device__ Fragment memory(int f) const {
        return in_memory[(f - IN_REGISTERS - IN_SHARED) * 32];
    }
};
