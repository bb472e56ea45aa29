"""The one differentiable operator through which every fused backend runs.

A fused backend's module offers, beside what :class:`flashrnn.backends.Backend` asks:

    forward(problem, Wx, R, b, states) -> (states, last_states, gates)
    backward(problem, R, states_initial, states, gates, d_states, d_last_states) -> Gradients

The residuals are the same for all: the states and, where a gradient may be asked for, the gates'
pre-activations ``[B, T, G, N, D]``.

``torch.library`` makes operators of both directions, so that ``torch.compile`` sees them whole.
An operator's arguments are tensors, numbers and strings: a cell goes in as its text, so that a
program that was saved runs wherever this package is imported. Where nothing records operators, an
autograd function runs instead, or where no gradient is needed, nothing but the backend: each takes
a fraction of the host time of the one before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashrnn.backends import recorded
from flashrnn.backends.gradients import Gradients, select
from flashrnn.cells.spec import Cell
from flashrnn.cells.traced import TracedCell, cell_of_text
from flashrnn.problem import Problem


class FusedBackend(Protocol):
    """What a fused backend offers to the operator."""

    def forward(
        self, problem: Problem, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States, last states, and the gates' pre-activations (empty without gradients)."""

    def backward(
        self,
        problem: Problem,
        R: Tensor,
        states_initial: Tensor,
        states: Tensor,
        gates: Tensor,
        d_states: Tensor,
        d_last_states: Tensor,
    ) -> Gradients:
        """The gradients of all that went in; Wx's is part of the pre-activations'."""


