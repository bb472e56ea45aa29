"""Several small copies in one launch, each of which would be one of PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from flashrnn.jit import launch
from flashrnn.jit.kernel import Kernel, launch_in_turn
from flashrnn.jit.kernel import load as _kernel
from flashrnn.kernels import copies


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
    absent = (0,) * (3 * (copies.MOST - len(counts)))
    launch_in_turn([(kernel, shape, (*addresses, *absent, *numbers))])


@lru_cache(maxsize=512)
def _prepared(
    counts: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Kernel, launch.Shape, tuple[int, ...]]:
    kernel = _kernel_of(dtype, device)
    numbers, ctas = copies.share(counts)
    return kernel, kernel.shape._replace(grid=ctas), numbers


@lru_cache(maxsize=32)
def _kernel_of(dtype: torch.dtype, device: torch.device) -> Kernel:
    shape = launch.Shape(grid=0, threads=copies.THREADS)
    return _kernel(copies.ENTRY, program(dtype), shape, device)


def program(dtype: torch.dtype) -> dict[str, str]:
    """The program's text in parts, each under the name that an error gives it."""
    return copies.program(str(dtype).removeprefix("torch."))


KERNELS = (_prepared, _kernel_of)
"""The caches that hold kernels."""
