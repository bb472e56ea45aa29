"""Backend ``vanilla``: the recurrence as a plain PyTorch loop, on any device.

It is the definition that every other backend is compared with, and the only one that can be
differentiated twice. A step is one batched product and one call of the cell. What does not depend
on the step before is computed for all steps at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashrnn.backends import Run, Runs
from flashrnn.cells.traced import TracedCell
from flashrnn.problem import Problem, as_dtype_has_it


def unavailable(device: torch.device) -> str | None:
    """Nothing: it runs wherever PyTorch does."""
    return None


def unsupported(problem: Problem) -> str | None:
    """Nothing: it supports every problem."""
    return None


def run(
    problem: Problem, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`flashrnn.backends.autograd.run`."""
    cell, dtype, carry_dtype = problem.cell, problem.dtype, states.dtype
    S, B, T, N, D = len(cell.states), problem.B, problem.T, problem.N, problem.D
    order = _order(cell)
    inputs = _input_preactivations(problem, Wx.to(carry_dtype), b.to(carry_dtype), order)
    recurrent_matrix = _recurrent_matrix(R, carry_dtype)
    # [S, B, 1, N, D] to a contiguous [N, B, D] for each state, the layout of the cell's results.
    carried = tuple(state.transpose(0, 1).contiguous() for state in states.squeeze(2).unbind(0))

    trajectory: list[tuple[Tensor, ...]] = []
    for inputs_t in _unbound(inputs.permute(1, 3, 0, 2, 4), 0):
        carried = _next(problem, order, carried, inputs_t, recurrent_matrix)
        trajectory.append(carried)

    last_states = torch.stack(carried).transpose(1, 2).unsqueeze(2).contiguous()
    if T == 0:
        # Empty, but computed from all inputs, so that backward gives zeros for each.
        return Wx.new_empty(S, B, 0, N, D) + (Wx.sum() + R.sum() + b.sum()), last_states
    steps = torch.stack([after[s] for s in range(S) for after in trajectory])
    every_state = steps.view(S, T, N, B, D).permute(0, 3, 1, 2, 4)
    return every_state.to(dtype).contiguous(), last_states


def stepper(problem: Problem, R: Tensor, b: Tensor) -> Runs:
    """Steps one at a time; see :mod:`flashrnn.backends`."""
    order, carry_dtype = _order(problem.cell), problem.carry_dtype
    recurrent_matrix, b = _recurrent_matrix(R, carry_dtype), b.to(carry_dtype)

    def run_of(B: int) -> Run:
        of_batch = problem._replace(B=B)

        @torch.no_grad()
        def run(wx: Tensor, states: Tensor, out: Tensor | None) -> Tensor:
            Wx = wx.unsqueeze(1).to(carry_dtype)
            inputs = _input_preactivations(of_batch, Wx, b, order).permute(1, 3, 0, 2, 4)
            carried = tuple(state.transpose(0, 1).contiguous() for state in states.unbind(0))
            carried = _next(of_batch, order, carried, inputs[0], recurrent_matrix)
            return torch.stack([x.transpose(0, 1) for x in carried], out=out)

        return run

    return run_of


def _order(cell: TracedCell) -> tuple[int, ...]:
    """All gates, first those that R feeds: a product then adds to one slice."""
    recurrent = cell.fed_by("R")
    return (*recurrent, *(k for k in range(len(cell.gates)) if k not in recurrent))


def _recurrent_matrix(R: Tensor, carry_dtype: torch.dtype) -> Tensor:
    """``[N, D, Gr · D]``: what h is multiplied by, of all gates that R feeds."""
    Gr, N, D, _ = R.shape
    return R.to(carry_dtype).permute(1, 3, 0, 2).reshape(N, D, Gr * D)


def _next(
    problem: Problem,
    order: tuple[int, ...],
    carried: tuple[Tensor, ...],
    inputs: Tensor,
    recurrent_matrix: Tensor,
) -> tuple[Tensor, ...]:
    """The states after a step, ``[N, B, D]`` each, of those before.

    ``inputs`` are Wx and b of the step, ``[N, B, G, D]``, the gates in ``order``.
    """
    cell, dtype, carry_dtype = problem.cell, problem.dtype, carried[0].dtype
    step = problem.step
    assert step is not None, "flashrnn() hands it on"
    B, N, D = problem.B, problem.N, problem.D
    G, Gr = len(cell.gates), len(cell.fed_by("R"))
    declared = sorted(range(G), key=order.__getitem__)
    # h is rounded to dtype before it multiplies R: the same numbers as the returned h.
    h = carried[0].to(dtype).to(carry_dtype)
    if problem.gradient_recurrent_cut:
        h = h.detach()
    elif problem.gradient_recurrent_clipval is not None:
        h = _ClipGradient.apply(h, as_dtype_has_it(problem.gradient_recurrent_clipval, carry_dtype))
    product = torch.baddbmm(inputs[:, :, :Gr].reshape(N, B, Gr * D), h, recurrent_matrix)
    gates = (*product.view(N, B, Gr, D).unbind(2), *_unbound(inputs[:, :, Gr:], 2))
    after = tuple(step(carried, tuple(gates[k] for k in declared)))
    if problem.forward_clipval is not None:
        bound = as_dtype_has_it(problem.forward_clipval, carry_dtype)
        after = (after[0].clamp(-bound, bound), *after[1:])
    return after


def _input_preactivations(
    problem: Problem, Wx: Tensor, b: Tensor, order: tuple[int, ...]
) -> Tensor:
    """Wx and b of all gates, ``[B, T, G, N, D]``, in ``order``."""
    cell, (B, T, N, D) = problem.cell, (problem.B, problem.T, problem.N, problem.D)
    bias = dict(zip(cell.fed_by("b"), _unbound(b, 0), strict=True))
    b = torch.stack([bias.get(k, b.new_zeros(N, D)) for k in order])
    if cell.fed_by("Wx") != order:
        given = dict(zip(cell.fed_by("Wx"), Wx.unbind(2), strict=True))
        nothing = Wx.new_zeros(()).expand(B, T, N, D)
        Wx = torch.stack([given.get(k, nothing) for k in order], dim=2)
    return Wx + b


def _unbound(tensor: Tensor, dim: int) -> tuple[Tensor, ...]:
    """``tensor.unbind(dim)``, also of size 0, for which saved programs cannot have it."""
    return tensor.unbind(dim) if tensor.shape[dim] else ()


class _ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is clipped element by element."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, clipval: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.clipval = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].clamp(-ctx.clipval, ctx.clipval), None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "gradient_recurrent_clipval clips gradients that flow backward, and a derivative "
            "forward (torch.func.jvp, jacfwd, torch.autograd.forward_ad) has none: leave it out, "
            "or take torch.func.vjp or jacrev"
        )
