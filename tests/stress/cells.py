"""Cells that are hard on a kernel, and inputs that suit them.

Most are well behaved wherever their gates are some way from 0, which is where units that do not
exist (a tile's padding) would evaluate them.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from flashrnn import Cell, cell
from tests.problems import BUILT_IN, Inputs, sparse, wide

Tensors = tuple[Tensor, ...]


@cell(states=("h",), gates=("g",))
def logarithm(states: Tensors, gates: Tensors) -> Tensors:
    """−inf at 0."""
    return (torch.log(gates[0]),)


@cell(states=("h",), gates=("g",))
def root(states: Tensors, gates: Tensors) -> Tensors:
    """Its derivative is NaN at 0."""
    return (gates[0].abs().sqrt(),)


@cell(states=("h",), gates=("g",))
def reciprocal(states: Tensors, gates: Tensors) -> Tensors:
    """Infinite at 0."""
    return (1 / gates[0],)


@cell(states=("h",), gates=("g",))
def entropy(states: Tensors, gates: Tensors) -> Tensors:
    """NaN at 0."""
    return (1 - gates[0] * torch.log(gates[0]) / 4,)


@cell(states=("h", "n"), gates=("g", "f"))
def quotient(states: Tensors, gates: Tensors) -> Tensors:
    """Infinite where a state is 0."""
    _, n = states
    g, f = gates
    return torch.tanh(g) / n, (n + torch.sigmoid(f)) / 2 + 0.5


@cell(states=("h",), gates={"x": ("Wx",), "y": ("R", "b")})
def steep(states: Tensors, gates: Tensors) -> Tensors:
    """A large derivative."""
    x, y = gates
    return (256 * x + torch.tanh(y / 256),)


@cell(
    states=("h",),
    gates={
        **{f"a{k}": ("Wx", "R", "b") for k in range(3)},
        **{f"b{k}": ("R",) for k in range(2)},
        **{f"c{k}": ("Wx",) for k in range(2)},
        **{f"d{k}": ("b",) for k in range(2)},
    },
)
def nine(states: Tensors, gates: Tensors) -> Tensors:
    """Nine gates, fed in four ways."""
    return (torch.tanh(sum(gates) / 3) * torch.sigmoid(gates[-1]),)


@cell(states=("h", "c"), gates={"i": ("Wx", "R", "b"), "z": ("Wx", "R", "b"), "w": ("b",)})
def peephole(states: Tensors, gates: Tensors) -> Tensors:
    """A gate that only b feeds: a parameter of the cell."""
    _, c = states
    i, z, w = gates
    i = torch.sigmoid(i + w * c)
    c = (1 - i) * c + i * torch.tanh(z)
    return torch.tanh(c), c


@cell(states=("h", "a", "b", "c", "d", "e"), gates={"x": ("Wx",), "y": ("R",)})
def cascade(states: Tensors, gates: Tensors) -> Tensors:
    """Many states, and no bias."""
    _, a, *others = states
    x, y = gates
    filtered = [0.5 * a + torch.tanh(x + y)]
    for state in others:
        filtered.append(0.5 * (state + filtered[-1]))
    return torch.tanh(filtered[-1]), *filtered


def new_cell(k: int) -> Cell:
    """The k-th of many cells; asked for again, an equal one that is built again."""
    scale = 1 + k / 64

    @cell(states=("h",), gates=("f", "z"))
    def scaled(states: Tensors, gates: Tensors) -> Tensors:
        f = torch.sigmoid(gates[0])
        return (f * states[0] + (1 - f) * torch.tanh(scale * gates[1]),)

    return scaled


AWAY_FROM_0 = (logarithm, root, reciprocal, entropy)
CELLS: dict[str, str | Cell] = {
    **{name: name for name in BUILT_IN},
    **{
        own.name: own
        for own in (sparse, wide, *AWAY_FROM_0, quotient, steep, nine, peephole, cascade)
    },
}


def suited(kind: str | Cell, inputs: Inputs) -> Inputs:
    """The inputs, changed in place so that the cell is well conditioned at them."""
    with torch.no_grad():
        if kind in AWAY_FROM_0:
            # Ten standard deviations from 0.
            inputs.Wx.div_(4).add_(3)
            inputs.R.div_(10)
            inputs.b.div_(10)
    return inputs


def plant(x: Tensor, rng: random.Random, values: tuple[float, ...]) -> None:
    """Write one of the values into one element, chosen at random."""
    if x.numel():
        with torch.no_grad():
            x[tuple(rng.randrange(size) for size in x.shape)] = rng.choice(values)
