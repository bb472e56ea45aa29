"""The graphs that a traced cell leaves compute the cell and its derivative."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from flashrnn import cell
from flashrnn.cells import elman, gru, lstm, slstm
from flashrnn.cells.graph import evaluate
from flashrnn.cells.operations import OPERATIONS


@cell(states=("h", "a"), gates={"p": ("Wx", "R", "b"), "q": ("Wx", "R"), "u": ("Wx", "b")})
def everything(states, gates):
    """Composite, clamped, compared and constant: what a user may well write."""
    h, a = states
    p, q, u = gates
    mixed = F.gelu(p) + F.silu(q) + F.softplus(u) + F.elu(p * q) + F.leaky_relu(u, 0.1)
    mixed = mixed + F.hardtanh(p) + F.relu(q) + F.mish(u) + F.relu6(p) + F.celu(q)
    switched = torch.where((p > q) & ~(u >= 0) | (h == a), mixed, mixed.clamp(-1, 2))
    a = torch.lerp(a, switched, torch.sigmoid(p)) + (p > 0).to(a.dtype) * 0.5
    h = torch.add(torch.sin(p), torch.cos(q), alpha=0.3) + a**3 + torch.rsqrt(1 + u**2)
    h = h + torch.reciprocal(2 + q.abs()) + torch.exp(-u.square()) + torch.expm1(-p.abs())
    h = h + torch.log1p(a.abs()) * torch.sign(a) + (1 - torch.erf(q)) + torch.addcmul(h, p, q)
    return torch.tanh(h) + 0 * torch.full_like(h, 7.0) + torch.tensor(0.25), a


CELLS = [elman, lstm, gru, slstm, everything]
numbers = st.floats(-4, 4).filter(lambda x: x == 0 or abs(x) > 1e-3)


def sample(data, cell):
    """States, gates and gradients of the new states, of five units; n ≥ 1 or all states 0."""

    def tensors(count):
        return [
            torch.tensor(data.draw(st.lists(numbers, min_size=5, max_size=5)), dtype=torch.float64)
            for _ in range(count)
        ]

    states, gates = tensors(len(cell.states)), tensors(len(cell.gates))
    if "n" in cell.states:
        n = states[cell.states.index("n")]
        n.abs_().add_(1)
        n[0] = 0.0
        states[cell.states.index("c")][0] = 0.0
    return states, gates, tensors(len(cell.states))


def evaluated(graph, inputs):
    """The graph's outputs as a tensor ``[outputs, units]``."""
    units = zip(*(x.tolist() for x in inputs), strict=True)
    return torch.tensor([evaluate(graph, unit) for unit in units], dtype=torch.float64).T


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_graphs_equal_the_cell_and_autograd(cell, data):
    states, gates, cotangents = sample(data, cell)
    leaves = [x.requires_grad_() for x in (*states, *gates)]
    new = cell.step(tuple(states), tuple(gates))
    torch.testing.assert_close(
        evaluated(cell.graphs.forward, leaves), torch.stack(new), rtol=1e-12, atol=1e-12
    )
    differentiable = [(y, d) for y, d in zip(new, cotangents, strict=True) if y.requires_grad]
    expected = torch.autograd.grad(
        [y for y, _ in differentiable],
        leaves,
        [d for _, d in differentiable],
        allow_unused=True,
        materialize_grads=True,
    )
    torch.testing.assert_close(
        evaluated(cell.graphs.derivative, [*leaves, *cotangents]),
        torch.stack(expected),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_graphs_have_no_dead_or_repeated_node(cell):
    for graph in (cell.graphs.forward, cell.graphs.derivative):
        used = {a for x in graph.body for a in x.arguments} | set(graph.outputs)
        assert all(x.name in used for x in graph.body)
        computed = [(x.operation, x.arguments) for x in graph.body]
        assert len(set(computed)) == len(computed)


def test_gradient_free_state_has_no_influence():
    """sLSTM's m' passes no gradient on, so its incoming gradient is never read."""
    used = {a for x in slstm.graphs.derivative.body for a in x.arguments}
    assert "d_state_m" not in used
    assert {"d_state_h", "d_state_c", "d_state_n"} <= used


def test_constants_are_no_inputs():
    """A shape, a dtype and a device may be handed on, for these make no constant another one."""

    @cell(states=("h", "a"), gates=("g",))
    def constants(states, gates):
        h, _ = states
        factor = torch.tensor(0.25)
        h = h * factor * torch.tensor(2.0, dtype=h.dtype, device=h.device) + factor.item()
        sevens = torch.full(h.shape, 7.0, dtype=h.dtype, device=h.device, layout=h.layout)
        return h, sevens + torch.zeros(h.size(), dtype=h.dtype).to(h.device)

    assert evaluate(constants.graphs.forward, (1.0, 2.0, 3.0)) == (0.75, 7.0)
    assert evaluate(constants.graphs.derivative, (1.0, 2.0, 3.0, 4.0, 5.0)) == (2.0, 0.0, 0.0)


@pytest.mark.parametrize("exponent", [k / 2 for k in range(-16, 17)])
def test_powers(exponent):
    """Every power that the message promises, with its derivative."""
    power = cell(states=("h",), gates=("g",))(lambda s, g: (g[0] ** exponent,))
    x = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    x.pow(exponent).backward()
    (value,) = evaluate(power.graphs.forward, (0.0, 1.7))
    assert math.isclose(value, 1.7**exponent, rel_tol=1e-14)
    assert math.isclose(
        evaluate(power.graphs.derivative, (0.0, 1.7, 1.0))[1], x.grad, rel_tol=1e-14
    )


def test_cell_without_a_gradient():
    @cell(states=("h",), gates=("g",))
    def steps(states, gates):
        return (torch.sign(states[0]).detach(),)

    assert steps.graphs.derivative.outputs == (0.0, 0.0)


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu"), FakeTensorMode],
    ids=str,
)
def test_graphs_do_not_depend_on_when_they_are_traced(mode):
    again, expected = cell(states=("h", "c"), gates=("i", "f", "z", "o"))(lstm.step), lstm.graphs
    with mode():
        assert again.graphs == expected


