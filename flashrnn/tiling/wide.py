"""How a team of thread blocks owns a head and many sequences."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from flashrnn.problem import Problem
from flashrnn.tiling.gpu import GPU
from flashrnn.tiling.sizes import tiles_of

# With fewer for each team its step takes longer than that of plan_team's; see docs/performance.md.
_FEWEST_TILES, _MOST_TILES = 3, 4


@dataclass(frozen=True)
class WidePlan:
    """How a team of thread blocks owns a head and many sequences; see ``kernels/wide.cuh``.

    Attributes:
        UNITS: units of the head that a block owns.
        THREADS: of a block.
        size: thread blocks of a team.
        tiles: tiles of 16 sequences that a team owns.
        at_once: slices of what the team exchanges that a warp asks for at once.
        parcels: 16-byte parcels of a team's buffers in global memory, two for each tile.
        shared_memory: a block's dynamic shared memory in bytes.
        cycles: what a step is reckoned to take, of no concern to a kernel.
    """

    UNITS: ClassVar = 24
    THREADS: ClassVar = 256

    size: int
    tiles: int
    at_once: int
    parcels: int
    shared_memory: int
    cycles: float = field(default=0.0, compare=False)

    def teams(self, B: int, N: int, gpu: GPU) -> int:
        """Teams of a launch, as many as run at once."""
        return min(N * tiles_of(B, 16 * self.tiles), gpu.multiprocessors // self.size)


def plan_wide(problem: Problem, gpu: GPU) -> WidePlan | None:
    """How teams own the heads of a problem in a forward scan, if they can and have much to do."""
    cell, N, D = problem.cell, problem.N, problem.D
    recurrent = len(cell.fed_by("R"))
    possible = gpu.multiplies_by_groups and problem.dtype.itemsize == 2 and D % 2 == 0
    # The product has at most 256 columns.
    if not possible or not 1 <= recurrent <= 10:
        return None
    size = tiles_of(D, WidePlan.UNITS)
    teams = gpu.multiprocessors // size
    if not teams:
        return None
    tiles = min(_MOST_TILES, tiles_of(N * tiles_of(problem.B, 16), teams))
    # Of a warp: half of those of all parcels, of 6 units each.
    slices = tiles_of(size, 4)
    # R, halves of sums for the other half's warps, and the bias.
    matrix_bytes = 2 * slices * 48 * WidePlan.UNITS * recurrent * 2
    halves_bytes = WidePlan.THREADS * 6 * recurrent * 4
    shared_memory = matrix_bytes + halves_bytes + 4 * len(cell.gates) * WidePlan.UNITS
    if tiles < _FEWEST_TILES or shared_memory > gpu.shared_memory:
        return None
    plan = WidePlan(
        size=size,
        tiles=tiles,
        # As equal parts as there are, of 4 at most.
        at_once=tiles_of(slices, tiles_of(slices, 4)),
        parcels=tiles * 2 * 2 * slices * 4 * 32,
        shared_memory=shared_memory,
    )
    values = len(cell.states) + len(cell.gates)
    return replace(plan, cycles=cycles(plan, values, max(1, problem.B), N, gpu))


def cycles(plan: WidePlan, values: int, B: int, N: int, gpu: GPU) -> float:
    """What a step of all sequences takes, in the measure of :func:`flashrnn.tiling.team.cycles`.

    Its numbers follow what was measured on an H200 (docs/performance.md), the mean of calls that
    save pre-activations and calls that do not. `values`: states and gates of a cell.
    """
    slices = 2 * tiles_of(plan.size, 4)
    items = N * tiles_of(B, 16 * plan.tiles)
    rounds = tiles_of(items, plan.teams(B, N, gpu))
    return rounds * (250 + plan.tiles * (44 * slices + 284 * values))
