"""The instruction by which four warps multiply: its text depends on the product's columns."""

from __future__ import annotations


def instruction(columns: int, precision: str) -> str:
    """A function ``multiply_by_group`` in CUDA, for Hopper (PTX: wgmma.mma_async).

    Args:
        columns: of the right operand, a multiple of 8 up to 256.
        precision: ``"float16"`` or ``"bfloat16"``.
    """
    kind = {"float16": "f16", "bfloat16": "bf16"}[precision]
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(sums[{i}])' for i in range(count))

    def function(parameter: str, left: str, inputs: str, words: int, transposes: str) -> str:
        right, add = count + words, count + words + 1
        return f"""\
__device__ inline void multiply_by_group(float (&sums)[{count}], {parameter},
                                         unsigned long long right, bool add, {precision}) {{
    asm volatile(
        "{{ .reg .pred add; setp.ne.u32 add, %{add}, 0;"
        " wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}"
        " {{{sums}}}, {left}, %{right}, add, 1, 1, {transposes}; }}"
        : {outputs}
        : {inputs}, "l"(right), "r"(unsigned(add)));
}}
"""

    words = ", ".join(f"%{count + i}" for i in range(4))
    of_words = ", ".join(f'"r"(left[{i}])' for i in range(4))
    return f"""\
// The group's sums[64 x {columns}] += left[64 x 16] right[16 x {columns}]; = where it does not add.
//
// Warp w of the group has the rows from 16 w on, as in mma(): lane 4 i + j the rows i and i + 8, of
// left the words left[0], left[2] and left[1], left[3], of sums the columns 8 k + 2 j and the next,
// at 4 k and 4 k + 2. What lies in shared memory is an operand().
{function("const unsigned (&left)[4]", f"{{{words}}}", of_words, 4, "0")}
{function("unsigned long long left", f"%{count}", '"l"(left)', 1, "0, 0")}"""
