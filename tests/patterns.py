"""Problems whose numbers are not all finite, and cells that are not finite at 0.

A backend computes units and sequences that do not exist from zeros. Such a cell turns these into
NaN, which must not reach any sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from flashrnn import Cell, cell
from tests.fused import same_pattern_as_vanilla
from tests.problems import Inputs, random_inputs


@cell(states=("h",), gates=("g",))
def linear(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Infinite values stay infinite."""
    return (gates[0],)


@cell(states=("h", "c"), gates=("f", "g"))
def summing(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Two states, of which one is carried along."""
    _, c = states
    f, g = gates
    c = torch.sigmoid(f) * c + g
    return c, c


@cell(states=("h",), gates=("g",))
def logarithm(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """-inf at 0."""
    return (torch.log(gates[0]),)


@cell(states=("h", "c"), gates=("g", "k"))
def root(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Finite at 0, where its derivative is not."""
    g, k = gates
    return g.abs().sqrt(), states[1] * 0.5 + k.abs().sqrt()


@cell(states=("h",), gates=("r", "g"))
def reciprocal(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Infinite at 0, or NaN."""
    r, g = gates
    return (1 / g + states[0] / r,)


@cell(states=("h",), gates=("g",))
def steep(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A derivative of 1e30 at 0."""
    return (torch.tanh(1e30 * (gates[0] - 4)) + gates[0],)


BAD_AT_ZERO = (logarithm, root, reciprocal, steep)


def positive_inputs(kind: Cell, *sizes: int, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Gates between 2 and 4, or so: all that exists is finite."""
    inputs = random_inputs(kind, *sizes, dtype, device)
    with torch.no_grad():
        inputs.Wx.sigmoid_().add_(2)
        inputs.R.abs_().mul_(0.1 / sizes[-1] ** 0.5)
        inputs.b.abs_().mul_(0.1)
        inputs.states.abs_()
    return inputs


def ignores_what_is_not_there(
    backend: str,
    kind: Cell,
    *sizes: int,
    dtype: torch.dtype,
    device: str = "cpu",
    **options: object,
) -> None:
    """Hold a cell that is bad at 0 to vanilla."""
    inputs = positive_inputs(kind, *sizes, dtype=dtype, device=device)
    same_pattern_as_vanilla(backend, kind, inputs, **options)


def _set(name: str, value: float, *place: int) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        inputs.tensors()[name][place] = value

    return change


def _grow(inputs: Inputs) -> None:
    """A finite number next to the largest, and factors that keep its products finite."""
    inputs.states[0, 1, 0, 0, 2] = torch.finfo(inputs.Wx.dtype).max
    inputs.R.mul_(1e-3)


def _overflow(inputs: Inputs) -> None:
    """One product is infinite, and no other near it."""
    R, h = (8.0, 1e4) if inputs.R.dtype == torch.float16 else (3e38, 1e3)
    inputs.R[0, 0, 2, 1], inputs.states[0, 0, 0, 0, 1] = R, h


CHANGES: dict[str, Callable[[Inputs], None]] = {
    "h inf": _set("states", math.inf, 0, 1, 0, 0, 2),
    "h -inf": _set("states", -math.inf, 0, 0, 0, 0, 1),
    "h NaN": _set("states", math.nan, 0, 1, 0, 0, 2),
    "Wx inf": _set("Wx", math.inf, 0, 1, 0, 0, 3),
    "Wx NaN": _set("Wx", math.nan, 0, 1, 0, 0, 3),
    "R inf": _set("R", math.inf, 0, 0, 2, 1),
    "R NaN": _set("R", math.nan, 0, 0, 2, 1),
    "b -inf": _set("b", -math.inf, 0, 0, 2),
    "h near the largest": _grow,
    "sums beyond the largest": _overflow,
}


def _add_up(inputs: Inputs) -> None:
    """Two finite products whose sum is infinite, at the first step at least."""
    for unit in (1, 3):
        inputs.R[0, 0, 2, unit], inputs.states[0, 0, 0, 0, unit] = 3e38, 1.0


FAR_CHANGES = CHANGES | {
    "R -inf": _set("R", -math.inf, 0, 0, 2, 1),
    "R inf, of the last unit and head": _set("R", math.inf, -1, -1, -1, -1),
    "R near the largest": _set("R", 3e38, 0, 0, 2, 1),
    "h 3e38": _set("states", 3e38, 0, 1, 0, 0, 2),
    "a sum beyond the largest": _add_up,
}
"""Of float32: with what makes a step whose ``h`` is bounded need care after all."""

GRADIENTS = {
    "inf": math.inf,
    "-inf": -math.inf,
    "NaN": math.nan,
    # So far that R's gradient is too, which comes of what is stored: rounded, and so infinite.
    "beyond float16": 1e10,
    "large": 1e37,
}


def gradients_of(dtype: torch.dtype, clipped: bool) -> list[str]:
    """Those of ``GRADIENTS`` whose patterns are vanilla's.

    What a step hands on in float16 is rounded, and may become infinite. A clip contains that, of a
    cell that carries nothing past it.
    """
    others = {"beyond float16", "large"} if dtype == torch.float16 and not clipped else set()
    return [name for name in GRADIENTS if name not in others]


def follows_vanilla(
    backend: str,
    *sizes: int,
    dtype: torch.dtype,
    device: str = "cpu",
    clipval: float | None = None,
    but: Collection[str] = (),
) -> None:
    """Hold the patterns of problems with ``CHANGES`` and ``GRADIENTS``, but some, to vanilla."""
    B, T, N, D = sizes
    kind = linear if dtype == torch.float16 else summing
    options = {} if clipval is None else {"gradient_recurrent_clipval": clipval}
    differing = []
    for name in (*CHANGES, *gradients_of(dtype, clipval is not None)):
        if name in but:
            continue
        inputs, asked = random_inputs(kind, *sizes, dtype, device), None
        if name in CHANGES:
            with torch.no_grad():
                CHANGES[name](inputs)
        else:
            S, generator = len(inputs.states), torch.Generator().manual_seed(3)
            d_states = torch.randn(S, B, T, N, D, generator=generator).to(device, dtype)
            d_last = torch.randn(S, B, 1, N, D, generator=generator).to(inputs.states)
            d_last[0, 0, 0, 0, 2] = GRADIENTS[name]
            asked = d_states, d_last
        try:
            same_pattern_as_vanilla(backend, kind, inputs, asked, **options)
        except AssertionError as error:
            differing.append(f"{name}: {error}")
    assert not differing, "\n".join(differing)


def bounded_follows_vanilla(
    backend: str, kind: str, *sizes: int, device: str = "cpu", forward_clipval: float | None = None
) -> None:
    """Hold the patterns of float32 problems with ``FAR_CHANGES`` to vanilla.

    The cell is one whose ``h`` is bounded. It saturates, so a number of ``R`` or of the first ``h``
    matters to the step that it meets, and hardly to later ones.
    """
    differing = []
    for name, change in FAR_CHANGES.items():
        inputs = random_inputs(kind, *sizes, torch.float32, device)
        with torch.no_grad():
            change(inputs)
        try:
            same_pattern_as_vanilla(backend, kind, inputs, forward_clipval=forward_clipval)
        except AssertionError as error:
            differing.append(f"{name}: {error}")
    assert not differing, "\n".join(differing)
