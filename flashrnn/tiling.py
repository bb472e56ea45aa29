"""Plans: how a kernel is tiled for a problem. Pure functions of the problem."""

from __future__ import annotations

from dataclasses import dataclass

from flashrnn.problem import Problem


@dataclass(frozen=True)
class ScanPlan:
    """Tiles of the Triton scan.

    Attributes:
        BB: sequences a program owns.
        DD: the head dimension, padded.
        warps: warps of a program.
    """

    BB: int
    DD: int
    warps: int


def plan_scan(problem: Problem) -> ScanPlan:
    """The tiles of the Triton scan for a problem."""
    DD = max(16, 1 << (problem.D - 1).bit_length())
    return ScanPlan(BB=16, DD=DD, warps={16: 1, 32: 2, 64: 4}.get(DD, 8))
