"""How a step is computed whose recurrent product a library computes: the cell's own launch.

Where there are many sequences, a step's product is large enough for the library's matrix rate, and
a step takes longer than its two launches take the host. This is for such calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.plan import Counts, passed_states, read_states
from flashrnn.kernels.sizes import tiles_of
from flashrnn.problem import Problem

FEWEST = 64
"""Sequences below which no call is computed so; nothing is looked up for fewer."""

_THREADS = 256
# Numbers that a thread of several units holds before it computes, at most. Forward these and their
# addresses take 80 registers, with which three CTAs are resident. With more numbers the compiler
# may spill to keep three.
_HELD = 64

# What a step's time is reckoned from, in cycles of 1.98 GHz; docs/cost-model.md has the fit.
# Operations (two a product) of a multiprocessor and cycle, by the product's precision, at most; and
# without wgmma, where the GPUs differ: a cautious rate.
_MATRIX_RATES = {"float16": 4096, "bfloat16": 4096, "tf32": 2048, "float32": 256}
_WITHOUT_WGMMA = 4
REACHED = 0.5
"""The part of it that a library's product reaches."""
# Bytes of a multiprocessor and cycle, as a copy on an H200 reaches from main memory.
_MEMORY_RATE = 16
# From a launch to the next, beyond what the kernels take.
_LAUNCH = 2500
# Of the host, for both launches of a step. A step takes no less.
_HOST = 40_000


@dataclass(frozen=True)
class CellPlan:
    """A launch for a step of all sequences, behind that of the step's product.

    Attributes:
        backward: the direction.
        D: head dimension.
    """

    backward: bool
    D: int

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return "cell_backward" if self.backward else "cell_forward"

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return _THREADS

    @property
    def record(self) -> call.Record:
        """The record that it reads."""
        return call.CELL_BACKWARD if self.backward else call.CELL_FORWARD

    def grid(self, cell: TracedCell, B: int, N: int) -> int:
        """CTAs of a launch."""
        return tiles_of(B * N * self.D, units_of(cell, self.backward) * _THREADS)

    def source(
        self, cell: TracedCell, precision: str, options: source.Options, aligned: bool
    ) -> dict[str, str]:
        """The program's text in parts, each under the name that an error gives it.

        Args:
            cell: the cell.
            precision: out of ``source.PRECISIONS``.
            options: out of :func:`flashrnn.kernels.source.forward_options` or ``backward_options``.
            aligned: whether all rows of all given tensors begin at multiples of 16 bytes.
        """
        constants = {
            "D": self.D,
            "THREADS": _THREADS,
            "VECTOR": units_of(cell, self.backward),
            "ALIGNED": aligned,
            "CLIP": False,
            "STORED": len(cell.states),
            "READ": read_states(cell, self.backward),
            "PASSED": passed_states(cell),
            **dict(options),
        }
        kernel = f"per_step/{self.entry}.cu"
        return source.program(kernel, cell, precision, constants, self.record)


def units_of(cell: TracedCell, backward: bool) -> int:
    """Units of a thread: 4, or 2 or 1 where the numbers of so many are too many to hold."""
    counts, read = Counts.of(cell), read_states(cell, backward).bit_count()
    if backward:
        # Pre-activations, states, the gradients given for them and those carried, the product.
        held = counts.gates + read + counts.states + passed_states(cell).bit_count() + 1
    else:
        held = counts.inputs + len(cell.fed_by("b")) + counts.recurrent + read
    return next((units for units in (4, 2) if units * held <= _HELD), 1)


def factors_are_apart(problem: Problem) -> bool:
    """Whether what backward's product reads of the gates' gradients is not rows of one matrix."""
    fed = problem.cell.fed_by("R")
    rows = problem.N == 1 or len(fed) == 1
    consecutive = fed == tuple(range(fed[0], fed[0] + len(fed)))
    # Infinities have to be bounded: see common/gradient_clip.cuh.
    bounded = problem.dtype == torch.float16 and problem.gradient_recurrent_clipval is not None
    return bounded or not (rows and consecutive)


def plan_steps(
    problem: Problem, precision: str, gpu: GPU, backward: bool, cycles: float
) -> CellPlan | None:
    """The plan, where a step is estimated to take less time by it than by another way.

    T does not matter, so that a sequence in parts has the bits of the whole (of heads that are not
    padded; see :mod:`flashrnn.padded`): a persistent kernel's
    start, 17,000 cycles on an H200, is less than a step of the calls that this is for. What steps
    take is estimated as if they saved pre-activations in any case.

    Args:
        problem: what is computed.
        precision: how products are computed.
        gpu: on which GPU.
        backward: the direction.
        cycles: that a step takes by the other way.
    """
    # What rows that begin anywhere cost is not known.
    rows_begin_anywhere = problem.D * problem.dtype.itemsize % 16 != 0
    if problem.B < FEWEST or problem.is_sequenced or rows_begin_anywhere:
        return None
    estimated = estimated_cycles(problem, precision, gpu, backward)
    return CellPlan(backward, problem.D) if estimated < cycles else None


def matrix_rate(precision: str, gpu: GPU) -> float:
    """Operations of a multiprocessor and cycle, two a product, at most."""
    return _MATRIX_RATES[precision] / (1 if gpu.multiplies_by_groups else _WITHOUT_WGMMA)


def estimated_cycles(problem: Problem, precision: str, gpu: GPU, backward: bool) -> float:
    """Of a step of all sequences: its product, its cell and what their launches take."""
    counts, N, D, size = Counts.of(problem.cell), problem.N, problem.D, problem.dtype.itemsize
    fed = counts.recurrent * D
    columns, depth = (D, fed) if backward else (fed, D)
    matrix, memory = matrix_rate(precision, gpu) * REACHED, _MEMORY_RATE * gpu.multiprocessors
    # The library is taken to compute tiles of 64 sequences and 128 columns, and to cut the sums
    # where there are fewer of them than multiprocessors.
    tiles = N * tiles_of(problem.B, 64) * tiles_of(columns, 128)
    parts = max(1, min(gpu.multiprocessors // tiles, depth // 1024))
    multiply = tiles_of(tiles * parts, gpu.multiprocessors) * 2 * 64 * 128 * depth / parts / matrix
    product = max(multiply, N * fed * D * size / memory)
    # Of a unit: what the cell's launch reads and writes.
    if backward:
        carried = passed_states(problem.cell).bit_count()
        read = read_states(problem.cell, True).bit_count()
        of_a_unit = 4 + 8 * carried + size * (2 * counts.gates + counts.states + read)
    else:
        carried = read_states(problem.cell, False).bit_count()
        numbers = counts.inputs + counts.gates + counts.states
        of_a_unit = 4 * counts.recurrent + 8 * carried + size * numbers
    cell = problem.B * N * D * of_a_unit / memory
    return max(_HOST, product + cell + 2 * _LAUNCH)
