"""From suites to rows: who is measured on what, and by what kind of measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flashrnn.bench import cold_start
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

    def of(self, suite: Suite, entry: Entry) -> list[Contender]:
        """Those who are measured on an entry of a suite."""
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
            # On a GPU its speed depends on the dtype by more than on anything else.
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
    """A contender on an entry of a suite."""

    suite: str
    entry: Entry
    contender: Contender


def plan(names: Sequence[str], selection: Selection, contestants: Contestants) -> list[Task]:
    """All tasks of some suites, in order."""
    return [
        Task(name, entry, contender)
        for name in names
        for entry in SUITES[name].entries(selection)
        for contender in contestants.of(SUITES[name], entry)
    ]


def measure(task: Task, quick: bool) -> list[Row]:
    """Carry out a task: a row for each of its measures."""
    suite, case, contender = SUITES[task.suite], task.entry.case, task.contender
    device = torch.device(suite.device)
    if suite.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    found: dict[str, Found]
    if suite.kind == "memory":
        found = contender.memory(case, device)
    elif suite.kind == "cold start":
        assert isinstance(contender, Ours)
        found = cold_start.measure(contender, case, device, repetitions=1 if quick else 3)
    else:
        found = contender.times(case, device, seconds=0.1 if quick else 0.5)
    includes = contender.includes(case, device)
    return [
        Row.of(task.suite, contender.name, case, includes, name, value, task.entry.marks.get(name))
        for name, value in found.items()
    ]
