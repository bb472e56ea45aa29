"""The error that rounded residuals cause: vanilla, with a backward that reads what fused backends
keep.

Fused backends keep every step's states and pre-activations rounded to the dtype of the call. They
give the pre-activations' gradients, a factor of the next product, in that dtype. Vanilla's own
graph has all three in float32. For most cells the difference is negligible. It is not where a
derivative is ill-conditioned (that of 1/g has twice g's relative error) or discontinuous (a clamp,
a clip, a maximum). There the rounding of a pre-activation shows in its gradient, and no kernel can
undo it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flashrnn.backends import vanilla
from flashrnn.problem import Problem, as_dtype_has_it


@contextmanager
def backward_from_residuals() -> Iterator[None]:
    """Have vanilla compute gradients from what fused backends keep; outputs stay as they are."""
    run = vanilla.run

    def run_with_residuals(problem: Problem, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        step = _Step(problem)
        return run(problem._replace(step=step, forward_clipval=None), *tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vanilla, "run", run_with_residuals)
        yield


@contextmanager
def infinite_counting_as_largest() -> Iterator[None]:
    """Gradients of gates from what float16 keeps of them count in the product with R as its
    largest numbers where they are infinite, as `triton` and `cuda` have it under a clip: of what is
    stored they cannot tell an infinity from an overflow.
    """
    with backward_from_residuals(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "baddbmm", _Product.apply)
        yield


@contextmanager
def clips_that_let_pass(share: float) -> Iterator[None]:
    """Have vanilla clip h as it does, and let those gradients pass whose h is within a ``share`` of
    the clip. So what hangs on the rounding of an h beside the clip is told from what does not.
    """
    run = vanilla.run

    def run_so(problem: Problem, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        assert problem.step is not None and problem.forward_clipval is not None
        bound = as_dtype_has_it(problem.forward_clipval, problem.carry_dtype)
        step = partial(_let_pass, problem.step, bound, share)
        return run(problem._replace(step=step, forward_clipval=None), *tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vanilla, "run", run_so)
        yield


def _let_pass(step: Any, bound: float, share: float, states: Any, gates: Any) -> Any:
    h, *others = step(states, gates)
    return _Clip.apply(h, bound, share), *others


class _Clip(torch.autograd.Function):
    """A clip whose gradient is that of another one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float, share: float) -> Tensor:
        ctx.save_for_backward(x.abs() <= share * bound)
        return x.clamp(-bound, bound)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (passes,) = ctx.saved_tensors
        return torch.where(passes, gradients[0], 0), None, None


class _Product(torch.autograd.Function):
    """``torch.baddbmm``, whose second factor's gradient sees no infinite one."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, h: Tensor, R: Tensor) -> Tensor:
        ctx.save_for_backward(h, R)
        return inputs + h @ R

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, R = ctx.saved_tensors
        (d_gates,) = gradients
        largest = torch.finfo(torch.float16).max
        d_h = d_gates.clamp(-largest, largest) @ R.transpose(1, 2)
        return d_gates, d_h, h.transpose(1, 2) @ d_gates


class _Step:
    """A cell's step with the clip of h. The initial states are kept as they are given."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.first = problem, True

    def __call__(self, states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> Any:
        kept = self.problem.carry_dtype if self.first else self.problem.dtype
        self.first = False
        step = partial(_clipped, self.problem)
        return _FromResiduals.apply(step, kept, self.problem.dtype, len(states), *states, *gates)


def _clipped(
    problem: Problem, states: tuple[Tensor, ...], gates: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    assert problem.step is not None
    h, *others = problem.step(states, gates)
    if problem.forward_clipval is not None:
        bound = as_dtype_has_it(problem.forward_clipval, problem.carry_dtype)
        h = h.clamp(-bound, bound)
    return h, *others


class _FromResiduals(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        step: Callable[..., tuple[Tensor, ...]],
        states_dtype: torch.dtype,
        gates_dtype: torch.dtype,
        S: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.step, ctx.S, ctx.gates_dtype = step, S, gates_dtype
        ctx.save_for_backward(
            *(x.to(states_dtype) for x in tensors[:S]), *(x.to(gates_dtype) for x in tensors[S:])
        )
        return tuple(x.view_as(x) for x in step(tensors[:S], tensors[S:]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        S = ctx.S
        leaves = [x.detach().to(gradients[0].dtype).requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            results = ctx.step(tuple(leaves[:S]), tuple(leaves[S:]))
        depend = [(x, y) for x, y in zip(results, gradients, strict=True) if x.requires_grad]
        outputs, slopes = zip(*depend, strict=True)
        found = torch.autograd.grad(outputs, leaves, slopes, allow_unused=True)
        kept = [x if x is None else x.to(ctx.gates_dtype).to(x.dtype) for x in found[S:]]
        return None, None, None, None, *found[:S], *kept
