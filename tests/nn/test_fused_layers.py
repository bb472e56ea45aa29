"""Layers take a fused backend where one runs: here Triton's, by its interpreter on the CPU."""

import os

import pytest
import torch

import flashrnn.nn as ours
from flashrnn import backends
from tests.nn.against import assert_like_torch, assert_same, pair, states

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@pytest.mark.parametrize(
    "kind",
    ["LSTM", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("GRU", "RNN"))],
)
def test_batches_and_packed_sequences(kind):
    mine, theirs = pair(kind, 3, 16, bidirectional=True, dtype=torch.float32)
    assert backends.fused_on(torch.device("cpu"))
    x = torch.randn(3, 2, 3)
    assert_like_torch(mine, theirs, x, states(mine, 2), tolerance=1e-5)
    assert_like_torch(mine, theirs, x, None, torch.tensor([3, 1]), tolerance=1e-5)


def test_what_it_cannot_do_is_done_by_vanilla():
    mine, theirs = pair("GRU", 3, 16)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    assert_same(mine(x), theirs(x))


def test_cells_and_steps():
    layer = ours.LSTM(3, 16)
    cell = ours.LSTMCell(3, 16)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(2, 3)
    expected, _ = torch.nn.LSTM.forward(layer, x[None])
    assert_same(cell(x)[0], expected[0], 1e-5)
    assert_same(layer.step(x)[0], expected[0], 1e-5)
