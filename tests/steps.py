"""Calls that a library's product and the cell's launch compute, however few sequences they have."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from flashrnn import calls
from flashrnn.backends import cuda, steps
from flashrnn.kernels import registry
from flashrnn.kernels.per_step import cell_plan


def forget() -> None:
    """Empty the caches of what is chosen by estimated times."""
    registry.plan_steps.cache_clear()
    cuda._planned_steps.cache_clear()
    calls.kept.clear()


def by_steps(monkeypatch: pytest.MonkeyPatch, backward: Sequence[bool] = (False, True)) -> None:
    """Have backends compute such directions step by step wherever they can, and no other.

    Whoever asks for it forgets what was chosen when it ends.
    """

    def estimated_cycles(problem: object, precision: str, gpu: object, direction: bool) -> float:
        return 0.0 if direction in backward else math.inf

    for module in (cell_plan, steps):
        monkeypatch.setattr(module, "FEWEST", 1)
    monkeypatch.setattr(cell_plan, "estimated_cycles", estimated_cycles)
    forget()
