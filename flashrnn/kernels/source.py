"""The text of a CUDA program: a kernel's file, what it includes, and what the host writes for it.

A ``.cu`` or ``.cuh`` file includes what it uses, by its path from this folder. NVRTC gets one text,
in which each file stands once, before those that include it. Two files are written here for each
problem: ``types.cuh``, with the types of elements, and ``problem.cuh``, with the constants of the
plan, the cell, and the record of the call.
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
from collections.abc import Mapping
from functools import cache, lru_cache
from itertools import starmap
from pathlib import Path

import torch

from flashrnn.cells.bounds import bound_of_h
from flashrnn.cells.render import render_cuda
from flashrnn.cells.traced import TracedCell
from flashrnn.kernels.call import Record
from flashrnn.problem import Problem, tf32_allowed

PRECISIONS = {"float16": "float16", "bfloat16": "bfloat16", "tf32": "tf32", "float32": "float"}
"""How products are computed, and the type ``Operand`` in CUDA that selects it."""

_INCLUDE = re.compile(r'^#include "(.*)"$', re.MULTILINE)


def precision_of(problem: Problem) -> str:
    """How products are computed."""
    if problem.dtype == torch.float32 and tf32_allowed(problem):
        return "tf32"
    return _NAMES[problem.dtype]


_NAMES = {getattr(torch, name): name for name in PRECISIONS if name != "tf32"}


def itemsize_of(precision: str) -> int:
    """Bytes of an element of the tensors."""
    return 2 if precision in ("float16", "bfloat16") else 4


def program(
    kernel: str,
    cell: TracedCell | None,
    precision: str,
    constants: Mapping[str, bool | int],
    record: Record,
    generated: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """A kernel's program in parts, in order, each under the name that an error gives it.

    Args:
        kernel: the path of its file from this folder.
        cell: its constants and functions, which :func:`flashrnn.cells.render.render_cuda` writes;
            ``None`` for a kernel that computes no step.
        precision: out of ``PRECISIONS``; sets the types ``Element``, of the tensors, ``Bits``, an
            integer of the same size, and ``Operand``, which selects the product.
        constants: all other constants that are compiled in.
        record: of the call.
        generated: further files that the host writes, by name.
    """
    of_cell = {} if cell is None else {f"cell {_unquoted(cell.name)}": render_cuda(cell)}
    element = "float" if precision == "tf32" else PRECISIONS[precision]
    bits = "unsigned short" if itemsize_of(precision) == 2 else "unsigned"
    types = [
        '#include "common/ptx.cuh"',
        f"using Element = {element};",
        f"using Bits = {bits};",
        f"using Operand = {PRECISIONS[precision]};",
    ]
    problem = [
        '#include "types.cuh"',
        '#include "common/clips.cuh"',
        '#include "common/pointwise.cuh"',
        *(f'#include "{name}"' for name in of_cell),
        *starmap(_constant, (dict.fromkeys(SEQUENCE_OPTIONS, False) | dict(constants)).items()),
        record.struct,
        # The host packs and allocates so many bytes.
        f"static_assert(sizeof({record.name}) == {8 * record.size});",
        record.parameters,
        *(operand.absent for operand in record.absent),
    ]
    texts = {
        "types.cuh": "\n".join(types),
        "problem.cuh": "\n".join(problem),
        **of_cell,
        **(generated or {}),
    }
    parts: dict[str, str] = {}
    _add(kernel, texts, parts)
    return parts


def _unquoted(name: str) -> str:
    return name.replace('"', "")


def _add(name: str, generated: Mapping[str, str], parts: dict[str, str]) -> None:
    """Add a file to the parts, behind what it includes."""
    if name in parts:
        return
    text = generated[name] if name in generated else read(name)
    for included in _INCLUDE.findall(text):
        _add(included, generated, parts)
    # An include leaves an empty line, so that the other lines keep their numbers.
    parts[name] = _INCLUDE.sub("", text)


def exponent_of_h(cell: TracedCell) -> int | None:
    """The least exponent such that each new h is NaN or less than 2 to it in size, at least -16.

    ``None`` if it is more than 60, or if there is none: see ``single_cta/split_product.cuh``.
    """
    bound = bound_of_h(cell.graphs.forward)
    if bound is None:
        return None
    exponent = max(math.frexp(bound)[1], -16)
    return exponent if exponent <= 60 else None


Options = tuple[tuple[str, bool | int], ...]
"""Names and values of constants of a call, which are compiled in."""

SEQUENCE_OPTIONS = ("RESETS", "STARTS", "RAGGED", "PACKED", "REVERSE")
"""Constants that say which options of sequences a call has (``common/sequence.cuh``).

