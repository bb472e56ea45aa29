"""Layers of ours and of torch.nn with the same weights, and how their results are compared."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import flashrnn.nn as ours
from flashrnn import cell

KINDS = ("LSTM", "GRU", "RNN")
BACKENDS = ("auto", "vanilla")
every_kind = pytest.mark.parametrize("kind", KINDS)
both_paths = pytest.mark.parametrize("backend", BACKENDS)


@cell(states=("h", "c"), gates={"z": ("Wx", "b"), "f": ("Wx", "R", "b"), "p": ("b",)})
def own(states, gates):
    """Gates that not all sources feed, one of them by a bias alone."""
    _, c = states
    z, f, p = gates
    c = torch.sigmoid(f + p * c) * c + torch.tanh(z)
    return torch.tanh(c), c


def pair(kind: str, *args: Any, backend: str = "auto", **options: Any) -> tuple[Any, Any]:
    """Ours and torch.nn's, in float64 unless said otherwise."""
    options.setdefault("dtype", torch.float64)
    theirs = getattr(nn, kind)(*args, **options)
    mine = getattr(ours, kind)(*args, backend=backend, **options)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def states(layer: Any, *batch: int) -> Any:
    """Random ones, as the layer takes them."""
    rows = layer.num_layers * (1 + layer.bidirectional)
    dtype = layer.weight_ih_l0.dtype
    h = torch.randn(rows, *batch, layer.proj_size or layer.hidden_size, dtype=dtype)
    if layer.mode != "LSTM":
        return h
    return h, torch.randn(rows, *batch, layer.hidden_size, dtype=dtype)


def hidden(layer: Any, B: int) -> Any:
    """The same of any cell without a projection, positive, in float64."""
    rows = layer.num_layers * (1 + layer.bidirectional)
    made = [torch.rand(rows, B, layer.hidden_size).double() for _ in layer.cell.states]
    return tuple(made) if len(made) > 1 else made[0]


def tensors(value: Any) -> list[Tensor]:
    """Those in a result, in order."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value or () for tensor in tensors(item)]


def assert_same(given: Any, expected: Any, tolerance: float = 1e-10) -> None:
    given, expected = tensors(given), tensors(expected)
    assert len(given) == len(expected)
    for mine, theirs in zip(given, expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def leaf(value: Any) -> Any:
    """A copy that requires gradients."""
    if isinstance(value, tuple):
        return tuple(map(leaf, value))
    return None if value is None else value.detach().clone().requires_grad_()


def run(layer: Any, x: Tensor, hx: Any = None, lengths: Any = None) -> tuple[Any, list[Tensor]]:
    """The results, and the gradients of everything, of a sum with weights of its own for each."""
    x, hx = leaf(x), leaf(hx)
    layer.zero_grad()
    given = x
    if lengths is not None:
        given = pack_padded_sequence(x, lengths, layer.batch_first, enforce_sorted=False)
    results = layer(given) if hx is None else layer(given, hx)
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in tensors(results)
    )
    loss.backward()
    weights = [weight for _, weight in sorted(layer.named_parameters())]
    return results, [tensor.grad for tensor in [x, *tensors(hx), *weights]]


def results_and_gradients(layer: Any, x: Tensor, hx: Any, compute: Any) -> list[Tensor]:
    """Those of ``compute(x, hx)``, of a sum in which each number has another weight."""
    layer.zero_grad()
    x, hx = leaf(x), leaf(hx)
    results = tensors(compute(x, hx))
    sum((y * torch.arange(1, y.numel() + 1).view_as(y)).sum() for y in results).backward()
    leaves = (x, *tensors(hx), *layer.parameters())
    # What nothing reads has no gradient.
    return results + [torch.zeros_like(y) if y.grad is None else y.grad for y in leaves]


def assert_like_torch(mine: Any, theirs: Any, *args: Any, tolerance: float = 1e-10) -> None:
    """Results and gradients of both."""
    (given, gradients), (expected, their_gradients) = run(mine, *args), run(theirs, *args)
    assert type(given[0]) is type(expected[0]) and type(given[1]) is type(expected[1])
    assert_same(given, expected, tolerance)
    assert_same(gradients, their_gradients, tolerance)


@st.composite
def options(draw: Any, kind: str) -> dict[str, Any]:
    """What a constructor takes beyond sizes."""
    found = {
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    if kind == "RNN":
        found["nonlinearity"] = draw(st.sampled_from(("tanh", "relu")))
    if kind == "LSTM":
        found["proj_size"] = draw(st.integers(0, 2))
    return found


def corners(kind: str) -> list[dict[str, object]]:
    """Constructors' options, each with each, of two layers."""
    axes: dict[str, tuple[object, ...]] = {
        "bias": (True, False),
        "batch_first": (False, True),
        "bidirectional": (False, True),
    }
    if kind == "LSTM":
        axes["proj_size"] = (0, 3)
    if kind == "RNN":
        axes["nonlinearity"] = ("tanh", "relu")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)
