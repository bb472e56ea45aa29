"""Checks results before they are timed.

The timed configuration itself is run, at its full length. There the truth would take minutes. But a
recurrence is causal: the first steps of a sequence, and the gradients of a loss of these steps
alone, are the same if the sequence ends after them. So the truth is computed in float64 on the
first few steps.

As for its imports, see ``timing.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 64
# The error allowed to a peer, whose rounding may differ. A wrong order of gates gives far more.
PEERS = 0.05
# The same where TF32 may be used: its operands have 10 bits after the point, and vanilla's products
# need not have taken it.
TF32 = 2**-9


@dataclass(frozen=True)
class Results:
    """The first steps of an output and the gradients of a loss of them; whether all is finite."""

    output: Tensor
    gradients: list[Tensor]
    finite: bool


def results(
    run: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    inputs: int,
    time: int,
    gradient: Tensor,
    backward: bool,
) -> Results:
    """Run a contender, and keep the results of the first steps.

    Args:
        run: what is checked.
        leaves: its arguments.
        inputs: how many of them, at the front, have a time axis.
        time: the axis of time of these and of the output.
        gradient: of the loss by the output's first steps, and of their shape.
        backward: whether to ask for gradients.
    """
    steps = gradient.shape[time]
    if not backward:
        with torch.no_grad():
            output = run(*leaves)
        return Results(output.narrow(time, 0, steps), [], bool(output.isfinite().all()))
    output = run(*leaves)
    first = output.narrow(time, 0, steps)
    found = torch.autograd.grad(first, leaves, gradient.to(first))
    finite = all(bool(x.isfinite().all()) for x in (output, *found))
    cut = [x.narrow(time, 0, steps) if k < inputs else x for k, x in enumerate(found)]
    return Results(first.detach(), cut, finite)


@dataclass(frozen=True)
class Verdict:
    """The errors of results, ‖given − truth‖ / ‖truth‖, and the reason if they are wrong.

    Attributes:
        output: of the output.
        gradient: the largest of the gradients; ``None`` where none was asked for.
        reason: ``None`` where all is right.
    """

    output: float
    gradient: float | None
    reason: str | None


def judge(given: Results, truth: Results, plain: Results | None, tf32: bool = False) -> Verdict:
    """Compare results with the truth.

    Args:
        given: what is judged.
        truth: in float64.
        plain: ours are held to twice the error of these, which are ``vanilla``'s in the same
            dtype, and a peer, for whom this is ``None``, to 5%.
        tf32: whether products of float32 may be TF32.
    """
    output = _error(given.output, truth.output)
    gradients = _errors(given, truth)
    allowed_output, allowed_gradients = PEERS, [PEERS] * len(gradients)
    if plain is not None:
        dtype = plain.output.dtype
        allowed_output = _allowed(_error(plain.output, truth.output), dtype, 0, tf32)
        # Gradients may be computed from what was rounded to 16 bits for them: half a unit in
        # the last place at most, half of that in the mean.
        residual = torch.finfo(dtype).eps / 4
        allowed_gradients = [
            _allowed(error, dtype, residual, tf32) for error in _errors(plain, truth)
        ]
    wrong = [] if given.finite else ["something is not finite"]
    if not output <= allowed_output:
        wrong.append(f"the output is off by {output:.2g}, allowed is {allowed_output:.2g}")
    wrong += [
        f"gradient {k} is off by {error:.2g}, allowed is {allowed:.2g}"
        for k, (error, allowed) in enumerate(zip(gradients, allowed_gradients, strict=True))
        if not error <= allowed
    ]
    reason = f"wrong: {'; '.join(wrong)}" if wrong else None
    return Verdict(output, max(gradients, default=None), reason)


def _allowed(plain: float, dtype: torch.dtype, residual: float, tf32: bool) -> float:
    if dtype.itemsize == 2:
        return 2 * plain + max(residual, 1e-6)
    if dtype == torch.float32:
        return max(2 * plain, TF32 if tf32 else 1e-5)
    return max(2 * plain, 1e-12)


def _errors(given: Results, truth: Results) -> list[float]:
    return [_error(a, b) for a, b in zip(given.gradients, truth.gradients, strict=True)]


def _error(given: Tensor, truth: Tensor) -> float:
    given, truth = given.double(), truth.double()
    return float((given - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny))
