"""How a cluster of thread blocks owns a head and many sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar

from flashrnn.problem import Problem
from flashrnn.tiling.cluster import Rows
from flashrnn.tiling.gpu import GPU, clusters_at_once
from flashrnn.tiling.sizes import one_of_few, tiles_of


@dataclass(frozen=True)
class WideClusterPlan:
    """How a cluster of thread blocks owns a head; see ``kernels/wide_cluster.cuh``.

    Attributes:
        TRAFFIC: threads that move data.
        TRAFFIC_REGISTERS: that each of them keeps, where others go to threads that compute.
        size: thread blocks of the cluster.
        units: units of the head that a block owns.
        groups: groups of four warps of a block that compute.
        blocks: blocks of 8 sequences that the cluster owns.
        buffers: of what blocks send each other, one or two.
        held: steps of 16 of R's columns that stay in the registers of a group.
        shared_memory: a block's dynamic shared memory in bytes.
        cycles: what a step is reckoned to take, of no concern to a kernel.
    """

    TRAFFIC: ClassVar = 128
    TRAFFIC_REGISTERS: ClassVar = 56

    size: int
    units: int
    groups: int
    blocks: int
    buffers: int
    held: int
    shared_memory: int
    cycles: float = field(default=0.0, compare=False)

    def threads(self) -> int:
        """Threads of a block."""
        return 128 * self.groups + self.TRAFFIC

    @property
    def registers(self) -> int:
        """Registers of a thread that computes: a multiple of 8, as hardware has them shared out."""
        return registers_of(self.groups)

    def clusters(self, B: int, N: int) -> int:
        """Clusters of a launch: heads times what a cluster owns of their sequences."""
        return N * tiles_of(B, 8 * self.blocks)


def plan_wide_cluster(problem: Problem, gpu: GPU) -> WideClusterPlan | None:
    """How clusters own the heads of a problem in a forward scan, if they can."""
    # Pieces of 16 bytes have eight units.
    if not gpu.multiplies_by_groups or problem.dtype.itemsize != 2 or problem.D % 8:
        return None
    B, N, rows = max(1, problem.B), problem.N, Rows.of(problem.cell)
    # Few kernels for all sizes of a batch.
    plan = best_plan(rows, 8 * one_of_few(tiles_of(B, 8)), N, problem.D, gpu)
    return plan and replace(plan, cycles=cycles(plan, rows, B, N, gpu))


@lru_cache(maxsize=1024)
def best_plan(rows: Rows, B: int, N: int, D: int, gpu: GPU) -> WideClusterPlan | None:
    """The plan with the fewest :func:`cycles`, if there is any."""
    plans = [
        replace(plan, cycles=cycles(plan, rows, B, N, gpu)) for plan in possible_plans(rows, D, gpu)
    ]
    return min(plans, key=lambda plan: plan.cycles, default=None)


def possible_plans(rows: Rows, D: int, gpu: GPU) -> Iterator[WideClusterPlan]:
    """All plans for heads of D units."""
    if not 1 <= rows.recurrent <= 4:
        return
    for groups in (1, 2, 3):
        units = 64 // rows.padded * groups
        size = tiles_of(D, units)
        if size < 2 or not clusters_at_once(size, gpu):
            continue
        steps = size * units // 16
        # With one block it has never been the best way.
        for blocks in range(2, 9):
            carried = 4 // rows.padded * blocks * rows.states
            working = 24 + 4 * blocks + carried + (8 if carried > 20 else 0)
            held = min(steps, (registers_of(groups) - working) // 4)
            if held < 1:
                continue
            line = 16 * units * blocks
            for buffers in (2, 1):
                lines = buffers * size + rows.gates + rows.states - 1
                barriers = buffers * tiles_of(size, min(4, size)) + 1
                shared_memory = lines * line + 16 + 16 * tiles_of(barriers, 2)
                shared_memory += 4 * rows.gates * units + groups * (steps - held) * 2048
                if shared_memory <= gpu.shared_memory:
                    yield WideClusterPlan(size, units, groups, blocks, buffers, held, shared_memory)
                    break


def registers_of(groups: int) -> int:
    """See :attr:`WideClusterPlan.registers`."""
    left = 64 * 1024 - WideClusterPlan.TRAFFIC * WideClusterPlan.TRAFFIC_REGISTERS
    return min(240, left // (128 * groups) // 8 * 8)


def cycles(plan: WideClusterPlan, rows: Rows, B: int, N: int, gpu: GPU) -> float:
    """What a step of all sequences takes, in the measure of :func:`flashrnn.tiling.team.cycles`.

    Its numbers follow what was measured on an H200 (docs/performance.md), the mean of calls that
    save pre-activations and calls that do not.
    """
    steps = plan.size * plan.units // 16
    elements = plan.size * plan.units * plan.blocks
    values = 8 * plan.units * plan.blocks * (rows.gates + rows.states)
    step = 1970 + 1.6 * plan.groups * steps + 0.68 * elements + 0.334 * values
    # Without a second buffer blocks wait for one another once more.
    step += 740 if plan.buffers == 1 else 0
    return step * tiles_of(plan.clusters(B, N), clusters_at_once(plan.size, gpu))
