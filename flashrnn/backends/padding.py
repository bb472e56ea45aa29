"""Tensors with more units or features, or without them again, several in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashrnn.backends.protocols import Kind, Resized
from flashrnn.jit import launch
from flashrnn.jit.kernel import Kernel, launch_in_turn
from flashrnn.jit.kernel import load as _kernel
from flashrnn.kernels import padding
from flashrnn.problem import Problem


class Resizing(NamedTuple):
    """The launch that copies tensors of some sizes and strides to others.

    Attributes:
        kernel: the kernel.
        shape: the launch's.
        sizes: those of the new tensors.
        numbers: the launch's arguments behind the addresses.
    """

    kernel: Kernel
    shape: launch.Shape
    sizes: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...]

    def __call__(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The new tensors, contiguous.

        Those given are like those that this was made for: nobody asks for their sizes and strides.
        """
        found: list[Tensor] = []
        addresses: list[int] = []
        for x, size in zip(given, self.sizes, strict=True):
            to = x.new_empty(size)
            found.append(to)
            addresses += x.data_ptr(), to.data_ptr()
        absent = (0,) * (len(padding.RECORD.operands) - len(addresses))
        launch_in_turn([(self.kernel, self.shape, (*addresses, *absent, *self.numbers))])
        return found


def too_large(problem: Problem, features: int) -> bool:
    """Whether Wx, a layer's input or its states have too many elements for a launch."""
    (rows, T), cell = problem.rows, problem.cell
    # With up to 7 units or features more. States may be float32.
    width = problem.N * (problem.D + 7)
    of_a_row = max(features + 7, len(cell.fed_by("Wx")) * width, len(cell.states) * width)
    return rows * T * of_a_row * torch.float32.itemsize // 16 > padding.MOST_PIECES


def resizing(given: Sequence[Resized], rows: int, device: torch.device) -> Resizing:
    """What makes new tensors of some that are like those given.

    Args:
        given: up to ``padding.MOST`` tensors of up to five dimensions, of 16 or 32 bits an element;
            what each is, and how long its rows are to be. They may have no memory.
        rows: how many rows a head's weights are to have.
        device: where the tensors will be.
    """
    of: list[Any] = []
    for x, kind, width in given:
        of += x.shape, x.stride(), x.dtype, kind, width
    return _prepared(rows, device, *of)


@lru_cache(maxsize=512)
def _prepared(rows: int, device: torch.device, *of: Any) -> Resizing:
    """The launch, by each tensor's sizes, strides and dtype, what it is and its new width."""
    copies, sizes = [], []
    for shape, strides, dtype, kind, width in zip(*[iter(of)] * 5, strict=True):
        missing = 5 - len(shape)
        *outer, of_rows, columns = (1,) * missing + shape
        new = *outer, (rows if kind is Kind.WEIGHTS else of_rows), width
        strides = (0,) * missing + strides
        repeats = kind is Kind.GATES
        copies.append(padding.Copy(new, strides, of_rows, columns, repeats, dtype.itemsize))
        sizes.append(new[missing:])
    numbers, ctas = padding.share(copies)
    kernel = _loaded(device)
    return Resizing(kernel, kernel.shape._replace(grid=ctas), tuple(sizes), numbers)


@lru_cache(maxsize=16)
def _loaded(device: torch.device) -> Kernel:
    shape = launch.Shape(grid=0, threads=padding.THREADS)
    return _kernel(padding.ENTRY, padding.program(), shape, device)


KERNELS = (_prepared, _loaded)
"""The caches that hold kernels."""
