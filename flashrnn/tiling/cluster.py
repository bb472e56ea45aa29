"""How a cluster of thread blocks owns a head warp by warp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar, NamedTuple

from flashrnn.cells.traced import TracedCell
from flashrnn.problem import Problem
from flashrnn.tiling.gpu import GPU, clusters_at_once
from flashrnn.tiling.sizes import power_of_two, tiles_of


@dataclass(frozen=True)
class ClusterPlan:
    """How a cluster of thread blocks owns a head; see ``kernels/cluster.cuh``.

    Attributes:
        TRAFFIC: threads that move data.
        STAGES: steps whose inputs are on their way at once, or being read.
        size: thread blocks of the cluster.
        units: units of the head that a block owns.
        warps: warps of a block that compute.
        blocks: blocks of 8 sequences that the cluster owns.
        held: fragments of R that stay in a warp's registers.
        spared: those that lie in shared memory.
        shared_memory: a block's dynamic shared memory in bytes.
        cycles: what a step is reckoned to take, of no concern to a kernel.
    """

    TRAFFIC: ClassVar = 64
    STAGES: ClassVar = 8

    size: int
    units: int
    warps: int
    blocks: int
    held: int
    spared: int
    shared_memory: int
    cycles: float = field(default=0.0, compare=False)

    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps + self.TRAFFIC

    def clusters(self, B: int, N: int) -> int:
        """Clusters of a launch: heads times what a cluster owns of their sequences."""
        return N * tiles_of(B, 8 * self.blocks)


def plan_cluster(problem: Problem, gpu: GPU) -> ClusterPlan | None:
    """How clusters own the heads of a problem in a forward scan, if they can."""
    # Of 16 bytes, the units that a block has of a sequence.
    if problem.dtype.itemsize != 2 or problem.D % 8:
        return None
    # Few kernels for all sizes of a batch.
    B, N, rows = 8 * power_of_two(tiles_of(max(1, problem.B), 8)), problem.N, Rows.of(problem.cell)
    plan = best_plan(rows, B, N, problem.D, gpu)
    return plan and replace(plan, cycles=cycles(plan, rows, max(1, problem.B), N, gpu))


class Rows(NamedTuple):
    """How many numbers of a unit and sequence a step has of each kind.

    Attributes:
        recurrent: gates that R feeds.
        inputs: gates that Wx feeds.
        states: states.
        gates: gates of any kind.
    """

    recurrent: int
    inputs: int
    states: int
    gates: int

    @staticmethod
    def of(cell: TracedCell) -> Rows:
        """Those of a cell."""
        recurrent, inputs = (len(cell.fed_by(source)) for source in ("R", "Wx"))
        return Rows(recurrent, inputs, len(cell.states), len(cell.gates))

    @property
    def padded(self) -> int:
        """Rows of R that the tensor core multiplies for a unit; see ``kernels/rows.cuh``."""
        return self.recurrent if self.recurrent <= 2 else 4


@lru_cache(maxsize=1024)
def best_plan(rows: Rows, B: int, N: int, D: int, gpu: GPU) -> ClusterPlan | None:
    """The plan with the fewest :func:`cycles`, if there is any."""
    plans = [
        replace(plan, cycles=cycles(plan, rows, B, N, gpu)) for plan in possible_plans(rows, D, gpu)
    ]
    return min(plans, key=lambda plan: plan.cycles, default=None)


def possible_plans(rows: Rows, D: int, gpu: GPU) -> Iterator[ClusterPlan]:
    """All plans for heads of D units."""
    if not 1 <= rows.recurrent <= 4:
        return
    warp_units = 16 // rows.padded
    for size in (2, 4, 8, 16):
        # A multiple of 16 bytes, and of what a warp has.
        granule = max(8, warp_units)
        units = tiles_of(D, size * granule) * granule
        warps = units // warp_units
        threads = 32 * warps + ClusterPlan.TRAFFIC
        if not clusters_at_once(size, gpu) or tiles_of(D, units) != size or threads > 1024:
            continue
        steps = tiles_of(size * units, 16)
        for blocks in (1, 2):
            owned = 4 // rows.padded * blocks
            # Each quarter of a multiprocessor has a quarter of its registers for its warps.
            registers = min(255, 512 // tiles_of(threads, 128) // 8 * 8)
            working = 56 + 8 * blocks + owned * (2 * rows.gates + rows.states)
            held = min(steps, (registers - working) // 4)
            # A traffic thread keeps the addresses of its pieces, of 8 units each.
            counts = (rows.inputs, rows.states, rows.gates)
            pieces = sum(tiles_of(blocks * units * k, ClusterPlan.TRAFFIC) for k in counts)
            if held < 1 or 65 + 2 * pieces > registers:
                continue

            def line(count: int, units: int = units) -> int:
                return 16 * (tiles_of(2 * count * units, 16) + 1)

            stages = ClusterPlan.STAGES * line(rows.inputs)
            lines = stages + 2 * (line(rows.states) + line(rows.gates))
            exchange_bytes, spared = 2 * (steps * blocks * 256 + 8), steps - held
            shared_memory = exchange_bytes + 512 * warps * spared + 8 * blocks * lines
            if shared_memory <= gpu.shared_memory:
                yield ClusterPlan(size, units, warps, blocks, held, spared, shared_memory)


def cycles(plan: ClusterPlan, rows: Rows, B: int, N: int, gpu: GPU) -> float:
    """What a step of all sequences takes, in the measure of :func:`flashrnn.tiling.team.cycles`.

    Its numbers follow what was measured on an H200 (docs/performance.md).
    """
    steps = tiles_of(plan.size * plan.units, 16)
    # Reads of 128 bytes from shared memory, of h and of R.
    reads = plan.warps * (2 * steps * plan.blocks + 4 * plan.spared)
    # Parcels that arrive together, 64 bytes.
    packets = plan.size * plan.units // 4 * plan.blocks
    # Of the warps of a quarter of a multiprocessor.
    multiply = tiles_of(plan.warps, 4) * steps * plan.blocks * 8
    step = 140 + 75 * rows.gates + 25 * rows.states + 0.75 * reads + 4.75 * packets + 0.6 * multiply
    # Many to send to, and much for each.
    step += 430 if plan.size == 16 and plan.blocks > 1 else 0
    rounds = tiles_of(plan.clusters(B, N), clusters_at_once(plan.size, gpu))
    return step * (rounds + 0.03 * (rounds - 1))
