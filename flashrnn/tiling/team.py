"""How a team of thread blocks owns a head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import ClassVar, NamedTuple

from flashrnn.problem import Problem
from flashrnn.tiling.gpu import GPU, clusters_at_once
from flashrnn.tiling.sizes import power_of_two, tiles_of


@dataclass(frozen=True)
class TeamPlan:
    """How a team of thread blocks owns a head; see ``kernels/team.cuh``.

    Attributes:
        units: units of the head that a block owns.
        blocks: blocks of 8 sequences in a tile.
        turns: tiles that a team owns, whose steps take turns.
        size: thread blocks of a team.
        cluster: whether a team is a cluster.
        scatter: whether, backward, its blocks send each other parts of dh, not gates' gradients.
        sum_parts: parts into which a block's warps cut the sums of its product.
        row_parts: and its rows.
        held: fragments of R that stay in a warp's registers.
        spared: those that lie in shared memory.
        streamed: those that lie in global memory, and are read at every step.
        ahead: slices of what the team exchanges that a warp asks for at once.
        parcels: 16-byte parcels of a team's buffers in global memory, two for each turn.
        shared_memory: a block's dynamic shared memory in bytes.
        cycles: what a step is reckoned to take, of no concern to a kernel.
    """

    units: int
    blocks: int
    turns: int
    size: int
    cluster: bool
    scatter: bool
    sum_parts: int
    row_parts: int
    held: int
    spared: int
    streamed: int
    ahead: int
    parcels: int
    shared_memory: int
    cycles: float = field(default=0.0, compare=False)

    def items(self, B: int, N: int) -> int:
        """Heads times what a team owns of their sequences."""
        return N * tiles_of(B, 8 * self.blocks * self.turns)

    def teams(self, B: int, N: int, gpu: GPU) -> int:
        """Teams of a launch: where they are no clusters, as many as run at once."""
        items = self.items(B, N)
        return items if self.cluster else min(items, gpu.multiprocessors // self.size)

    def warps(self) -> int:
        """Warps of a block."""
        return self.sum_parts * self.row_parts


def plan_team(problem: Problem, gpu: GPU, backward: bool) -> TeamPlan | str:
    """How teams of thread blocks own the heads of a problem, or the reason why they cannot.

    Args:
        problem: its cell, B, N, D and dtype decide; B and N not, whether there is a plan. Nor
            whether float32 may be tf32: that can be set anew between forward and backward.
        gpu: the device.
        backward: whether for the backward scan.
    """
    cell = problem.cell
    S, G, recurrent = len(cell.states), len(cell.gates), len(cell.fed_by("R"))
    values = Values(
        backward=backward,
        sent=recurrent if backward else 1,
        produced=1 if backward else recurrent,
        kept=2 * G + 3 * S if backward else 2 * G + len(cell.fed_by("Wx")) + S,
        carried=S,
        itemsize=problem.dtype.itemsize,
        passes=3 if problem.dtype.itemsize == 4 else 1,
    )
    # Few kernels for all sizes of a batch, an empty one among them.
    B, N = 8 * power_of_two(tiles_of(max(1, problem.B), 8)), problem.N
    plan = best_plan(values, B, N, problem.D, gpu)
    if isinstance(plan, str):
        return plan
    taken, reckoned = (_rounds(plan, size, N, gpu) for size in (max(1, problem.B), B))
    return replace(plan, cycles=plan.cycles * taken / reckoned)


def _rounds(plan: TeamPlan, B: int, N: int, gpu: GPU) -> float:
    """How often a step is computed for all sequences, and some time to begin anew."""
    at_once = clusters_at_once(plan.size, gpu) if plan.cluster else gpu.multiprocessors // plan.size
    rounds = tiles_of(plan.items(B, N), at_once)
    return rounds + 0.03 * (rounds - 1)


class Values(NamedTuple):
    """What a team computes with at a step.

    Attributes:
        backward: the direction.
        sent: values of a unit and sequence that a team exchanges.
        produced: values that its product yields.
        kept: numbers that their owner keeps.
        carried: those among them that pass from step to step.
        itemsize: bytes of a value.
        passes: products of the tensor core that one takes.
    """

    backward: bool
    sent: int
    produced: int
    kept: int
    carried: int
    itemsize: int
    passes: int


@lru_cache(maxsize=1024)
def best_plan(values: Values, B: int, N: int, D: int, gpu: GPU) -> TeamPlan | str:
    """The plan with the fewest :func:`cycles`, or the reason why there is none."""
    best: TeamPlan | None = None
    for choice, most_ahead in product(_choices(values, B, N, D, gpu), (8, 1)):
        plan = _plan(choice, gpu, most_ahead)
        if plan is not None:
            plan = replace(plan, cycles=cycles(choice, plan, B, N, gpu))
            if best is None or plan.cycles < best.cycles:
                best = plan
    if best is None:
        return (
            f"a head of {D} units; its recurrent matrix does not find room on this GPU: more than "
            "two thirds would have to be read anew at each step"
        )
    return best


@dataclass(frozen=True)
class Choice:
    """Tiles, and what follows from them; the names are those of ``kernels/team.cuh``."""

    values: Values
    D: int
    units: int
    blocks: int
    turns: int
    cluster: bool
    sum_parts: int
    row_parts: int

    scatter: ClassVar[bool] = False

    @property
    def size(self) -> int:
        """Thread blocks of a team."""
        return tiles_of(self.D, self.units)

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.sum_parts * self.row_parts

    @property
    def columns(self) -> int:
        """Sequences of a tile."""
        return 8 * self.blocks

    @property
    def words(self) -> int:
        """Words of a parcel that hold values."""
        return 4 if self.cluster else 3

    @property
    def unit_parcels(self) -> int:
        """Parcels of one value of a block's units, for one sequence."""
        return tiles_of(self.units, 4 * self.words // self.values.itemsize)

    @property
    def slices(self) -> int:
        """A warp's slices."""
        return tiles_of(self.size * self.values.sent * self.unit_parcels, 8 * self.sum_parts)

    @property
    def row_tiles(self) -> int:
        """A warp's tiles of 16 rows."""
        return tiles_of(self.units * self.values.produced, 16 * self.row_parts)

    @property
    def fragments(self) -> int:
        """A warp's fragments of R."""
        return self.words * self.row_tiles * self.slices

    @property
    def owned(self) -> int:
        """Units and sequences that a lane owns."""
        lanes_parcels = 32 // (4 * self.words // self.values.itemsize)
        return tiles_of(self.unit_parcels * self.columns, self.warps * lanes_parcels)


class ScatterChoice(Choice):
    """As :class:`Choice`, by the names of ``kernels/team_scatter.cuh``."""

    scatter = True

    @property
    def pairs(self) -> int:
        """Pairs of a block's units."""
        return tiles_of(self.units, 2)

    @property
    def received(self) -> int:
        """Parcels that a block receives in an exchange."""
        return self.size * self.pairs * self.columns // 2

    @property
    def slices(self) -> int:
        """Slices of what the product sums, two steps of the tensor core each."""
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
    def owned(self) -> int:
        """Units and sequences that a lane owns."""
        return tiles_of(2 * self.pairs * self.columns, 32 * self.warps)


# Parts of a block's sums, and of its rows, that its warps take.
_PARTS = {
    False: [(6, 1), (8, 1), (12, 1), (16, 1)],
    True: [(s, r) for s in (1, 2, 4, 8) for r in (1, 2, 4, 8) if 4 <= s * r <= 16],
}
_SCATTERING_WARPS = (4, 8, 16)
# Slices that a warp of so many asks for at once, where registers are there for it.
_AHEAD = {4: 8, 6: 8, 8: 8, 12: 4, 16: 1}
# More blocks take registers from R.
_BLOCKS = (1, 2)
_TURNS = (1, 2, 4, 8)
_CLUSTERS = (2, 4, 8, 16)
_FEWEST_UNITS, _MOST_UNITS = 12, 128


def _choices(values: Values, B: int, N: int, D: int, gpu: GPU) -> Iterator[Choice]:
    for blocks, turns in product(_BLOCKS, _TURNS):
        if 8 * blocks * turns > B:
            continue
        items = N * tiles_of(B, 8 * blocks * turns)
        # Few units a block, as long as all teams run at once or in few rounds.
        at_once = {tiles_of(items, rounds) for rounds in range(1, 9)} | {1, 2, 4, 8, 16, 32}
        sizes = {gpu.multiprocessors // teams for teams in at_once} - {0}
        least = {max(_FEWEST_UNITS, tiles_of(D, size)) for size in sizes}
        # Whole tiles or parcels of them, or neither.
        some = {tiles_of(few, whole) * whole for few in least for whole in (4, 8, 12, 16)}
        clusters = [size for size in _CLUSTERS if clusters_at_once(size, gpu)]
        of_clusters = {
            tiles_of(D, size) for size in clusters if tiles_of(D, tiles_of(D, size)) == size
        }
        for cluster, units in ((False, some), (True, of_clusters)):
            for few, parts in product(sorted(units), _PARTS[cluster]):
                if few <= _MOST_UNITS:
                    yield Choice(values, D, few, blocks, turns, cluster, *parts)
        if values.backward and turns == 1:
            for few, warps in product(sorted(of_clusters), _SCATTERING_WARPS):
                if few <= _MOST_UNITS:
                    yield ScatterChoice(values, D, few, blocks, turns, True, 1, warps)


def _plan(choice: Choice, gpu: GPU, most_ahead: int) -> TeamPlan | None:
    """Where R goes, if there is room for enough of it."""
    if isinstance(choice, ScatterChoice):
        return _scatter_plan(choice, gpu)
    values, cluster, blocks, warps = choice.values, choice.cluster, choice.blocks, choice.warps
    slices, fragments, row_tiles = choice.slices, choice.fragments, choice.row_tiles

    # Forward little is exchanged, and there is less to ask for than to be in the way of.
    most = 1 if blocks > 1 else 2 if values.sent == 1 else _AHEAD[warps]
    most = min(most, most_ahead)
    # With more to hold, the compiler moves tags to other registers, and so waits for them.
    if most > 4 and (most < slices or choice.turns > 1):
        most = 1 if choice.turns == 1 else 4
    # The same for each time of asking.
    ahead = tiles_of(slices, tiles_of(slices, most))
    arriving = 8 * blocks * (2 if cluster else ahead)
    arriving += max(16, 8 * blocks) if ahead < slices else 0
    working = 68 + 4 * row_tiles * blocks + arriving + choice.owned * values.kept
    # Products of float32 in full take every operand apart.
    working += 64 if values.passes > 1 else 0
    registers = min(255, 65536 // (32 * warps) // 8 * 8)
    held = min(fragments, (registers - working) // 4)

    parcels = choice.turns * 2 * slices * choice.sum_parts * 2 * blocks * 32
    exchange_bytes = 16 * parcels + 16 * choice.turns if cluster else 0
    kept_tiles = choice.turns if choice.turns > 1 else 0
    carried_bytes = kept_tiles * choice.owned * values.carried * 32 * warps * 4
    pitch = 16 * row_tiles * choice.row_parts + 4
    partial_bytes = 2 * choice.sum_parts * choice.columns * pitch * 4
    taken = exchange_bytes + partial_bytes + carried_bytes
    return _with_matrix(choice, gpu, held, taken, ahead, 0 if cluster else parcels)


def _scatter_plan(choice: ScatterChoice, gpu: GPU) -> TeamPlan | None:
    """As :func:`_plan`."""
    values, blocks, warps = choice.values, choice.blocks, choice.warps
    sums = 4 * choice.row_tiles * blocks
    chains = max(1, 4 // (choice.row_tiles * blocks))
    # While sums are added up nothing is multiplied, and the other way round.
    working = 36 + choice.owned * (values.kept + values.sent + 12) + 2 * choice.row_tiles
    working += max(sums * chains + min(32, 4 * choice.slices * blocks), choice.size + 16)
    working += 64 if values.passes > 1 else 0
    registers = min(255, 65536 // (32 * warps) // 8 * 8)
    held = min(choice.fragments, (registers - working) // 4)
    taken = 2 * (16 * choice.received + 8 + 512 * choice.slices * blocks)
    return _with_matrix(choice, gpu, held, taken, ahead=1, parcels=0)


def _with_matrix(
    choice: Choice, gpu: GPU, held: int, taken: int, ahead: int, parcels: int
) -> TeamPlan | None:
    """The plan, with fragments of R in shared memory as far as what is taken leaves room."""
    fragments, warps = choice.fragments, choice.warps
    room = gpu.shared_memory - taken
    if held < 1 or room < 0:
        return None
    spared = min(fragments - held, room // (512 * warps))
    streamed = fragments - held - spared
    if 3 * streamed > 2 * fragments:
        return None
    return TeamPlan(
        units=choice.units,
        blocks=choice.blocks,
        turns=choice.turns,
        size=choice.size,
        cluster=choice.cluster,
        scatter=choice.scatter,
        sum_parts=choice.sum_parts,
        row_parts=choice.row_parts,
        held=held,
        spared=spared,
        streamed=streamed,
        ahead=ahead,
        parcels=parcels,
        shared_memory=taken + 512 * warps * spared,
    )


def cycles(choice: Choice, plan: TeamPlan, B: int, N: int, gpu: GPU) -> float:
    """What a step of all sequences takes, so far as plans compare by it.

    Its numbers follow what was measured on an H100 (docs/performance.md).
    """
    if isinstance(choice, ScatterChoice):
        return _scatter_cycles(choice, plan, B, N, gpu)
    values, warps, columns = choice.values, choice.warps, choice.columns
    size, slices = choice.size, choice.slices
    chain, issue = 37 * choice.words * slices, warps * choice.blocks * choice.fragments
    multiply = max(chain, issue) * values.passes
    exchanged_bytes = 16 * size * values.sent * choice.unit_parcels * columns
    if choice.cluster:
        wait, transfer = 0.0, max(300, exchanged_bytes / 3.6 - 740)
    else:
        running = min(gpu.multiprocessors // size, plan.items(B, N)) * size
        wait, transfer = 400.0 + size, max(exchanged_bytes / 87, running * exchanged_bytes / 11000)
        # Slices that are asked for later come while those before are multiplied, or after.
        late = max(0, 300 - plan.ahead * multiply / slices)
        transfer += late * (tiles_of(slices, plan.ahead) - 1)
    fetch = 512 * warps * (plan.spared / 200 + plan.streamed / 20)
    add = choice.sum_parts * (57 + columns * choice.units * values.produced / 30)
    turn = transfer + multiply + fetch + add + 700 * choice.owned
    return max(wait + turn, choice.turns * turn) * _rounds(plan, B, N, gpu)


def _scatter_cycles(choice: ScatterChoice, plan: TeamPlan, B: int, N: int, gpu: GPU) -> float:
    """As :func:`cycles`, reckoned and then set right by what an H200 took (docs/performance.md)."""
    values, warps = choice.values, choice.warps
    chain = 33 * 2 * choice.slices / max(1, min(4, 4 // (choice.row_tiles * choice.blocks)))
    issue = warps * choice.blocks * choice.fragments * 1.6
    multiply = max(chain, issue) * values.passes
    # Parcels of 16 bytes, each a write of its own; then 128 bytes a cycle.
    transfer = max(550, 16 * choice.received / 8) + 16 * choice.received / 128
    fetch = 512 * warps * (plan.spared / 200 + plan.streamed / 20)
    # Gradients to all warps, the barrier, what wakes up.
    pass_on = 150 + 64 * warps * choice.slices * choice.blocks / 16
    step = 0.8 * (transfer + multiply + fetch + pass_on + 300 * choice.owned)
    return step * _rounds(plan, B, N, gpu)
