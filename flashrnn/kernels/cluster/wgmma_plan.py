"""Plans of the forward scan of clusters by ``wgmma``; see ``wgmma_tile.cuh``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.cluster.plan import ClusterPlan
from flashrnn.kernels.common import wgmma
from flashrnn.kernels.common.gates_in_warp import padded
from flashrnn.kernels.gpu import GPU, clusters_at_once
from flashrnn.kernels.plan import Counts, best_of
from flashrnn.kernels.sizes import one_of_few, tiles_of
from flashrnn.problem import Problem

# Registers of a multiprocessor, and the most that setmaxnreg is asked to give a thread.
_REGISTERS = 64 * 1024
_MOST_REGISTERS = 240
# Registers of a computing thread beside those of R, of its sums and of its states; and some more
# where it has many states. The tests compile such kernels and find no spills.
_OTHER_REGISTERS = 24
_MANY_STATES = 11
_REGISTERS_OF_MANY_STATES = 8
# With options of sequences.
_REGISTERS_OF_SEQUENCES = 8

# Cycles of a step, fitted to 96 times of an H200 (docs/cost-model.md): 2% off in the median. All
# are scaled by 0.83, so that they compare with the other regimes' estimates.
_CYCLES_OF_A_PART = 710
# For each step of the product and warpgroup whose R is read from shared memory, by each part.
_CYCLES_A_READ = 14.2
# For each unit of all CTAs and n-tile: h, exchanged and multiplied.
_CYCLES_AN_H = 0.705
# For each gate and state of the CTA's units, and more for each gate that is saved.
_CYCLES_A_VALUE = 0.239
_CYCLES_A_SAVED_VALUE = 0.154
# What is left of these when h of a part is on its way during the other's turn.
_LEFT_OF_TWO_PARTS = 0.75


@dataclass(frozen=True, kw_only=True)
class ClusterWgmmaPlan(ClusterPlan):
    """How a cluster computes a head and many sequences by ``wgmma``.

    Attributes:
        PRODUCERS: threads of a CTA that send h and copy between global and shared memory.
        PRODUCER_REGISTERS: registers that each of them keeps, where it gives others away.
        warpgroups: warpgroups of a CTA that compute.
        parts: parts of the sequences that take turns, one or two: h of one is on its way while the
            warps multiply and compute the other.
        buffers: buffers of h of all CTAs, one or two.
        in_registers: steps of the product, of 16 of R's columns, whose part of R is in registers.
    """

    ROW_ALIGNMENT: ClassVar = 16
    PRODUCERS: ClassVar = 128
    PRODUCER_REGISTERS: ClassVar = 56

    warpgroups: int
    parts: int
    buffers: int
    in_registers: int

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return "cluster_wgmma_forward"

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 128 * self.warpgroups + self.PRODUCERS

    @property
    def registers(self) -> int:
        """Registers of a computing thread: a multiple of 8, as setmaxnreg takes them."""
        return registers_of(self.warpgroups)

    @property
    def n_tiles_of_parts(self) -> tuple[int, ...]:
        """The n-tiles of each part."""
        return tuple((self.n_tiles + i) // self.parts for i in reversed(range(self.parts)))

    def source(
        self, cell: TracedCell, precision: str, options: source.Options, piece_bytes: int
    ) -> dict[str, str]:
        """See :meth:`flashrnn.kernels.plan.Plan.source`."""
        constants = {
            "D": self.D,
            "GROUP_SIZE": self.size,
            "UNITS": self.units,
            "WARPGROUPS": self.warpgroups,
            "N_TILES": self.n_tiles,
            "PARTS": self.parts,
            "BUFFERS": self.buffers,
            "IN_REGISTERS": self.in_registers,
            # One warpgroup has as many registers as it can use without those of producers.
            "SHIFT_REGISTERS": self.warpgroups > 1,
            "COMPUTING_REGISTERS": self.registers,
            "PRODUCERS": self.PRODUCERS,
            "PRODUCER_REGISTERS": self.PRODUCER_REGISTERS,
            # Must be what the kernel computes of its parts: a static_assert holds them together.
            "SHARED_MEMORY": self.shared_memory,
            "STORED": len(cell.states),
            **dict(options),
        }
        columns = sorted({8 * n_tiles for n_tiles in self.n_tiles_of_parts})
        instructions = "\n".join(wgmma.instruction(count, precision) for count in columns)
        generated = {"common/wgmma.cuh": instructions}
        kernel = "cluster/wgmma_forward.cu"
        record = call.FORWARD.complete if source.is_sequenced(options) else call.FORWARD
        return source.program(kernel, cell, precision, constants, record, generated)


def plan_forward(problem: Problem, gpu: GPU, backward: bool) -> ClusterWgmmaPlan | str:
    """The plan of a problem's forward scan, or the reason why there is none."""
    # A CTA's units of a sequence are copied in chunks of 16 bytes.
    if backward or problem.dtype.itemsize != 2 or problem.D % 8:
        return "it is for the forward scan, 16 bits and a D that is a multiple of 8"
    if not gpu.multiplies_by_groups:
        return "it needs a GPU with wgmma"
    B, N, counts = max(1, problem.B), problem.N, Counts.of_problem(problem)
    # Few kernels for all sizes of a batch.
    plan = best_plan(counts, 8 * one_of_few(tiles_of(B, 8)), N, problem.D, gpu)
    if plan is None:
        return f"no cluster of this GPU holds a head of {problem.D} units and its gates"
    return replace(plan, estimated_cycles=estimated_cycles(plan, counts, B, N, gpu))


