"""Calls like one before, by what their backend has kept of that one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashrnn.backends import are_plain, recorded
from flashrnn.backends.gradients import Gradients
from flashrnn.backends.protocols import Factors, Repeatable, RepeatingBackend
from flashrnn.problem import Problem


class Kept(NamedTuple):
    """What is kept of a call without options of sequences.

    Attributes:
        backend: what computed it.
        problem: ...
        names: of the tensors that forward is given, without the initial states, which follow.
        forward: what the backend keeps of its forward.
        gradients: what it keeps of backwards, by :func:`gradients_again`'s key.
    """

    backend: RepeatingBackend
    problem: Problem
    names: tuple[str, ...]
    forward: Repeatable
    gradients: dict[tuple[object, ...], Repeatable | None]


def without_memory(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors of the same sizes, strides and dtypes, of which nothing is read."""
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in tensors]


def forward_again(
    kept: Kept | None, given: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """What a backend's forward returns, of a call of which that was kept."""
    made = None if kept is None else kept.forward.run(given)
    if made is None:
        return None
    return made["states"], made["last_states"], made.get("gates")


# More strides of upstream gradients than programs have.
_MOST_GRADIENTS = 16


def gradients_again(
    kept: Kept,
    residuals: Sequence[Any],
    d_states: Tensor | None,
    d_last: Tensor | None,
    factors: Factors | None = None,
) -> Gradients | None:
    """The gradients of a call of which something was kept; see
    :func:`flashrnn.backends.autograd.gradients_of`.

    ``None``: they are to be worked out.
    """
    if torch.is_grad_enabled() or recorded():
        return None
    R, initial, states, gates, *_ = residuals
    x, W, needs_x, needs_W = None, None, False, False
    if factors is not None and (factors.needs_x or factors.needs_W):
        x, W, needs_x, needs_W, _ = factors
    if kept.problem.returned == 0:
        d_states = None
    tensors = R, initial, states, gates, d_states, d_last, x, W
    given = [tensor for tensor in tensors if tensor is not None]
    if not are_plain(given):
        return None
    key = needs_x, needs_W, *[None if tensor is None else tensor.stride() for tensor in tensors]
    if key not in kept.gradients:
        if len(kept.gradients) >= _MOST_GRADIENTS:
            kept.gradients.clear()
        names = [n for n, tensor in zip(_GIVEN, tensors, strict=True) if tensor is not None]
        named = dict(zip(names, without_memory(given), strict=True))
        found = kept.backend.repeated_gradients(kept.problem, named, needs_x, needs_W)
        kept.gradients[key] = found
    repeated = kept.gradients.get(key)
    if repeated is not None and not repeated.is_current():
        kept.gradients.pop(key, None)
        return None
    made = None if repeated is None else repeated.run(given)
    if made is None:
        return None
    of_call = made["d_gates"], made["d_initial"], made["d_R"], made["d_b"], None
    return Gradients(*of_call, made.get("d_x"), made.get("d_W"))


_GIVEN = "R", "initial", "states", "gates", "d_states", "d_last", "x", "W"
