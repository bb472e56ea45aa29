"""How one CTA computes whole heads of up to 128 units; ``tile.cuh`` says what each thread owns.

The constants below are used for every GPU. Times were measured on an H100 and an H200
(docs/notebook). The numbers of registers follow what the compiler allocates: with them no
loop over time spills, which tests look for in the machine code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, NamedTuple

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.plan import SEQUENCE_BYTES, Counts, Plan, read_states
from flashrnn.kernels.sizes import tiles_of
from flashrnn.problem import Problem

LARGEST_HEAD = 128

# Registers that a computing thread needs beside R's, by bytes of an element. Full float32 splits
# every factor in two, which takes more.
_WORKING_REGISTERS = {2: 64, 4: 136}
# Registers of which the compiler makes use beside those of R and of the cell, where it is free to.
_USED_REGISTERS = {2: 56, 4: 128}
_REGISTERS_OF_A_MULTIPROCESSOR = 64 * 1024
# The most fragments of R in registers, 4 registers of a thread each, by bytes of an element.
_MOST_FRAGMENTS_IN_REGISTERS = {2: 32, 4: 22}

# A thread can address 255 registers. A CTA of more than 8 warps has 65536 / threads for each: 168
# with 12 warps, the most that there are.
_MOST_REGISTERS = 255
_REGISTERS_OF_12_WARPS = 168
# A computing thread's where producer threads give up some, by the number of computing warps:
# COMPUTING_REGISTERS of tile.cuh.
_SHIFTED_REGISTERS = {8: 216, 12: 152}

# Inputs are fetched a step less ahead than the ring has stages: with 8, main memory's latency is
# covered at the shortest steps, of 0.1 us; with fewer than 3, every step would wait for it.
_MOST_STAGES = 8
_FEWEST_STAGES = 3

# There are 2 producer warps, and more if each of them would copy more than so many pieces of 16
# bytes a step; a third more where two CTAs then run on a multiprocessor.
_PIECES_A_PRODUCER_WARP = 192
_MOST_PIECES = 256

# Several CTAs run on a multiprocessor where R's rows have at most so many bytes. With 12 warps in
# all each thread has 168 registers, which suffice for cells of so many gates. LSTM 12x64 in
# bfloat16, forward, on an H200, one CTA and two: B = 128 0.68 and 0.49 ms, B = 256 1.02 and 0.78.
# Two are reckoned with for other cells too, but the compiler is not held to it: it would spill.
_SMALL_ROW_BYTES = 128
_SMALL_GATES = 4
_WARPS_AT_ONCE = 12
# Sequences of a tile: as many as a product has columns, or fewer, which share the cell's work.
_COLUMNS = (2, 4, 8)
# Computing warps of a CTA of several tiles. With 4 producer warps, which give up some, a computing
# thread has 152 registers. Such tiles are of 4 or 8 sequences, and a CTA has at most so many, by
# whether it goes backward: there 48 took longer than one tile a CTA (LSTM 24x32, B = 200, H200).
_SHARING_WARPS = 12
_SHARING_COLUMNS = (4, 8)
_MOST_SHARING = {False: 48, True: 32}

# Shared memory of a multiprocessor that the system takes for each CTA.
_RESERVED_MEMORY = 1024

# An estimate is not better than that: of plans so much alike the one with the widest CTAs is taken.
_ALIKE = 1.03


class _Cycles(NamedTuple):
    """Of a step, as docs/cost-model.md says and to what they were fitted.

    Attributes:
        fixed: of a CTA, whatever it computes.
        others: how much longer than alone a warp keeps its scheduler busy for other CTAs' warps.
    """

    fixed: float
    others: float


# By whether they are of backward.
_CYCLES = {False: _Cycles(190, 1), True: _Cycles(280, 1.8)}
# Of a warp, for each product by a fragment of R, of which float32 is counted three (with TF32 too),
# and for each gate and state of each sequence.
_CYCLES_A_FRAGMENT = 9
_PRODUCTS = {2: 1, 4: 3}
_CYCLES_A_VALUE = 4.5
# Of a CTA, for copies and barriers, where several share a multiprocessor's schedulers.
_CYCLES_OF_COPIES = 160
# Of the multiprocessor's share of main memory, for each row of a head that a step reads or writes,
# and for each byte of it. Less than a sector is not moved.
_CYCLES_A_ROW = 1.4
_CYCLES_A_BYTE = 0.063
_SECTOR_BYTES = 32
# Several heads write one line of the L2 cache, each its rows, and their CTAs run apart, the more so
# the more sequences of a multiprocessor are in other CTAs. A written row takes so much longer for
# each of those, times the part of the line that other heads write.
_LINE_BYTES = 128
_LONGER_FOR_OTHERS = 0.025
# Latency, issue and memory overlap, but not wholly where two of them take equally long: they are
# added as powers of so much.
_OVERLAP = 6

# Parts of the sequences that run at some time, of lengths that are spread evenly.
_PARTS = (0.875, 0.625, 0.375, 0.125)

# Bytes of a warp's fragment.
_FRAGMENT_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class SingleCtaPlan(Plan):
    """How CTAs compute heads, each one head for some sequences.

    Attributes:
        backward: the direction.
        sequences: sequences of a CTA.
        tiles: tiles of 2, 4 or 8 of them, each with computing warps of its own.
        in_registers: a warp's fragments of R that stay in registers; the others lie in shared
            memory.
        producers: threads that copy between global and shared memory.
        stages: slots of the ring of inputs: steps whose inputs are being fetched or read.
        at_once: CTAs on a multiprocessor that the compiler leaves registers for.
    """

    # common/row_pieces.cuh: rows are contiguous, and begin at words where they consist of words.
    ROW_ALIGNMENT: ClassVar = 4

    backward: bool
    sequences: int
    tiles: int
    in_registers: int
    producers: int
    stages: int
    at_once: int

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return "single_cta_backward" if self.backward else "single_cta_forward"

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.tiles * tiles_of(self.D, 16) + self.producers

    def grid(self, B: int, N: int, gpu: GPU) -> int:
        """CTAs of a launch."""
        return N * tiles_of(B, self.sequences)

    def source(
        self, cell: TracedCell, precision: str, options: source.Options, piece_bytes: int
    ) -> dict[str, str]:
        """See :meth:`flashrnn.kernels.plan.Plan.source`."""
        constants = {
            "D": self.D,
            "SEQUENCES": self.sequences,
            "TILES": self.tiles,
            "IN_REGISTERS": self.in_registers,
            "PRODUCERS": self.producers,
            "STAGES": self.stages,
            "AT_ONCE": self.at_once,
            "SHARED_MEMORY": self.shared_memory,
            "PIECE_BYTES": piece_bytes,
            "STORED": len(cell.states),
            **dict(options),
        }
        if self.backward:
            kernel, record = "single_cta/backward.cu", call.BACKWARD
            constants["FIRST_READ"] = _first_read(cell)
        else:
            kernel, record = "single_cta/forward.cu", call.FORWARD
            exponent = source.exponent_of_h(cell)
            constants["H_IS_BOUNDED"], constants["H_EXPONENT"] = exponent is not None, exponent or 0
        if source.is_sequenced(options):
            record = record.complete
        return source.program(kernel, cell, precision, constants, record)


def plan_scan(problem: Problem, gpu: GPU, backward: bool) -> SingleCtaPlan | str:
    """How CTAs compute the heads of a problem, or the reason why they cannot.

    Args:
        problem: its cell, B, N, D, dtype, options and whether it needs a gradient decide.
        gpu: the device.
        backward: whether for the backward scan.
    """
    if problem.D > LARGEST_HEAD:
        return (
            f"a head of {problem.D} units; it takes up to {LARGEST_HEAD}, "
            "since one CTA computes a whole head"
        )
    head = _head(problem, backward)
    if possible := _plans(head, max(1, problem.B), problem.N, gpu):
        least = min(plan.estimated_cycles for plan in possible)
        alike = (plan for plan in possible if plan.estimated_cycles <= _ALIKE * least)
        return max(alike, key=lambda plan: plan.sequences)
    return (
        f"{head.recurrent} gates of {head.D} units that R feeds; with what a step reads and "
        f"writes they take more than the {gpu.shared_memory} bytes of shared memory that this "
        "GPU gives a CTA"
    )


def possible_plans(problem: Problem, gpu: GPU, backward: bool) -> tuple[SingleCtaPlan, ...]:
    """All plans of a problem with heads of at most ``LARGEST_HEAD`` units.

    Args:
        problem: as of :func:`plan_scan`.
        gpu: the device.
        backward: whether for the backward scan.
    """
    return _plans(_head(problem, backward), max(1, problem.B), problem.N, gpu)


def _first_read(cell: TracedCell) -> int:
    """The first state whose value before a step the derivative reads; their number if none is."""
    read, count = read_states(cell, backward=True), len(cell.states)
    return next((s for s in range(count) if read >> s & 1), count)


def _head(problem: Problem, backward: bool) -> _Head:
    counts = Counts.of(problem.cell)
    if backward:
        inputs = counts.gates + 2 * counts.states
        outputs: tuple[int, ...] = (counts.gates,)
    else:
        inputs = counts.inputs
        outputs = (counts.states, counts.gates) if problem.needs_gradient else (counts.states,)
    if not backward and problem.resets:
        outputs = (outputs[0] + 1, *outputs[1:])
    return _Head(
        backward,
        counts.recurrent,
        counts.gates,
        counts.gates + counts.states,
        inputs,
        outputs,
        problem.D,
        problem.dtype.itemsize,
        SEQUENCE_BYTES if problem.is_sequenced else 0,
        problem.ragged and not problem.even,
    )


class _Head(NamedTuple):
    """What a plan needs to know of a head.

    Attributes:
        backward: the direction.
        recurrent: gates that R feeds.
        gates: all gates.
        values: gates and states.
        inputs: rows of a line of the ring: numbers of a unit that a step reads.
        outputs: rows of the lines that a step writes, one number for each kind of line.
        D: head dimension.
        itemsize: bytes of an element of the tensors.
        sequence_bytes: bytes of what says where a sequence's rows lie.
        ragged: whether sequences may have lengths that differ much.
    """

    backward: bool
    recurrent: int
    gates: int
    values: int
    inputs: int
    outputs: tuple[int, ...]
    D: int
    itemsize: int
    sequence_bytes: int
    ragged: bool

    @property
    def computing_warps(self) -> int:
        """Warps that multiply, each 16 units."""
        return tiles_of(self.D, 16)

    @property
    def fragments(self) -> int:
        """Fragments of R of a computing warp, 32 bytes of the summed dimension each."""
        return self.recurrent * (16 * self.computing_warps * self.itemsize // 32)

    @property
    def is_small(self) -> bool:
        """Whether R takes few enough registers for several tiles on a multiprocessor."""
        return self.D * self.itemsize <= _SMALL_ROW_BYTES

    @property
    def has_few_gates(self) -> bool:
        """Whether a step takes few enough registers for that too."""
        return self.gates <= _SMALL_GATES

    def at_once(self, warps: int) -> int:
        """How many CTAs of so many warps are reckoned to run on a multiprocessor."""
        if not self.is_small:
            return 1
        if not self.has_few_gates or self.itemsize == 4:
            return 2
        at_once = _WARPS_AT_ONCE // warps
        # Options of sequences take registers too: with three, sLSTM 24x32 would spill.
        return min(2, at_once) if self.sequence_bytes else at_once

    def line(self, rows: int) -> int:
        """Bytes from one line of shared memory to the next: ``pitch`` of ``tile.cuh``."""
        return rows * 16 * self.computing_warps * self.itemsize + 16

    @property
    def input_bytes(self) -> int:
        """Bytes of a sequence in a slot of the ring."""
        return self.line(self.inputs)

    @property
    def output_bytes(self) -> int:
        """Bytes of a sequence beside the ring: of what steps write, two buffers of each kind."""
        return 2 * sum(map(self.line, self.outputs)) + self.sequence_bytes


class _Tiling(NamedTuple):
    """How a multiprocessor's sequences lie in tiles, each with computing warps of its own.

    Attributes:
        columns: sequences of a tile.
        tiles: tiles of a CTA.
        warps: computing warps of a tile.
        producer_warps: of a CTA.
        at_once: CTAs on a multiprocessor.
    """

    columns: int
    tiles: int
    warps: int
    producer_warps: int
    at_once: int

    @property
    def sequences(self) -> int:
        """Sequences of a CTA."""
        return self.tiles * self.columns

    @property
    def computing_warps(self) -> int:
        """Computing warps of a CTA."""
        return self.tiles * self.warps


@lru_cache(maxsize=1024)
def _plans(head: _Head, B: int, N: int, gpu: GPU) -> tuple[SingleCtaPlan, ...]:
    """Those of all tilings for which shared memory suffices."""
    plans = (_plan(head, tiling, B, N, gpu) for tiling in _tilings(head, gpu))
    return tuple(plan for plan in plans if plan is not None)


def _tilings(head: _Head, gpu: GPU) -> list[_Tiling]:
    """All, those with the fewest tiles and sequences first."""
    warps, found = head.computing_warps, []
    for columns in _COLUMNS:
        producers = _producer_warps(head, columns)
        found.append(_Tiling(columns, 1, warps, producers, head.at_once(warps + producers)))
    # Producer threads of several tiles have no registers left for what options of sequences need.
    shares = head.is_small and head.has_few_gates and head.itemsize == 2 and not head.sequence_bytes
    if shares and gpu.shifts_registers and _SHARING_WARPS % warps == 0:
        tiles = _SHARING_WARPS // warps
        most = _MOST_SHARING[head.backward] // tiles
        found += [_Tiling(few, tiles, warps, 4, 1) for few in _SHARING_COLUMNS if few <= most]
    return found


def _plan(head: _Head, tiling: _Tiling, B: int, N: int, gpu: GPU) -> SingleCtaPlan | None:
    """The plan of a tiling, if shared memory suffices."""
    in_registers = _fragments_in_registers(head, tiling, gpu)
    R_bytes = (head.fragments - in_registers) * head.computing_warps * _FRAGMENT_BYTES
    sequences = tiling.sequences
    at_once = tiling.at_once if head.has_few_gates else 1
    # Of the shared memory that CTAs of a multiprocessor divide, each takes some for the system.
    share = (gpu.shared_memory + _RESERVED_MEMORY) // at_once - _RESERVED_MEMORY
    room = share - R_bytes - sequences * head.output_bytes
    stages = min(_MOST_STAGES, room // (sequences * head.input_bytes))
    if stages < _FEWEST_STAGES:
        return None
    lines = sequences * (stages * head.input_bytes + head.output_bytes)
    plan = SingleCtaPlan(
        D=head.D,
        backward=head.backward,
        sequences=sequences,
        tiles=tiling.tiles,
        in_registers=in_registers,
        producers=32 * tiling.producer_warps,
        stages=stages,
        at_once=at_once,
        shared_memory=R_bytes + lines,
    )
    resident = _resident(head, tiling, plan, gpu)
    cycles = _estimated_cycles(head, tiling, resident, B, N, gpu)
    if head.ragged:
        # Between sequences of one length and lengths spread evenly, of which fewer and fewer run.
        running = [max(1, round(part * B)) for part in _PARTS]
        spread = [_estimated_cycles(head, tiling, resident, few, N, gpu) for few in running]
        cycles = (cycles + sum(spread) / len(spread)) / 2
    return replace(plan, estimated_cycles=cycles)


def _resident(head: _Head, tiling: _Tiling, plan: SingleCtaPlan, gpu: GPU) -> int:
    """CTAs on a multiprocessor: more than the compiler is held to, if it needs fewer registers."""
    elements = max(1, tiling.columns // 2)
    used = 4 * plan.in_registers + elements * head.values + _USED_REGISTERS[head.itemsize]
    of_a_cta = plan.threads * 8 * tiles_of(used, 8)
    by_memory = (gpu.shared_memory + _RESERVED_MEMORY) // (plan.shared_memory + _RESERVED_MEMORY)
    return max(tiling.at_once, min(_REGISTERS_OF_A_MULTIPROCESSOR // of_a_cta, by_memory))


def _estimated_cycles(
    head: _Head, tiling: _Tiling, resident: int, B: int, N: int, gpu: GPU
) -> float:
    """What a step of all sequences takes, with so many CTAs resident on a multiprocessor."""
    tiles = tiles_of(B, tiling.sequences)
    filled = B / (tiles * tiling.sequences)
    rounds, rest = divmod(N * tiles, resident * gpu.multiprocessors)
    cycles = rounds * _cycles(head, tiling, resident, resident, filled)
    if rest:
        busiest = tiles_of(rest, gpu.multiprocessors)
        cycles += _cycles(head, tiling, busiest, rest / gpu.multiprocessors, filled)
    return cycles


def _cycles(head: _Head, tiling: _Tiling, busiest: int, mean: float, filled: float) -> float:
    """A step of one round of CTAs.

    `busiest`: CTAs of the multiprocessor that has most; `mean`: of all; `filled`: the part of the
    CTAs' sequences that there are.
    """
    of = _CYCLES[head.backward]
    product = _CYCLES_A_FRAGMENT * head.fragments * _PRODUCTS[head.itemsize]
    cell = _CYCLES_A_VALUE * head.values * tiling.columns
    # Warps of a CTA meet at every step: those of one of the four schedulers add up.
    latency = of.fixed + max(1, tiling.computing_warps / 4) * (product + cell)
    of_a_cta = _CYCLES_OF_COPIES + tiling.computing_warps * of.others * (product + cell)
    issue = busiest * of_a_cta / 4
    row_bytes = max(_SECTOR_BYTES, head.D * head.itemsize)
    in_other_ctas = (busiest - 1) * tiling.columns
    of_other_heads = max(0, 1 - row_bytes / _LINE_BYTES)
    written = sum(head.outputs) * (1 + _LONGER_FOR_OTHERS * in_other_ctas * of_other_heads)
    rows = head.inputs + written
    # Multiprocessors compete for memory, but each has a limit of its own too.
    sequences = tiling.sequences * (mean * filled + busiest) / 2
    memory = sequences * rows * (_CYCLES_A_ROW + _CYCLES_A_BYTE * row_bytes)
    return float(sum(x**_OVERLAP for x in (latency, issue, memory)) ** (1 / _OVERLAP))


def _fragments_in_registers(head: _Head, tiling: _Tiling, gpu: GPU) -> int:
    """How many of a warp's fragments of R stay in registers."""
    registers, warps = _MOST_REGISTERS, tiling.computing_warps
    if gpu.shifts_registers and tiling.producer_warps == 4 and warps in _SHIFTED_REGISTERS:
        registers = _SHIFTED_REGISTERS[warps]
    elif warps > 6:
        registers = _REGISTERS_OF_12_WARPS
    room = (registers - _WORKING_REGISTERS[head.itemsize]) // 4
    return min(head.fragments, _MOST_FRAGMENTS_IN_REGISTERS[head.itemsize], room)


def _producer_warps(head: _Head, sequences: int) -> int:
    """How many warps copy between global and shared memory, for a CTA of one tile."""
    # A whole warpgroup, which can give registers to the two that compute.
    if head.computing_warps == 8:
        return 4
    most = 4 if head.computing_warps > 6 else min(4, 8 - head.computing_warps)
    pieces = sequences * head.inputs * tiles_of(head.D * head.itemsize, 16)
    of_two = _WARPS_AT_ONCE // 2 - head.computing_warps
    if head.is_small and head.has_few_gates and pieces <= _MOST_PIECES * of_two:
        most = min(most, of_two)
    return min(most, max(2, tiles_of(pieces, _PIECES_A_PRODUCER_WARP)))
