"""A layer's forward, its input product and its scan, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flashrnn import backends, calls
from flashrnn.backends import autograd, kept_calls, protocols
from flashrnn.backends.gradients import Gradients, select
from flashrnn.backends.library import factors_gradients, input_product
from flashrnn.problem import Problem
from flashrnn.sequences import Sequences


def factors_as_computed(problem: Problem, x: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """x and W in the dtype of the computation."""
    return calls.cast_to(x, problem.dtype), calls.cast_to(W, problem.dtype)


def forward_of_layer(
    backend: protocols.FusedBackend,
    problem: Problem,
    x: Tensor,
    W: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    options: Sequence[Tensor | None] = (),
    bias: Tensor | None = None,
    results: protocols.Results | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A fused backend's forward of a layer: the backend computes the product too, where it can.

    All tensors are of the dtypes of the computation. ``bias``, if there is one, is added to the
    product; it has W's dimensions but the last. ``results`` are for backends that write them.
    """
    of_scan = R, b, states, Sequences(*options) if options else None
    further: dict[str, Any] = {} if results is None else {"results": results}
    if protocols.multiplies(backend, problem, x, W):
        factors = protocols.Factors(x, W, bias=bias)
        return backend.forward(problem, None, *of_scan, factors, **further)
    Wx = input_product(problem, x, W.flatten(0, -2), None if bias is None else bias.view(-1))
    return backend.forward(problem, Wx, *of_scan, **further)


def gradients_of_layer(
    backend: protocols.FusedBackend,
    problem: Problem,
    factors: protocols.Factors,
    residuals: Sequence[Any],
    given: int,
    d_states: Tensor | None,
    d_last: Tensor | None,
    kept: kept_calls.Kept | None = None,
) -> Gradients:
    """The same backward, from what a node has kept; see :func:`autograd.gradients_of`."""
    if kept is not None:
        again = kept_calls.gradients_again(kept, residuals, d_states, d_last, factors)
        if again is not None:
            return again
    arguments = backend, problem, residuals, given, d_states, d_last
    x, W, needs_x, needs_W, _ = factors
    # A hook on saved tensors may have changed these, too.
    if backends.are_plain((x, W)) and protocols.multiplies(backend, problem, x, W):
        found = autograd.gradients_of(*arguments, factors=factors)
    else:
        found = autograd.gradients_of(*arguments)
    if (found.x is None and needs_x) or (found.W is None and needs_W):
        d_Wx = select(found.gates, 2, problem.cell.fed_by("Wx"))
        d_x, d_W = factors_gradients(d_Wx, x, W.flatten(0, -2), needs_x, needs_W)
        found = found._replace(x=d_x, W=None if d_W is None else d_W.view(W.shape))
    return found
