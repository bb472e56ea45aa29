"""Plans of the backward scan of clusters by ``wgmma``; see ``wgmma_backward_tile.cuh``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import gcd
from typing import NamedTuple

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.cluster.plan import ClusterPlan, time_of_rounds
from flashrnn.kernels.common import wgmma
from flashrnn.kernels.gpu import GPU, clusters_at_once
from flashrnn.kernels.plan import best_of, passed_states, read_states
from flashrnn.kernels.sizes import one_of_few, tiles_of
from flashrnn.problem import Problem

# What is compared.
_WARPGROUPS = (1, 2, 3)
_COLUMNS = (2, 4)
_N_TILES = tuple(range(1, 9))

# Elements of a thread whose inputs are loaded ahead: the first of these for which there is room.
_AHEAD = (2, 1)
# Registers of a thread beside those of R, of its elements' gradients and of its units' sums: while
# it multiplies, besides the sums; while it computes an element, besides inputs. The tests compile
# such kernels and find hardly a spill. An element takes one more where a thread has units of two
# row tiles; each further address to which it writes gates' gradients takes two.
_REGISTERS_OF_A_PRODUCT = 32
_REGISTERS_OF_AN_ELEMENT = 46

# Bytes between chunks (``PADDING`` in the kernel).
_PADDING = 32

# Cycles of a step. They are reckoned from numbers of instructions and bytes, with rates that other
# kernels of clusters reach or exceed, and agree with an H200 (docs/cost-model.md).
# Of a warp's instruction, in which its scheduler issues no other; and how many instructions an
# element takes for each gate and state. A warp that is alone on its scheduler waits as long as a
# second one would take.
_CYCLES_AN_INSTRUCTION = 1.3
_INSTRUCTIONS_A_VALUE = 22
# Of a wgmma: for each n-tile, and at least. Shared memory is read at so many bytes a cycle.
_CYCLES_AN_N_TILE = 4
_CYCLES_A_WGMMA = 16
_BYTES_READ_A_CYCLE = 128
# What CTAs send arrives after this latency and at so many bytes a cycle: bulk copies, and packets.
_LATENCY = 700
_COPIED_BYTES_A_CYCLE = 20
_PACKED_BYTES_A_CYCLE = 10
# Barriers, signals, addresses.
_CYCLES_OF_A_STEP = 600
# Of each element whose inputs are not loaded ahead. Fitted: on an H200 plans with more of them took
# so much longer. The cause is not known.
_CYCLES_OF_A_LATE_ELEMENT = 800


@dataclass(frozen=True, kw_only=True)
class ClusterWgmmaBackwardPlan(ClusterPlan):
    """How a cluster computes the backward scan of a head and many sequences by ``wgmma``.

    Attributes:
        rows: rows of CTAs; those of a column exchange the gates' gradients.
        columns: columns of CTAs; those of a row exchange parts of dh.
        warpgroups: warpgroups of a CTA.
        ahead: elements of a thread whose inputs are loaded ahead.
        in_registers: steps of the product, of 16 gates, whose part of R is in registers.
    """

    rows: int
    columns: int
    warpgroups: int
    ahead: int
    in_registers: int

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return "cluster_wgmma_backward"

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 128 * self.warpgroups

    def source(
        self, cell: TracedCell, precision: str, options: source.Options, piece_bytes: int
    ) -> dict[str, str]:
        """See :meth:`flashrnn.kernels.plan.Plan.source`."""
        constants = {
            "D": self.D,
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "UNITS": self.units,
            "WARPGROUPS": self.warpgroups,
            "N_TILES": self.n_tiles,
            "AHEAD": self.ahead,
            "IN_REGISTERS": self.in_registers,
            "READ_STATES": Values.of(cell).read,
            # Must be what the kernel computes of its parts: a static_assert holds them together.
            "SHARED_MEMORY": self.shared_memory,
            **dict(options),
        }
        generated = {"common/wgmma.cuh": wgmma.instruction(8 * self.n_tiles, precision)}
        kernel = "cluster/wgmma_backward.cu"
        return source.program(kernel, cell, precision, constants, call.BACKWARD, generated)


def plan_backward(problem: Problem, gpu: GPU, backward: bool) -> ClusterWgmmaBackwardPlan | str:
    """The plan of a problem's backward scan, or the reason why there is none."""
    if not backward or problem.dtype.itemsize != 2:
        return "it is for the backward scan and 16 bits"
    if not gpu.multiplies_by_groups:
        return "it needs a GPU with wgmma"
    if problem.is_sequenced or problem.gradient_recurrent_cut:
        return "it has no options of sequences, and always a gradient through R"
    B, N, values = max(1, problem.B), problem.N, Values.of(problem.cell)
    # Few kernels for all sizes of a batch.
    plan = best_plan(values, 8 * one_of_few(tiles_of(B, 8)), N, problem.D, gpu)
    if plan is None:
        return f"no cluster of this GPU holds a head of {problem.D} units and its gates"
    return replace(plan, estimated_cycles=estimated_cycles(plan, values, B, N, gpu))


class Values(NamedTuple):
    """How many numbers of a unit and sequence a step has of each kind.

    Attributes:
        recurrent: gates that R feeds.
        gates: gates of any kind.
        states: states.
        carried: states whose gradient passes from step to step other than through R.
        read: states before a step of which its derivative depends, as the bits of a number.
    """

    recurrent: int
    gates: int
    states: int
    carried: int
    read: int

    @staticmethod
    def of(cell: TracedCell) -> Values:
        """Those of a cell."""
        carried, read = passed_states(cell).bit_count(), read_states(cell, backward=True)
        recurrent, gates, states = len(cell.fed_by("R")), len(cell.gates), len(cell.states)
        return Values(recurrent, gates, states, carried, read)


