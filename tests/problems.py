"""Random problems, cells to try them on, and how results are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashrnn import Cell, cell, flashrnn
from flashrnn.cells import resolve
from flashrnn.problem import carry_dtype

BUILT_IN = ("elman", "lstm", "gru", "slstm")


@cell(states=("h", "a"), gates={"x": ("Wx",), "p": ("R",), "y": ("Wx", "R"), "q": ("Wx", "b")})
def sparse(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Every kind of gate that no built-in cell has, R's gates in the middle."""
    h, a = states
    x, p, y, q = gates
    a = torch.sigmoid(p) * a + torch.tanh(x)
    return torch.tanh(a + y * torch.sigmoid(q)) + 0.1 * h, a


@cell(states=("h",), gates=[f"g{k}" for k in range(7)])
def wide(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """More gates than any built-in cell."""
    (h,) = states
    return (torch.tanh(sum(torch.sigmoid(k * g) for k, g in enumerate(gates))) * torch.sigmoid(h),)


@cell(states=("h", "c"), gates=[f"g{k}" for k in range(20)])
def widest(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """So many gates that a thread holds those of few units."""
    h, c = states
    c = torch.sigmoid(c) + torch.tanh(sum(torch.sigmoid(k * g) for k, g in enumerate(gates)))
    return torch.tanh(c) * torch.sigmoid(h), c


@cell(states=("h",), gates=("g",))
def root(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Its derivative is not finite at 0."""
    return (gates[0].abs().sqrt(),)


@cell(
    states=("h", "c", "n"),
    gates={"a": ("Wx", "R", "b"), "x": ("Wx",), "p": ("R",), "q": ("Wx", "b"), "r": ("R", "b")},
)
def undefined(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Neither it nor its derivative is finite at 0; R does not feed all gates."""
    _, c, n = states
    a, x, p, q, r = gates
    h = torch.log(a.abs()) + 1 / (c.abs() + p.abs())
    c = torch.tanh(c).abs().sqrt() + torch.tanh(x) / torch.exp(q)
    return h, c, torch.tanh(n) / r


@cell(states=("h",), gates=[f"g{k}" for k in range(5)])
def steep(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Its first gate's gradient is 5000 times that of h."""
    return (torch.tanh(5000 * gates[0]) + sum(gates[1:]),)


@dataclass
class Inputs:
    """The arguments of a call, leaves that require gradients."""

    Wx: Tensor
    R: Tensor
    b: Tensor
    states: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return vars(self)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values as new leaves in another dtype; states in the carry's."""
        converted = {name: x.detach().to(dtype) for name, x in vars(self).items()}
        converted["states"] = self.states.detach().to(carry_dtype(dtype))
        return Inputs(**{name: x.requires_grad_() for name, x in converted.items()})


def random_inputs(
    function: str | Cell,
    B: int,
    T: int,
    N: int,
    D: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Inputs of ordinary size, with an R for which the recurrence neither dies out nor is chaotic.

    The initial states are ones that a step can return: n ≥ 1 for sLSTM, all others within (−1, 1).
    """
    cell = resolve(function)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    states = torch.tanh(normal(len(cell.states), B, 1, N, D))
    if "n" in cell.states:
        states[cell.states.index("n")].abs_().add_(1)
    leaves = {
        "Wx": normal(B, T, len(cell.fed_by("Wx")), N, D),
        "R": normal(len(cell.fed_by("R")), N, D, D) / D**0.5,
        "b": normal(len(cell.fed_by("b")), N, D),
        "states": states,
    }
    cast = {name: x.to(device, dtype) for name, x in leaves.items()}
    cast["states"] = leaves["states"].to(device, carry_dtype(dtype))
    return Inputs(**{name: x.requires_grad_() for name, x in cast.items()})


def gentle_inputs(*arguments: Any, **options: Any) -> Inputs:
    """As :func:`random_inputs`, far from where :func:`undefined` and its slopes have no bound.

    Float16 has a number for each of its results and gradients then, and for all on the way there.
    """
    inputs = random_inputs(*arguments, **options)
    with torch.no_grad():
        inputs.Wx.tanh_()
        inputs.R.mul_(0.1)
        inputs.b.abs_().add_(3)
        inputs.states.abs_().add_(1)
    return inputs


def call(function: str | Cell, inputs: Inputs, **options: object) -> tuple[Tensor, Tensor]:
    return flashrnn(**inputs.tensors(), function=function, **options)  # type: ignore[arg-type]


def gradients(outputs: tuple[Tensor, Tensor], inputs: Inputs, seed: int = 1) -> dict[str, Tensor]:
    """Gradients of a random weighted sum of both outputs."""
    leaves = list(inputs.tensors().values())
    weights = random_weights(outputs, seed)
    found = torch.autograd.grad(outputs, leaves, weights, allow_unused=True, materialize_grads=True)
    return dict(zip(inputs.tensors(), found, strict=True))


def random_weights(outputs: tuple[Tensor, Tensor], seed: int) -> list[Tensor]:
    """Gradients of outputs; they depend on the shapes alone, so two precisions get the same."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]


def relative_error(given: Tensor, truth: Tensor) -> float:
    """``‖given − truth‖ / ‖truth‖``; NaN in ``given`` gives NaN, which no bound accepts."""
    given, truth = given.detach().double(), truth.detach().double()
    difference = (given - truth).norm()
    return float(difference / truth.norm().clamp_min(torch.finfo(torch.float64).tiny))
