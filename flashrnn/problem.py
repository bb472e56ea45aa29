"""A call's problem: what a backend is asked to compute, without the data."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch

from flashrnn.cells.spec import Step
from flashrnn.cells.traced import TracedCell


class Problem(NamedTuple):
    """The problem that a backend supports or not.

    Attributes:
        cell: the cell, as traced.
        B: batch size.
        T: sequence length; of a packed batch its rows, which are those of all sequences.
        N: number of heads.
        D: head dimension.
        dtype: of ``Wx``, ``R``, ``b`` and the returned ``states``.
        device: where all tensors are.
        needs_gradient: whether a gradient may be asked for.
        gradient_recurrent_cut: see :class:`flashrnn.FlashRNNConfig`, as the two below.
        gradient_recurrent_clipval: ...
        forward_clipval: ...
        allow_tf32: see :class:`flashrnn.FlashRNNConfig`; :func:`tf32_allowed` resolves ``None``.
        step: the cell's own function, which only ``vanilla`` calls. What a cache keeps has none.
        resets: whether states go back to a start before some steps; :mod:`flashrnn.sequences` has
            the tensors of this option and of the next two.
        ragged: whether sequences have lengths of their own.
        packed: whether they lie one behind another in ``[1, T]`` rows, not each in T of ``[B, T]``.
        reverse: whether time runs backwards; a tuple of one for each head where they differ.
        longest: the largest length, where it is known: T or less.
        even: whether lengths are known to differ little: their mean is 9/10 of the largest or more.
        starts: whether what states go back to is given, else it is zeros; of ``cuda_fused`` alone.
        returned: how many states are returned of every step; ``None``: all.
    """

    cell: TracedCell
    B: int
    T: int
    N: int
    D: int
    dtype: torch.dtype
    device: torch.device
    needs_gradient: bool = False
    gradient_recurrent_cut: bool = False
    gradient_recurrent_clipval: float | None = None
    forward_clipval: float | None = None
    allow_tf32: bool | None = None
    step: Step | None = None
    resets: bool = False
    ragged: bool = False
    packed: bool = False
    reverse: bool | tuple[bool, ...] = False
    returned: int | None = None
    longest: int | None = None
    even: bool = False
    starts: bool = False

    @property
    def rows(self) -> tuple[int, int]:
        """The dimensions of ``Wx`` that stand for sequences and steps."""
        return (1, self.T) if self.packed else (self.B, self.T)

    @property
    def is_sequenced(self) -> bool:
        """Whether sequences do not all run through T steps, from the first to the last."""
        return self.resets or self.ragged or self.reverse is not False

    @property
    def steps(self) -> int:
        """How many steps the longest sequence has at most."""
        return self.T if self.longest is None else self.longest

    @property
    def has_idle_rows(self) -> bool:
        """Whether some rows may be no step of any sequence. In a packed batch those are the rows
        before the first sequence and behind the last, if values that nobody checked leave such."""
        return self.ragged and not (self.packed and self.longest is not None)

    @property
    def carry_dtype(self) -> torch.dtype:
        """The dtype in which the cell computes and its states go from step to step.

        float32 where ``dtype`` has 16 bits, so that what is stored is rounded and what is
        carried is not; else ``dtype``.
        """
        return carry_dtype(self.dtype)


def as_compiled(problem: Problem) -> Problem:
    """A problem without what no program of its has: T, values of clips, how PyTorch is set, and
    which heads run backwards, where some do."""
    gradient, forward = (
        None if value is None else 1.0
        for value in (problem.gradient_recurrent_clipval, problem.forward_clipval)
    )
    return problem._replace(
        T=1,
        gradient_recurrent_clipval=gradient,
        forward_clipval=forward,
        allow_tf32=None,
        step=None,
        reverse=problem.reverse is not False,
        longest=None,
    )


def carry_dtype(dtype: torch.dtype) -> torch.dtype:
    """See :attr:`Problem.carry_dtype`."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def as_dtype_has_it(value: float, dtype: torch.dtype) -> float:
    """A number, or infinity where it is beyond the dtype's largest: PyTorch refuses such ones."""
    return value if abs(value) <= torch.finfo(dtype).max else math.copysign(math.inf, value)


def rnn_tf32_allowed() -> bool:
    """Whether PyTorch's settings let torch.nn's recurrent layers use TF32 on a GPU."""
    if hasattr(torch.backends.cudnn, "rnn"):
        precision = getattr(torch.backends.cudnn.rnn, "fp32_precision", None)
        if precision is not None:
            return bool(precision == "tf32")
    return bool(torch.backends.cudnn.allow_tf32)


def tf32_allowed(problem: Problem) -> bool:
    """Whether products of float32 may see 10 bits of its mantissa: else PyTorch's setting says."""
    return matmul_tf32_allowed() if problem.allow_tf32 is None else problem.allow_tf32


def matmul_tf32_allowed() -> bool:
    """Whether PyTorch's settings let its products use TF32 on a GPU."""
    matmul = torch.backends.cuda.matmul
    # PyTorch 2.9's setting; where it was used, asking for the older one is an error.
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def autocast_enabled(device_type: str) -> bool:
    """Whether ``torch.autocast`` is on, for devices that have it."""
    # Dynamo knows the second question only.
    has_it = torch.compiler.is_compiling() or _has_autocast(device_type)
    return has_it and torch.is_autocast_enabled(device_type)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """That of ``torch.autocast``, if it is on; for calls that Dynamo does not follow."""
    if _has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


# Of the kinds of devices that there are.
_has_autocast = cache(torch.amp.is_autocast_available)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Within it operands are multiplied in the dtype that they have."""
    if autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
