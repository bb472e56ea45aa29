"""Resets within a batch, and sequences one after the other: the same as each part by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashrnn.nn as ours
from tests.nn.against import assert_same, both_paths, hidden, results_and_gradients, tensors

CELLS = ("lstm", "gru", "slstm")
few = settings(max_examples=20, deadline=None)


def layer_for(data, backend):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    return ours.Recurrent(
        data.draw(st.sampled_from(CELLS)),
        3,
        4,
        data.draw(st.integers(1, 2)),
        bidirectional=data.draw(st.booleans()),
        batch_first=data.draw(st.booleans()),
        dtype=torch.float64,
        backend=backend,
    )


def part(hx, b):
    """The states of one sequence, without a batch."""
    return tuple(s[:, b] for s in hx) if isinstance(hx, tuple) else hx[:, b]


def assert_same_with_gradients(layer, x, hx, whole, parts):
    """Results, gradients of the weights, of the input and of the states."""
    assert_same(*(results_and_gradients(layer, x, hx, compute) for compute in (whole, parts)))


@both_paths
@few
@given(st.data())
def test_resets(backend, data):
    layer = layer_for(data, backend)
    T, B = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    reset = torch.rand(T, B) < data.draw(st.sampled_from((0.0, 0.3, 1.0)))
    # Programs pass bool, and floats of 0 and 1.
    given_reset = reset.float() if data.draw(st.booleans()) else reset
    hx = hidden(layer, B) if data.draw(st.booleans()) else None

    def whole(x, hx):
        if not layer.batch_first:
            return layer(x, hx, reset=given_reset)
        output, last = layer(x.transpose(0, 1), hx, reset=given_reset.t())
        return output.transpose(0, 1), last

    def parts(x, hx):
        outputs, lasts = [], []
        for b in range(B):
            starts = sorted({0, *reset[:, b].nonzero().flatten().tolist()})
            pieces = []
            for t, end in zip(starts, [*starts[1:], T], strict=True):
                state = None if hx is None or reset[t, b] else part(hx, b)
                piece, last = layer(x[t:end, b], state)
                pieces.append(piece)
            outputs.append(torch.cat(pieces))
            lasts.append(tensors(last))
        return torch.stack(outputs, 1), [torch.stack(s, 1) for s in zip(*lasts, strict=True)]

    assert_same_with_gradients(layer, torch.randn(T, B, 3).double(), hx, whole, parts)


@both_paths
@few
@given(st.data())
def test_sequences_one_after_the_other(backend, data):
    layer = layer_for(data, backend)
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    B = len(lengths)
    hx = hidden(layer, B)

    def whole(x, hx):
        return layer(x, hx, cu_seqlens=bounds)

    def parts(x, hx):
        outputs, lasts = [], []
        for b in range(B):
            last = part(hx, b)
            if lengths[b]:
                piece, last = layer(x[bounds[b] : bounds[b + 1]], last)
                outputs.append(piece)
            lasts.append(tensors(last))
        return torch.cat(outputs), [torch.stack(s, 1) for s in zip(*lasts, strict=True)]

    assert_same_with_gradients(layer, torch.randn(sum(lengths), 3).double(), hx, whole, parts)


def test_one_sequence_with_resets():
    for batch_first in (False, True):
        layer = ours.GRU(3, 4, batch_first=batch_first)
        x, reset = torch.randn(5, 3), torch.tensor([0, 0, 1, 0, 0])
        assert_same(layer(x, reset=reset)[0][2:], layer(x[2:])[0], 1e-6)


def test_errors():
    layer, x = ours.LSTM(3, 4), torch.randn(5, 2, 3)
    with pytest.raises(RuntimeError, match=r"reset has shape \(2, 5\); accepted is \(5, 2\)"):
        layer(x, reset=torch.zeros(2, 5))
    with pytest.raises(TypeError, match="reset is list; accepted is"):
        layer(x, reset=[0])
    with pytest.raises(ValueError, match="without reset"):
        layer(x[:, 0], reset=torch.zeros(5), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="reset goes with a tensor"):
        layer(torch.nn.utils.rnn.pack_sequence([x[:, 0]]), reset=torch.zeros(5, 1))
    for bounds in ([0, 4], [1, 5], [0, 4, 3, 5]):
        with pytest.raises(RuntimeError, match="for 5 rows; accepted are numbers"):
            layer(x[:, 0], cu_seqlens=torch.tensor(bounds))
    for bounds, error, words in (
        ([0, 5], TypeError, "cu_seqlens is list; accepted is a torch.Tensor"),
        (torch.tensor([0, 2.5, 5]), TypeError, "cu_seqlens is of torch.float32"),
        (torch.tensor([False, True]), TypeError, "cu_seqlens is of torch.bool"),
        (torch.tensor([[0, 5]]), RuntimeError, r"shape \(1, 2\); accepted is \[B \+ 1\]"),
        (torch.tensor([], dtype=torch.int64), RuntimeError, r"shape \(0,\)"),
        (torch.tensor([0]), RuntimeError, r"shape \(1,\); accepted is \[B \+ 1\], B of 1 or more"),
    ):
        with pytest.raises(error, match=words):
            layer(x[:, 0], cu_seqlens=bounds)
    with pytest.raises(RuntimeError, match="got no rows"):
        layer(x[:0, 0], cu_seqlens=torch.tensor([0, 0]))
