"""The tile sizes of the Triton scan, and where R lies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from flashrnn.kernels.sizes import power_of_two
from flashrnn.problem import Problem

LARGEST_SCANNED_HEAD = 128


@dataclass(frozen=True)
class ScanPlan:
    """Tiles of the Triton scan; see ``scan.py``.

    Attributes:
        BLOCK_B: sequences of a program.
        BLOCK_D: the head dimension, padded.
        BLOCK_S: the number of states, padded.
        BLOCK_G: the number of gates, padded.
        warps: warps of a program.
        stages: steps whose inputs are being copied at once.
        R_in_registers: whether R stays in registers, or is read again at every step.
    """

    BLOCK_B: int
    BLOCK_D: int
    BLOCK_S: int
    BLOCK_G: int
    warps: int
    stages: int
    R_in_registers: bool

    @property
    def blocks(self) -> tuple[int, int, int, int]:
        """The sizes of the tiles, in the order of the kernels' parameters."""
        return self.BLOCK_D, self.BLOCK_B, self.BLOCK_S, self.BLOCK_G


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
    BLOCK_D = max(16, power_of_two(D))
    BLOCK_S, BLOCK_G = max(2, power_of_two(S)), max(2, power_of_two(G))
    # A tensor core instruction computes 16 units for a warp; products without it need more threads.
    warps = BLOCK_D // 16
    R_bytes = BLOCK_G * BLOCK_D * BLOCK_D * itemsize
    # R may take half of the registers. On its way there it is in shared memory, beside the inputs
    # that are being copied.
    stages = 4
    inputs_bytes = (stages - 1) * (BLOCK_G + 2 * BLOCK_S) * BLOCK_D * 8 * itemsize
    R_in_registers = R_bytes <= warps * 16384 and R_bytes + inputs_bytes <= shared_memory
    if exact and itemsize == 4:
        warps, R_in_registers = 2 * warps, False
    # Three slices of 16 summed units of R, and as many of the other operand, are being copied.
    slices_bytes = 3 * 16 * (BLOCK_G * BLOCK_D + 16) * itemsize
    if not R_in_registers and slices_bytes > shared_memory:
        return (
            f"{G} gates of {D} units; a slice of their recurrent matrix takes {slices_bytes} "
            f"bytes of shared memory, of which this GPU gives a program {shared_memory}"
        )
    return ScanPlan(8, BLOCK_D, BLOCK_S, BLOCK_G, warps, stages, R_in_registers)
