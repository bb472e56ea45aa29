"""replace() and restore(): the layers of a model become ours, and torch.nn's again."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import flashrnn.nn as ours
from tests.nn.against import assert_same, run


class Model(nn.Module):
    """Layers in all places: an attribute, a list, twice the same, a subclass."""

    class Odd(nn.LSTM):
        def forward(self, x, hx=None):
            return super().forward(2 * x, hx)

    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, proj_size=2)
        self.blocks = nn.ModuleList([nn.GRU(4, 4, batch_first=True), nn.RNN(4, 4, 1, "relu")])
        self.tied = self.blocks[0]
        self.odd = self.Odd(4, 3)

    def forward(self, x):
        x, _ = self.encoder(x)
        for block in (*self.blocks, self.tied, self.odd):
            x, last = block(x)
        return x, last


NAMES = ["encoder", "blocks.0", "blocks.1"]
KINDS = ["LSTM", "GRU", "RNN"]


@pytest.mark.parametrize("keep_types", [True, False])
@pytest.mark.parametrize("backend", ["auto", "vanilla"])
def test_a_model_computes_the_same_with_the_same_parameters(keep_types, backend):
    model = Model().double()
    original = copy.deepcopy(model)
    parameters = list(model.parameters())
    seen = []
    model.encoder.register_forward_hook(lambda *_: seen.append("hook"))
    x = torch.randn(2, 5, 3).double()

    report = ours.replace(model, keep_types=keep_types, backend=backend)

    assert list(report.swapped) == NAMES and list(report.left) == ["odd"]
    assert "blocks.0: " in str(report) and "odd: left, its class" in str(report)
    for name, kind in zip(NAMES, KINDS, strict=True):
        layer = model.get_submodule(name)
        assert type(layer) is (getattr(ours, kind) if keep_types else ours.Recurrent)
        assert isinstance(layer, getattr(nn, kind)) is keep_types
        assert layer.backend == backend
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert_same(run(model, x), run(original, x))
    assert seen == ["hook"]
    assert_same(copy.deepcopy(model)(x), original(x))

    assert list(ours.restore(model).swapped) == NAMES
    for name, kind in zip(NAMES, KINDS, strict=True):
        layer = model.get_submodule(name)
        assert type(layer) is getattr(nn, kind)
        assert layer.__dict__.keys() == original.get_submodule(name).__dict__.keys()
    assert_same(model(x), original(x))


def test_again_and_again():
    model = Model()
    first = ours.replace(model)
    assert not ours.replace(model).swapped and first.swapped
    assert not ours.restore(nn.Linear(2, 2)).swapped
    assert str(ours.replace(nn.Linear(2, 2))) == "no recurrent layer of torch.nn"


def test_the_model_may_be_a_layer():
    layer = nn.LSTM(3, 4)
    assert str(ours.replace(layer)) == "(the model): LSTM(3, 4)"
    assert type(layer) is ours.LSTM


def test_what_is_left_and_why():
    model = nn.ModuleDict(
        {
            "heads": ours.LSTM(3, 4, heads=2),
            "own": ours.Recurrent("slstm", 3, 4),
            "normed": parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
        }
    )
    assert list(ours.replace(model).left) == ["normed"]
    left = ours.restore(model).left
    assert left["heads"] == "torch.nn has no heads, and it has 2"
    assert left["own"] == "torch.nn has no cell 'slstm'"


def test_layers_made_as_ours_are_restored_too():
    layer = ours.Recurrent(ours.elman_relu, 3, 4, 2)
    x = torch.randn(5, 2, 3)
    expected = layer(x)
    ours.restore(layer)
    assert type(layer) is nn.RNN and layer.nonlinearity == "relu"
    assert_same(layer(x), expected, 1e-6)


def test_errors():
    with pytest.raises(TypeError, match=r"model is dict; accepted is a torch\.nn\.Module"):
        ours.replace({})
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        ours.replace(nn.LSTM(3, 4), backend="fast")


def test_what_is_ours_already_is_left_and_said():
    layer = nn.LSTM(3, 4)
    ours.replace(layer)
    assert not ours.replace(layer).left
    for asked in ({"keep_types": False}, {"backend": "vanilla"}):
        report = ours.replace(layer, **asked)
        assert not report.swapped and layer.backend == "auto" and isinstance(layer, nn.LSTM)
        assert "LSTM of this package, backend 'auto'; set its backend" in report.left[""]
    with pytest.raises(TypeError, match="keep_types is str; accepted are True and False"):
        ours.replace(nn.LSTM(3, 4), keep_types="no")
    with pytest.raises(TypeError, match="backend is NoneType; accepted is a name"):
        ours.replace(nn.LSTM(3, 4), backend=None)
