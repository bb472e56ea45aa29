"""How a group of CTAs, over the whole GPU, owns a head; see ``tile.cuh``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.call import Scratch
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.plan import Plan, Values
from flashrnn.kernels.sizes import power_of_two, tiles_of
from flashrnn.problem import Problem

# Words of a packet that hold values; the fourth is its flag.
_WORDS = 3

# Bytes of the initial h, of all CTAs together, up to which each reads what it needs itself for a
# single step, in place of packets. On an H200, with 3.1 MB (1x768, B = 16) that takes 1.1 us less,
# with 12.6 MB (1x1536) 1.4 us more.
_MOST_READ = 3_500_000

# Units of the widest head that CTAs of a cluster own.
_WIDEST_OF_CLUSTERS = 1024

# Tensor core instructions of a product in float32 beyond which parts of it are loops. Seconds of a
# busy core to compile LSTM 1x2048, without loops and with them: forward 5.9 and 2.9, backward 6.2
# and 2.1.
_MOST_UNROLLED = 400


@dataclass(frozen=True, kw_only=True)
class GridPlan(Plan):
    """How a group of CTAs owns a head.

    Attributes:
        backward: the direction.
        units: units of the head that a CTA owns.
        n_tiles: n-tiles of 8 sequences in a batch tile.
        interleaved: batch tiles that a group owns, whose steps alternate.
        size: CTAs of a group.
        warps: warps of a CTA, each of which sums a part of its product.
        in_registers: fragments of R that stay in a warp's registers.
        in_shared: those that lie in shared memory.
        in_memory: those that lie in global memory; like those in shared memory, they are loaded at
            every step.
        ahead: slices of the packets that a warp loads at once.
        packets: 16-byte packets of a group's buffers in global memory, two for each batch tile.
        one_step: whether it is for a single step, for which no CTA waits for another: each reads
            the initial h itself.
    """

    backward: bool
    units: int
    n_tiles: int
    interleaved: int
    size: int
    warps: int
    in_registers: int
    in_shared: int
    in_memory: int
    ahead: int
    packets: int
    one_step: bool = False

    @property
    def cooperative(self) -> bool:
        """Whether all CTAs of a launch must run at once, as they do that wait for each other."""
        return not self.one_step

    def of_one_step(self, B: int, N: int) -> GridPlan:
        """See :meth:`flashrnn.kernels.plan.Plan.of_one_step`."""
        read = self.size * B * N * self.D * 4
        # Where the units of two packets lie side by side, h can be read several numbers at a time.
        if self.backward or self.units % 12 or read > _MOST_READ:
            return self
        return replace(self, one_step=True, packets=0)

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return "grid_backward" if self.backward else "grid_forward"

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps

    def work_tiles(self, B: int, N: int) -> int:
        """Heads times what a group owns of their sequences."""
        return N * tiles_of(B, 8 * self.n_tiles * self.interleaved)

    def groups(self, B: int, N: int, gpu: GPU) -> int:
        """CTA groups of a launch, as many as run at once."""
        return min(self.work_tiles(B, N), gpu.multiprocessors // self.size)

    def grid(self, B: int, N: int, gpu: GPU) -> int:
        """CTAs of a launch."""
        return self.groups(B, N, gpu) * self.size

    def scratch(self, B: int, N: int, gpu: GPU) -> Scratch:
        """See :meth:`flashrnn.kernels.plan.Plan.scratch`."""
        groups = self.groups(B, N, gpu)
        fragments = groups * self.size * self.warps * self.in_memory
        return Scratch(packets=groups * self.packets, R_in_memory=32 * fragments)

    def source(
        self, cell: TracedCell, precision: str, options: source.Options, piece_bytes: int
    ) -> dict[str, str]:
        """See :meth:`flashrnn.kernels.plan.Plan.source`."""
        constants = {
            "D": self.D,
            "UNITS": self.units,
            "N_TILES": self.n_tiles,
            "INTERLEAVED": self.interleaved,
            "WARPS": self.warps,
            "IN_REGISTERS": self.in_registers,
            "IN_SHARED": self.in_shared,
            "IN_MEMORY": self.in_memory,
            "AHEAD": self.ahead,
            "FORWARD": not self.backward,
            "ONE_STEP": self.one_step,
            "GROUP_PACKETS": self.packets,
            "SHARED_BYTES": self.shared_memory,
            "MOST_UNROLLED": _MOST_UNROLLED,
            "STORED": len(cell.states),
            **dict(options),
        }
        direction, record = (
            ("backward", call.BACKWARD) if self.backward else ("forward", call.FORWARD)
        )
        if source.is_sequenced(options):
            record = record.complete
        return source.program(f"grid/{direction}.cu", cell, precision, constants, record)


def plan_scan(problem: Problem, gpu: GPU, backward: bool) -> GridPlan | str:
    """How groups of CTAs own the heads of a problem, or the reason why they cannot.

    Args:
        problem: its cell, D and dtype decide whether there is a plan, B and N only which. Whether
            float32 products may be tf32 does not decide, as that may change between the forward
            and the backward scan.
        gpu: the device.
        backward: whether for the backward scan.
    """
    values = Values.of(problem, backward)
    # Powers of two, so that batches of all sizes, empty ones too, take few different kernels.
    B, N = 8 * power_of_two(tiles_of(max(1, problem.B), 8)), problem.N
    plan = best_plan(values, B, N, problem.D, gpu)
    if isinstance(plan, str):
        return plan
    taken, estimated = (_rounds(plan, size, N, gpu) for size in (max(1, problem.B), B))
    return replace(plan, estimated_cycles=plan.estimated_cycles * taken / estimated)


@lru_cache(maxsize=1024)
def best_plan(values: Values, B: int, N: int, D: int, gpu: GPU) -> GridPlan | str:
    """The plan with the fewest :func:`estimated_cycles`, or the reason why there is none."""
    best: GridPlan | None = None
    for choice in _choices(values, B, N, D, gpu):
        for ahead in _slices_ahead(choice):
            plan = _plan(choice, gpu, ahead)
            if plan is not None:
                plan = replace(plan, estimated_cycles=estimated_cycles(choice, plan, B, N, gpu))
                if best is None or plan.estimated_cycles < best.estimated_cycles:
                    best = plan
    if best is None:
        return (
            f"a head of {D} units; its recurrent matrix does not find room on this GPU: more than "
            "two thirds would have to be read anew at each step"
        )
    return best


@dataclass(frozen=True)
class Choice:
    """Tiles, and what follows from them; see ``tile.cuh`` for what the kernels call it."""

    values: Values
    D: int
    units: int
    n_tiles: int
    interleaved: int
    warps: int

    @property
    def size(self) -> int:
        """CTAs of a group."""
        return tiles_of(self.D, self.units)

    @property
    def columns(self) -> int:
        """Sequences of a batch tile."""
        return 8 * self.n_tiles

    @property
    def is_wide(self) -> bool:
        """Whether it is a head of 16 bits that no cluster holds, of which plans were timed anew."""
        return self.D > _WIDEST_OF_CLUSTERS and self.values.itemsize == 2

    @property
    def unit_packets(self) -> int:
        """Packets of one value of a CTA's units, for one sequence."""
        return tiles_of(self.units, 4 * _WORDS // self.values.itemsize)

    @property
    def slices(self) -> int:
        """Slices that a warp multiplies."""
        return tiles_of(self.size * self.values.sent * self.unit_packets, 8 * self.warps)

    @property
    def row_tiles(self) -> int:
        """Tiles of 16 rows of a CTA's product."""
        return tiles_of(self.units * self.values.produced, 16)

    @property
    def fragments(self) -> int:
        """Fragments of R of a warp."""
        return _WORDS * self.row_tiles * self.slices

    @property
    def elements(self) -> int:
        """Elements of a thread, of each batch tile."""
        packets_a_warp = 32 // (4 * _WORDS // self.values.itemsize)
        return tiles_of(self.unit_packets * self.columns, self.warps * packets_a_warp)


# ---- which plans are compared

_WARPS = (6, 8, 12, 16)
# With more n-tiles, sums and packets take the registers that R needs.
_N_TILES = (1, 2)
_INTERLEAVED = (1, 2, 4, 8)
_FEWEST_UNITS, _MOST_UNITS = 12, 128
# Packets or tiles of 16 rows are full if a CTA's units are a multiple of one of these.
_MULTIPLES = (4, 8, 12, 16)
# What a CTA owns is chosen such that all work tiles take at most so many rounds, ...
_MOST_ROUNDS = 8
# ... or so many groups run at once.
_GROUPS_AT_ONCE = (1, 2, 4, 8, 16, 32)


def _choices(values: Values, B: int, N: int, D: int, gpu: GPU) -> Iterator[Choice]:
    for n_tiles, interleaved in product(_N_TILES, _INTERLEAVED):
        if 8 * n_tiles * interleaved > B:
            continue
        work_tiles = N * tiles_of(B, 8 * n_tiles * interleaved)
        for units, warps in product(_units(work_tiles, D, gpu), _WARPS):
            yield Choice(values, D, units, n_tiles, interleaved, warps)


def _units(work_tiles: int, D: int, gpu: GPU) -> list[int]:
    """How many units a CTA may own: as few as possible for some numbers of groups at once."""
    rounds = range(1, _MOST_ROUNDS + 1)
    at_once = {tiles_of(work_tiles, count) for count in rounds} | set(_GROUPS_AT_ONCE)
    sizes = {gpu.multiprocessors // groups for groups in at_once} - {0}
    fewest = {max(_FEWEST_UNITS, tiles_of(D, size)) for size in sizes}
    rounded = {tiles_of(few, whole) * whole for few in fewest for whole in _MULTIPLES}
    return sorted(units for units in rounded if units <= _MOST_UNITS)


# ---- where R goes

# Registers of a thread for all but R, sums, packets and elements. With so many, the loop over time
# of no plan spills; tests hold the machine code to that.
_OTHER_REGISTERS = 68
# Where a sequence's rows lie, backward, in calls with options of sequences. On Hopper the compiler
# needs none: with fewer for R it spills more, since fragments from memory take registers too.
_SEQUENCE_REGISTERS_ELSEWHERE = 16
# float32 in full splits each operand into two, in registers of their own.
_SPLIT_OPERANDS = 64
# A thread of a fragment has 4 of its words, a warp 512 bytes.
_FRAGMENT_WORDS, _FRAGMENT_BYTES = 4, 512
# Slices that a warp loads at once, by the warps of a CTA: more warps have fewer registers.
_AHEAD = {6: 8, 8: 8, 12: 4, 16: 1}
# Forward, a group exchanges little: polling for more only slows down the CTAs that still send.
_AHEAD_FORWARD = 2
# Of two n-tiles, whose slices take twice the registers: one, but for wide heads.
_AHEAD_OF_TWO = 3
# Where batch tiles of two n-tiles are interleaved and have more slices, the compiler spills with
# several of them ahead: LSTM 1x2048, B = 64, forward + backward took 46 us a step instead of 40.
_MOST_SLICES_INTERLEAVED = 16
# Beyond this many, the compiler may copy flags to other registers, and so wait for one load after
# the other: a plan with 8 slices took 7.4 ms instead of 2.0 at 1x768 (docs/notebook/2026-11-28.md).
_MOST_AHEAD_IN_PARTS = 4


def _plan(choice: Choice, gpu: GPU, ahead: int) -> GridPlan | None:
    """Where R goes, if there is room for enough of it."""
    warps, fragments = choice.warps, choice.fragments
    in_registers = min(fragments, _registers_for_R(choice, ahead, gpu) // _FRAGMENT_WORDS)
    taken = _shared_memory_without_R(choice)
    room = gpu.shared_memory - taken
    if in_registers < 1 or room < 0:
        return None
    in_shared = min(fragments - in_registers, room // (_FRAGMENT_BYTES * warps))
    in_memory = fragments - in_registers - in_shared
    if 3 * in_memory > 2 * fragments:
        return None
    # With parts of R on their way too, slices that are loaded ahead cost more than they save.
    if choice.n_tiles > 1 and ahead > 1 and in_memory:
        return None
    return GridPlan(
        D=choice.D,
        backward=choice.values.backward,
        units=choice.units,
        n_tiles=choice.n_tiles,
        interleaved=choice.interleaved,
        size=choice.size,
        warps=warps,
        in_registers=in_registers,
        in_shared=in_shared,
        in_memory=in_memory,
        ahead=ahead,
        packets=choice.interleaved * 2 * choice.slices * warps * 2 * choice.n_tiles * 32,
        shared_memory=taken + _FRAGMENT_BYTES * warps * in_shared,
    )


def _slices_ahead(choice: Choice) -> list[int]:
    """How many slices a warp may load at once: as many as are of use, or one."""
    slices = choice.slices
    most = _AHEAD_FORWARD if choice.values.sent == 1 else _AHEAD[choice.warps]
    if choice.n_tiles > 1:
        spills = choice.interleaved > 1 and slices > _MOST_SLICES_INTERLEAVED
        most = _AHEAD_OF_TWO if choice.is_wide and not spills else 1
    if most > _MOST_AHEAD_IN_PARTS and (most < slices or choice.interleaved > 1):
        most = 1 if choice.interleaved == 1 else _MOST_AHEAD_IN_PARTS
    # Parts of equal size.
    ahead = tiles_of(slices, tiles_of(slices, most))
    return [ahead, 1] if ahead > 1 else [1]


def _registers_for_R(choice: Choice, ahead: int, gpu: GPU) -> int:
    """Registers of a thread that are left for R; below 0 if there are too few for the rest."""
    values, n_tiles = choice.values, choice.n_tiles
    # A lane has two packets, of 4 words each, of a slice and an n-tile.
    packets = 8 * n_tiles * ahead
    # The words of a slice are copied if the next one is loaded in its place.
    packets += max(16, 8 * n_tiles) if ahead < choice.slices else 0
    sums = 4 * choice.row_tiles * n_tiles
    working = _OTHER_REGISTERS + sums + packets + choice.elements * values.kept
    working += _SPLIT_OPERANDS if values.passes > 1 else 0
    if values.looked_up and values.backward and not gpu.multiplies_by_groups:
        working += _SEQUENCE_REGISTERS_ELSEWHERE
    # Of 65536 of a multiprocessor, by the 8; a thread cannot have more than 255.
    return min(255, 65536 // (32 * choice.warps) // 8 * 8) - working


def _shared_memory_without_R(choice: Choice) -> int:
    """Bytes of two products' sums, what threads carry of interleaved tiles, and sequences."""
    threads = 32 * choice.warps
    kept_tiles = choice.interleaved if choice.interleaved > 1 else 0
    carried = kept_tiles * choice.elements * choice.values.carried * threads * 4
    sums = 2 * choice.warps * choice.columns * (16 * choice.row_tiles + 4) * 4
    sequences = choice.interleaved * choice.columns if choice.values.looked_up else 0
    table = choice.values.sequence_bytes * sequences
    return sums + carried + table


# ---- what a step takes, in cycles
#
# These were fitted to 281 timings of random plans at 16 shapes, on an H100. Among these and 142
# more, the plans that they choose are within 5% of the best for most shapes, and 12% slower at
# worst (docs/cost-model.md, "How plans are chosen").

# An mma waits so long for the one before that adds to the same sum.
_MMA_LATENCY = 37
# A packet's way through the L2 cache, and one cycle more for each CTA of a group.
_EXCHANGE_LATENCY = 400.0
# Bytes a cycle that a CTA, and all CTAs together, load of packets.
_PACKET_BYTES_A_CTA, _PACKET_BYTES_A_GPU = 87, 11000
# How long before its use a slice must be loaded, lest the product wait.
_SLICE_LATENCY = 300
# Bytes a cycle of R that a CTA loads from shared and from global memory.
_SHARED_BYTES, _MEMORY_BYTES = 200, 20
# The part of that which a step of a wide head waits for, forward.
_MEMORY_SHOWS = 1 / 3
# To add the sums of the warps, for each of them: at all, and sums a cycle.
_ADD_LATENCY, _SUMS_A_CYCLE = 57, 30
# The cell's step of a thread's element, with what it loads and stores.
_ELEMENT_CYCLES = 700
# To begin another work tile, as a part of all steps of the one before.
_NEW_ROUND = 0.03


def estimated_cycles(choice: Choice, plan: GridPlan, B: int, N: int, gpu: GPU) -> float:
    """What a step of all sequences takes, as far as plans compare by it."""
    multiply = _product_cycles(choice)
    transfer = _transfer_cycles(choice, plan, multiply, B, N, gpu)
    from_shared = _FRAGMENT_BYTES * choice.warps * plan.in_shared / _SHARED_BYTES
    from_memory = _FRAGMENT_BYTES * choice.warps * plan.in_memory / _MEMORY_BYTES
    sums = choice.columns * choice.units * choice.values.produced
    add = choice.warps * (_ADD_LATENCY + sums / _SUMS_A_CYCLE)
    step = transfer + multiply + from_shared + add + _ELEMENT_CYCLES * choice.elements
    if choice.is_wide and not plan.backward:
        # R arrives from memory during all of the step.
        step = max(step + _MEMORY_SHOWS * from_memory, from_memory)
    else:
        step += from_memory
    # Interleaved batch tiles hide the latency of the exchange.
    latency = _EXCHANGE_LATENCY + choice.size
    of_tiles = [max(latency + step, (tile + 1) * step) for tile in range(choice.interleaved)]
    cycles = of_tiles[-1] * _rounds(plan, B, N, gpu)
    if choice.values.ragged:
        # Between sequences of one length and lengths that are spread evenly.
        cycles = (cycles + _spread_cycles(choice, plan, of_tiles, B, N, gpu)) / 2
    return cycles


def _spread_cycles(
    choice: Choice, plan: GridPlan, of_tiles: list[float], B: int, N: int, gpu: GPU
) -> float:
    """The same of lengths that are spread evenly, of the group with the longest sequence.

    ``of_tiles`` is what a step of one, two and more batch tiles of a work tile takes.
    """
    batch_tiles, of_head = tiles_of(B, choice.columns), plan.work_tiles(B, 1)
    taken = range(0, plan.work_tiles(B, N), gpu.multiprocessors // plan.size)
    # Of many work tiles some tell as much.
    some, total = taken[:: tiles_of(len(taken), 16)], 0.0
    for index in some:
        place = index % of_head
        # As in tile.cuh, the longest first.
        order = [
            k * of_head + (of_head - 1 - place if k % 2 else place) for k in range(len(of_tiles))
        ]
        lengths = [max(0.0, 1 - tile / batch_tiles) for tile in order] + [0.0]
        total += sum(cycles * (lengths[k] - lengths[k + 1]) for k, cycles in enumerate(of_tiles))
    return total * len(taken) / len(some)


def _product_cycles(choice: Choice) -> float:
    """The product: its longest chain of instructions, or issuing those of all warps."""
    chain = _MMA_LATENCY * _WORDS * choice.slices
    issue = choice.warps * choice.n_tiles * choice.fragments
    return max(chain, issue) * choice.values.passes


def _transfer_cycles(
    choice: Choice, plan: GridPlan, multiply: float, B: int, N: int, gpu: GPU
) -> float:
    """Loading the packets of a batch tile, and waiting for slices that are loaded late."""
    size, slices = choice.size, choice.slices
    exchanged = 16 * size * choice.values.sent * choice.unit_packets * choice.columns
    running = min(gpu.multiprocessors // size, plan.work_tiles(B, N)) * size
    transfer = max(exchanged / _PACKET_BYTES_A_CTA, running * exchanged / _PACKET_BYTES_A_GPU)
    # Slices that are loaded later arrive while those before are multiplied, or after.
    late = max(0, _SLICE_LATENCY - plan.ahead * multiply / slices)
    return transfer + late * (tiles_of(slices, plan.ahead) - 1)


def _rounds(plan: GridPlan, B: int, N: int, gpu: GPU) -> float:
    """How often groups compute a step, one work tile after another."""
    rounds = tiles_of(plan.work_tiles(B, N), gpu.multiprocessors // plan.size)
    return rounds + _NEW_ROUND * (rounds - 1)
