"""The base class of contenders, and the results of measuring one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from flashrnn.bench import memory, timing
from flashrnn.bench.case import Case
from flashrnn.bench.check import STEPS, Results, Verdict, judge, results
from flashrnn.bench.errors import BenchError

FORWARD, BOTH = "forward", "forward + backward"
# What is timed, and whether with backward.
TIMES = {FORWARD: False, BOTH: True}

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A measure's value, or the reason why there is none.

    Attributes:
        value: the median where there are several.
        unit: of ``value``.
        q1: lower quartile.
        q3: upper quartile.
        repetitions: how often it was measured.
        error: of the output against float64, relative.
        gradient_error: the largest of the gradients.
        reason: why there is no value.
    """

    value: float | None = None
    unit: str = ""
    q1: float | None = None
    q3: float | None = None
    repetitions: int | None = None
    error: float | None = None
    gradient_error: float | None = None
    reason: str | None = None

    @staticmethod
    def timed(taken: timing.Timing, verdict: Verdict, unit: str = "ms") -> Found:
        """A time, and the errors of the results."""
        return Found(
            taken.median,
            unit,
            taken.q1,
            taken.q3,
            taken.repetitions,
            verdict.output,
            verdict.gradient,
        )

    @staticmethod
    def wrong(verdict: Verdict) -> Found:
        """No time, because the results are wrong."""
        return Found(error=verdict.output, gradient_error=verdict.gradient, reason=verdict.reason)


@dataclass(frozen=True, eq=False)
class Work:
    """Something to time.

    Attributes:
        inputs: leaves with an axis of time; each repetition gets different ones.
        weights: further leaves, the same in every repetition.
        run: ``run(*inputs, *weights)`` gives the output at every step.
        reference: the same in plain PyTorch, in any dtype and of any length.
        time: the axis of time of inputs and output.
        ours: whether the error must be within ``vanilla``'s bound rather than a peer's.
        causal: whether the results of the first steps do not depend on later steps.
    """

    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    time: int
    ours: bool
    causal: bool = True

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """All arguments of ``run``."""
        return (*self.inputs, *self.weights)

    def weights_of_loss(self) -> Tensor:
        """A gradient of the output's first steps, for :func:`check.results`."""
        with torch.no_grad():
            return torch.randn_like(self.reference(*self._first(STEPS), *self.weights))

    def given(self, gradient: Tensor, backward: bool) -> Results:
        """What ``run`` computes: on the whole sequence if it is causal, else on its first steps."""
        leaves = self.leaves
        if not self.causal:
            first = [x.requires_grad_() for x in self._first(gradient.shape[self.time])]
            leaves = (*first, *self.weights)
        return results(self.run, leaves, len(self.inputs), self.time, gradient, backward)

    def truths(self, gradient: Tensor, backward: bool) -> tuple[Results, Results | None]:
        """What the reference computes on the first steps: in float64, and in the same dtype.

        The second is ``None`` for a peer, whose bound does not depend on it.
        """
        steps, count = gradient.shape[self.time], len(self.inputs)

        def by_reference(dtype: torch.dtype) -> Results:
            cut = self._first(steps)
            leaves = [x.detach().to(dtype).requires_grad_() for x in (*cut, *self.weights)]
            return results(self.reference, leaves, count, self.time, gradient, backward)

        plain = by_reference(self.inputs[0].dtype) if self.ours else None
        return by_reference(torch.float64), plain

    def _first(self, steps: int) -> list[Tensor]:
        """The first steps of the inputs, no more than there are."""
        steps = min(steps, self.inputs[0].shape[self.time])
        return [x.detach().narrow(self.time, 0, steps) for x in self.inputs]


class Contender(ABC):
    """Something that computes cases; see ``ours.py``, ``peers.py`` and ``upstream.py``."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in tables and figures."""

    @abstractmethod
    def includes(self, case: Case, device: torch.device) -> str:
        """What its measured times include, and the layout of its tensors."""

    def refusal(self, case: Case, device: torch.device, backward: bool) -> str | None:
        """Why it cannot compute a case; ``None`` if it can."""
        return None

    @abstractmethod
    def prepare(self, case: Case, device: torch.device) -> Work:
        """The case with random data, as something to time."""

    def times(self, case: Case, device: torch.device, seconds: float) -> dict[str, Found]:
        """Time forward, and forward with backward, for ``seconds`` each, after checking results."""
        prepared: list[Work] = []

        def measure(backward: bool) -> Found:
            if not prepared:
                prepared.append(self.prepare(case, device))
            return self.time(prepared[0], case, backward, seconds)

        return {
            name: self.attempt(case, device, backward, partial(measure, backward))
            for name, backward in TIMES.items()
        }

    def time(self, work: Work, case: Case, backward: bool, seconds: float) -> Found:
        """Check the results, then measure the time."""
        gradient = work.weights_of_loss()
        truths = work.truths(gradient, backward)
        verdict = judge(work.given(gradient, backward), *truths, tf32=case.tf32)
        if verdict.reason:
            return Found.wrong(verdict)
        taken = timing.measure(work.run, work.inputs, work.weights, backward, seconds)
        return Found.timed(taken, verdict)

    def memory(self, case: Case, device: torch.device) -> dict[str, Found]:
        """What a training step allocates on the GPU besides inputs and weights."""

        def measure() -> dict[str, float]:
            work = self.prepare(case, device)
            return memory.measure(work.run, work.leaves)

        measured = self.attempt(case, device, True, measure)
        if isinstance(measured, Found):
            return dict.fromkeys(memory.MEASURES, measured)
        return {name: Found(value, "MiB", repetitions=1) for name, value in measured.items()}

    def attempt(
        self, case: Case, device: torch.device, backward: bool, measure: Callable[[], T]
    ) -> T | Found:
        """``measure()``, or the reason why there is no measurement.

        Raises:
            BenchError: after a failure the GPU no longer works in this process.
        """
        reason = self.refusal(case, device, backward)
        if reason:
            return Found(reason=reason)
        try:
            return measure()
        except Exception as error:
            # One kernel that does not compile must not end a benchmark of an hour.
            words = str(error).strip().partition("\n")[0]
            failed = Found(reason=f"failed: {type(error).__name__}: {words}")
        if device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise BenchError(
                    f"{self.name} left the GPU unusable for this process ({case}: "
                    f"{failed.reason}). Leave it out with --backends or --peers to measure the rest"
                ) from error
        return failed