@lru_cache(maxsize=1024)
def best_plan(counts: Counts, B: int, N: int, D: int, gpu: GPU) -> ClusterWgmmaPlan | None:
    """The plan with the fewest :func:`estimated_cycles`, if there is any."""
    possible = possible_plans(counts, D, gpu)
    return best_of(possible, lambda plan: estimated_cycles(plan, counts, B, N, gpu))


def possible_plans(counts: Counts, D: int, gpu: GPU) -> Iterator[ClusterWgmmaPlan]:
    """All plans for heads of D units."""
    if not 1 <= counts.recurrent <= 4:
        return
    for warpgroups in (1, 2, 3):
        units = 64 // padded(counts.recurrent) * warpgroups
        size = tiles_of(D, units)
        if size < 2 or not clusters_at_once(size, gpu):
            continue
        steps = size * units // 16
        # With one n-tile another kernel was faster for every problem that was measured.
        for n_tiles in range(2, 9):
            carried = 4 // padded(counts.recurrent) * n_tiles * counts.states
            working = _OTHER_REGISTERS + 4 * n_tiles + carried
            working += _REGISTERS_OF_MANY_STATES if carried > _MANY_STATES else 0
            working += _REGISTERS_OF_SEQUENCES if counts.sequence_bytes else 0
            in_registers = min(steps, (registers_of(warpgroups) - working) // 4)
            if in_registers < 1:
                continue
            # Parts of one n-tile each would read R twice for little.
            for parts in (1, 2) if n_tiles > 2 else (1,):
                # With a second buffer a CTA need not wait until its tile is multiplied everywhere.
                for buffers in (2, 1):
                    plan = ClusterWgmmaPlan(
                        D=D,
                        size=size,
                        units=units,
                        warpgroups=warpgroups,
                        n_tiles=n_tiles,
                        parts=parts,
                        buffers=buffers,
                        in_registers=in_registers,
                        shared_memory=0,
                    )
                    plan = replace(plan, shared_memory=shared_memory_of(plan, counts))
                    if plan.shared_memory <= gpu.shared_memory:
                        yield plan
                        break


def shared_memory_of(plan: ClusterWgmmaPlan, counts: Counts) -> int:
    """Bytes of a CTA's shared memory, part by part as the kernel lays it out."""
    size, units = plan.size, plan.units
    tile = 16 * units * plan.n_tiles
    # Of h, all CTAs' in each buffer; of each gate and each other state, the CTA's own. With resets
    # also of the h that is stored.
    tiles = plan.buffers * size + counts.gates + counts.states - 1 + (counts.starts > 0)
    # Each counts up to four tiles; one counts the packets that say that tiles are consumed.
    barriers = plan.buffers * tiles_of(size, min(4, size)) + 1
    exchange = plan.parts * (16 + 16 * tiles_of(barriers, 2))
    bias = 4 * counts.gates * units
    in_shared = size * units // 16 - plan.in_registers
    # Where sequences' rows lie, and with resets whether the next step starts anew.
    table = counts.sequence_bytes + (4 if counts.starts else 0)
    table *= 8 * plan.n_tiles
    return tiles * tile + exchange + bias + 2048 * plan.warpgroups * in_shared + table


def registers_of(warpgroups: int) -> int:
    """See :attr:`ClusterWgmmaPlan.registers`."""
    left = _REGISTERS - ClusterWgmmaPlan.PRODUCERS * ClusterWgmmaPlan.PRODUCER_REGISTERS
    return min(_MOST_REGISTERS, left // (128 * warpgroups) // 8 * 8)


def estimated_cycles(plan: ClusterWgmmaPlan, counts: Counts, B: int, N: int, gpu: GPU) -> float:
    """The cycles of a step of all sequences, by which plans of all regimes are compared."""
    steps = plan.size * plan.units // 16
    elements = plan.size * plan.units * plan.n_tiles
    of_a_unit = _CYCLES_A_VALUE * (counts.gates + counts.states)
    of_a_unit += _CYCLES_A_SAVED_VALUE * counts.saved
    reads = plan.warpgroups * (steps - plan.in_registers)
    of_sequences = _CYCLES_AN_H * elements + 8 * plan.units * plan.n_tiles * of_a_unit
    if plan.parts == 2:
        of_sequences *= _LEFT_OF_TWO_PARTS
    of_parts = plan.parts * (_CYCLES_OF_A_PART + _CYCLES_A_READ * reads)
    return (of_parts + of_sequences) * plan.rounds(B, N, gpu)