def run(
    backend: str, problem: Problem, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a fused backend, differentiably; see :class:`flashrnn.backends.Backend`."""
    if recorded():
        every_state, last_states, _ = scan(
            Wx,
            R,
            b,
            states,
            backend,
            _text(problem.cell),
            problem.needs_gradient,
            problem.gradient_recurrent_cut,
            problem.gradient_recurrent_clipval,
            problem.forward_clipval,
        )
        return every_state, last_states
    # The autograd function also says that it has no derivative forward.
    if problem.needs_gradient or forward_ad._current_level >= 0:
        return _Scan.apply(Wx, R, b, states, backend, problem)
    every_state, last_states, _ = _backend(backend).forward(problem, Wx, R, b, states)
    return every_state, last_states


def _text(cell: TracedCell) -> str:
    """The string that stands for a cell in a graph: all of it."""
    if torch.compiler.is_compiling():
        from flashrnn.backends import constants

        return constants.text(cast(Cell, cell).handle)
    return cell.text


def new_outputs(problem: Problem, Wx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a fused backend's forward returns, not yet written."""
    cell, (B, T, N, D) = problem.cell, (problem.B, problem.T, problem.N, problem.D)
    S, G = len(cell.states), len(cell.gates)
    return (
        Wx.new_empty(S, B, T, N, D),
        Wx.new_empty(S, B, 1, N, D, dtype=problem.carry_dtype),
        Wx.new_empty((B, T, G, N, D) if problem.needs_gradient else (0,)),
    )


def state_strides(states: Tensor) -> tuple[int, int, int, int]:
    """Of ``[S, B, 1, N, D]``, without that of the 1."""
    s, b, _, n, d = states.stride()
    return s, b, n, d


@cache
def _backend(name: str) -> FusedBackend:
    return cast(FusedBackend, importlib.import_module(f"flashrnn.backends.{name}"))


@torch.library.custom_op("flashrnn::scan", mutates_args=())
def scan(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    backend: str,
    cell: str,
    save_gates: bool,
    cut: bool,
    clipval: float | None,
    forward_clipval: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every step's states, the last states as carried, and the gates' pre-activations."""
    B, T, _, N, D = Wx.shape
    problem = Problem(
        cell_of_text(cell),
        B,
        T,
        N,
        D,
        Wx.dtype,
        Wx.device,
        save_gates,
        cut,
        clipval,
        forward_clipval,
    )
    return _backend(backend).forward(problem, Wx, R, b, states)


@scan.register_fake
def _(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    backend: str,
    cell: str,
    save_gates: bool,
    cut: bool,
    clipval: float | None,
    forward_clipval: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, _, N, D = Wx.shape
    problem = Problem(cell_of_text(cell), B, T, N, D, Wx.dtype, Wx.device, save_gates)
    return new_outputs(problem, Wx)


@torch.library.custom_op("flashrnn::scan_backward", mutates_args=())
def scan_backward(
    R: Tensor,
    states_initial: Tensor,
    states: Tensor,
    gates: Tensor,
    d_states: Tensor,
    d_last_states: Tensor,
    backend: str,
    cell: str,
    cut: bool,
    clipval: float | None,
    forward_clipval: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the gates' pre-activations, of the initial states, of R and of b."""
    _, B, T, N, D = states.shape
    problem = Problem(
        cell_of_text(cell), B, T, N, D, R.dtype, R.device, True, cut, clipval, forward_clipval
    )
    found = _backend(backend).backward(
        problem, R, states_initial, states, gates, d_states, d_last_states
    )
    # A graph is made for one layout, whichever the backend has.
    return found.gates, found.states, found.R.contiguous(), found.b.contiguous()


@scan_backward.register_fake
def _(
    R: Tensor,
    states_initial: Tensor,
    states: Tensor,
    gates: Tensor,
    d_states: Tensor,
    d_last_states: Tensor,
    backend: str,
    cell: str,
    cut: bool,
    clipval: float | None,
    forward_clipval: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, N, D, _ = R.shape
    return (
        gates.new_empty(gates.shape),
        states_initial.new_empty(states_initial.shape),
        R.new_empty(R.shape),
        R.new_empty(len(cell_of_text(cell).fed_by("b")), N, D),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, R, _, states_initial, backend, cell, _, cut, clipval, forward_clipval = inputs
    states, _, gates = output
    ctx.save_for_backward(R, states_initial, states, gates)
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)
    ctx.call = (backend, cell, cut, clipval, forward_clipval)


def _backward(ctx: Any, d_states: Tensor | None, d_last: Tensor | None, _: Any) -> tuple[Any, ...]:
    def pull_back(*tensors: Tensor) -> Gradients:
        return Gradients(*scan_backward(*tensors, *ctx.call))

    return *_gradients(ctx, cell_of_text(ctx.call[1]), pull_back, d_states, d_last), *(None,) * 6


scan.register_autograd(_backward, setup_context=_setup_context)


class _Scan(torch.autograd.Function):
    """The same as :func:`scan`, at a fraction of its cost on the host."""

    @staticmethod
    def forward(
        ctx: Any,
        Wx: Tensor,
        R: Tensor,
        b: Tensor,
        states_initial: Tensor,
        backend: str,
        problem: Problem,
    ) -> tuple[Tensor, Tensor]:
        states, last_states, gates = _backend(backend).forward(problem, Wx, R, b, states_initial)
        ctx.save_for_backward(R, states_initial, states, gates)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.problem = backend, problem
        return states, last_states

    @staticmethod
    def backward(ctx: Any, d_states: Tensor | None, d_last: Tensor | None) -> tuple[Any, ...]:
        backend, problem = ctx.backend, ctx.problem

        def pull_back(*tensors: Tensor) -> Gradients:
            # In a graph of the gradient, the operator says that it has no derivative of its own.
            if recorded() or torch.is_grad_enabled():
                return Gradients(
                    *scan_backward(
                        *tensors,
                        backend,
                        _text(problem.cell),
                        problem.gradient_recurrent_cut,
                        problem.gradient_recurrent_clipval,
                        problem.forward_clipval,
                    )
                )
            return _backend(backend).backward(problem, *tensors)

        return *_gradients(ctx, problem.cell, pull_back, d_states, d_last), None, None


def _gradients(
    ctx: Any,
    cell: TracedCell,
    pull_back: Callable[..., Gradients],
    d_states: Tensor | None,
    d_last: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of Wx, R, b and the initial states."""
    R, states_initial, states, gates = ctx.saved_tensors
    # A hook on saved tensors may have given them back in another layout.
    states, gates = states.contiguous(), gates.contiguous()
    # A gradient that nobody asked through is one row of zeros, read again and again.
    if d_states is None:
        d_states = states.new_zeros(states.shape[-1]).expand_as(states)
    if d_last is None:
        d_last = states_initial.new_zeros(()).expand_as(states_initial)
    found = pull_back(R, states_initial, states, gates, d_states, d_last)
    needs_Wx, needs_R, needs_b, needs_states, *_ = ctx.needs_input_grad
    return (
        select(found.gates, 2, cell.fed_by("Wx")) if needs_Wx else None,
        found.R if needs_R else None,
        found.b if needs_b else None,
        found.states if needs_states else None,
    )
