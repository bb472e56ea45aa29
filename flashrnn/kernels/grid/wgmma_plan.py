"""How a group of CTAs owns a head and many sequences, by ``wgmma``; see ``wgmma_tile.cuh``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.common import wgmma
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.plan import Counts, Plan, Scratch
from flashrnn.kernels.sizes import tiles_of
from flashrnn.problem import Problem

# A warpgroup has a warp for each batch tile. With fewer batch tiles than this, mma is as fast
# (docs/cost-model.md: 1x768, B = 64).
_FEWEST_TILES, _MOST_TILES = 3, 4
# Columns of the largest wgmma.
_MOST_COLUMNS = 256
# Slices that a warp loads at once: packets take 16 registers each.
_MOST_SLICES_AT_ONCE = 4
# Numbers of wgmma_tile.cuh.
_THREADS, _WARPGROUPS, _LANE_UNITS, _PACKET_WORDS = 256, 2, 6, 3

# Cycles of a step, fitted to 20 times of an H200 and scaled by 0.83, so that they compare with the
# other regimes' estimates (docs/cost-model.md): 3% off in the median. Each warp has a batch tile of
# its own, so that the cell takes as long for one as for four: so many cycles for each gate that R
# feeds, whose sums partner warps exchange, and for each state. But batch tiles wait for one another
# where they receive slices and where they save gates.
_VALUE_CYCLES, _SLICE_CYCLES, _SAVED_GATE_CYCLES = 850, 41, 211


@dataclass(frozen=True, kw_only=True)
class GridWgmmaPlan(Plan):
    """How a group of CTAs owns a head and many sequences.

    Attributes:
        UNITS: units of the head that a CTA owns.
        recurrent: gates that R feeds.
        size: CTAs of a group.
        batch_tiles: batch tiles of 16 sequences that a group owns.
        slices_at_once: slices of the packets that a warp loads at once.
        packets: 16-byte packets of a group's buffers in global memory, two for each batch tile.
    """

    COOPERATIVE: ClassVar = True
    # Two neighbouring units are loaded as one word.
    ROW_ALIGNMENT: ClassVar = 4
    UNITS: ClassVar = 4 * _LANE_UNITS

    recurrent: int
    size: int
    batch_tiles: int
    slices_at_once: int
    packets: int

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return "grid_wgmma_forward"

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return _THREADS

    def groups(self, B: int, N: int, gpu: GPU) -> int:
        """CTA groups of a launch, as many as run at once."""
        return min(N * tiles_of(B, 16 * self.batch_tiles), gpu.multiprocessors // self.size)

    def grid(self, B: int, N: int, gpu: GPU) -> int:
        """CTAs of a launch."""
        return self.groups(B, N, gpu) * self.size

    def scratch(self, B: int, N: int, gpu: GPU) -> Scratch:
        """See :meth:`flashrnn.kernels.plan.Plan.scratch`."""
        return Scratch(packets=self.groups(B, N, gpu) * self.packets, R_in_memory=0)

    def source(
        self, cell: TracedCell, precision: str, options: source.Options, piece_bytes: int
    ) -> dict[str, str]:
        """See :meth:`flashrnn.kernels.plan.Plan.source`."""
        constants = {
            "D": self.D,
            "BATCH_TILES": self.batch_tiles,
            "SLICES_AT_ONCE": self.slices_at_once,
            "GROUP_PACKETS": self.packets,
            "SHARED_BYTES": self.shared_memory,
            "STORED": len(cell.states),
            **dict(options),
        }
        columns = self.UNITS * self.recurrent
        generated = {"common/wgmma.cuh": wgmma.instruction(columns, precision)}
        record = call.FORWARD.complete if source.is_sequenced(options) else call.FORWARD
        kernel = "grid/wgmma_forward.cu"
        return source.program(kernel, cell, precision, constants, record, generated)


def plan_forward(problem: Problem, gpu: GPU, backward: bool) -> GridWgmmaPlan | str:
    """How groups of CTAs own the heads of a problem in a forward scan, or why they do not."""
    cell, N, D = problem.cell, problem.N, problem.D
    recurrent = len(cell.fed_by("R"))
    if backward or problem.dtype.itemsize != 2 or D % 2:
        return "it is for the forward scan, 16 bits and an even D"
    if not gpu.multiplies_by_groups:
        return "it needs a GPU with wgmma"
    size = tiles_of(D, GridWgmmaPlan.UNITS)
    groups = gpu.multiprocessors // size
    if not groups or not 1 <= recurrent <= _MOST_COLUMNS // GridWgmmaPlan.UNITS:
        return f"a head of {D} units with {recurrent} gates that R feeds"
    batch_tiles = min(_MOST_TILES, tiles_of(N * tiles_of(problem.B, 16), groups))
    slices = _slices_a_warp(size)
    shared_memory = _shared_memory(slices, recurrent, len(cell.gates))
    if batch_tiles < _FEWEST_TILES or shared_memory > gpu.shared_memory:
        return "too few sequences, or too large a recurrent matrix"
    plan = GridWgmmaPlan(
        D=D,
        recurrent=recurrent,
        size=size,
        batch_tiles=batch_tiles,
        # Parts of equal size.
        slices_at_once=tiles_of(slices, tiles_of(slices, _MOST_SLICES_AT_ONCE)),
        # Two buffers, of two packets a lane for each slice and each of two n-tiles.
        packets=batch_tiles * 2 * _WARPGROUPS * slices * 2 * 2 * 32,
        shared_memory=shared_memory,
    )
    counts = Counts.of_problem(problem)
    cycles = estimated_cycles(plan, counts, max(1, problem.B), N, gpu)
    return replace(plan, estimated_cycles=cycles)


def _slices_a_warp(size: int) -> int:
    """Slices of 8 packets that a warp receives: each CTA sends 4, and a warpgroup takes half."""
    return tiles_of(4 * size, 8 * _WARPGROUPS)


def _shared_memory(slices: int, recurrent: int, gates: int) -> int:
    """Bytes of a CTA's part of R, of the sums for partner warps, and of the bias."""
    summed = _WARPGROUPS * slices * _PACKET_WORDS * 16
    matrix = summed * GridWgmmaPlan.UNITS * recurrent * 2
    partner_sums = _THREADS * _LANE_UNITS * recurrent * 4
    return matrix + partner_sums + 4 * gates * GridWgmmaPlan.UNITS


def estimated_cycles(plan: GridWgmmaPlan, counts: Counts, B: int, N: int, gpu: GPU) -> float:
    """What a step of all sequences takes, comparable with the grid's ``estimated_cycles``."""
    slices = _WARPGROUPS * _slices_a_warp(plan.size)
    work_tiles = N * tiles_of(B, 16 * plan.batch_tiles)
    rounds = tiles_of(work_tiles, plan.groups(B, N, gpu))
    of_a_tile = _SLICE_CYCLES * slices + _SAVED_GATE_CYCLES * counts.saved
    of_the_cell = _VALUE_CYCLES * (counts.recurrent + counts.states)
    return rounds * (of_the_cell + plan.batch_tiles * of_a_tile)