@lru_cache(maxsize=1024)
def best_plan(values: Values, B: int, N: int, D: int, gpu: GPU) -> ClusterWgmmaBackwardPlan | None:
    """The plan with the fewest :func:`estimated_cycles`, if there is any."""
    possible = possible_plans(values, D, gpu)
    return best_of(possible, lambda plan: estimated_cycles(plan, values, B, N, gpu))


def possible_plans(values: Values, D: int, gpu: GPU) -> Iterator[ClusterWgmmaBackwardPlan]:
    """All plans for heads of D units."""
    if not values.recurrent:
        return
    for warpgroups, columns, n_tiles in product(_WARPGROUPS, _COLUMNS, _N_TILES):
        units, rows = 64 * warpgroups // columns, tiles_of(D, 64 * warpgroups)
        if units % 16 or rows < 2 or not clusters_at_once(rows * columns, gpu):
            continue
        for ahead in _AHEAD:
            in_registers = _in_registers(values, warpgroups, columns, rows, n_tiles, ahead)
            if in_registers < 1 or ahead > 4 // columns * n_tiles:
                continue
            plan = ClusterWgmmaBackwardPlan(
                D=D,
                size=rows * columns,
                units=units,
                rows=rows,
                columns=columns,
                warpgroups=warpgroups,
                n_tiles=n_tiles,
                ahead=ahead,
                in_registers=in_registers,
                shared_memory=0,
            )
            plan = replace(plan, shared_memory=shared_memory_of(plan, values))
            if plan.shared_memory <= gpu.shared_memory:
                yield plan
                break


def _in_registers(
    values: Values, warpgroups: int, columns: int, rows: int, n_tiles: int, ahead: int
) -> int:
    """Steps of the product whose part of R registers have room for."""
    inputs = values.gates + values.states + values.read.bit_count()
    of_an_element = _REGISTERS_OF_AN_ELEMENT + ahead * inputs
    working = max(_REGISTERS_OF_A_PRODUCT + 4 * n_tiles, of_an_element)
    units = 4 // columns
    working += units * (n_tiles * (values.carried + units - 1) + values.gates)
    # Gates that are neighbours in a chunk of 8 are written at once.
    working += 2 * units * (values.recurrent // gcd(values.recurrent, 8) - 1)
    registers = min(255, 64 * 1024 // (128 * warpgroups) // 8 * 8)
    steps = rows * 4 * warpgroups * values.recurrent // columns
    return min(steps, (registers - working) // 4)


def shared_memory_of(plan: ClusterWgmmaBackwardPlan, values: Values) -> int:
    """Bytes of a CTA's shared memory, part by part as the kernel lays it out."""
    # Where signals arrive, and the barriers.
    signals = 16 + 16 * ((plan.rows + plan.columns + 2) // 2)
    in_shared = 2048 * plan.warpgroups * (steps_of(plan, values) - plan.in_registers)
    return plan.rows * tile_bytes(plan, values) + part_bytes(plan) + signals + in_shared


def estimated_cycles(
    plan: ClusterWgmmaBackwardPlan, values: Values, B: int, N: int, gpu: GPU
) -> float:
    """The cycles of a step of all sequences, by which plans of all regimes are compared."""
    warpgroups, n_tiles = plan.warpgroups, plan.n_tiles
    elements = 4 // plan.columns * n_tiles
    instructions = elements * _INSTRUCTIONS_A_VALUE * (values.gates + values.states)
    cell = max(2, warpgroups) * instructions * _CYCLES_AN_INSTRUCTION
    cell += _CYCLES_OF_A_LATE_ELEMENT * (elements - plan.ahead)

    steps = steps_of(plan, values)
    tensor = warpgroups * steps * max(_CYCLES_A_WGMMA, _CYCLES_AN_N_TILE * n_tiles)
    read = warpgroups * (2048 * (steps - plan.in_registers) + 256 * n_tiles * steps)
    # The CTA's own tile is there.
    gathered = (plan.rows - 1) * tile_bytes(plan, values)
    gather = _LATENCY + gathered / _COPIED_BYTES_A_CYCLE
    multiply = max(tensor, read / _BYTES_READ_A_CYCLE, gather)

    scatter = _LATENCY + part_bytes(plan) / _PACKED_BYTES_A_CYCLE
    step = cell + multiply + scatter + _CYCLES_OF_A_STEP
    return step * time_of_rounds(plan.rounds(B, N, gpu))


def steps_of(plan: ClusterWgmmaBackwardPlan, values: Values) -> int:
    """Steps of the product, of 16 gates."""
    return plan.rows * plan.units * values.recurrent // 16


def tile_bytes(plan: ClusterWgmmaBackwardPlan, values: Values) -> int:
    """Bytes of a CTA's gates' gradients, in chunks of 8 gates of a sequence."""
    return plan.units * values.recurrent // 8 * (16 * 8 * plan.n_tiles + _PADDING)


def part_bytes(plan: ClusterWgmmaBackwardPlan) -> int:
    """Bytes of the parts of dh that a CTA receives, its own among them."""
    return plan.columns * plan.units * 8 * plan.n_tiles * 4
