"""Plans of the forward scan of clusters by ``mma``; see ``mma_tile.cuh``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.cluster.plan import ClusterPlan, time_of_rounds
from flashrnn.kernels.common.gates_in_warp import padded
from flashrnn.kernels.gpu import GPU, clusters_at_once
from flashrnn.kernels.plan import Counts, best_of
from flashrnn.kernels.sizes import power_of_two, tiles_of
from flashrnn.problem import Problem

# Registers of a computing thread beside those of R and of its elements: addresses and the like, and
# sums of the product for each n-tile. The tests compile such kernels and find no spills.
_OTHER_REGISTERS = 56
_REGISTERS_A_TILE = 8
# With options of sequences; for resets the states that they go back to besides.
_REGISTERS_OF_SEQUENCES = 8
# Registers of a producer thread beside the addresses of what it copies, two registers each.
_PRODUCER_REGISTERS = 65

# Cycles of a step, fitted to the times of 53 plans of 15 problems on an H200
# (docs/cost-model.md): 7% off in the median, 14% or less for four in five.
_CYCLES = 140
_CYCLES_A_GATE = 75
_CYCLES_A_STATE = 25
# For each read of 128 bytes of shared memory.
_CYCLES_A_READ = 0.75
# For each 64 bytes that a CTA receives, four packets.
_CYCLES_A_RECEIPT = 4.75
# An mma takes 8 cycles of a quarter of a multiprocessor, a part of which other work hides.
_CYCLES_AN_MMA = 8
_PART_OF_MMA = 0.6
# Sixteen receivers of more than one n-tile.
_CYCLES_OF_MANY_PACKETS = 430


@dataclass(frozen=True, kw_only=True)
class ClusterMmaPlan(ClusterPlan):
    """How a cluster computes a head by ``mma``.

    Attributes:
        PRODUCERS: threads of a CTA that copy between global and shared memory.
        STAGES: steps in the ring of inputs.
        warps: warps of a CTA that compute.
        in_registers: fragments of R that stay in a warp's registers.
        in_shared: those that lie in shared memory.
    """

    ROW_ALIGNMENT: ClassVar = 16
    PRODUCERS: ClassVar = 64
    STAGES: ClassVar = 8

    warps: int
    in_registers: int
    in_shared: int

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return "cluster_mma_forward"

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps + self.PRODUCERS

    def source(
        self, cell: TracedCell, precision: str, options: source.Options, piece_bytes: int
    ) -> dict[str, str]:
        """See :meth:`flashrnn.kernels.plan.Plan.source`."""
        constants = {
            "D": self.D,
            "UNITS": self.units,
            "WARPS": self.warps,
            "N_TILES": self.n_tiles,
            "IN_REGISTERS": self.in_registers,
            "IN_SHARED": self.in_shared,
            "IN_MEMORY": 0,
            "PRODUCERS": self.PRODUCERS,
            "STAGES": self.STAGES,
            # Must be what the kernel computes of its parts: a static_assert holds them together.
            "SHARED_MEMORY": self.shared_memory,
            "STORED": len(cell.states),
            **dict(options),
        }
        record = call.FORWARD.complete if source.is_sequenced(options) else call.FORWARD
        return source.program("cluster/mma_forward.cu", cell, precision, constants, record)


def plan_forward(problem: Problem, gpu: GPU, backward: bool) -> ClusterMmaPlan | str:
    """The plan of a problem's forward scan, or the reason why there is none."""
    # A CTA's units of a sequence are copied in chunks of 16 bytes.
    if backward or problem.dtype.itemsize != 2 or problem.D % 8:
        return "it is for the forward scan, 16 bits and a D that is a multiple of 8"
    # Few kernels for all sizes of a batch.
    B, N = 8 * power_of_two(tiles_of(max(1, problem.B), 8)), problem.N
    counts = Counts.of_problem(problem)
    plan = best_plan(counts, B, N, problem.D, gpu)
    if plan is None:
        return f"no cluster of this GPU holds a head of {problem.D} units and its gates"
    cycles = estimated_cycles(plan, counts, max(1, problem.B), N, gpu)
    return replace(plan, estimated_cycles=cycles)


