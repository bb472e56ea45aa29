"""A layer in one call, as fused backends have it: the same as torch.nn's, and as in turns.

Here by `vanilla`, in float64, which layers on the CPU call for one direction at a time.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashrnn.nn as ours
from flashrnn.nn import at_once
from tests.nn.against import (
    assert_like_torch,
    assert_same,
    every_kind,
    hidden,
    options,
    pair,
    results_and_gradients,
    states,
)

few = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def calls(monkeypatch):
    """How many calls of a layer there were, where all can be in one."""
    made = []
    compute = at_once.recurrent_layer

    def counted(*args, **options):
        made.append(options)
        return compute(*args, **options)

    monkeypatch.setattr(at_once, "recurrent_layer", counted)
    monkeypatch.setattr(at_once, "can_be", lambda *_: True)
    return made


@every_kind
@few
@given(data=st.data())
def test_batches_and_packed_sequences(kind, calls, data):
    chosen = {**data.draw(options(kind)), "bidirectional": True}
    size, H = data.draw(st.integers(1, 3)), data.draw(st.integers(3, 4))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    mine, theirs = pair(kind, size, H, backend="vanilla", **chosen)
    T, B = int(lengths.max()), len(lengths)
    shape = (B, T, size) if chosen["batch_first"] else (T, B, size)
    x = torch.randn(shape, dtype=torch.float64)
    hx = states(mine, B) if data.draw(st.booleans()) else None
    calls.clear()
    assert_like_torch(mine, theirs, x, hx, lengths if data.draw(st.booleans()) else None)
    assert len(calls) == chosen["num_layers"]


@st.composite
def layers(draw):
    """One of any cell, with as many heads and directions, or an LSTM with a projection."""
    torch.manual_seed(draw(st.integers(0, 99)))
    given_ = {
        "num_layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "dtype": torch.float64,
        "backend": "vanilla",
    }
    if draw(st.booleans()):
        return ours.LSTM(3, 4, proj_size=2, **given_)
    function = draw(st.sampled_from(("lstm", "gru", "elman", "slstm")))
    return ours.Recurrent(function, 3, 4, heads=draw(st.integers(1, 2)), **given_)


def of_layer(layer, B):
    return states(layer, B) if layer.proj_size else hidden(layer, B)


@few
@given(data=st.data())
def test_resets_and_rows_as_in_turns(calls, data):
    layer, T, B = data.draw(layers()), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    hx = of_layer(layer, B) if data.draw(st.booleans()) else None
    if data.draw(st.booleans()):
        x = torch.randn(T, B, 3, dtype=torch.float64)
        given_ = {"reset": torch.rand(T, B) < data.draw(st.sampled_from((0.0, 0.3, 1.0)))}
    else:
        lengths = data.draw(st.lists(st.integers(0, 4), min_size=B, max_size=B).filter(any))
        x = torch.randn(sum(lengths), 3, dtype=torch.float64)
        given_ = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}

    def compute(x, hx):
        return layer(x, hx, **given_)

    calls.clear()
    found = results_and_gradients(layer, x, hx, compute)
    assert len(calls) == layer.num_layers
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(at_once, "can_be", lambda *_: False)
        assert_same(found, results_and_gradients(layer, x, hx, compute))


@every_kind
def test_no_two_gradients_share_memory(kind, calls):
    mine, _ = pair(kind, 3, 4, bidirectional=True, backend="vanilla")
    mine(torch.randn(3, 2, 3, dtype=torch.float64))[0].sum().backward()
    assert len(calls) == 1
    memory = {weight.grad.untyped_storage().data_ptr() for weight in mine.parameters()}
    assert len(memory) == len(list(mine.parameters()))


def test_compiled_in_one_graph_with_options():
    """Nothing of their values is asked for, on the CPU either."""
    layer = ours.Recurrent("gru", 3, 4, bidirectional=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(3, 2, 3)
    with torch.no_grad():
        for starts in (torch.tensor([[0, 0], [0, 1], [1, 0]]), torch.ones(3, 2).long()):
            assert_same(compiled(x, reset=starts), layer(x, reset=starts), 1e-6)
        for bounds in (torch.tensor([0, 3, 3, 6]), torch.tensor([0, 1, 4, 6])):
            rows = x.flatten(0, 1)
            assert_same(compiled(rows, cu_seqlens=bounds), layer(rows, cu_seqlens=bounds), 1e-6)


def test_what_computes_one_direction_decides():
    """`vanilla` has each in turn; where there is a backend that is fused, it is asked."""
    layer = ours.LSTM(3, 16, bidirectional=True, backend="vanilla")
    x, weights = torch.randn(2, 4, 3), list(layer.parameters())
    asked = (x, weights, layer.cell, "vanilla", 1, 16, True, at_once.Batch())
    assert not at_once.can_be(*asked)
