"""Microseconds of a call: of the host, by the wall clock, and of the GPU within a CUDA graph.

Each clock takes the device and *calls*, a function that prepares a number of calls. It returns a
sample: a function that makes the calls and returns their mean time. ``timing.py`` has the clock for
calls that are long enough to be measured one by one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
Calls = Callable[[int], Sequence[Call]]
Sample = Callable[[], float]
Clock = Callable[[Calls, torch.device], Sample]

# Calls in a sample of the host's time: few enough that a GPU's queue of about 1000 launches, which
# makes the host wait when it is full, takes them all.
ENQUEUED = 10
# Calls in a CUDA graph: they share the time until its first kernel starts.
RECORDED = 20
# The seconds of a sample by the wall clock, about, and the most calls in it.
SECONDS, MOST = 0.005, 100
# Cycles for which the GPU is kept busy while the host launches a graph: about 0.25 ms.
BUSY = 500_000


def host(calls: Calls, device: torch.device) -> Sample:
    """The time until a call returns, whether or not the GPU has finished."""

    def sample() -> float:
        ready = calls(ENQUEUED)
        _finish(device)
        taken = _seconds(ready)
        _finish(device)
        return taken / ENQUEUED * 1e6

    return sample


def wall(calls: Calls, device: torch.device) -> Sample:
    """The time of a call among many in a row: the host's or the GPU's time, whichever is longer.

    A sample ends when the GPU has finished.
    """

    def mean(count: int) -> float:
        ready = calls(count)
        _finish(device)
        return _seconds([*ready, lambda: _finish(device)]) / count

    mean(1)
    count = min(max(math.ceil(SECONDS / mean(1)), 1), MOST)
    return lambda: mean(count) * 1e6


def graph(calls: Calls, device: torch.device) -> Sample:
    """The GPU's time for a call, one of many in a CUDA graph, by its own clock."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # Outside of the recording: workspaces of libraries are allocated, kernels are loaded.
        _seconds(calls(3))
    torch.cuda.current_stream(device).wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    ready = calls(RECORDED)
    with torch.cuda.graph(recorded):
        _seconds(ready)

    def sample() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY)
        start.record()
        recorded.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / RECORDED * 1e3

    return sample


def _seconds(calls: Sequence[Call]) -> float:
    begun = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - begun


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
