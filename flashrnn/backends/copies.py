"""Several small copies in one launch, each of which would be one of PyTorch's.

Such a launch is one by itself, or it is behind a scan and copies what that has written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from flashrnn.backends.launches import LaunchTemplate
from flashrnn.backends.protocols import Results
from flashrnn.jit import launch
from flashrnn.jit.kernel import Kernel, launch_in_turn
from flashrnn.jit.kernel import load as _kernel
from flashrnn.kernels import call, copies
from flashrnn.problem import Problem


def enqueue(
    counts: tuple[int, ...], addresses: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Copy.

    Args:
        counts: how many elements each copy has; up to ``copies.MOST`` copies.
        addresses: of each the source's, that of what is added to it, or 0, and the destination's.
        dtype: of all of them.
        device: where they are.
    """
    kernel, shape, numbers = _prepared(counts, dtype, device)
    absent = (0,) * (len(copies.RECORD.operands) - len(addresses))
    launch_in_turn([(kernel, shape, (*addresses, *absent, *numbers))])


@lru_cache(maxsize=512)
def _prepared(
    counts: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Kernel, launch.Shape, tuple[int, ...]]:
    kernel = _kernel_of(dtype, device)
    numbers, ctas = copies.share(counts)
    return kernel, kernel.shape._replace(grid=ctas), numbers


def results(problem: Problem, like: Tensor, by_time: bool) -> Results:
    """Memory for those results of a scan that it is worth to copy behind it.

    Args:
        problem: the scan's.
        like: of ``problem.dtype`` and where it is computed.
        by_time: whether h is wanted with time before sequences.
    """
    of_h, of_last = _sizes(problem, by_time)
    return Results(
        None if of_h is None else like.new_empty(of_h),
        None if of_last is None else like.new_empty(of_last),
    )


@lru_cache(maxsize=1024)
def _sizes(
    problem: Problem, by_time: bool
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Those of the results' h and last states."""
    S, (B, T, N, D) = len(problem.cell.states), (problem.B, problem.T, problem.N, problem.D)
    if max(T, S) * B * N * D > copies.MOST_RESULTS:
        return None, None
    turns, rounds = by_time and B > 1 and T > 1, problem.carry_dtype != problem.dtype
    return (T, B, N * D) if turns else None, (S, B, N * D) if rounds else None


def operands(results: Results) -> dict[str, Tensor]:
    """Those that are wanted, by the names of the record."""
    found = {}
    if results.h is not None:
        found["h_by_time"] = results.h
    if results.last is not None:
        found["last_rounded"] = results.last
    return found


def behind_scan(problem: Problem, layout: call.Layout) -> list[LaunchTemplate]:
    """The launch of the copies of a scan's results, if any are given.

    Args:
        problem: the scan's.
        layout: of its tensors, with the :func:`operands` among them.
    """
    B, T, width = problem.B, problem.T, problem.N * problem.D
    of_h = T * B * width if "h_by_time" in layout.names else 0
    of_last = len(problem.cell.states) * B * width if "last_rounded" in layout.names else 0
    if not (of_h or of_last):
        return []
    kernel = _kernel_of(problem.dtype, problem.device)
    numbers, ctas = copies.share_results(of_h, of_last)
    packing = copies.RECORD.packing(layout._replace(strides=()), T=T, B=B, width=width, **numbers)
    return [LaunchTemplate(kernel, kernel.shape._replace(grid=ctas), packing)]


@lru_cache(maxsize=32)
def _kernel_of(dtype: torch.dtype, device: torch.device) -> Kernel:
    shape = launch.Shape(grid=0, threads=copies.THREADS)
    return _kernel(copies.ENTRY, program(dtype), shape, device)


def program(dtype: torch.dtype) -> dict[str, str]:
    """The program's text in parts, each under the name that an error gives it."""
    return copies.program(str(dtype).removeprefix("torch."))


KERNELS = (_prepared, _kernel_of)
"""The caches that hold kernels."""
