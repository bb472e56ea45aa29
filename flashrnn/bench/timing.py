"""Milliseconds of a function of tensors, forward alone and with its backward.

This file and ``check.py`` import nothing of FlashRNN: the process that times the upstream package
loads them by their path, since both packages go by the name ``flashrnn``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST, MOST = 3, 200
MOST_TURNS = 64
# Rows of a product that takes a GPU some milliseconds, more than the host takes to enqueue a call.
BUSY = 10_240
# A CPU's last-level cache, of which PyTorch does not say the size.
CPU_CACHE = 32 << 20


@dataclass(frozen=True)
class Timing:
    """Median and quartiles in milliseconds."""

    median: float
    q1: float
    q3: float
    repetitions: int


def measure(
    run: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    backward: bool,
    seconds: float,
) -> Timing:
    """Time ``run(*inputs, *weights)``.

    Args:
        run: what is timed.
        inputs: leaves; repetitions alternate between copies, which exceed the cache.
        weights: leaves that are the same in every repetition, as in training.
        backward: ``False``: under ``torch.no_grad()``. ``True``: with the gradients of all
            leaves, given a dense one of the result.
        seconds: repeat for about so long, but 3 times at least and 200 times at most.
    """
    device = inputs[0].device
    with torch.no_grad():
        gradient = torch.randn_like(run(*inputs, *weights))
    turns = _turns(inputs, gradient, _cache(device))

    def call(k: int) -> None:
        *rotated, given = turns[k % len(turns)]
        if backward:
            leaves = (*rotated, *weights)
            torch.autograd.grad(run(*leaves), leaves, given)
        else:
            with torch.no_grad():
                run(*rotated, *weights)

    clock = _by_events if device.type == "cuda" else _by_wall_clock
    (first,) = clock(call, 1)
    # Warm up for a fifth of the time: clocks rise, and memory is allocated.
    *_, once = clock(call, _count(seconds / 5, first, fewest=1))
    samples = clock(call, _count(seconds, once, FEWEST))
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, q1, q3, len(samples))


def _count(seconds: float, once: float, fewest: int) -> int:
    return min(max(math.ceil(seconds * 1e3 / max(once, 1e-3)), fewest), MOST)


def _cache(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_CACHE
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def _turns(inputs: Sequence[Tensor], gradient: Tensor, cache: int) -> list[list[Tensor]]:
    """Copies of the inputs and a gradient that fill the cache twice, so that no access hits."""
    given = [*inputs, gradient]
    size = sum(x.numel() * x.element_size() for x in given)
    count = min(max(math.ceil(2 * cache / max(size, 1)), 2), MOST_TURNS)
    return [
        [x.detach().clone().requires_grad_(x.requires_grad) for x in given] for _ in range(count)
    ]


def _by_events(call: Callable[[int], None], count: int) -> list[float]:
    """The GPU's own clock. A product keeps the GPU busy while the host enqueues the call."""
    busy = torch.zeros(BUSY, BUSY, dtype=torch.float16, device="cuda")
    events = []
    for k in range(count):
        torch.mm(busy, busy)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(k)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _by_wall_clock(call: Callable[[int], None], count: int) -> list[float]:
    samples = []
    for k in range(count):
        start = time.perf_counter()
        call(k)
        samples.append((time.perf_counter() - start) * 1e3)
    return samples
