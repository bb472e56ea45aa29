"""The interface of a plan: how one kernel computes a scan, from the text to the launch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, TypeVar

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import source
from flashrnn.kernels.call import Scratch
from flashrnn.kernels.gpu import GPU
from flashrnn.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """How a kernel computes a scan of heads of D units: its tiles, its text and its launch.

    The fields here and in a regime's own plan are compiled in; B, T, N, addresses, strides and clip
    values are in the record of a call (:mod:`flashrnn.kernels.call`).

    Attributes:
        ROW_ALIGNMENT: bytes to whose multiples rows of D elements of the given tensors are aligned,
            or of a divisor of it where D does not allow that. If more than 1, they are contiguous.
        KEEPS_R: whether R, or a part of it, stays on chip from step to step.
        D: head dimension.
        shared_memory: a CTA's dynamic shared memory in bytes.
        estimated_cycles: of a step of all sequences; an estimate that plans are compared by.
    """

    ROW_ALIGNMENT: ClassVar[int] = 1
    KEEPS_R: ClassVar[bool] = True

    D: int
    shared_memory: int
    estimated_cycles: float = field(default=0.0, compare=False)

    @property
    @abstractmethod
    def entry(self) -> str:
        """The kernel's name."""

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads of a CTA."""

    @property
    def cooperative(self) -> bool:
        """Whether all CTAs of a launch must run at once."""
        return False

    @property
    def cluster_size(self) -> int:
        """CTAs of a cluster; 0 where there are no clusters."""
        return 0

    @abstractmethod
    def source(
        self, cell: TracedCell, precision: str, options: source.Options, piece_bytes: int
    ) -> dict[str, str]:
        """The program's text in parts, each under the name that an error gives it.

        Args:
            cell: the cell.
            precision: out of ``source.PRECISIONS``.
            options: out of :func:`flashrnn.kernels.source.forward_options` or ``backward_options``.
            piece_bytes: in pieces of so many bytes its kernels may copy rows; see
                :meth:`flashrnn.kernels.call.Record.piece_bytes`. Those of heads of more than 128
                units do not ask.
        """

    def of_one_step(self, B: int, N: int) -> Plan:
        """The plan of a forward scan of one step, if another is better; it gives the same bits."""
        return self

    def groups(self, B: int, N: int, gpu: GPU) -> int:
        """CTA groups of a launch. A group computes a head for some sequences at a time."""
        return 0

    @abstractmethod
    def grid(self, B: int, N: int, gpu: GPU) -> int:
        """CTAs of a launch."""

    def scratch(self, B: int, N: int, gpu: GPU) -> Scratch:
        """Global memory that a launch needs for itself."""
        return Scratch()


# What a step by a persistent kernel takes on an H200, as a multiple of its estimate. The estimates
# compare with one another, but are all too low by about as much (docs/cost-model.md). With TF32 a
# step takes less than estimated, since the estimate of float32 is for three products: 0.8 was
# measured.
TAKEN, TAKEN_WITH_TF32 = 1.18, 0.75


P = TypeVar("P", bound=Plan)


def best_of(plans: Iterable[P], cycles: Callable[[P], float]) -> P | None:
    """The plan with the fewest cycles, which become its estimate, if there is any."""
    estimated = [replace(plan, estimated_cycles=cycles(plan)) for plan in plans]
    return min(estimated, key=lambda plan: plan.estimated_cycles, default=None)


SEQUENCE_BYTES = 16
"""Of a ``Sequence`` (``common/sequence.cuh``)."""


class Counts(NamedTuple):
    """How many numbers of a unit and sequence a step has of each kind.

    Attributes:
        recurrent: gates that R feeds.
        inputs: gates that Wx feeds.
        states: states.
        gates: gates of any kind.
        starts: states that a reset goes back to; 0 without resets.
        sequence_bytes: bytes that say where a sequence's rows lie (``common/sequence.cuh``); 0
            without options of sequences.
        saved: gates whose pre-activations forward saves; 0 where no gradient is needed.
    """

    recurrent: int
    inputs: int
    states: int
    gates: int
    starts: int = 0
    sequence_bytes: int = 0
    saved: int = 0

    @staticmethod
    def of(cell: TracedCell) -> Counts:
        """Those of a cell, in a call without gradients and options of sequences."""
        recurrent, inputs = (len(cell.fed_by(source)) for source in ("R", "Wx"))
        return Counts(recurrent, inputs, len(cell.states), len(cell.gates))

    @staticmethod
    def of_problem(problem: Problem) -> Counts:
        """Those of a problem's cell, with what the problem's options add."""
        return Counts.of(problem.cell)._replace(
            starts=len(problem.cell.states) if problem.resets else 0,
            sequence_bytes=SEQUENCE_BYTES if problem.is_sequenced else 0,
            saved=len(problem.cell.gates) if problem.needs_gradient else 0,
        )


def read_states(cell: TracedCell, backward: bool) -> int:
    """A bit for each state: whether a direction depends on it otherwise than through R."""
    graph = cell.graphs.derivative if backward else cell.graphs.forward
    used = {*graph.outputs, *(x for assignment in graph.body for x in assignment.arguments)}
    return sum((name in used) << s for s, name in enumerate(graph.inputs[: len(cell.states)]))


def passed_states(cell: TracedCell) -> int:
    """A bit for each state: whether a gradient reaches it otherwise than through R."""
    # The derivation leaves a zero for the others.
    outputs = cell.graphs.derivative.outputs[: len(cell.states)]
    return sum((isinstance(x, str) or x != 0) << s for s, x in enumerate(outputs))


class Values(NamedTuple):
    """How many numbers of a unit and sequence a step has of each kind.

    Attributes:
        backward: the direction.
        sent: values that its CTA sends to the group.
        produced: sums that the product has.
        kept: numbers that its thread has in registers.
        carried: those among them that pass from step to step.
        itemsize: bytes of a value.
        passes: tensor core instructions that a product of two operands takes.
        sequence_bytes: bytes that say where a sequence's rows lie (``common/sequence.cuh``); 0
            without options of sequences.
        looked_up: whether that differs from sequence to sequence or from head to head.
        ragged: whether sequences may have lengths that differ much.
    """

    backward: bool
    sent: int
    produced: int
    kept: int
    carried: int
    itemsize: int
    passes: int
    sequence_bytes: int
    looked_up: bool
    ragged: bool

    @staticmethod
    def of(problem: Problem, backward: bool) -> Values:
        """Those of a problem."""
        cell = problem.cell
        S, G, recurrent = len(cell.states), len(cell.gates), len(cell.fed_by("R"))
        return Values(
            backward=backward,
            sent=recurrent if backward else 1,
            produced=1 if backward else recurrent,
            kept=2 * G + 3 * S if backward else 2 * G + len(cell.fed_by("Wx")) + S,
            carried=S,
            itemsize=problem.dtype.itemsize,
            passes=3 if problem.dtype.itemsize == 4 else 1,
            sequence_bytes=SEQUENCE_BYTES if problem.is_sequenced else 0,
            looked_up=problem.ragged or problem.reverse is not False,
            ragged=problem.ragged and not problem.even,
        )
