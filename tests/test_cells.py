"""What a cell may be, how it is named, and what is refused with which words."""

import copy

import pytest
import torch

import flashrnn
from flashrnn import CellError, cell, register
from flashrnn.cells import elman, gru, resolve
from flashrnn.cells.spec import _registered, cell_of
from tests.problems import BUILT_IN, call, random_inputs


@pytest.fixture
def clean_registry():
    before = dict(_registered)
    yield
    _registered.clear()
    _registered.update(before)


def step_of(step, states=("h",), gates=("g",)):
    return cell(states=states, gates=gates, name="mine")(step)


def test_built_in_functions_are_listed():
    assert flashrnn.available_functions()[:4] == BUILT_IN


def test_gates_are_declared_with_what_feeds_them():
    assert gru.gate_names("Wx") == ("r", "z", "n")
    assert gru.gate_names("R") == ("g", "r", "z")
    assert gru.gate_names("b") == ("g", "r", "z", "n")


def test_own_cell_works_by_object_and_by_name(clean_registry):
    mine = step_of(lambda states, gates: (torch.tanh(gates[0]),))
    inputs = random_inputs("elman", 2, 3, 1, 4)
    expected = call("elman", inputs)
    assert torch.equal(call(mine, inputs)[0], expected[0])
    register(mine)
    assert "mine" in flashrnn.available_functions()
    assert torch.equal(call("mine", inputs)[0], expected[0])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_is_a_cell_of_its_own(copied):
    other = copied(gru)
    assert cell_of(other.handle) is other is not gru is cell_of(gru.handle)
    assert other.fingerprint == gru.fingerprint


def test_registering_again_replaces_but_never_a_built_in(clean_registry):
    first = register(step_of(lambda s, g: (g[0],)))
    second = register(step_of(lambda s, g: (g[0] * 2,)))
    assert resolve("mine") is second is not first
    with pytest.raises(ValueError, match="built-in"):
        register(first, "lstm")
    with pytest.raises(TypeError, match="function"):
        register(lambda s, g: s)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown function 'lsmt'.*'lstm'.*elman, lstm, gru"):
        resolve("lsmt")
    with pytest.raises(TypeError, match="int"):
        resolve(3)


@pytest.mark.parametrize(
    ("states", "gates", "words"),
    [
        ((), ("g",), "one state or more"),
        (("h", "h"), ("g",), "name of its own"),
        (("h",), (), "one gate or more"),
        (("h",), ("g", "g"), "name of its own"),
        (("h",), {"g": ("Wx", "W")}, "accepted is any non-empty selection"),
        (("h",), {"g": ()}, "accepted is any non-empty selection"),
        (("h",), {"g": ("R", "b")}, "fed by 'Wx'"),
        (("h",), {"g": ("Wx", "b")}, "fed by 'R'"),
        ("h", ("g",), "sequence"),
    ],
)
def test_declarations_that_cannot_be(states, gates, words):
    with pytest.raises(ValueError, match=words):
        cell(states=states, gates=gates)(lambda s, g: s)


def if_on_data(states, gates):
    (h,) = states
    if h.sum() > 0:
        return (h,)
    return (-h,)


CAPTURED = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (if_on_data, r"looks at a tensor's values in Python .*line \d+.*torch.where"),
        (lambda s, g: (s[0] * g[0].max().item(),), "tensor's values"),
        (lambda s, g: (s[0] * g[0].tolist()[0][0],), "tolist"),
        (lambda s, g: (torch.softmax(g[0], -1),), "_softmax.*not pointwise"),
        (lambda s, g: (g[0] - g[0].mean(),), "mean.*not pointwise"),
        (lambda s, g: (g[0].roll(1, -1),), "not pointwise"),
        (lambda s, g: (torch.dropout(g[0], 0.5, True),), "random"),
        (lambda s, g: (torch.special.bessel_j0(g[0]),), "bessel_j0.*table.*sigmoid"),
        (lambda s, g: (g[0] + torch.rand(()),), "random"),
        (lambda s, g: (g[0].clone().mul_(2),), "in place"),
        (lambda s, g: (s[0].add_(g[0]),), "in place"),
        (lambda s, g: (g[0] + torch.ones(3, dtype=torch.float64),), r"shape \(3,\).*full_like"),
        (lambda s, g: (g[0] + CAPTURED,), r"captures a tensor of shape \(3,\)"),
        (lambda s, g: (g[0] ** 1.5,), "power 1.5"),
        (lambda s, g: (g[0].float().double(),), "converts torch.float64 to torch.float32"),
        (lambda s, g: (g[0].sum(-1),), "shape"),
        (lambda s, g: (g[0].float(),), "dtype torch.float32"),
        (lambda s, g: g[0], "returned Tensor; accepted is a tuple of 1 new states"),
        (lambda s, g: (g[0], g[0]), "returned 2 tensors; expected 1"),
        (lambda s, g: (0.0,), "returned float"),
        (lambda s, g: (g[0] @ g[0],), "failed while it was traced"),
    ],
)
def test_step_functions_that_cannot_be_a_cell(step, words):
    """The error comes from flashrnn() itself, on any backend, before any work."""
    inputs = random_inputs(elman, 1, 1, 1, 2)
    with pytest.raises(CellError, match=words):
        call(step_of(step), inputs)


def test_unsupported_operation_is_named_with_those_supported():
    with pytest.raises(CellError) as error:
        _ = step_of(lambda s, g: (torch.lgamma(g[0]),)).graphs
    assert "aten.lgamma" in str(error.value)
    assert "tanh" in str(error.value) and "where" in str(error.value)
