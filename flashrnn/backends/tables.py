"""What CUDA kernels read of a call's options of sequences, made by one launch.

PyTorch's operations make the same (:func:`flashrnn.sequences.arrange`, ``gradients.before_steps``,
``gradients.gathered``), by up to forty launches. Nothing waits for the GPU, and nothing is copied
to it, so that a CUDA graph records either.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flashrnn.backends.gradients import Before, before_steps, copies_of_h
from flashrnn.backends.launches import LaunchTemplate
from flashrnn.jit import launch
from flashrnn.jit.kernel import Kernel
from flashrnn.jit.kernel import load as _kernel
from flashrnn.kernels import call, sequence_tables
from flashrnn.problem import Problem
from flashrnn.sequences import Sequences, bounds, operands, runs_backwards


class Tables(NamedTuple):
    """The tables of a call.

    Attributes:
        of_scan: by the names of operands of a scan's record.
        lengths: ``[B]`` of int32, in the order of the batch; ``None`` if all have T steps.
        before: where h before each step is, if it was asked for.
    """

    of_scan: dict[str, Tensor]
    lengths: Tensor | None = None
    before: Before | None = None


class Idle(NamedTuple):
    """What is to be 0 in rows of a packed batch that are no step of any sequence; others may be.

    Attributes:
        tensor: contiguous; with as many rows as the batch, or several times as many.
        width: the elements of a row.
    """

    tensor: Tensor
    width: int


def made(
    problem: Problem,
    sequences: Sequences,
    initial: Tensor | None = None,
    idle: Idle | None = None,
) -> Tables:
    """Launch what makes them.

    Args:
        problem: what is computed; B and T are not 0.
        sequences: the options.
        initial: ``[S, B, 1, N, D]``, the initial states; where given, ``before`` is made.
        idle: what becomes 0, too.
    """
    if not problem.is_sequenced:
        return Tables({})
    if problem.ragged and problem.B > sequence_tables.MOST_SEQUENCES:
        return _by_pytorch(problem, sequences, initial, idle)
    B, N, D, rows = problem.B, problem.N, problem.D, math.prod(problem.rows)
    reset, starts = sequences.reset, sequences.reset_states
    named: dict[str, Tensor | None] = {
        "given": sequences.lengths if sequences.cu_seqlens is None else sequences.cu_seqlens,
        "reset": reset,
        "idle": None if idle is None else idle.tensor,
    }
    of_scan: dict[str, Tensor] = {}
    lengths = before = None
    if problem.ragged:
        found = _integers(problem, 4, B).unbind()
        named |= zip(("order", "first_rows", "sorted_lengths", "lengths"), found, strict=True)
        *in_order, lengths = found
        names = "sequence_order", "sequence_rows", "sequence_lengths"
        of_scan |= zip(names, in_order, strict=True)
    if problem.reverse is not False:
        of_scan["runs_backwards"] = runs_backwards(problem)
    if reset is not None:
        named["flags"] = of_scan["reset_flags"] = _integers(problem, rows)
    if starts is not None:
        of_scan["reset_states"] = starts.expand(-1, B, problem.T, -1, -1)
    if initial is not None:
        of_resets = 0 if reset is None else 1 if starts is None else math.prod(starts.shape[1:3])
        before = Before(
            _integers(problem, 1 if problem.reverse is False else 2, rows),
            torch.empty((B + of_resets, N, D), dtype=problem.dtype, device=problem.device),
        )
        named |= {"initial": initial, "reset_states": starts}
        named |= {"before_rows": before.rows, "h_starts": before.starts}
    tensors = {name: x for name, x in named.items() if x is not None}
    if tensors:
        addresses, layout = call.SEQUENCE_TABLES.read(tensors)
        kernel, shape, packing = _prepared(
            problem._replace(longest=None),
            layout,
            is_wide=named["given"] is not None and named["given"].dtype == torch.int64,
            starts=0 if before is None else len(before.starts),
            starts_a_sequence=1 if starts is None else starts.shape[2],
            idle_width=1 if idle is None else idle.width,
            idle_spans=0 if idle is None else idle.tensor.numel() // (rows * idle.width),
        )
        kernel.launch(shape, packing(addresses))
    return Tables(of_scan, lengths, before)


def _integers(problem: Problem, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.int32, device=problem.device)


def _by_pytorch(
    problem: Problem, sequences: Sequences, initial: Tensor | None, idle: Idle | None
) -> Tables:
    """The same of so many sequences that to compare each with all takes longer."""
    if idle is not None:
        idle.tensor.zero_()
    before = None
    if initial is not None:
        before = before_steps(problem, sequences, initial[0], problem.dtype)
    _, lengths = bounds(sequences, problem.T, torch.int32)
    return Tables(operands(problem, sequences), lengths, before)


@lru_cache(maxsize=256)
def _prepared(
    problem: Problem, layout: call.Layout, is_wide: bool, **numbers: int
) -> tuple[Kernel, launch.Shape, call.Packing]:
    """The launch of the tables, which lacks addresses."""
    rows = math.prod(problem.rows)
    of_rows = {"flags", "before_rows", "idle"} & {*layout.names}
    tiles = sequence_tables.plan_tables(
        problem.B if problem.ragged else 0, rows if of_rows else 0, numbers["starts"]
    )
    kernel = _loaded(sequence_tables.TABLES, problem.dtype, problem.device)
    packing = call.SEQUENCE_TABLES.packing(
        layout,
        rows=rows,
        T=problem.T,
        B=problem.B,
        N=problem.N,
        D=problem.D,
        is_wide=is_wide,
        is_packed=problem.packed,
        directions=1 if problem.reverse is False else 2,
        order_ctas=tiles.order,
        row_ctas=tiles.rows,
        **numbers,
    )
    return kernel, kernel.shape._replace(grid=sum(tiles)), packing


def h_before(problem: Problem, before: Before | None, h_initial: Tensor, h: Tensor) -> Tensor:
    """h before each step, in one launch, as :func:`flashrnn.backends.gradients.complete` takes it.

    Args:
        problem: what was computed; B and T are not 0.
        before: where h before each step is; ``None``: in the row before.
        h_initial: ``[..., B, 1, N, D]``, of ``problem.carry_dtype``, of which h is the first.
        h: ``[..., B, T, N, D]``, contiguous, likewise.
    """
    found = new_h_before(problem, h)
    tensors = {"h": h, "before": found}
    if before is None:
        tensors["h_initial"] = h_initial
    else:
        tensors |= {"before_rows": before.rows, "h_starts": before.starts}
        if problem.reverse is not False:
            tensors["runs_backwards"] = runs_backwards(problem)
    addresses, layout = call.H_BEFORE.read(tensors)
    kernel, shape, packing = _prepared_h_before(problem._replace(longest=None), layout)
    kernel.launch(shape, packing(addresses))
    return found


def new_h_before(problem: Problem, like: Tensor) -> Tensor:
    """Memory for h before each step, ``[rows, copies_of_h, N, D]``."""
    repeated = copies_of_h(problem.cell, problem.N)
    return like.new_empty(math.prod(problem.rows), repeated, problem.N, problem.D)


def behind_scan(problem: Problem, layout: call.Layout) -> LaunchTemplate:
    """The launch of h before each step that follows a backward scan.

    Args:
        problem: what is computed.
        layout: of the scan's tensors, with ``before`` among them.
    """
    names, strides = {"states": "h"}, layout.strides
    if "before_rows" in layout.names:
        strides = ()
    else:
        # Of the scan's operands with strides the initial states are the first: [S, B, 1, N, D].
        names["initial"], strides = "h_initial", (strides[0][1:],)
    named = tuple(names.get(name, name) for name in layout.names)
    return _prepared_h_before(problem, layout._replace(names=named, strides=strides))


# Whose rows it copies in pieces.
_IN_PIECES = ("h", "h_starts", "before")


@lru_cache(maxsize=256)
def _prepared_h_before(problem: Problem, layout: call.Layout) -> LaunchTemplate:
    rows, T, N, D = math.prod(problem.rows), problem.T, problem.N, problem.D
    kernel = _loaded(sequence_tables.H_BEFORE, problem.dtype, problem.device)
    size = problem.dtype.itemsize
    numbers = {"rows": rows, "T": T, "N": N, "D": D, "repeated": copies_of_h(problem.cell, N)}
    numbers["piece_bytes"] = call.H_BEFORE.piece_bytes(_IN_PIECES, layout, D, size)
    packing = call.H_BEFORE.packing(layout, **numbers)
    shape = kernel.shape._replace(grid=sequence_tables.h_before_grid(rows, N))
    return LaunchTemplate(kernel, shape, packing)


@lru_cache(maxsize=64)
def _loaded(entry: str, dtype: torch.dtype, device: torch.device) -> Kernel:
    shape = launch.Shape(grid=0, threads=sequence_tables.THREADS)
    return _kernel(entry, sequence_tables.program(entry, dtype), shape, device)


KERNELS = (_prepared, _prepared_h_before, _loaded)
"""The caches that hold kernels."""


def programs(problem: Problem, with_before: bool) -> list[dict[str, str]]:
    """That of the tables, if there are any; ``with_before``: h before each step is looked up."""
    makes = problem.resets or problem.ragged or (with_before and problem.is_sequenced)
    return [sequence_tables.program(sequence_tables.TABLES, problem.dtype)] if makes else []


def program_of_h(problem: Problem) -> dict[str, str]:
    """That of :func:`h_before`."""
    return sequence_tables.program(sequence_tables.H_BEFORE, problem.dtype)
