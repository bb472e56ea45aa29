"""Products of numbers of any size, held to the sizes of their terms.

A relative error of a whole result says nothing of its small numbers. Here each pre-activation's
error is held to the sum of its terms' sizes, ``Σ_j |R_ij h_j|``; steps have no other input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flashrnn import Cell, cell
from tests.problems import Inputs, call, random_inputs, relative_error


def limited(bound: float) -> Cell:
    """A cell whose ``h`` is its gate, and at most ``bound`` in size."""

    @cell(states=("h",), gates=("g",))
    def limited(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (gates[0].clamp(-bound, bound),)

    return limited


def _powers(x: Tensor, least: int, largest: int) -> Tensor:
    """Random powers of two, one for each element."""
    generator = torch.Generator().manual_seed(3)
    exponents = torch.randint(least, largest + 1, x.shape, generator=generator)
    return torch.ldexp(torch.ones(x.shape), exponents).to(x)


def _scale(h: float, R: float = 1.0) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        inputs.states.mul_(h)
        inputs.R.mul_(R)

    return change


def _spread(least: int, largest: int, R: float = 1.0) -> Callable[[Inputs], None]:
    """``h`` of very different sizes, and rows of R with few numbers, so that each ``h`` counts."""

    def change(inputs: Inputs) -> None:
        inputs.states.mul_(_powers(inputs.states, least, largest))
        units = torch.arange(inputs.R.shape[-1], device=inputs.R.device)
        inputs.R.mul_(((units[:, None] - units) % 7 == 0) * R)

    return change


def _rows(inputs: Inputs) -> None:
    inputs.R.mul_(_powers(inputs.R[..., :1], -70, 0))
    inputs.R[0, 0, 1] = 0


def _wide(inputs: Inputs) -> None:
    """The large numbers of a row meet zeros."""
    inputs.R[..., ::2] *= 2.0**-60
    inputs.states[..., 1::2] = 0


def _one(value: float) -> Callable[[Inputs], None]:
    """In one sequence, whose R keeps the sum small."""

    def change(inputs: Inputs) -> None:
        inputs.states[0, 1, 0, 0, 2] = value
        inputs.R[..., 2] /= max(1.0, abs(value))

    return change


SIZES: dict[str, Callable[[Inputs], None]] = {
    "ordinary": _scale(1.0),
    "tiny": _scale(1e-9),
    "tinier": _scale(1e-30),
    "denormal": _scale(1e-41),
    "large": _scale(1e6, 1e-6),
    "larger": _scale(1e30, 1e-20),
    "fading": _scale(1.0, 1e-12),
    "spread": _spread(-120, 0),
    "spread, large": _spread(-20, 60, 1e-18),
    "rows of R": _rows,
    "R tiny": _scale(1.0, 1e-20),
    "R tinier": _scale(1.0, 1e-30),
    "wide R": _wide,
    "one h 1e6": _one(1e6),
    "one h tiny": _one(1e-30),
}


def keeps_every_term(
    backend: str, D: int, sizes: str, bound: float = 4.0, device: str = "cpu", B: int = 5
) -> None:
    """Hold some steps of :func:`limited` to their terms.

    Float32 without TF32 has 21 bits of each factor and more, and adds D of their products.

    Args:
        backend: the backend.
        D: head dimension.
        sizes: out of ``SIZES``.
        bound: of the cell's ``h``.
        device: where the tensors are.
        B: sequences.
    """
    kind = limited(bound)
    inputs = random_inputs(kind, B, 3, 2, D, torch.float32, device)
    with torch.no_grad():
        inputs.Wx.zero_()
        inputs.b.zero_()
        SIZES[sizes](inputs)
        (found, *_), _ = call(kind, inputs, backend=backend)
        # Each step's own error: of the h before it, as it was found.
        h = torch.cat([inputs.states[0], found[:, :-1]], dim=1).double()
        R = inputs.R[0].double()
        terms = torch.einsum("npq,btnq->btnp", R.abs(), h.abs())
        truth = torch.einsum("npq,btnq->btnp", R, h).clamp(-bound, bound)
    error = (found.double() - truth).abs()
    # Of tf32 operands both low parts are cut off.
    relative = 2.0**-18 if sizes in ("wide R", "R tinier") else 2.0**-20
    # What is rounded to a multiple of the least number, in float32 or on the way.
    allowed = relative * terms + 4 * 2.0**-149
    assert (error <= allowed).all(), f"{(error / allowed).max():.3g} times what is allowed"


def leaves_other_sequences_alone(
    backend: str, kind: str | Cell, *sizes: int, device: str = "cpu"
) -> None:
    """Give a sequence one initial ``h`` of any size, and hold its states to vanilla's in float64.

    Those of the other sequences have the same bits whatever it is.
    """
    inputs = random_inputs(kind, *sizes, torch.float32, device)

    def states(value: float, wide: bool = False) -> Tensor:
        changed = inputs.to(torch.float64) if wide else inputs
        with torch.no_grad():
            changed.states[0, 1, 0, 0, 3] = value
            found = call(kind, changed, backend="vanilla" if wide else backend)
        return torch.cat(found, dim=2)

    others, usual = [b for b in range(sizes[0]) if b != 1], states(0.5)
    assert torch.equal(states(0.5), usual)
    for value in (1e-30, 1e-41, 0.0, 1e6, -1e38, 3e38, math.inf, math.nan):
        given = states(value)
        assert torch.equal(given[:, others], usual[:, others]), value
        if not math.isnan(value):
            error = relative_error(given[:, 1], states(value, wide=True)[:, 1])
            assert error < 1e-6, f"{value}: {error}"
