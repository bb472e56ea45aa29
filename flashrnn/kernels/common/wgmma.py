"""The instruction by which a warpgroup multiplies; its text depends on the product's columns."""

from __future__ import annotations


def instruction(columns: int, precision: str) -> str:
    """The text of ``common/wgmma.cuh``: the CUDA function ``wgmma`` (PTX: wgmma.mma_async, Hopper).

    Args:
        columns: columns of the right operand, a multiple of 8 up to 256.
        precision: ``"float16"``, ``"bfloat16"`` or ``"tf32"``.
    """
    kind = {"float16": "f16", "bfloat16": "bf16", "tf32": "tf32"}[precision]
    depth = 8 if precision == "tf32" else 16
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(sums[{i}])' for i in range(count))

    def function(parameter: str, left: str, inputs: str, words: int, transposes: str) -> str:
        right, add = count + words, count + words + 1
        # Of 16-bit operands in shared memory it is said whether they lie transposed.
        transposes = "" if precision == "tf32" else f", {transposes}"
        return f"""\
__device__ inline void wgmma(float (&sums)[{count}], {parameter},
                             unsigned long long right, bool add, {precision}) {{
    asm volatile(
        "{{ .reg .pred add; setp.ne.u32 add, %{add}, 0;"
        " wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind}"
        " {{{sums}}}, {left}, %{right}, add, 1, 1{transposes}; }}"
        : {outputs}
        : {inputs}, "l"(right), "r"(unsigned(add)));
}}
"""

    words = ", ".join(f"%{count + i}" for i in range(4))
    of_words = ", ".join(f'"r"(left[{i}])' for i in range(4))
    return f"""\
// The warpgroup's sums[64 x {columns}] += left[64 x {depth}] right[{depth} x {columns}], or = if
// not `add`.
//
// Warp w has the rows from 16 w on and holds them as in mma(): left[0] to left[3] are its a0 to a3,
// and sums[4 k] to sums[4 k + 3] its sums of the columns 8 k to 8 k + 7. Matrices in shared memory
// are given by operand().
{function("const unsigned (&left)[4]", f"{{{words}}}", of_words, 4, "0")}
{function("unsigned long long left", f"%{count}", '"l"(left)', 1, "0, 0")}"""
