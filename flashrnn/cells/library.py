"""The built-in cells. They use nothing that a user's own cell cannot."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flashrnn.cells.spec import add_to_library, cell

# exp of it is finite in float32 and bfloat16; see slstm.
_LARGEST_EXPONENT = 80.0


@add_to_library
@cell(states=("h",), gates=("g",))
def elman(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The simple recurrent network (Elman, 1990): ``h' = tanh(g)``."""
    (g,) = gates
    return (torch.tanh(g),)


@add_to_library
@cell(states=("h", "c"), gates=("i", "f", "z", "o"))
def lstm(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Long short-term memory with a forget gate (Hochreiter & Schmidhuber, 1997; Gers, 2000).

    ``c' = σ(f)·c + σ(i)·tanh(z)``; ``h' = σ(o)·tanh(c')``.
    """
    _, c = states
    i, f, z, o = gates
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
    return torch.sigmoid(o) * torch.tanh(c), c


@add_to_library
@cell(
    states=("h",),
    gates={"g": ("R", "b"), "r": ("Wx", "R", "b"), "z": ("Wx", "R", "b"), "n": ("Wx", "b")},
)
def gru(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gated recurrent unit (Cho et al., 2014), reset after the product as in cuDNN.

    ``h' = σ(z)·h + (1−σ(z))·tanh(n + σ(r)·g)``, where only ``R`` and ``b`` feed ``g`` and
    only ``Wx`` and ``b`` feed ``n``.
    """
    (h,) = states
    g, r, z, n = gates
    z = torch.sigmoid(z)
    return (z * h + (1 - z) * torch.tanh(n + torch.sigmoid(r) * g),)


@add_to_library
@cell(states=("h", "c", "n", "m"), gates=("i", "f", "z", "o"))
def slstm(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """LSTM with an exponential input gate and a normalizer (xLSTM, Beck et al., 2024).

    ``m' = i`` where ``n = 0``, else ``max(i, logσ(f) + m)``; ``i' = exp(i − m')``;
    ``f' = exp(logσ(f) + m − m')``; ``c' = f'·c + i'·tanh(z)``; ``n' = max(f'·n + i', 1)``;
    ``h' = σ(o)·c'/n'``.

    No gradient flows through ``m'``: it scales ``c'`` and ``n'`` alike and leaves ``h'`` as
    it is. Where ``n = 0`` nothing bounds the exponent of ``f'``; there it multiplies a ``c``
    of 0, and the clamp keeps ``inf · 0`` out.
    """
    _, c, n, m = states
    i, f, z, o = gates
    decayed = logsigmoid(f) + m
    m = torch.where(n == 0, i, torch.maximum(i, decayed)).detach()
    i = torch.exp(i - m)
    f = torch.exp(torch.clamp(decayed - m, max=_LARGEST_EXPONENT))
    c = f * c + i * torch.tanh(z)
    n = f * n + i
    # Not a clamp: n is 1 after a first step, and at its bound PyTorch 2.14 gives it no gradient.
    n = torch.where(n < 1, 1.0, n)
    return torch.sigmoid(o) * c / n, c, n, m
