"""A layer's input product and its gradients by PyTorch's library."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashrnn.backends.gradients import over_rows
from flashrnn.problem import Problem
from flashrnn.rows import contiguous


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
