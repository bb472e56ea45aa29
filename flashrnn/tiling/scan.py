"""How the Triton scan is tiled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from flashrnn.problem import Problem
from flashrnn.tiling.sizes import power_of_two

LARGEST_SCANNED_HEAD = 128


@dataclass(frozen=True)
class ScanPlan:
    """Tiles of the Triton scan; see :mod:`flashrnn.kernels.scan`.

    Attributes:
        BB: sequences a program owns.
        DD: the head dimension, padded.
        SS: the number of states, padded.
        GG: the number of gates, padded.
        warps: warps of a program.
        stages: steps whose inputs are on their way at once.
        resident: whether R stays in registers.
    """

    BB: int
    DD: int
    SS: int
    GG: int
    warps: int
    stages: int
    resident: bool


def plan_scan(problem: Problem, exact: bool, shared_memory: int) -> ScanPlan | str:
    """The tiles of the Triton scan for a problem, or the reason why there are none.

    Args:
        problem: its cell, head dimension and dtype decide.
        exact: whether float32 products are computed as such (``"ieee"``), not in tf32.
        shared_memory: bytes that a program may have of it.
    """
    S, G = len(problem.cell.states), len(problem.cell.gates)
    return _plan_scan(S, G, problem.D, problem.dtype.itemsize, exact, shared_memory)


@lru_cache(maxsize=1024)
def _plan_scan(
    S: int, G: int, D: int, itemsize: int, exact: bool, shared_memory: int
) -> ScanPlan | str:
    if D > LARGEST_SCANNED_HEAD:
        return (
            f"a head of {D} units; it takes up to {LARGEST_SCANNED_HEAD}, "
            "since one program computes a whole head"
        )
    DD, SS, GG = max(16, power_of_two(D)), max(2, power_of_two(S)), max(2, power_of_two(G))
    # A warp's tensor core instruction yields 16 units; products without it want more threads.
    warps = DD // 16
    R_bytes = GG * DD * DD * itemsize
    # R passes through shared memory into registers, of which it may take half, next to the
    # inputs on their way.
    stages = 4
    inputs_bytes = (stages - 1) * (GG + 2 * SS) * DD * 8 * itemsize
    resident = R_bytes <= warps * 16384 and R_bytes + inputs_bytes <= shared_memory
    if exact and itemsize == 4:
        warps, resident = 2 * warps, False
    # Three slices of 16 summed units on their way, and as many of the operand.
    streamed_bytes = 3 * 16 * (GG * DD + 16) * itemsize
    if not resident and streamed_bytes > shared_memory:
        return (
            f"{G} gates of {D} units; a slice of their recurrent matrix takes {streamed_bytes} "
            f"bytes of shared memory, of which this GPU gives a program {shared_memory}"
        )
    return ScanPlan(8, DD, SS, GG, warps, stages, resident)
