"""How one CTA computes whole heads of up to 128 units; ``tile.cuh`` says what each thread owns.

The constants below are used for every GPU. Times were measured on an H100 and an H200
(docs/notebook). The numbers of registers follow what the compiler allocates: with them no
loop over time spills, which tests look for in the machine code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.plan import SEQUENCE_BYTES, Counts, Plan
from flashrnn.kernels.sizes import tiles_of
from flashrnn.problem import Problem

LARGEST_HEAD = 128

# Registers that a computing thread needs beside R's, by bytes of an element. Full float32 splits
# every factor in two, which takes more.
_WORKING_REGISTERS = {2: 64, 4: 136}
# The most fragments of R in registers, 4 registers of a thread each, by bytes of an element.
_MOST_FRAGMENTS_IN_REGISTERS = {2: 32, 4: 22}

# A thread can address 255 registers. A CTA of more than 8 warps has 65536 / threads for each: 168
# with 12 warps, the most that there are.
_MOST_REGISTERS = 255
_REGISTERS_OF_12_WARPS = 168
# A computing thread's where producer threads give up some: COMPUTING_REGISTERS of tile.cuh.
_SHIFTED_REGISTERS = 216

# Inputs are fetched a step less ahead than the ring has stages: with 8, main memory's latency is
# covered at the shortest steps, of 0.1 us; with fewer than 3, every step would wait for it.
_MOST_STAGES = 8
_FEWEST_STAGES = 3

# There are 2 producer warps, and more if each of them would copy more than so many pieces of 16
# bytes a step.
_PIECES_A_PRODUCER_WARP = 192

# Two CTAs run on a multiprocessor where R's rows have at most so many bytes, a CTA so many threads,
# which leaves each thread 168 registers, and the cell so many gates. LSTM 12x64 in bfloat16,
# forward, on an H200, one CTA and two: B = 128 0.68 and 0.49 ms, B = 256 1.02 and 0.78.
_ROW_BYTES_OF_TWO = 128
_THREADS_OF_TWO = 192
_GATES_OF_TWO = 4

# Bytes of a warp's fragment, and what ldmatrix reads beyond the last line (READ_BEYOND_LINES of
# tile.cuh).
_FRAGMENT_BYTES = 512
_READ_BEYOND_LINES = 16


@dataclass(frozen=True, kw_only=True)
class SingleCtaPlan(Plan):
    """How CTAs compute heads, each one head for some sequences.

    Attributes:
        backward: the direction.
        sequences: sequences of a CTA: 2, 4, or a multiple of 8.
        in_registers: a warp's fragments of R that stay in registers; the others lie in shared
            memory.
        producers: threads that copy between global and shared memory.
        stages: slots of the ring of inputs: steps whose inputs are being fetched or read.
        at_once: CTAs on a multiprocessor that the compiler leaves registers for.
    """

    backward: bool
    sequences: int
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
        return 32 * tiles_of(self.D, 16) + self.producers

    def grid(self, B: int, N: int, gpu: GPU) -> int:
        """CTAs of a launch."""
        return N * tiles_of(B, self.sequences)

    def source(
        self, cell: TracedCell, precision: str, options: source.Options, aligned: bool
    ) -> dict[str, str]:
        """See :meth:`flashrnn.kernels.plan.Plan.source`."""
        constants = {
            "D": self.D,
            "SEQUENCES": self.sequences,
            "IN_REGISTERS": self.in_registers,
            "PRODUCERS": self.producers,
            "STAGES": self.stages,
            "AT_ONCE": self.at_once,
            "SHARED_MEMORY": self.shared_memory,
            "ALIGNED": aligned,
            "STORED": len(cell.states),
            **dict(options),
        }
        if self.backward:
            kernel, record = "single_cta/backward.cu", call.BACKWARD
        else:
            kernel, record = "single_cta/forward.cu", call.FORWARD
            constants["H_IS_NEVER_LARGE"] = source.h_is_never_large(cell)
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
    counts = Counts.of(problem.cell)
    if backward:
        inputs = counts.gates + 2 * counts.states
        outputs: tuple[int, ...] = (counts.gates,)
    else:
        inputs = counts.inputs
        outputs = (counts.states, counts.gates) if problem.needs_gradient else (counts.states,)
    if not backward and problem.resets:
        outputs = (outputs[0] + 1, *outputs[1:])
    head = _Head(
        backward,
        counts.recurrent,
        counts.gates,
        inputs,
        outputs,
        problem.D,
        problem.dtype.itemsize,
        SEQUENCE_BYTES if problem.is_sequenced else 0,
    )
    return _plan(head, problem.B, problem.N, gpu)


class _Head(NamedTuple):
    """What a plan needs to know of a head.

    Attributes:
        backward: the direction.
        recurrent: gates that R feeds.
        gates: all gates.
        inputs: rows of a line of the ring: numbers of a unit that a step reads.
        outputs: rows of the lines that a step writes, one number for each kind of line.
        D: head dimension.
        itemsize: bytes of an element of the tensors.
        sequence_bytes: bytes of what says where a sequence's rows lie.
    """

    backward: bool
    recurrent: int
    gates: int
    inputs: int
    outputs: tuple[int, ...]
    D: int
    itemsize: int
    sequence_bytes: int

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
        """Whether R takes few enough registers for two CTAs on a multiprocessor."""
        return self.D * self.itemsize <= _ROW_BYTES_OF_TWO

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


@lru_cache(maxsize=1024)
def _plan(head: _Head, B: int, N: int, gpu: GPU) -> SingleCtaPlan | str:
    in_registers = _fragments_in_registers(head, gpu)
    R_bytes = (head.fragments - in_registers) * head.computing_warps * _FRAGMENT_BYTES
    room = gpu.shared_memory - R_bytes - _READ_BEYOND_LINES
    sequences = _sequences(head, B, N, room, gpu)
    room_for_ring = room - sequences * head.output_bytes
    stages = min(_MOST_STAGES, room_for_ring // (sequences * head.input_bytes))
    if stages < _FEWEST_STAGES:
        return (
            f"{head.recurrent} gates of {head.D} units that R feeds; with what a step reads and "
            f"writes they take more than the {gpu.shared_memory} bytes of shared memory that this "
            "GPU gives a CTA"
        )
    producer_warps = _producer_warps(head, sequences)
    threads = 32 * (head.computing_warps + producer_warps)
    two = head.is_small and threads <= _THREADS_OF_TWO and head.gates <= _GATES_OF_TWO
    lines = sequences * (stages * head.input_bytes + head.output_bytes)
    return SingleCtaPlan(
        D=head.D,
        backward=head.backward,
        sequences=sequences,
        in_registers=in_registers,
        producers=32 * producer_warps,
        stages=stages,
        at_once=2 if two else 1,
        shared_memory=R_bytes + lines + _READ_BEYOND_LINES,
    )


def _fragments_in_registers(head: _Head, gpu: GPU) -> int:
    """How many of a warp's fragments of R stay in registers."""
    registers = _MOST_REGISTERS
    if head.computing_warps == 8 and gpu.shifts_registers:
        registers = _SHIFTED_REGISTERS
    elif head.computing_warps > 6:
        registers = _REGISTERS_OF_12_WARPS
    room = (registers - _WORKING_REGISTERS[head.itemsize]) // 4
    return min(head.fragments, _MOST_FRAGMENTS_IN_REGISTERS[head.itemsize], room)


