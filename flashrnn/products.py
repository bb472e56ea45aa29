"""A layer's input product and its gradients, beside a scan and the scan's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashrnn import backends, calls
from flashrnn.backends import autograd
from flashrnn.backends.gradients import Gradients, over_rows, select
from flashrnn.problem import Problem
from flashrnn.rows import contiguous
from flashrnn.sequences import Sequences


def factors_as_computed(problem: Problem, x: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """x and W in the dtype of the computation."""
    return calls.cast_to(x, problem.dtype), calls.cast_to(W, problem.dtype)


def input_product(problem: Problem, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """``Wx`` ``[B, T, Gw, N, D]``: one product for all steps and gates.

    ``x`` is ``[B, T, I]``, ``W`` ``[Gw * N * D, I]``; ``bias``, with ``Gw * N * D`` elements, is
    added.
    """
    (rows, T), N, D = problem.rows, problem.N, problem.D
    Gw = W.shape[0] // (N * D)
    if torch.compiler.is_compiling() or x.is_contiguous() or not _is_time_major(x):
        return linear(x, W, bias).view(rows, T, Gw, N, D)
    # The rows in the order in which they lie in memory. Kernels take Wx of any strides.
    return linear(x.transpose(0, 1), W, bias).view(T, rows, Gw, N, D).transpose(0, 1)


def factors_gradients(
    d_Wx: Tensor, x: Tensor, W: Tensor, needs_x: bool, needs_W: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of what :func:`input_product` multiplies, of those that are needed."""
    if not (needs_x or needs_W):
        return None, None
    # Not by flatten(), which gradients of a batch (is_grads_batched) do not have.
    B, T, Gw, N, D = d_Wx.shape
    rows = d_Wx.reshape(B * T, Gw * N * D)
    if needs_W and _is_time_major(x):
        # Other inputs' rows mostly lie so that they need no copy.
        x = contiguous(x)
    return (
        torch.mm(rows, W).view(x.shape) if needs_x else None,
        over_rows(rows, x.flatten(0, 1)) if needs_W else None,
    )


def _is_time_major(x: Tensor) -> bool:
    """Whether ``[B, T, I]`` is a view of a ``[T, B, I]``."""
    (B, T, _), (of_B, of_T, _) = x.shape, x.stride()
    return B > 1 and T > 1 and of_T == B * of_B > 0


def forward_of_layer(
    backend: autograd.FusedBackend,
    problem: Problem,
    x: Tensor,
    W: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    options: Sequence[Tensor | None] = (),
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A fused backend's forward of a layer: the backend computes the product too, where it can.

    All tensors are of the dtypes of the computation. ``bias``, if there is one, is added to the
    product; it has W's dimensions but the last.
    """
    of_scan = R, b, states, Sequences(*options) if options else None
    if autograd.multiplies(backend, problem, x, W):
        return backend.forward(problem, None, *of_scan, autograd.Factors(x, W, bias=bias))
    Wx = input_product(problem, x, W.flatten(0, -2), None if bias is None else bias.view(-1))
    return backend.forward(problem, Wx, *of_scan)


def gradients_of_layer(
    backend: autograd.FusedBackend,
    problem: Problem,
    factors: autograd.Factors,
    residuals: Sequence[Any],
    given: int,
    d_states: Tensor | None,
    d_last: Tensor | None,
    kept: autograd.Kept | None = None,
) -> Gradients:
    """The same backward, from what a node has kept; see :func:`autograd.gradients_of`."""
    if kept is not None:
        again = autograd.gradients_again(kept, residuals, d_states, d_last, factors)
        if again is not None:
            return again
    arguments = backend, problem, residuals, given, d_states, d_last
    x, W, needs_x, needs_W, _ = factors
    # A hook on saved tensors may have changed these, too.
    if backends.are_plain((x, W)) and autograd.multiplies(backend, problem, x, W):
        found = autograd.gradients_of(*arguments, factors=factors)
    else:
        found = autograd.gradients_of(*arguments)
    if (found.x is None and needs_x) or (found.W is None and needs_W):
        d_Wx = select(found.gates, 2, problem.cell.fed_by("Wx"))
        d_x, d_W = factors_gradients(d_Wx, x, W.flatten(0, -2), needs_x, needs_W)
        found = found._replace(x=d_x, W=None if d_W is None else d_W.view(W.shape))
    return found