def test_graphs_are_traced_under_a_transform():
    again, expected = cell(states=("h", "c"), gates=("i", "f", "z", "o"))(lstm.step), lstm.graphs

    def loss(x):
        assert again.graphs == expected
        return x.sum()

    assert torch.func.grad(loss)(torch.ones(2)).tolist() == [1, 1]


def test_graph_is_readable():
    assert str(elman.graphs.forward).split("\n") == [
        "(state_h, gate_g) ->",
        "    v0 = tanh(gate_g)",
        "    (v0)",
    ]


EXTREMES = [0.0, -0.0, 1.0, -1.0, 0.3, -2.5, 88.0, -88.0, 100.0, -100.0, 1e4, -1e4]
EXTREMES += [math.inf, -math.inf, math.nan]

BINARY = ["add", "sub", "mul", "div", "maximum", "minimum"]
BINARY += ["eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or"]
ARITIES = {"where": 3} | dict.fromkeys(BINARY, 2)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_agrees_with_torch(name):
    """Every row of the table, at extremes too: the meaning that renderings will be held to."""
    operation = OPERATIONS[name]
    values = torch.tensor(EXTREMES, dtype=torch.float64)
    if name in ("sin", "cos"):
        values = values[values.isfinite()]
    arity = ARITIES.get(name, 1)
    arguments = torch.cartesian_prod(*[values] * arity).view(-1, arity)
    columns = list(arguments.unbind(1))
    if name == "where":
        columns[0] = columns[0] > 0
    expected = getattr(torch, name)(*columns)
    given = [operation.python(*row) for row in zip(*(x.tolist() for x in columns), strict=True)]
    if operation.returns_bool:
        assert given == expected.tolist()
    else:
        torch.testing.assert_close(
            torch.tensor(given, dtype=torch.float64), expected, rtol=1e-14, atol=0, equal_nan=True
        )