def _sequences(head: _Head, B: int, N: int, room: int, gpu: GPU) -> int:
    """Sequences of a CTA: the fewest for which all CTAs run at once, or 8.

    Fewer where shared memory does not hold so many. LSTM 12x64 in bfloat16, forward, with 2, 4, 8
    and 16 sequences: B = 16 0.20, 0.25, 0.35, 0.60 ms; B = 64 0.51, 0.32, 0.36, 0.61; B = 256 1.52,
    0.96, 1.06, 1.20.
    """
    at_once = (2 if head.is_small else 1) * gpu.multiprocessors
    sequences = next((few for few in (2, 4) if N * tiles_of(B, few) <= at_once), 8)
    while sequences > 2 and room < sequences * (
        _FEWEST_STAGES * head.input_bytes + head.output_bytes
    ):
        sequences //= 2
    return sequences


def _producer_warps(head: _Head, sequences: int) -> int:
    """How many warps copy between global and shared memory."""
    # A whole warpgroup, which can give registers to the two that compute.
    if head.computing_warps == 8:
        return 4
    most = 4 if head.computing_warps > 6 else min(4, 8 - head.computing_warps)
    pieces = sequences * head.inputs * tiles_of(head.D * head.itemsize, 16)
    return min(most, max(2, tiles_of(pieces, _PIECES_A_PRODUCER_WARP)))