@lru_cache(maxsize=1024)
def best_plan(counts: Counts, B: int, N: int, D: int, gpu: GPU) -> ClusterMmaPlan | None:
    """The plan with the fewest :func:`estimated_cycles`, if there is any."""
    possible = possible_plans(counts, D, gpu)
    return best_of(possible, lambda plan: estimated_cycles(plan, counts, B, N, gpu))


def possible_plans(counts: Counts, D: int, gpu: GPU) -> Iterator[ClusterMmaPlan]:
    """All plans for heads of D units."""
    if not 1 <= counts.recurrent <= 4:
        return
    warp_units = 16 // padded(counts.recurrent)
    for size in (2, 4, 8, 16):
        # A multiple of 16 bytes, and of what a warp has.
        granule = max(8, warp_units)
        units = tiles_of(D, size * granule) * granule
        warps = units // warp_units
        threads = 32 * warps + ClusterMmaPlan.PRODUCERS
        if not clusters_at_once(size, gpu) or tiles_of(D, units) != size or threads > 1024:
            continue
        steps = tiles_of(size * units, 16)
        for n_tiles in (1, 2):
            elements = 4 // padded(counts.recurrent) * n_tiles
            # A quarter of a multiprocessor has 512 registers a lane, for its share of the warps.
            registers = min(255, 512 // tiles_of(threads, 128) // 8 * 8)
            working = _OTHER_REGISTERS + _REGISTERS_A_TILE * n_tiles
            working += elements * (2 * counts.gates + counts.states)
            if counts.sequence_bytes:
                working += _REGISTERS_OF_SEQUENCES + elements * counts.starts
            in_registers = min(steps, (registers - working) // 4)
            # A producer thread keeps the address of each 16 bytes that it copies, 8 units.
            copied = (counts.inputs, counts.states, counts.gates)
            chunks = sum(tiles_of(n_tiles * units * k, ClusterMmaPlan.PRODUCERS) for k in copied)
            if in_registers < 1 or _PRODUCER_REGISTERS + 2 * chunks > registers:
                continue

            # A sequence's values of a step: so many gates or states of the CTA's units, and 16
            # bytes, after which the next sequence's begin in other banks.
            def line(count: int, units: int = units) -> int:
                return 16 * (tiles_of(2 * count * units, 16) + 1)

            stages = ClusterMmaPlan.STAGES * line(counts.inputs)
            lines = stages + 2 * (line(counts.states) + line(counts.gates))
            exchange_bytes, in_shared = 2 * (steps * n_tiles * 256 + 8), steps - in_registers
            lines += counts.sequence_bytes
            shared_memory = exchange_bytes + 512 * warps * in_shared + 8 * n_tiles * lines
            if shared_memory <= gpu.shared_memory:
                yield ClusterMmaPlan(
                    D=D,
                    size=size,
                    units=units,
                    warps=warps,
                    n_tiles=n_tiles,
                    in_registers=in_registers,
                    in_shared=in_shared,
                    shared_memory=shared_memory,
                )


def estimated_cycles(plan: ClusterMmaPlan, counts: Counts, B: int, N: int, gpu: GPU) -> float:
    """The cycles of a step of all sequences, by which plans of all regimes are compared."""
    steps = tiles_of(plan.size * plan.units, 16)
    # Each warp reads all of h, and its own part of R.
    reads = plan.warps * (2 * steps * plan.n_tiles + 4 * plan.in_shared)
    receipts = plan.size * plan.units // 4 * plan.n_tiles
    multiply = tiles_of(plan.warps, 4) * steps * plan.n_tiles * _CYCLES_AN_MMA
    step = (
        _CYCLES
        + _CYCLES_A_GATE * counts.gates
        + _CYCLES_A_STATE * counts.states
        + _CYCLES_A_READ * reads
        + _CYCLES_A_RECEIPT * receipts
        + _PART_OF_MMA * multiply
    )
    step += _CYCLES_OF_MANY_PACKETS if plan.size == 16 and plan.n_tiles > 1 else 0
    return step * time_of_rounds(plan.rounds(B, N, gpu))
