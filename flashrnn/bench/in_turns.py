"""Measures the contenders of a case in turns, so that a slow phase of the machine affects all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from flashrnn.bench import clocks
from flashrnn.bench.case import Case, tf32_allowed
from flashrnn.bench.check import judge
from flashrnn.bench.clocks import Call, Calls, Clock, Sample
from flashrnn.bench.contender import Contender, Found, Work
from flashrnn.bench.timing import Timing

# The fewest rounds, however long they take.
FEWEST, MOST = 3, 200
# The seed of every contender's data: equal shapes get equal numbers.
SEED = 0

T = TypeVar("T")


# ---- what is called


def without_gradients(work: Work) -> Calls:
    """Forward under ``torch.no_grad()``."""

    def call() -> None:
        with torch.no_grad():
            work.run(*work.leaves)

    return lambda count: [call] * count


def with_gradients(work: Work) -> Calls:
    """Forward that keeps what backward needs."""
    return lambda count: [partial(work.run, *work.leaves)] * count


def backward(work: Work) -> Calls:
    """The gradients of all leaves from a dense one of the output; forward is not timed."""
    gradient = _gradient(work)

    def ready(count: int) -> list[Call]:
        outputs = [work.run(*work.leaves) for _ in range(count)]
        return [partial(torch.autograd.grad, x, work.leaves, gradient) for x in outputs]

    return ready


def both(work: Work) -> Calls:
    """Forward and the gradients of all leaves."""
    gradient = _gradient(work)

    def call() -> None:
        torch.autograd.grad(work.run(*work.leaves), work.leaves, gradient)

    return lambda count: [call] * count


def _gradient(work: Work) -> torch.Tensor:
    with torch.no_grad():
        return torch.randn_like(work.run(*work.leaves))


# ---- what is measured


@dataclass(frozen=True)
class Measure:
    """A clock, and what is called by it.

    Attributes:
        name: in the rows.
        clock: out of ``clocks.py``.
        calls: one of the four above.
    """

    name: str
    clock: Clock
    calls: Callable[[Work], Calls]


HOST = (
    Measure("host, forward, no gradients", clocks.host, without_gradients),
    Measure("host, forward", clocks.host, with_gradients),
    Measure("host, backward", clocks.host, backward),
)
WALL = (
    Measure("wall, forward", clocks.wall, without_gradients),
    Measure("wall, forward + backward", clocks.wall, both),
)
GRAPH = (
    Measure("graph, forward", clocks.graph, without_gradients),
    Measure("graph, forward + backward", clocks.graph, both),
)
# Of contenders that have no gradients.
FORWARD_ALONE = (HOST[0], WALL[0], GRAPH[0])


def measure(
    contenders: Sequence[Contender],
    case: Case,
    device: torch.device,
    measures: Sequence[Measure],
    seconds: float,
) -> list[dict[str, Found]]:
    """What the measures find of each contender, once it is found to be right.

    Float32 may be computed in TF32 by all, as cuDNN does by default.

    Args:
        contenders: who computes.
        case: what.
        device: where.
        measures: what is measured.
        seconds: how long all of it may take, first calls and checks included; some samples of
            each measure are taken in any case.
    """
    end = time.perf_counter() + seconds
    gradients = any(each.calls is not without_gradients for each in measures)
    found: list[dict[str, Found]] = [{} for _ in contenders]
    with tf32_allowed():
        runners = [_Runner(each, case, device, gradients) for each in contenders]
        for k, each in enumerate(measures):
            samples = [runner.sample(each) for runner in runners]
            left = (end - time.perf_counter()) / (len(measures) - k)
            for row, runner, taken in zip(found, runners, in_turns(samples, left), strict=True):
                row[each.name] = taken if isinstance(taken, Found) else runner.found(taken)
    return found


def in_turns(
    samples: Sequence[Callable[[], float | Found] | Found], seconds: float
) -> list[list[float] | Found]:
    """Samples of each runner for some seconds, in rounds of alternating order; or the reasons."""
    taken: list[list[float] | Found] = [each if isinstance(each, Found) else [] for each in samples]
    order = list(range(len(samples)))
    end = time.perf_counter() + seconds
    for turn in range(MOST):
        if turn >= FEWEST and time.perf_counter() > end:
            break
        for k in order:
            sample, values = samples[k], taken[k]
            if isinstance(sample, Found) or isinstance(values, Found):
                continue
            value = sample()
            if isinstance(value, Found):
                taken[k] = value
            else:
                values.append(value)
        order.reverse()
    return taken


class _Runner:
    """A contender on a case: its work, checked, or the reason why it is not measured."""

    def __init__(
        self, contender: Contender, case: Case, device: torch.device, gradients: bool
    ) -> None:
        self._contender, self._case, self._device = contender, case, device
        self._gradients = gradients
        self._work = self._attempt(self._checked)

    def _attempt(self, do: Callable[[], T]) -> T | Found:
        return self._contender.attempt(self._case, self._device, self._gradients, do)

    def _checked(self) -> Work | Found:
        torch.manual_seed(SEED)
        work = self._contender.prepare(self._case, self._device)
        gradient = work.weights_of_loss()
        truth, plain = work.truths(gradient, self._gradients)
        given = work.given(gradient, self._gradients)
        self._verdict = judge(given, truth, plain, tf32=self._device.type == "cuda")
        return Found.wrong(self._verdict) if self._verdict.reason else work

    def sample(self, measure: Measure) -> Callable[[], float | Found] | Found:
        """Takes a sample, or says why it cannot. A first one is forgotten: it warms up."""
        if isinstance(self._work, Found):
            return self._work
        if measure.clock is clocks.graph and self._device.type != "cuda":
            return Found(reason="a CUDA graph needs a GPU")
        calls = measure.calls
        work, device = self._work, self._device

        def start() -> Sample:
            sample = measure.clock(calls(work), device)
            sample()
            return sample

        started = self._attempt(start)
        return started if isinstance(started, Found) else partial(self._attempt, started)

    def found(self, samples: Sequence[float]) -> Found:
        """Median and quartiles."""
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return Found.timed(Timing(median, q1, q3, len(samples)), self._verdict, "µs")
