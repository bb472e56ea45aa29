"""Plans of the forward scan of many sequences that reads R at each step; see ``tile.cuh``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.call import Scratch
from flashrnn.kernels.common import wgmma
from flashrnn.kernels.gpu import GPU, clusters_at_once
from flashrnn.kernels.plan import (
    TAKEN,
    TAKEN_WITH_TF32,
    Counts,
    Plan,
    best_of,
    read_states,
)
from flashrnn.kernels.sizes import tiles_of
from flashrnn.problem import Problem

_SEQUENCES = 128
"""Of a tile: 64 for each warpgroup that computes."""

_CHUNK_STRIPES = 8

_MOST_READ = 2
"""Carried states that a step may read. Numbers of more do not fit into registers: the compiler
spills, and with three a step is no faster than by other regimes."""

# Cycles of a step, fitted to times of an H200 (docs/cost-model.md). Of a work tile; for each chunk,
# at least and for each column; for each unit: for each gate and state, for each gate that is saved,
# and for each carried state that a step reads. Where it is given by bytes of an element, float32 is
# by TF32.
_CYCLES_OF_A_WORK_TILE, _CYCLES_OF_A_CHUNK, _CYCLES_A_COLUMN = 3350, 500, {2: 4.9, 4: 5.6}
_CYCLES_A_VALUE, _CYCLES_A_SAVED_GATE = {2: 11, 4: 19}, {2: 15, 4: 26}
_CYCLES_A_CARRIED_STATE = 64
# Where a tile's rows do not fill whole lines of the cache, and its neighbours are computed later.
_BROKEN_LINES = 1.25


@dataclass(frozen=True, kw_only=True)
class StreamedPlan(Plan):
    """How CTAs divide the steps of many sequences.

    Attributes:
        PRODUCERS: threads of a CTA that copy R and h.
        PRODUCER_REGISTERS: registers that each of them keeps.
        registers: registers of each computing thread.
        cluster_size: CTAs of a cluster, which share what they read of R.
        units: units of a tile.
        recurrent: gates that R feeds.
        itemsize: bytes of an element.
        stages: chunks of R and h for which shared memory has room.
    """

    ROW_ALIGNMENT: ClassVar = 16
    KEEPS_R: ClassVar = False
    PRODUCERS: ClassVar = 128
    PRODUCER_REGISTERS: ClassVar = 24
    registers: ClassVar = 240
    cluster_size: ClassVar = 2

    units: int
    recurrent: int
    itemsize: int
    stages: int

    @property
    def cooperative(self) -> bool:
        """Whether all CTAs of a launch must run at once."""
        return True

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return "streamed_forward"

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 2 * _SEQUENCES + self.PRODUCERS

    @property
    def unit_tiles(self) -> int:
        """Tiles side by side that a head takes."""
        return tiles_of(self.D, self.units)

    @property
    def stripes(self) -> int:
        """Stripes of a head's units, of 16 bytes each: an even number."""
        return 2 * tiles_of(self.D * self.itemsize, 32)

    def row_tiles(self, B: int) -> int:
        """Tiles one above the other: as many as whole clusters have."""
        return self.cluster_size * tiles_of(B, self.cluster_size * _SEQUENCES)

    def work_tiles(self, B: int, N: int) -> int:
        """What clusters compute at a time."""
        return N * self.unit_tiles * self.row_tiles(B) // self.cluster_size

    def groups(self, B: int, N: int, gpu: GPU) -> int:
        """Clusters of a launch, as many as run at once."""
        return min(self.work_tiles(B, N), clusters_at_once(self.cluster_size, gpu))

    def grid(self, B: int, N: int, gpu: GPU) -> int:
        """CTAs of a launch."""
        return self.groups(B, N, gpu) * self.cluster_size

    def scratch(self, B: int, N: int, gpu: GPU) -> Scratch:
        """See :meth:`flashrnn.kernels.plan.Plan.scratch`."""
        rows = N * self.row_tiles(B)
        of_R = N * self.unit_tiles * self.units * self.recurrent * self.stripes
        # Two buffers.
        of_h = 2 * rows * _SEQUENCES * self.stripes
        return Scratch(packets=tiles_of(1 + rows, 4), R_in_memory=of_R + of_h)

    def source(
        self, cell: TracedCell, precision: str, options: source.Options, piece_bytes: int
    ) -> dict[str, str]:
        """See :meth:`flashrnn.kernels.plan.Plan.source`."""
        constants = {
            "D": self.D,
            "CLUSTER_SIZE": self.cluster_size,
            "UNITS": self.units,
            "STAGES": self.stages,
            "PRODUCERS": self.PRODUCERS,
            "PRODUCER_REGISTERS": self.PRODUCER_REGISTERS,
            "COMPUTING_REGISTERS": self.registers,
            # Must be what the kernel computes of its parts: a static_assert holds them together.
            "SHARED_MEMORY": self.shared_memory,
            "READ": read_states(cell, False),
            "STORED": len(cell.states),
            **dict(options),
        }
        generated = {"common/wgmma.cuh": wgmma.instruction(self.units * self.recurrent, precision)}
        kernel = "streamed/forward.cu"
        return source.program(kernel, cell, precision, constants, call.FORWARD, generated)