All are false by default.
"""


def sequence_options(problem: Problem) -> Options:
    """Those of a problem."""
    resets, lengths = (problem.resets, problem.starts), (problem.ragged, problem.packed)
    has = (*resets, *lengths, problem.reverse is not False)
    return tuple(zip(SEQUENCE_OPTIONS, has, strict=True))


def is_sequenced(options: Options) -> bool:
    """Whether the kernel reads the operands that a record lacks by default."""
    return any(dict(options).get(name) for name in SEQUENCE_OPTIONS)


def forward_options(save_gates: bool) -> Options:
    """The constants of every forward scan.

    Args:
        save_gates: whether pre-activations are saved for the backward scan.
    """
    return (("SAVE_GATES", save_gates),)


def backward_options(cut: bool, clip: bool, given: int, given_last: bool) -> Options:
    """The constants of every backward scan.

    Args:
        cut: whether no gradient flows through R.
        clip: whether that gradient is clipped at each step.
        given: of how many states, from h on, every step's gradients are given.
        given_last: whether the last states' gradients are given. What is not is zero.
    """
    return ("CUT", cut), ("CLIP", clip), ("GIVEN", given), ("GIVEN_LAST", given_last)


def gradient_options(problem: Problem) -> Options:
    """The constants of the kernel of R's gradient."""
    # Else h before a step is that of the row before, the initial h, or zeros. To tell takes more
    # registers than float32 leaves.
    gathered = problem.starts or problem.packed or problem.reverse is not False
    gathered = gathered or (problem.is_sequenced and problem.dtype.itemsize == 4)
    resets, ragged = problem.resets and not gathered, problem.ragged and not gathered
    return ("GATHERED", gathered), ("RESETS", resets), ("RAGGED", ragged)


def options_of_storing(problem: Problem, stored: int) -> Options:
    """The further constants of a forward scan that has options of sequences or stores a part.

    Args:
        problem: what is computed.
        stored: how many states, from h on, are stored of every step.
    """
    if problem.returned is None:
        return ()
    of_sequences = sequence_options(problem) if problem.is_sequenced else ()
    return *of_sequences, ("STORED", stored)


def options_of(problem: Problem, backward: bool, stored: int) -> Options:
    """The constants of a problem's scan.

    Args:
        problem: what is computed.
        backward: the direction.
        stored: how many states, from h on, forward stores of every step.
    """
    if not backward:
        return *forward_options(problem.needs_gradient), *options_of_storing(problem, stored)
    clip = problem.gradient_recurrent_clipval is not None
    # The usual case: every returned state's gradient is given at every step, since the states are
    # one tensor, and nothing of the last states, unless those alone are returned.
    given = len(problem.cell.states) if problem.returned is None else problem.returned
    found = backward_options(problem.gradient_recurrent_cut, clip, given, not given)
    return (*found, *sequence_options(problem)) if problem.is_sequenced else found


@lru_cache(maxsize=1024)
def clips(gradient: float | None, forward: float | None) -> int:
    """The field ``clips`` of a call, two float32 numbers.

    Values beyond float32 become infinity, which clips nothing. For ``None`` the value is arbitrary:
    no kernel reads it.

    Args:
        gradient: what the gradient that reaches h through R is clipped to.
        forward: what h is clipped to.
    """
    values = (ctypes.c_float * 2)(gradient or 0.0, forward or 0.0)
    return int.from_bytes(bytes(values), sys.byteorder, signed=True)


def _constant(name: str, value: bool | int) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return f"constexpr {type(value).__name__} {name} = {text};"


@cache
def read(name: str) -> str:
    """The text of a file in this folder."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
