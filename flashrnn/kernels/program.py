"""The text that every CUDA program begins with: constants, PTX, the table's functions, the cell."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path

import torch

from flashrnn.cells.bounds import bound_of_h
from flashrnn.cells.render import render_cuda
from flashrnn.cells.traced import TracedCell
from flashrnn.problem import tf32_allowed

PRECISIONS = {"float16": "float16", "bfloat16": "bfloat16", "tf32": "tf32", "float32": "float"}
"""How products are computed, and the type that stands for it in CUDA."""


def precision_of(dtype: torch.dtype) -> str:
    """How products of a dtype are computed; of float32, as PyTorch's own are set to be."""
    if dtype == torch.float32 and tf32_allowed():
        return "tf32"
    return str(dtype).removeprefix("torch.")


def itemsize_of(precision: str) -> int:
    """Bytes of an element of the tensors."""
    return 2 if precision in ("float16", "bfloat16") else 4


def prelude(
    cell: TracedCell, precision: str, constants: Mapping[str, bool | int]
) -> dict[str, str]:
    """The first parts of a program, each under the name that an error gives it.

    Args:
        cell: its numbers and functions go in as :func:`flashrnn.cells.render.render_cuda` says.
        precision: out of ``PRECISIONS``; sets the types ``Element``, of the tensors,
            ``Bits``, a number as large, and ``Operand``, which chooses the product.
        constants: what else is compiled in.
    """
    element = "float" if precision == "tf32" else PRECISIONS[precision]
    bits = "unsigned short" if itemsize_of(precision) == 2 else "unsigned"
    return {
        "plan": "\n".join(map(_constant, constants, constants.values())),
        "ptx.cuh": read("ptx.cuh"),
        "operands.cuh": read("operands.cuh"),
        "clips.cuh": read("clips.cuh"),
        "types": f"using Element = {element};\nusing Bits = {bits};\n"
        f"using Operand = {PRECISIONS[precision]};",
        "pointwise.cuh": read("pointwise.cuh"),
        f"cell {cell.name}": render_cuda(cell),
    }


def with_files(
    cell: TracedCell,
    precision: str,
    constants: Mapping[str, bool | int],
    files: Sequence[str],
) -> dict[str, str]:
    """A whole program: :func:`prelude`, and files beside this one after it, in their order."""
    return {**prelude(cell, precision, constants), **{name: read(name) for name in files}}


def h_is_near(cell: TracedCell) -> bool:
    """Whether each new h is NaN or no far number, as operands.cuh has it: below 2^60."""
    bound = bound_of_h(cell.graphs.forward)
    return bound is not None and bound < 2**60


def gradient_options(cut: bool, clip: bool) -> dict[str, bool]:
    """The constants of every backward scan.

    Args:
        cut: whether no gradient flows through R.
        clip: whether that gradient is clipped at each step.
    """
    return {"CUT": cut, "CLIP": clip}


@lru_cache(maxsize=1024)
def clips(gradient: float | None, forward: float | None) -> int:
    """The argument ``Clips`` of a kernel, two float32 numbers.

    What float32 does not hold is infinity there, which clips nothing. What is ``None`` no kernel
    reads.

    Args:
        gradient: what the gradient that reaches h through R is clipped to.
        forward: what h is clipped to.
    """
    values = (ctypes.c_float * 2)(gradient or 0.0, forward or 0.0)
    return int.from_bytes(bytes(values), sys.byteorder)


def _constant(name: str, value: bool | int) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return f"constexpr {type(value).__name__} {name} = {text};"


@cache
def read(name: str) -> str:
    """The text of a source file beside this one."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
