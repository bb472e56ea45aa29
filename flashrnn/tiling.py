"""Plans: how a kernel is tiled for a problem. Pure functions of the problem and the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from flashrnn.problem import Problem

LARGEST_SCANNED_HEAD = 128


@dataclass(frozen=True)
class ScanPlan:
    """Tiles of the Triton scan; see :mod:`flashrnn.kernels.scan`.

    Attributes:
        BB: sequences a program owns.
        DD: the head dimension, padded.
        SS: the number of states, padded.
        GG: the number of gates, padded.
        warps: warps of a program.
        stages: steps whose inputs are on their way at once.
        parts: products into which backward splits its sum over the gates.
        resident: whether R stays in registers.
    """

    BB: int
    DD: int
    SS: int
    GG: int
    warps: int
    stages: int
    parts: int
    resident: bool


def plan_scan(problem: Problem, exact: bool, shared_memory: int) -> ScanPlan | str:
    """The tiles of the Triton scan for a problem, or the reason why there are none.

    Args:
        problem: its cell, head dimension and dtype decide.
        exact: whether float32 products are computed as such (``"ieee"``), not in tf32.
        shared_memory: bytes that a program may have of it.
    """
    S, G = len(problem.cell.states), len(problem.cell.gates)
    return _plan_scan(S, G, problem.D, problem.dtype.itemsize, exact, shared_memory)


@lru_cache(maxsize=1024)
def _plan_scan(
    S: int, G: int, D: int, itemsize: int, exact: bool, shared_memory: int
) -> ScanPlan | str:
    if D > LARGEST_SCANNED_HEAD:
        return (
            f"a head of {D} units; it takes up to {LARGEST_SCANNED_HEAD}, "
            "since one program computes a whole head"
        )
    DD, SS, GG = max(16, _power_of_two(D)), max(2, _power_of_two(S)), max(2, _power_of_two(G))
    # A warp's tensor core instruction yields 16 units; products without it want more threads.
    warps = DD // 16
    R_bytes = GG * DD * DD * itemsize
    # R passes through shared memory into registers, of which it may take half, next to the
    # inputs on their way.
    stages = 4
    inputs_bytes = (stages - 1) * (GG + 2 * SS) * DD * 8 * itemsize
    resident = R_bytes <= warps * 16384 and R_bytes + inputs_bytes <= shared_memory
    if exact and itemsize == 4:
        warps, resident = 2 * warps, False
    # Three slices of 16 summed units on their way, and as many of the operand.
    streamed_bytes = 3 * 16 * (GG * DD + 16) * itemsize
    if not resident and streamed_bytes > shared_memory:
        return (
            f"{G} gates of {D} units; a slice of their recurrent matrix takes {streamed_bytes} "
            f"bytes of shared memory, of which this GPU gives a program {shared_memory}"
        )
    return ScanPlan(8, DD, SS, GG, warps, stages, parts=1, resident=resident)


LARGEST_HEAD_OF_A_BLOCK = 128

# Registers a lane has for all but R, by an element's bytes; products of float32 in full take more.
_WORKING_REGISTERS = {2: 64, 4: 136}
_MOST_HELD = {2: 32, 4: 22}
# What a lane of a computing warp has where the traffic warps hand theirs over (kernels/head.cuh).
_SHIFTED_REGISTERS = 216
_STAGES = 8
_FEWEST_STAGES = 3


@dataclass(frozen=True)
class GPU:
    """What of a GPU plans depend on.

    Attributes:
        multiprocessors: how many.
        shared_memory: bytes of it that a thread block may have.
        shifts_registers: whether warps can hand registers to others.
        largest_cluster: thread blocks that a cluster may have; 0 where there are none.
    """

    multiprocessors: int
    shared_memory: int
    shifts_registers: bool
    largest_cluster: int


@dataclass(frozen=True)
class HeadPlan:
    """How a thread block owns a head; see ``kernels/head.cuh``.

    Attributes:
        sequences: sequences a block owns: 2, 4, or a multiple of 8.
        held: fragments of R that stay in registers.
        traffic: threads that move data.
        stages: steps whose inputs are on their way at once, or being read.
        shared_memory: a block's dynamic shared memory in bytes.
    """

    sequences: int
    held: int
    traffic: int
    stages: int
    shared_memory: int

    def grid(self, B: int, N: int) -> int:
        """Thread blocks of a launch."""
        return N * -(-B // self.sequences)

    def threads(self, D: int) -> int:
        """Threads of a block."""
        return 32 * -(-D // 16) + self.traffic


def plan_head(problem: Problem, gpu: GPU, backward: bool) -> HeadPlan | str:
    """How thread blocks own the heads of a problem, or the reason why they cannot.

    Args:
        problem: its cell, B, N, D, dtype and whether it needs a gradient decide.
        gpu: the device.
        backward: whether for the backward scan.
    """
    if problem.D > LARGEST_HEAD_OF_A_BLOCK:
        return (
            f"a head of {problem.D} units; it takes up to {LARGEST_HEAD_OF_A_BLOCK}, "
            "since one thread block computes a whole head"
        )
    cell = problem.cell
    S, G = len(cell.states), len(cell.gates)
    fed = {source: len(cell.fed_by(source)) for source in ("Wx", "R")}
    # Rows of a line of the ring, and of what a step writes.
    inputs = G + 2 * S if backward else fed["Wx"]
    outputs = [G] if backward else [S, *([G] if problem.needs_gradient else [])]
    B, N, D, itemsize = problem.B, problem.N, problem.D, problem.dtype.itemsize
    return _plan_head(fed["R"], inputs, tuple(outputs), B, N, D, itemsize, gpu)


@lru_cache(maxsize=1024)
def _plan_head(
    recurrent: int,
    inputs: int,
    outputs: tuple[int, ...],
    B: int,
    N: int,
    D: int,
    itemsize: int,
    gpu: GPU,
) -> HeadPlan | str:
    computing = -(-D // 16)
    DD = 16 * computing
    fragments = recurrent * (DD * itemsize // 32)
    # A fragment is four registers a lane; those that do not fit lie in shared memory. Up to eight
    # warps have all registers that a lane can address; of more, traffic warps may hand theirs over.
    shifted = computing == 8 and gpu.shifts_registers
    registers = _SHIFTED_REGISTERS if shifted else 168 if computing > 6 else 255
    held = min(fragments, _MOST_HELD[itemsize], (registers - _WORKING_REGISTERS[itemsize]) // 4)
    spared_bytes = (fragments - held) * computing * 512

    def line(rows: int) -> int:
        return rows * DD * itemsize + 16

    sequences = _sequences(B, N, D, itemsize, gpu)
    output_bytes = 2 * sum(map(line, outputs))
    while sequences > 2:
        least = sequences * (_FEWEST_STAGES * line(inputs) + output_bytes)
        if spared_bytes + least + 16 <= gpu.shared_memory:
            break
        sequences //= 2
    room = gpu.shared_memory - spared_bytes - sequences * output_bytes - 16
    stages = min(_STAGES, room // (sequences * line(inputs)))
    if stages < _FEWEST_STAGES:
        return (
            f"{recurrent} gates of {D} units that R feeds; with what a step reads and writes they "
            f"take more than the {gpu.shared_memory} bytes of shared memory that this GPU gives a "
            "thread block"
        )
    pieces = sequences * inputs * -(-D * itemsize // 16)
    most = 4 if computing > 6 else min(4, 8 - computing)
    traffic = most if computing == 8 else min(most, max(2, -(-pieces // 192)))
    return HeadPlan(
        sequences=sequences,
        held=held,
        traffic=32 * traffic,
        stages=stages,
        # A product may read 16 bytes beyond the last line.
        shared_memory=spared_bytes + sequences * (stages * line(inputs) + output_bytes) + 16,
    )


@dataclass(frozen=True)
class TeamPlan:
    """How a team of thread blocks owns a head; see ``kernels/team.cuh``.

    Attributes:
        units: units of the head that a block owns.
        blocks: blocks of 8 sequences that a team owns.
        size: thread blocks of a team.
        cluster: whether a team is a cluster.
        sum_parts: parts into which a block's warps cut the sums of its product.
        row_parts: and its rows.
        held: fragments of R that stay in a warp's registers.
        spared: those that lie in shared memory.
        streamed: those that lie in global memory, and are read at every step.
        ahead: slices of what the team exchanges that a warp asks for at once.
        parcels: 16-byte parcels of a team's two buffers in global memory.
        shared_memory: a block's dynamic shared memory in bytes.
    """

    units: int
    blocks: int
    size: int
    cluster: bool
    sum_parts: int
    row_parts: int
    held: int
    spared: int
    streamed: int
    ahead: int
    parcels: int
    shared_memory: int

    def items(self, B: int, N: int) -> int:
        """Heads times tiles of sequences: what teams are there for."""
        return N * _tiles(B, 8 * self.blocks)

    def teams(self, B: int, N: int, gpu: GPU) -> int:
        """Teams of a launch: where they are no clusters, as many as run at once."""
        items = self.items(B, N)
        return items if self.cluster else min(items, gpu.multiprocessors // self.size)

    def warps(self) -> int:
        """Warps of a block."""
        return self.sum_parts * self.row_parts


def plan_team(problem: Problem, exact: bool, gpu: GPU, backward: bool) -> TeamPlan | str:
    """How teams of thread blocks own the heads of a problem, or the reason why they cannot.

    Args:
        problem: its cell, B, N, D and dtype decide.
        exact: whether float32 products are computed as such (``"ieee"``), not in tf32.
        gpu: the device.
        backward: whether for the backward scan.
    """
    cell = problem.cell
    S, G, recurrent = len(cell.states), len(cell.gates), len(cell.fed_by("R"))
    values = Exchanged(
        sent=recurrent if backward else 1,
        produced=1 if backward else recurrent,
        kept=2 * G + 3 * S if backward else 2 * G + len(cell.fed_by("Wx")) + S,
        itemsize=problem.dtype.itemsize,
        passes=3 if exact and problem.dtype.itemsize == 4 else 1,
    )
    return _plan_team(values, problem.B, problem.N, problem.D, gpu)


class Exchanged(NamedTuple):
    """What a team computes with at a step.

    Attributes:
        sent: values of a unit and sequence that a team exchanges.
        produced: values that its product yields.
        kept: numbers that their owner keeps.
        itemsize: bytes of a value.
        passes: products of the tensor core that one takes.
    """

    sent: int
    produced: int
    kept: int
    itemsize: int
    passes: int


# Parts of a block's sums, and of its rows, that its warps take.
_PARTS = {
    False: [(6, 1), (8, 1), (12, 1), (16, 1)],
    True: [(s, r) for s in (1, 2, 4, 8) for r in (1, 2, 4, 8) if 4 <= s * r <= 16],
}
# Slices that a warp of so many asks for at once, where registers are there for it.
_AHEAD = {4: 8, 6: 8, 8: 8, 12: 4, 16: 1}
_CLUSTERS = (2, 4, 8, 16)
_FEWEST_UNITS, _MOST_UNITS = 12, 128


@lru_cache(maxsize=1024)
def _plan_team(values: Exchanged, B: int, N: int, D: int, gpu: GPU) -> TeamPlan | str:
    plans = _team_plans(values, B, N, D, gpu)
    if not plans:
        return (
            f"a head of {D} units; of its recurrent matrix more than two thirds would have to be "
            "read anew at each step"
        )
    return min(plans, key=lambda plan: _team_cycles(values, plan, B, N, gpu))


def _team_plans(values: Exchanged, B: int, N: int, D: int, gpu: GPU) -> list[TeamPlan]:
    # An empty batch has a plan too.
    B, plans = max(1, B), []
    for blocks in range(1, 1 + min(4, _tiles(B, 8))):
        items = N * _tiles(B, 8 * blocks)
        # Few units a block, as long as all teams run at once or take few turns.
        at_once = {_tiles(items, turns) for turns in range(1, 9)} | {1, 2, 4, 8, 16, 32}
        sizes = {gpu.multiprocessors // teams for teams in at_once} - {0}
        least = {max(_FEWEST_UNITS, _tiles(D, size)) for size in sizes}
        # Whole tiles or parcels of them, or neither.
        some = {_tiles(few, whole) * whole for few in least for whole in (4, 8, 12, 16)}
        units: dict[bool, set[int]] = {
            False: {few for few in some if few <= _MOST_UNITS},
            True: {_tiles(D, size) for size in _CLUSTERS if size <= gpu.largest_cluster},
        }
        plans += [
            plan
            for cluster in (False, True)
            for few, parts, most in product(sorted(units[cluster]), _PARTS[cluster], (8, 1))
            if (plan := _team_plan(values, D, gpu, few, blocks, cluster, parts, most))
        ]
    return plans


def _team_plan(
    values: Exchanged,
    D: int,
    gpu: GPU,
    units: int,
    blocks: int,
    cluster: bool,
    parts: tuple[int, int],
    most_ahead: int,
) -> TeamPlan | None:
    """What follows from the tiles; see the kernels' files for how."""
    words = 4 if cluster else 3
    sum_parts, row_parts = parts
    a_parcel, columns, size = 4 * words // values.itemsize, 8 * blocks, _tiles(D, units)
    if cluster and size not in _CLUSTERS:
        return None
    unit_parcels = _tiles(units, a_parcel)
    slices_a_warp = _tiles(size * values.sent * unit_parcels, 8 * sum_parts)
    tiles = _tiles(units * values.produced, 16 * row_parts)
    fragments = words * tiles * slices_a_warp
    warps = sum_parts * row_parts
    owned = _tiles(unit_parcels * columns, warps * (32 // a_parcel))

    # Forward little is exchanged, and there is less to ask for than to be in the way of.
    most = 1 if blocks > 1 else 2 if values.sent == 1 else _AHEAD[warps]
    ahead = min(most, most_ahead, slices_a_warp)
    arriving = 8 * blocks * (2 if cluster else ahead)
    arriving += max(16, 8 * blocks) if ahead < slices_a_warp else 0
    working = 60 + 4 * tiles * blocks + arriving + owned * values.kept
    # Products of float32 in full take every operand apart.
    working += 72 if values.passes > 1 else 0
    registers = min(255, 65536 // (32 * warps) // 8 * 8)
    held = min(fragments, (registers - working) // 4)
    parcels = 2 * slices_a_warp * sum_parts * 2 * blocks * 32
    exchange_bytes = 16 * parcels + 16 if cluster else 0
    partial_bytes = 2 * sum_parts * columns * (16 * tiles * row_parts + 4) * 4
    room = gpu.shared_memory - exchange_bytes - partial_bytes
    if held < 1 or room < 0:
        return None
    spared = min(fragments - held, room // (512 * warps))
    streamed = fragments - held - spared
    if 3 * streamed > 2 * fragments:
        return None
    return TeamPlan(
        units=units,
        blocks=blocks,
        size=size,
        cluster=cluster,
        sum_parts=sum_parts,
        row_parts=row_parts,
        held=held,
        spared=spared,
        streamed=streamed,
        ahead=ahead,
        parcels=0 if cluster else parcels,
        shared_memory=exchange_bytes + partial_bytes + 512 * warps * spared,
    )


def _team_cycles(values: Exchanged, plan: TeamPlan, B: int, N: int, gpu: GPU) -> float:
    """What a step takes, all teams' turns together, roughly: what docs/performance.md reckons."""
    warps, columns = plan.warps(), 8 * plan.blocks
    words = 4 if plan.cluster else 3
    a_parcel = 4 * words // values.itemsize
    unit_parcels = _tiles(plan.units, a_parcel)
    slices = _tiles(plan.size * values.sent * unit_parcels, 8 * plan.sum_parts)
    exchanged_bytes = 16 * plan.size * values.sent * unit_parcels * columns
    fragments = plan.held + plan.spared + plan.streamed
    owned = _tiles(unit_parcels * columns, warps * (32 // a_parcel))
    if plan.cluster:
        at_once = gpu.multiprocessors * 7 // 8 // plan.size
        exchange = 500 + exchanged_bytes / 12 + plan.row_parts * exchanged_bytes / 100
    else:
        at_once = gpu.multiprocessors // plan.size
        running = min(at_once, plan.items(B, N)) * plan.size
        exchange = 650 + 8 * plan.size + max(exchanged_bytes / 90, running * exchanged_bytes / 9000)
        exchange += 350 * (_tiles(slices, plan.ahead) - 1)
    multiply = max(36 * words * slices, 2 * warps * plan.blocks * fragments) * values.passes
    fetch = 512 * warps * (plan.spared / 50 + plan.streamed / 14)
    rows = plan.units * values.produced
    add = plan.sum_parts * (48 + columns * rows / 8)
    cycles = exchange + multiply + fetch + add + 150 * owned
    return cycles * _tiles(plan.items(B, N), at_once)


@dataclass(frozen=True)
class GradientPlan:
    """Tiles of ``kernels/recurrent_gradient.cu``.

    Attributes:
        gates: gates whose products a block computes.
        groups: groups of as many gates.
        parts: parts into which the sum over all steps is cut.
        rows: rows of a part.
        stages: chunks that are on their way at once, or being read.
        shared_memory: a block's dynamic shared memory in bytes.
    """

    gates: int
    groups: int
    parts: int
    rows: int
    stages: int
    shared_memory: int


# Registers of a block's sums: 64 of each of 256 threads.
_SUMS = 64 * 256


def plan_gradient(
    recurrent: int, rows: int, N: int, D: int, itemsize: int, gpu: GPU
) -> GradientPlan:
    """The tiles of R's gradient for heads of at most ``LARGEST_HEAD_OF_A_BLOCK`` units.

    Args:
        recurrent: gates that R feeds.
        rows: B · T, what the sum runs over.
        N: number of heads.
        D: head dimension.
        itemsize: bytes of an element of the tensors.
        gpu: the device.
    """
    DD = 16 * -(-D // 16)
    stages, chunk = 3, 64 // itemsize
    # A row of a chunk has a place for each unit of each gate and for each of h, and 16 more.
    places = gpu.shared_memory // (stages * chunk * itemsize)
    gates = max(1, min(recurrent, _SUMS // (DD * DD), (places - DD - 16) // DD))
    groups = -(-recurrent // gates)
    # Two blocks share a multiprocessor; a part is long enough that its sums' way out is not felt.
    parts = max(1, min(2 * gpu.multiprocessors // (N * groups), -(-rows // (8 * chunk))))
    rows_a_part = chunk * -(-rows // (parts * chunk))
    shared_memory = stages * chunk * (gates * DD + DD + 16) * itemsize
    return GradientPlan(gates, groups, -(-rows // rows_a_part), rows_a_part, stages, shared_memory)


def _sequences(B: int, N: int, D: int, itemsize: int, gpu: GPU) -> int:
    """The fewest for which all blocks run at once, or 8."""
    # Two share a multiprocessor where R takes no more than 64 registers of a lane.
    at_once = gpu.multiprocessors * (2 if D * itemsize <= 128 else 1)
    for sequences in (2, 4):
        if N * -(-B // sequences) <= at_once:
            return sequences
    return 8


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
