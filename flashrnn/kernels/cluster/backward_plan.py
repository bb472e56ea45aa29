"""Plans of the backward scan of clusters; see ``reduce_scatter.cuh``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.call import Scratch
from flashrnn.kernels.cluster.plan import ClusterPlan, time_of_rounds
from flashrnn.kernels.gpu import GPU, clusters_at_once
from flashrnn.kernels.plan import Values
from flashrnn.kernels.sizes import power_of_two, tiles_of
from flashrnn.problem import Problem

# The tiles that are compared. More n-tiles would take registers from R.
_WARPS = (4, 8, 16)
_N_TILES = (1, 2)
_SIZES = (2, 4, 8, 16)
_MOST_UNITS = 128
# The largest part of R that a step may read from global memory, as numerator and denominator.
_MOST_IN_MEMORY = (2, 3)

# Registers of a thread beside those of R: for addresses; for each of its elements, besides inputs
# and gates' gradients; for each row tile. The tests compile such kernels and find no spills.
_OTHER_REGISTERS = 36
_REGISTERS_AN_ELEMENT = 12
_REGISTERS_A_ROW_TILE = 2
# With options of sequences.
_REGISTERS_OF_SEQUENCES = 36
# While it adds up what it has received.
_REGISTERS_OF_ADDING = 16
# Words of the right operand that are loaded ahead.
_MOST_WORDS_AHEAD = 32
# Where a product takes several passes.
_REGISTERS_OF_PASSES = 64

# Cycles of a step: estimated from the numbers of instructions and bytes, then all times 0.8, which
# fits the times that were measured on an H200 (docs/cost-model.md).
_SCALE = 0.8
# An mma's latency, and what one of a warp's takes of the CTA's issue slots.
_MMA_LATENCY = 33
_CYCLES_A_FRAGMENT = 1.6
# The exchange: its latency, or all its packets at 8 bytes a cycle; then the CTA reads them at 128
# bytes a cycle.
_EXCHANGE_LATENCY = 550
_BYTES_ARRIVING_A_CYCLE = 8
_BYTES_READ_A_CYCLE = 128
# R that registers do not hold: bytes a cycle from shared and from global memory.
_BYTES_FROM_SHARED = 200
_BYTES_FROM_MEMORY = 20
# The barrier between gradients and product; a warp's read of a slice of an n-tile; an element.
_CYCLES_OF_BARRIER = 150
_CYCLES_A_READ = 4
_CYCLES_AN_ELEMENT = 300


@dataclass(frozen=True, kw_only=True)
class ClusterBackwardPlan(ClusterPlan):
    """How a cluster computes the backward scan of a head.

    Attributes:
        warps: warps of a CTA, each of which multiplies some of its product's row tiles.
        in_registers: fragments of R that stay in a warp's registers.
        in_shared: fragments of R in shared memory.
        in_memory: fragments of R in global memory, which are read at every step.
    """

    warps: int
    in_registers: int
    in_shared: int
    in_memory: int

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return "cluster_reduce_scatter_backward"

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps

    def scratch(self, B: int, N: int, gpu: GPU) -> Scratch:
        """See :meth:`flashrnn.kernels.plan.Plan.scratch`."""
        return Scratch(R_in_memory=32 * self.grid(B, N, gpu) * self.warps * self.in_memory)

    def source(
        self, cell: TracedCell, precision: str, options: source.Options, piece_bytes: int
    ) -> dict[str, str]:
        """See :meth:`flashrnn.kernels.plan.Plan.source`."""
        constants = {
            "D": self.D,
            "UNITS": self.units,
            "N_TILES": self.n_tiles,
            "WARPS": self.warps,
            "IN_REGISTERS": self.in_registers,
            "IN_SHARED": self.in_shared,
            "IN_MEMORY": self.in_memory,
            # Must be what the kernel computes of its parts: a static_assert holds them together.
            "SHARED_MEMORY": self.shared_memory,
            **dict(options),
        }
        record = call.BACKWARD.complete if source.is_sequenced(options) else call.BACKWARD
        return source.program("cluster/backward.cu", cell, precision, constants, record)


def plan_backward(problem: Problem, gpu: GPU, backward: bool) -> ClusterBackwardPlan | str:
    """The plan of a problem's backward scan, or the reason why there is none."""
    if not backward:
        return "it is for the backward scan"
    values = Values.of(problem, backward=True)
    # Few kernels for all sizes of a batch, an empty one among them.
    B, N = 8 * power_of_two(tiles_of(max(1, problem.B), 8)), problem.N
    plan = best_plan(values, B, N, problem.D, gpu)
    if plan is None:
        return f"no cluster of this GPU holds a head of {problem.D} units"
    # It was chosen for B rounded up.
    actual, rounded = (
        time_of_rounds(plan.rounds(sequences, N, gpu)) for sequences in (max(1, problem.B), B)
    )
    return replace(plan, estimated_cycles=plan.estimated_cycles * actual / rounded)


@lru_cache(maxsize=1024)
def best_plan(values: Values, B: int, N: int, D: int, gpu: GPU) -> ClusterBackwardPlan | None:
    """The plan with the fewest :func:`estimated_cycles`, if there is any."""
    plans = [
        replace(plan, estimated_cycles=estimated_cycles(choice, plan, B, N, gpu))
        for choice in _choices(values, B, D, gpu)
        if (plan := _plan(choice, gpu)) is not None
    ]
    return min(plans, key=lambda plan: plan.estimated_cycles, default=None)


