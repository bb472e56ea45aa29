"""How a thread block owns a head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from flashrnn.problem import Problem
from flashrnn.tiling.gpu import GPU

LARGEST_HEAD_OF_A_BLOCK = 128

# Registers a lane has for all but R, by an element's bytes; products of float32 in full take more.
_WORKING_REGISTERS = {2: 64, 4: 136}
_MOST_HELD = {2: 32, 4: 22}
# What a lane of a computing warp has where the traffic warps hand theirs over (kernels/head.cuh).
_SHIFTED_REGISTERS = 216
_STAGES = 8
_FEWEST_STAGES = 3


@dataclass(frozen=True)
class HeadPlan:
    """How a thread block owns a head; see ``kernels/head.cuh``.

    Attributes:
        sequences: sequences a block owns: 2, 4, or a multiple of 8.
        held: fragments of R that stay in registers.
        traffic: threads that move data.
        stages: steps whose inputs are on their way at once, or being read.
        at_once: blocks that a multiprocessor has registers for.
        shared_memory: a block's dynamic shared memory in bytes.
    """

    sequences: int
    held: int
    traffic: int
    stages: int
    at_once: int
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
    return _plan_head(fed["R"], G, inputs, tuple(outputs), B, N, D, itemsize, gpu)


@lru_cache(maxsize=1024)
def _plan_head(
    recurrent: int,
    gates: int,
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

    # Two share a multiprocessor where R takes no more than 64 registers of a lane.
    small = D * itemsize <= 128
    sequences = _sequences(B, N, (2 if small else 1) * gpu.multiprocessors)
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
    # Two blocks of 192 threads have 168 registers for each: enough for few gates.
    threads = 32 * (computing + traffic)
    at_once = 2 if small and threads <= 192 and gates <= 4 else 1
    return HeadPlan(
        sequences=sequences,
        held=held,
        traffic=32 * traffic,
        stages=stages,
        at_once=at_once,
        # A product may read 16 bytes beyond the last line.
        shared_memory=spared_bytes + sequences * (stages * line(inputs) + output_bytes) + 16,
    )


def _sequences(B: int, N: int, at_once: int) -> int:
    """The fewest for which all blocks run at once, or 8."""
    for sequences in (2, 4):
        if N * -(-B // sequences) <= at_once:
            return sequences
    return 8
