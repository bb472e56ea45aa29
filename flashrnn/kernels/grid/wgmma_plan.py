"""Plans of the forward scan of groups of clusters by ``wgmma``; see ``wgmma_tile.cuh``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.call import Scratch
from flashrnn.kernels.common import wgmma
from flashrnn.kernels.common.gates_in_warp import padded
from flashrnn.kernels.gpu import GPU, clusters_at_once
from flashrnn.kernels.plan import Counts, Plan, best_of
from flashrnn.kernels.sizes import one_of_few, tiles_of
from flashrnn.problem import Problem

# Registers of a multiprocessor, and the most that setmaxnreg is asked to give a thread.
_REGISTERS, _MOST_REGISTERS = 64 * 1024, 240
# Registers of a computing thread beside those of R, of its sums, of its states and pre-activations.
_OTHER_REGISTERS = 40
# With options of sequences.
_REGISTERS_OF_SEQUENCES = 8

# Cycles of a step, fitted to 404 times of an H200 (docs/cost-model.md): 3% off in the median. All
# are scaled by 0.83, so that they compare with the other regimes' estimates.
_CYCLES_OF_A_TURN = 1150
# For each step of the product and warpgroup: for each n-tile, and where R is in shared memory.
_CYCLES_AN_N_TILE, _CYCLES_A_READ = 2.36, 8.6
# For each packet of sums that a CTA receives, for each value that it copies between memories, and
# for each KB of h that all CTAs receive.
_CYCLES_A_PACKET, _CYCLES_A_VALUE, _CYCLES_A_KB = 0.91, 0.123, 0.035
# What h takes to all CTAs of the group, which other turns may cover.
_CYCLES_OF_THE_EXCHANGE = 2490


@dataclass(frozen=True, kw_only=True)
class GridWgmmaPlan(Plan):
    """How a group of clusters owns a head and many sequences.

    Attributes:
        PRODUCERS: threads of a CTA that receive and send h and copy between global and shared
            memory.
        PRODUCER_REGISTERS: registers that each of them keeps, where it gives others away.
        size: CTAs of a cluster.
        clusters: clusters of a group.
        rows: rows of R that a unit takes: a row for each gate that R feeds, 4 for 3 gates.
        warpgroups: warpgroups of a CTA that compute.
        n_tiles: n-tiles of 8 sequences of a batch tile.
        batch_tiles: batch tiles of a group, which take turns.
        in_registers: steps of the product, of 16 of R's columns, whose part of R is in registers.
    """

    ROW_ALIGNMENT: ClassVar = 16
    PRODUCERS: ClassVar = 128
    PRODUCER_REGISTERS: ClassVar = 56

    size: int
    clusters: int
    rows: int
    warpgroups: int
    n_tiles: int
    batch_tiles: int
    in_registers: int

    @property
    def cooperative(self) -> bool:
        """Whether all CTAs of a launch must run at once."""
        return True

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return "grid_wgmma_forward"

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 128 * self.warpgroups + self.PRODUCERS

    @property
    def registers(self) -> int:
        """Registers of a computing thread: a multiple of 8, as setmaxnreg takes them."""
        # What the CTA gets at its launch, when all of its threads have as many.
        all_registers = self.threads * (_REGISTERS // self.threads // 8 * 8)
        left = all_registers - self.PRODUCERS * self.PRODUCER_REGISTERS
        return min(_MOST_REGISTERS, left // (128 * self.warpgroups) // 8 * 8)

    @property
    def cluster_size(self) -> int:
        """CTAs of a cluster."""
        return self.size

    @property
    def units(self) -> int:
        """Units of the head that a cluster has."""
        return 64 // self.rows * self.warpgroups

    @property
    def steps(self) -> int:
        """Steps of a CTA's product, of 16 units each."""
        return tiles_of(self.clusters * self.units // 16, self.size)

    @property
    def slice_steps(self) -> int:
        """Steps of the product in a slice of h, which is received as a whole."""
        # Of 16 sequences a slice of 8 steps is small: lanes that poll get into each other's way.
        return 16 if self.n_tiles <= 2 else 8

    @property
    def h_bytes(self) -> int:
        """Bytes of h of a CTA's part, of a batch tile."""
        return self.steps * 16 * 8 * self.n_tiles * 2

    @property
    def packets(self) -> int:
        """16-byte pieces of a group's buffers and counters in global memory."""
        counters = self.batch_tiles * self.size * tiles_of(self.steps, self.slice_steps)
        return self.batch_tiles * 2 * self.size * self.h_bytes // 16 + tiles_of(counters, 4)

    def groups(self, B: int, N: int, gpu: GPU) -> int:
        """Groups of a launch, as many as run at once."""
        at_once = clusters_at_once(self.size, gpu) // self.clusters
        return min(N * tiles_of(B, 8 * self.n_tiles * self.batch_tiles), at_once)

    def grid(self, B: int, N: int, gpu: GPU) -> int:
        """CTAs of a launch."""
        return self.groups(B, N, gpu) * self.clusters * self.size

    def scratch(self, B: int, N: int, gpu: GPU) -> Scratch:
        """See :meth:`flashrnn.kernels.plan.Plan.scratch`."""
        return Scratch(packets=self.groups(B, N, gpu) * self.packets)

    def source(
        self, cell: TracedCell, precision: str, options: source.Options, piece_bytes: int
    ) -> dict[str, str]:
        """See :meth:`flashrnn.kernels.plan.Plan.source`."""
        constants = {
            "D": self.D,
            "CLUSTER_SIZE": self.size,
            "CLUSTERS": self.clusters,
            "UNITS": self.units,
            "WARPGROUPS": self.warpgroups,
            "N_TILES": self.n_tiles,
            "BATCH_TILES": self.batch_tiles,
            "IN_REGISTERS": self.in_registers,
            "SLICE_STEPS": self.slice_steps,
            # One warpgroup has as many registers as it can use without those of others.
            "SHIFT_REGISTERS": self.warpgroups > 1,
            "COMPUTING_REGISTERS": self.registers,
            "PRODUCERS": self.PRODUCERS,
            "PRODUCER_REGISTERS": self.PRODUCER_REGISTERS,
            "GROUP_PACKETS": self.packets,
            # Must be what the kernel computes of its parts: a static_assert holds them together.
            "SHARED_MEMORY": self.shared_memory,
            "STORED": len(cell.states),
            **dict(options),
        }
        generated = {"common/wgmma.cuh": wgmma.instruction(8 * self.n_tiles, precision)}
        kernel = "grid/wgmma_forward.cu"
        record = call.FORWARD.complete if source.is_sequenced(options) else call.FORWARD
        return source.program(kernel, cell, precision, constants, record, generated)


def plan_forward(problem: Problem, gpu: GPU, backward: bool) -> GridWgmmaPlan | str:
    """The plan of a problem's forward scan, or the reason why there is none."""
    # Units of a sequence are copied in chunks of 16 bytes.
    if backward or problem.dtype.itemsize != 2 or problem.D % 8:
        return "it is for the forward scan, 16 bits and a D that is a multiple of 8"
    if not gpu.multiplies_by_groups:
        return "it needs a GPU with wgmma"
    B, N, counts = max(1, problem.B), problem.N, Counts.of_problem(problem)
    # Few kernels for all sizes of a batch.
    plan = best_plan(counts, 8 * one_of_few(tiles_of(B, 8)), N, problem.D, gpu)
    if plan is None:
        return f"no group of clusters of this GPU holds a head of {problem.D} units and its gates"
    return replace(plan, estimated_cycles=estimated_cycles(plan, counts, B, N, gpu))


@lru_cache(maxsize=1024)
def best_plan(counts: Counts, B: int, N: int, D: int, gpu: GPU) -> GridWgmmaPlan | None:
    """The plan with the fewest :func:`estimated_cycles`, if there is any."""
    possible = possible_plans(counts, D, gpu)
    return best_of(possible, lambda plan: estimated_cycles(plan, counts, B, N, gpu))


def possible_plans(counts: Counts, D: int, gpu: GPU) -> Iterator[GridWgmmaPlan]:
    """All plans for heads of D units."""
    if not 1 <= counts.recurrent <= 4:
        return
    rows = padded(counts.recurrent)
    for size in (2, 4, 8):
        for warpgroups in (1, 2, 3, 4):
            clusters = tiles_of(D, 64 // rows * warpgroups)
            if clusters < 2 or clusters > clusters_at_once(size, gpu):
                continue
            for n_tiles in range(size, 17, size):
                for batch_tiles in (1, 2):
                    plan = GridWgmmaPlan(
                        D=D,
                        size=size,
                        clusters=clusters,
                        rows=rows,
                        warpgroups=warpgroups,
                        n_tiles=n_tiles,
                        batch_tiles=batch_tiles,
                        in_registers=0,
                        shared_memory=0,
                    )
                    in_registers = _in_registers(plan, counts)
                    if in_registers < 1:
                        continue
                    plan = replace(plan, in_registers=in_registers)
                    plan = replace(plan, shared_memory=shared_memory_of(plan, counts))
                    if plan.shared_memory <= gpu.shared_memory:
                        yield plan


def _in_registers(plan: GridWgmmaPlan, counts: Counts) -> int:
    """Steps of the product whose part of R fits into registers."""
    elements = 4 // plan.rows * plan.n_tiles // plan.size
    of_elements = elements * (plan.batch_tiles * counts.states + counts.gates)
    working = _OTHER_REGISTERS + 4 * plan.n_tiles + of_elements
    working += _REGISTERS_OF_SEQUENCES if counts.sequence_bytes else 0
    return min(plan.steps, (plan.registers - working) // 4)


def shared_memory_of(plan: GridWgmmaPlan, counts: Counts) -> int:
    """Bytes of a CTA's shared memory, part by part as the kernel lays it out."""
    h = plan.batch_tiles * plan.h_bytes
    own = plan.n_tiles // plan.size
    sums = 2 * (plan.size - 1) * own * 128 * plan.warpgroups * 16
    # One for each slice of each batch tile, one for each of these, and two for sums.
    barriers = plan.batch_tiles * (tiles_of(plan.steps, plan.slice_steps) + 1) + 2
    # With resets also a tile of the h that is stored.
    tiles = counts.gates + counts.states + (counts.starts > 0)
    tiles *= plan.batch_tiles * 8 * own * plan.units * 2
    bias = 4 * counts.gates * plan.units
    in_shared = plan.steps - plan.in_registers
    matrix = 2048 * plan.warpgroups * in_shared
    # Where sequences' rows lie, and with resets whether the next step starts anew.
    table = (counts.sequence_bytes + (4 if counts.starts else 0)) * plan.batch_tiles * 8 * own
    return h + sums + 16 * tiles_of(barriers, 2) + tiles + bias + matrix + table


def estimated_cycles(plan: GridWgmmaPlan, counts: Counts, B: int, N: int, gpu: GPU) -> float:
    """The cycles of a step of all sequences, by which plans of all regimes are compared."""
    work_tiles = N * tiles_of(B, 8 * plan.n_tiles * plan.batch_tiles)
    groups = plan.groups(B, N, gpu)
    own = plan.n_tiles // plan.size
    products = plan.warpgroups * plan.steps
    reads = plan.warpgroups * (plan.steps - plan.in_registers)
    packets = (plan.size - 1) * own * 128 * plan.warpgroups
    values = 8 * own * plan.units * (counts.inputs + counts.states + counts.saved)
    received = groups * plan.clusters * plan.size * plan.h_bytes / 1024
    turn = _CYCLES_OF_A_TURN + _CYCLES_AN_N_TILE * products * plan.n_tiles
    turn += _CYCLES_A_READ * reads + _CYCLES_A_PACKET * packets
    turn += _CYCLES_A_VALUE * values + _CYCLES_A_KB * received
    rounds = tiles_of(work_tiles, groups)
    return rounds * max(turn * plan.batch_tiles, turn + _CYCLES_OF_THE_EXCHANGE)
