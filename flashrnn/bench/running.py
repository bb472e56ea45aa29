"""From suites to rows: pairs cases with contenders and runs the measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flashrnn.bench import cold_start, in_turns
from flashrnn.bench.case import Case, tf32_allowed
from flashrnn.bench.contender import Contender, Found
from flashrnn.bench.ours import DEFAULT, Ours
from flashrnn.bench.peers import DTYPES, Attention, TorchNN
from flashrnn.bench.report import Row
from flashrnn.bench.suites import SUITES, Entry, Selection, Suite
from flashrnn.bench.upstream import BACKENDS, Upstream

PEERS = ("nn", "attention")


@dataclass(frozen=True)
class Contestants:
    """Who takes part.

    Attributes:
        backends: names as :meth:`Ours.named` takes them; ``None``: each suite's own choice.
        peers: out of ``PEERS``.
        upstream: the folder of an upstream package.
    """

    backends: tuple[str, ...] | None = None
    peers: tuple[str, ...] = PEERS
    upstream: Path | None = None

    def of(self, suite: Suite, entry: Entry) -> list[tuple[Contender, ...]]:
        """The contenders of an entry of a suite; those measured in turns form one group."""
        if entry.contenders:
            return [entry.contenders]
        return [(contender,) for contender in self._each_alone(suite, entry)]

    def _each_alone(self, suite: Suite, entry: Entry) -> list[Contender]:
        chosen = self.backends or entry.backends or DEFAULT
        if entry.alone:
            chosen = tuple(name for name in chosen if name in (entry.backends or ()))
        ours = [Ours.named(name) for name in chosen]
        if suite.kind == "cold start":
            return [contender for contender in ours if not contender.product]
        return [*ours, *([] if entry.alone else self._peers(suite, entry))]

    def _peers(self, suite: Suite, entry: Entry) -> list[Contender]:
        peers: list[Contender] = []
        if "nn" in self.peers:
            # On a GPU torch.nn's speed depends on the dtype more than on anything else.
            dtypes = DTYPES if suite.device == "cuda" else (entry.case.dtype,)
            widths = (False, True) if entry.case.N > 1 else (False,)
            peers += [TorchNN(dtype, full) for full in widths for dtype in dtypes]
        if "attention" in self.peers:
            peers.append(Attention())
        if self.upstream and suite.kind == "time":
            peers += [Upstream(backend, self.upstream) for backend in BACKENDS]
        return peers


@dataclass(frozen=True)
class Task:
    """Contenders on an entry of a suite: one, or all that are measured in turns."""

    suite: str
    entry: Entry
    contenders: tuple[Contender, ...]


def plan(names: Sequence[str], selection: Selection, contestants: Contestants) -> list[Task]:
    """All tasks of some suites, in order."""
    return [
        Task(name, entry, together)
        for name in names
        for entry in SUITES[name].entries(selection)
        for together in contestants.of(SUITES[name], entry)
    ]


def device_of(suite: Suite) -> torch.device:
    """Where a suite is measured on this machine."""
    if suite.device == "cpu" or (suite.device == "any" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def measure(task: Task, quick: bool, seconds: float = math.inf) -> list[Row]:
    """Carry out a task: a row for each of its measures.

    Args:
        task: the task.
        quick: with fewer repetitions.
        seconds: a case that is measured in turns takes no more, if more than ``quick`` says.
    """
    suite, case = SUITES[task.suite], task.entry.case
    device = device_of(suite)
    if suite.measures:
        seconds = min(seconds, 1.0 if quick else 4.0)
        found = in_turns.measure(task.contenders, case, device, suite.measures, seconds)
    else:
        found = [_alone(suite, each, case, device, quick) for each in task.contenders]
    return [
        Row.of(
            task.suite,
            contender.name,
            case,
            contender.includes(case, device),
            name,
            value,
            task.entry.marks.get(name),
        )
        for contender, measured in zip(task.contenders, found, strict=True)
        for name, value in measured.items()
    ]


def _alone(
    suite: Suite, contender: Contender, case: Case, device: torch.device, quick: bool
) -> dict[str, Found]:
    """What is found of one contender by itself."""
    if suite.kind == "memory":
        return contender.memory(case, device)
    if suite.kind == "cold start":
        assert isinstance(contender, Ours)
        return cold_start.measure(contender, case, device, repetitions=1 if quick else 3)
    with tf32_allowed(case.tf32):
        return contender.times(case, device, seconds=0.1 if quick else 0.5)