@dataclass(frozen=True)
class Choice:
    """Tiles, and what follows from them, as in ``reduce_scatter.cuh``."""

    values: Values
    D: int
    units: int
    n_tiles: int
    warps: int

    @property
    def size(self) -> int:
        """CTAs of the cluster."""
        return tiles_of(self.D, self.units)

    @property
    def sequences(self) -> int:
        """Sequences of the cluster."""
        return 8 * self.n_tiles

    @property
    def pairs(self) -> int:
        """Pairs of a CTA's units."""
        return tiles_of(self.units, 2)

    @property
    def received(self) -> int:
        """Packets that a CTA receives in an exchange."""
        return self.size * self.pairs * self.sequences // 2

    @property
    def slices(self) -> int:
        """Slices of what the product sums, two steps of mma each."""
        return tiles_of(self.units * self.values.sent * self.values.itemsize, 64)

    @property
    def row_tiles(self) -> int:
        """A warp's tiles of 16 rows."""
        return tiles_of(tiles_of(self.size * self.pairs, 8), self.warps)

    @property
    def fragments(self) -> int:
        """A warp's fragments of R."""
        return 2 * self.row_tiles * self.slices

    @property
    def elements(self) -> int:
        """Elements (a unit and a sequence) of a thread."""
        return tiles_of(2 * self.pairs * self.sequences, 32 * self.warps)


def _choices(values: Values, B: int, D: int, gpu: GPU) -> Iterator[Choice]:
    sizes = [size for size in _SIZES if clusters_at_once(size, gpu)]
    some = {tiles_of(D, size) for size in sizes if tiles_of(D, tiles_of(D, size)) == size}
    for n_tiles, units, warps in product(_N_TILES, sorted(some), _WARPS):
        if 8 * n_tiles <= B and units <= _MOST_UNITS:
            yield Choice(values, D, units, n_tiles, warps)


def _plan(choice: Choice, gpu: GPU) -> ClusterBackwardPlan | None:
    """The plan that puts R where there is room for it, if enough of it is fast to read."""
    values, n_tiles, warps = choice.values, choice.n_tiles, choice.warps
    sums = 4 * choice.row_tiles * n_tiles
    chains = max(1, 4 // (choice.row_tiles * n_tiles))
    working = _OTHER_REGISTERS + _REGISTERS_A_ROW_TILE * choice.row_tiles
    working += choice.elements * (values.kept + values.sent + _REGISTERS_AN_ELEMENT)
    working += _REGISTERS_OF_SEQUENCES if values.sequence_bytes else 0
    # A thread either multiplies or adds up what it has received.
    multiplying = sums * chains + min(_MOST_WORDS_AHEAD, 4 * choice.slices * n_tiles)
    working += max(multiplying, choice.size + _REGISTERS_OF_ADDING)
    working += _REGISTERS_OF_PASSES if values.passes > 1 else 0
    registers = min(255, 65536 // (32 * warps) // 8 * 8)
    fragments = choice.fragments
    in_registers = min(fragments, (registers - working) // 4)
    # Two buffers of packets, with a barrier each, and two of gradients.
    exchange = 2 * (16 * choice.received + 8 + 512 * choice.slices * n_tiles)
    # What says where sequences' rows lie.
    table = choice.sequences * values.sequence_bytes
    room = gpu.shared_memory - exchange - table
    if in_registers < 1 or room < 0:
        return None
    in_shared = min(fragments - in_registers, room // (512 * warps))
    in_memory = fragments - in_registers - in_shared
    most, whole = _MOST_IN_MEMORY
    if whole * in_memory > most * fragments:
        return None
    return ClusterBackwardPlan(
        D=choice.D,
        units=choice.units,
        n_tiles=n_tiles,
        size=choice.size,
        warps=warps,
        in_registers=in_registers,
        in_shared=in_shared,
        in_memory=in_memory,
        shared_memory=exchange + 512 * warps * in_shared + table,
    )


def estimated_cycles(choice: Choice, plan: ClusterBackwardPlan, B: int, N: int, gpu: GPU) -> float:
    """The cycles of a step of all sequences, by which plans of all regimes are compared."""
    values, warps = choice.values, choice.warps
    # Both steps of a slice add to one of so many sums in turn.
    chains = max(1, min(4, 4 // (choice.row_tiles * choice.n_tiles)))
    latency = _MMA_LATENCY * 2 * choice.slices / chains
    issue = warps * choice.n_tiles * choice.fragments * _CYCLES_A_FRAGMENT
    multiply = max(latency, issue) * values.passes
    received = 16 * choice.received
    transfer = max(_EXCHANGE_LATENCY, received / _BYTES_ARRIVING_A_CYCLE)
    transfer += received / _BYTES_READ_A_CYCLE
    fetch = (
        512 * warps * (plan.in_shared / _BYTES_FROM_SHARED + plan.in_memory / _BYTES_FROM_MEMORY)
    )
    gradients = _CYCLES_OF_BARRIER + _CYCLES_A_READ * warps * choice.slices * choice.n_tiles
    step = _SCALE * (transfer + multiply + fetch + gradients + _CYCLES_AN_ELEMENT * choice.elements)
    return step * time_of_rounds(plan.rounds(B, N, gpu))