def plan_forward(problem: Problem, gpu: GPU, backward: bool) -> StreamedPlan | str:
    """The plan of a problem's forward scan, or the reason why there is none."""
    itemsize = problem.dtype.itemsize
    if backward or not (itemsize == 2 or (itemsize == 4 and problem.allow_tf32)):
        return "it is for the forward scan, in 16 bits or by TF32"
    if problem.D * itemsize % 16:
        return "it needs heads whose rows are a multiple of 16 bytes"
    if problem.is_sequenced:
        return "it has no options of sequences"
    if not gpu.multiplies_by_groups:
        return "it needs a GPU with wgmma"
    counts, read = Counts.of_problem(problem), read_states(problem.cell, False).bit_count()
    if read > _MOST_READ:
        return f"a step of the cell reads more than {_MOST_READ} carried states"
    sizes = max(1, problem.B), problem.N, problem.D
    plan = best_plan(counts, read, *sizes, itemsize, gpu)
    return "no tile of it fits into a CTA" if plan is None else plan


@lru_cache(maxsize=1024)
def best_plan(
    counts: Counts, read: int, B: int, N: int, D: int, itemsize: int, gpu: GPU
) -> StreamedPlan | None:
    """The plan with the fewest :func:`estimated_cycles`, if there is any."""
    plans = possible_plans(counts, D, itemsize, gpu)
    return best_of(plans, lambda plan: estimated_cycles(plan, counts, read, B, N, gpu))


def possible_plans(counts: Counts, D: int, itemsize: int, gpu: GPU) -> Iterator[StreamedPlan]:
    """All plans for heads of D units, of elements of so many bytes."""
    if not clusters_at_once(StreamedPlan.cluster_size, gpu):
        return
    for units in (16, 32, 48, 64):
        columns = units * counts.recurrent
        if columns > 256 or units >= D + 16:
            continue
        # Beyond four a ring hides nothing more of wide tiles, and leaves the L1 cache less.
        for stages in (4, 3) if columns > 128 else (6, 5, 4):
            plan = StreamedPlan(
                D=D,
                units=units,
                recurrent=counts.recurrent,
                itemsize=itemsize,
                stages=stages,
                shared_memory=0,
            )
            plan = replace(plan, shared_memory=shared_memory_of(plan, counts))
            if plan.shared_memory <= gpu.shared_memory:
                yield plan
                break


def shared_memory_of(plan: StreamedPlan, counts: Counts) -> int:
    """Bytes of a CTA's shared memory, part by part as the kernel lays it out."""
    slot = _CHUNK_STRIPES * 16 * (plan.units * plan.recurrent + _SEQUENCES)
    return plan.stages * (slot + 16) + 4 * counts.gates * plan.units


def estimated_cycles(
    plan: StreamedPlan, counts: Counts, read: int, B: int, N: int, gpu: GPU
) -> float:
    """The cycles of a step of all sequences, by which plans of all regimes are compared.

    Args:
        plan: the plan.
        counts: of the problem.
        read: carried states that a step reads.
        B: sequences.
        N: heads.
        gpu: the GPU.
    """
    rounds = tiles_of(plan.work_tiles(B, N), plan.groups(B, N, gpu))
    size, columns = plan.itemsize, plan.units * plan.recurrent
    chunk = max(_CYCLES_OF_A_CHUNK, _CYCLES_A_COLUMN[size] * columns)
    of_a_unit = _CYCLES_A_VALUE[size] * (counts.gates + counts.states)
    of_a_unit += _CYCLES_A_SAVED_GATE[size] * counts.saved + _CYCLES_A_CARRIED_STATE * read
    chunks = tiles_of(plan.stripes, _CHUNK_STRIPES)
    cycles = _CYCLES_OF_A_WORK_TILE + chunks * chunk + plan.units * of_a_unit
    broken = _BROKEN_LINES if rounds > 1 and plan.units * size % 64 else 1.0
    # Times of an H200, as others' estimates are beside them.
    taken = TAKEN if size == 2 else TAKEN_WITH_TF32
    return rounds * cycles * broken / taken
