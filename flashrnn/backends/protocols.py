"""What a backend's module offers, beyond what every one does: forward and backward scans, a layer's
products, what is kept of a call, heads with additional units.

``vanilla`` is differentiated by PyTorch. All others are fused; which of the rest they have, the
functions beside each protocol tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from flashrnn.backends import Backend
from flashrnn.backends.gradients import Gradients
from flashrnn.problem import Problem
from flashrnn.sequences import Sequences


class DifferentiableBackend(Backend, Protocol):
    """What ``vanilla`` offers: PyTorch differentiates the operations it consists of."""

    def run(
        self,
        problem: Problem,
        Wx: Tensor,
        R: Tensor,
        b: Tensor,
        states: Tensor,
        sequences: Sequences | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :func:`flashrnn.backends.autograd.run`."""


class FusedBackend(Backend, Protocol):
    """What a fused backend's module offers."""

    def forward(
        self,
        problem: Problem,
        Wx: Tensor,
        R: Tensor,
        b: Tensor,
        states: Tensor,
        sequences: Sequences | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """States, last states, and, where a gradient is needed, the gates' pre-activations.

        States are all where a gradient is needed, else ``problem.returned``.
        """

    def backward(
        self,
        problem: Problem,
        R: Tensor,
        states_initial: Tensor,
        states: Tensor,
        gates: Tensor,
        d_states: Tensor | None,
        d_last_states: Tensor | None,
        sequences: Sequences | None = None,
    ) -> Gradients:
        """The gradients of all that went in; Wx's is part of the pre-activations'.

        ``d_states`` may have the first states only: ``[1, B, T, N, D]`` is of ``h`` alone. What is
        not given is zero, and no kernel reads it.
        """


def is_fused(backend: Backend) -> TypeGuard[FusedBackend]:
    """Whether it has a scan in each direction; else PyTorch differentiates what it does."""
    return hasattr(backend, "forward")


class Factors(NamedTuple):
    """What a layer's input product multiplies, and which gradients of it are asked for.

    Attributes:
        x: ``[B, T, I]``, of ``problem.dtype``.
        W: ``[Gw, N, D, I]``, or with fewer dimensions before the last; likewise.
        needs_x: whether the gradient of x is asked for.
        needs_W: whether that of W is.
        bias: what forward adds to the product, with W's dimensions but the last; contiguous, of
            ``problem.dtype``.
    """

    x: Tensor
    W: Tensor
    needs_x: bool = False
    needs_W: bool = False
    bias: Tensor | None = None


class Results(NamedTuple):
    """Results in the form of torch.nn's layers, contiguous and of ``problem.dtype``, that a forward
    writes besides its own. ``None``: it does not.

    Attributes:
        h: ``[T, B, N * D]``.
        last: of each state the last, ``[S, B, N * D]``.
    """

    h: Tensor | None = None
    last: Tensor | None = None


class MultiplyingBackend(FusedBackend, Protocol):
    """A fused backend that can compute a layer's input product, and its gradients, itself, and
    that has several small copies in one launch (:mod:`flashrnn.backends.copies`)."""

    def copy(
        self,
        counts: tuple[int, ...],
        addresses: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Enqueue copies."""

    def results(self, problem: Problem, like: Tensor, by_time: bool) -> Results:
        """Memory for results that the forward below is to write; see
        :func:`flashrnn.backends.copies.results`."""

    def multiplies(self, problem: Problem, x: Tensor, W: Tensor) -> bool:
        """Whether it does so for these factors; the two below then take them."""

    def forward(
        self,
        problem: Problem,
        Wx: Tensor | None,
        R: Tensor,
        b: Tensor,
        states: Tensor,
        sequences: Sequences | None = None,
        factors: Factors | None = None,
        results: Results | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """With ``factors`` in the place of ``Wx``, where R and b may have fewer dimensions that are
        as many elements; and, with either, ``results`` that it writes."""

    def backward(
        self,
        problem: Problem,
        R: Tensor,
        states_initial: Tensor,
        states: Tensor,
        gates: Tensor,
        d_states: Tensor | None,
        d_last_states: Tensor | None,
        sequences: Sequences | None = None,
        factors: Factors | None = None,
    ) -> Gradients:
        """With the gradients of ``factors`` that these ask for, or without both."""


def multiplies(
    backend: FusedBackend, problem: Problem, x: Tensor, W: Tensor
) -> TypeGuard[MultiplyingBackend]:
    """Whether a backend computes a layer's input product itself."""
    asked = getattr(backend, "multiplies", None)
    return asked is not None and asked(problem, x, W)


def copies(backend: FusedBackend) -> TypeGuard[MultiplyingBackend]:
    """Whether a backend has copies of its own, and writes :class:`Results`."""
    return hasattr(backend, "copy")


class Repeatable(Protocol):
    """What is kept of a direction of a call, for others like it."""

    def is_current(self) -> bool:
        """Whether the GPU, or the part of it, and PyTorch's settings are what they were."""

    def run(self, given: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """What it computes, if it is current, of tensors in the order in which they were given to
        what made it; ``None`` where all has to be worked out anew."""


class RepeatingBackend(MultiplyingBackend, Protocol):
    """A backend that keeps what it prepares for a call."""

    def repeated(
        self, problem: Problem, given: dict[str, Tensor], by_time: bool | None = None
    ) -> Repeatable | None:
        """What it keeps of a call's forward without options of sequences.

        Args:
            problem: the call's.
            given: ``Wx``, or a layer's ``x``, ``W`` and any ``bias``, then ``R``, ``b`` and
                ``initial``, all of the dtypes of the computation, without memory.
            by_time: as of ``results`` above, where those are wanted.

        Returns:
            What allocates ``states``, ``last_states``, ``gates`` where a gradient is needed, and
            any ``h_by_time`` and ``last_rounded``; ``None``: it keeps nothing.
        """

    def repeated_gradients(
        self, problem: Problem, given: dict[str, Tensor], needs_x: bool, needs_W: bool
    ) -> Repeatable | None:
        """The same of its backward.

        Args:
            problem: the call's.
            given: ``R``, ``initial``, ``states``, ``gates``, any ``d_states`` and ``d_last``, and
                of a layer ``x`` and ``W``, if a gradient of these is asked for; without memory.
            needs_x: whether the gradient of x is asked for.
            needs_W: whether that of W is.

        Returns:
            What allocates ``d_gates``, ``d_initial``, ``d_R``, ``d_b`` and any ``d_x`` and
            ``d_W``; ``None``: it keeps nothing.
        """


def keeps(backend: Backend) -> TypeGuard[RepeatingBackend]:
    """Whether a backend keeps what it prepares."""
    return hasattr(backend, "repeated")


class Kind(IntEnum):
    """What a tensor has for units, or features, that it is given in addition.

    ``GATES``: ``[..., D]``, the first unit's again. ``STATES``: ``[..., D]``, zeros. ``WEIGHTS``:
    ``[..., D, I]``, rows of the first unit again, and columns of zeros.
    """

    GATES = 0
    STATES = 1
    WEIGHTS = 2


Resized = tuple[Tensor, Kind, int]
"""A tensor, what it is, and how long its rows are to be."""


class PaddingBackend(RepeatingBackend, Protocol):
    """A backend that computes some heads faster with more units than they have; see
    :mod:`flashrnn.padded`."""

    def padded_units(self, problem: Problem, features: int) -> int:
        """With how many units heads are computed, by the arguments of
        :func:`flashrnn.padded.backend_for`; D: with their own."""

    def resizing(
        self, given: Sequence[Resized], rows: int, device: torch.device
    ) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """What gives tensors more units, or fewer (:func:`flashrnn.backends.padding.resizing`)."""


def has_additional_units(backend: Backend) -> bool:
    """Whether it is one of :func:`flashrnn.padded.backend_for`'s, whose heads have more units."""
    return hasattr(backend, "units")


def pads(backend: Backend) -> TypeGuard[PaddingBackend]:
    """Whether a backend computes some heads with more units."""
    return hasattr(backend, "padded_units")
