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
from flashrnn.cells.graph import GraphBuilder, evaluate
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


@cell(states=("h", "a"), gates={"p": ("Wx", "R", "b"), "q": ("Wx", "R"), "u": ("Wx", "b")})
def more(states, gates):
    """Other rows of the table, and what has a formula of ours."""
    _, a = states
    p, q, u = gates
    b = torch.tanh(a)
    mixed = torch.sinh(0.3 * p) - torch.cosh(0.3 * q) + torch.asinh(u) + torch.atan(p * q)
    mixed = mixed + torch.atanh(0.5 * b) * torch.asin(0.5 * b) + torch.acos(0.5 * b)
    mixed = mixed + torch.acosh(2.5 + b) + torch.tan(0.5 * b) + torch.hypot(p, q + 1)
    mixed = mixed + torch.exp2(b) + torch.log2(2 + b) - torch.log10(2 + b) + torch.erfc(q)
    mixed = mixed + (1.5 + b) ** 0.3 + 1.7**b + (1.5 + b) ** torch.tanh(q)
    mixed = mixed + torch.atan2(p, q + 1e-4)  # Of PyTorch 2.9 the derivative at 0, 0 is NaN.
    switched = torch.where((p > q) ^ (u > 0), torch.fmax(p, q), torch.copysign(u, p))
    stepped = torch.round(p) + torch.floor(q) - torch.ceil(u) + torch.trunc(p) * b
    rest = torch.frac(p) + torch.fmod(q, 1.3) + torch.remainder(u, 1.3) + (p > 0).float() * u
    soft = F.softshrink(p) + F.hardshrink(q) + torch.logaddexp2(p, u) + torch.xlogy(2 + b, 2 - b)
    return torch.tanh(0.1 * mixed + stepped + torch.nan_to_num(a)), switched + rest * 0.1 + soft


CELLS = [elman, lstm, gru, slstm, everything, more]
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
        equal_nan=True,  # As that of hypot at 0, 0.
    )


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_graphs_have_no_dead_or_repeated_node(cell):
    for graph in (cell.graphs.forward, cell.graphs.derivative):
        used = {a for x in graph.body for a in x.arguments} | set(graph.outputs)
        assert all(x.name in used for x in graph.body)
        computed = [(x.operation, x.arguments) for x in graph.body]
        assert len(set(computed)) == len(computed)


def test_what_a_constant_decides_is_no_operation():
    """Versions of PyTorch differ in whether a derivative has such ones, as that of ldexp."""
    builder = GraphBuilder()
    never = builder.emit("logical_and", False, builder.emit("ge", "x", 0.0))
    assert never is False and builder.emit("logical_and", "x", False) is False
    assert builder.emit("where", never, 0.0, "y") == "y"
    assert builder.emit("where", True, 0.5, "y") == 0.5
    assert not builder.graph(["x", "y"], [never]).body


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


def test_logical_operations_are_of_truths():
    """What PyTorch takes for a truth value is one in the graph too: C++ has no `&` of numbers."""
    mine = cell(states=("h",), gates=("x", "y"))(
        lambda s, g: (2 * torch.logical_and(*g).to(g[0].dtype) + torch.logical_or(g[0] > 1, g[1]),)
    )
    graph = mine.graphs.forward
    for operation in (x for x in graph.body if x.operation in ("logical_and", "logical_or")):
        made_by = {x.name: OPERATIONS[x.operation] for x in graph.body}
        assert all(made_by[argument].returns_bool for argument in operation.arguments)
    numbers = (0.0, 0.5, 2.0, math.nan)
    given = [evaluate(graph, (0.0, x, y))[0] for x in numbers for y in numbers]
    columns = torch.cartesian_prod(*[torch.tensor(numbers)] * 2).unbind(1)
    assert given == mine.step((), columns)[0].tolist()


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


EXTREMES = [0.0, -0.0, 1.0, -1.0, 0.3, -2.5, 3.0, 88.0, -88.0, 100.0, -100.0, 1e4, -1e4]
EXTREMES += [1e-9, 0.999999, -0.5, 1e30, -1e30, math.inf, -math.inf, math.nan]

BINARY = ["add", "sub", "mul", "div", "pow", "fmod", "copysign", "maximum", "minimum"]
BINARY += ["atan2", "hypot", "remainder", "fmax", "fmin"]
BINARY += ["eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or"]
ARITIES = {"where": 3} | dict.fromkeys(BINARY, 2)


def extreme_arguments(name, dtype):
    """All combinations of extremes that an operation of the table takes, a tensor for each."""
    values = torch.tensor(EXTREMES, dtype=dtype)
    arity = ARITIES.get(name, 1)
    columns = list(torch.cartesian_prod(*[values] * arity).view(-1, arity).unbind(1))
    if name == "where":
        columns[0] = columns[0] > 0
    return columns


def table_of(name, operations):
    """A cell with a state for each of the operations."""

    def step(states, gates):
        x, y, z = gates
        found = []
        for name in operations:
            given = (x > 0, y > 0) if name.startswith("logical") else (x, y)
            given = (z > 0, x, y) if name == "where" else given[: ARITIES.get(name, 1)]
            found.append(getattr(torch, name)(*given).to(x.dtype))
        return tuple(found)

    return cell(states=operations, gates=("x", "y", "z"), name=name)(step)


# Those that have a formula; `test_what_users_write_agrees_with_torch` has all.
COMPOSED = ("ceil", "trunc", "round", "log10", "tan", "sinh", "cosh", "asinh", "acosh", "atanh")
COMPOSED += ("asin", "acos", "angle", "atan2", "hypot", "remainder", "fmax", "fmin")


@cell(states=("log1p",), gates=("x", "y", "z"))
def within(states, gates):
    """The rows with spellings for arguments that are known to lie somewhere, of such arguments."""
    x, _, _ = gates
    return (torch.log1p(x.abs().clamp(max=1.0)),)


TABLES = [table_of("rows", tuple(OPERATIONS)), table_of("composed", COMPOSED), within]


def table_inputs():
    """Gates of `table`, in float32: every pair of extremes, and numbers of many sizes."""
    x, y = torch.cartesian_prod(*[torch.tensor(EXTREMES, dtype=torch.float32)] * 2).unbind(1)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 5000)
    more = torch.randn(shape, generator=generator) * 10 ** torch.empty(shape).uniform_(
        -4, 2, generator=generator
    )
    x, y = torch.cat([x, more[0]]), torch.cat([y, more[1]])
    return [x, y, x.roll(7)]


def check_table(table, gates, given):
    """Operations in float32: as PyTorch's in float64, but for what float32 cannot hold.

    Args:
        table: out of ``TABLES``.
        gates: float32 numbers.
        given: what became of them.
    """
    inputs = [x.double() for x in gates]
    for name, mine, truth in zip(table.states, given, table.step((), inputs), strict=True):
        mine, truth = mine.double(), truth.float().double()
        # e^x is 2 to the power of a product that was rounded. Below 1e-37 is as good as 0.
        of_exp = name in ("exp", "expm1", "sigmoid", "sinh", "cosh")
        size = truth.abs().log().abs().clamp_min(1) if of_exp else 1.0
        few = 8e-7 if name in COMPOSED else 4e-7
        allowed = few * size * truth.abs() + 2e-38
        wrong = ~((mine - truth).abs() <= allowed) & (mine != truth)
        wrong &= ~(mine.isnan() & truth.isnan())
        at = [x[wrong][0].item() for x in inputs] if wrong.any() else None
        assert at is None, (name, at, mine[wrong][0].item(), truth[wrong][0].item())


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_agrees_with_torch(name):
    """Every row of the table, at extremes too: the meaning that renderings will be held to."""
    operation = OPERATIONS[name]
    columns = extreme_arguments(name, torch.float64)
    expected = getattr(torch, name)(*columns)
    given = [operation.python(*row) for row in zip(*(x.tolist() for x in columns), strict=True)]
    if operation.returns_bool:
        assert given == expected.tolist()
    else:
        given = torch.tensor(given, dtype=torch.float64)
        torch.testing.assert_close(given, expected, rtol=1e-14, atol=0, equal_nan=True)
        if name not in ("maximum", "minimum"):  # Of 0 and -0.
            assert torch.equal(given.signbit() & (given == 0), expected.signbit() & (given == 0))


WRITTEN = {
    "x": """
        x.exp2() | x.log2() | x.log10() | torch.log1p(x) | torch.expm1(x) | x.tan() | x.asin()
        x.acos() | x.atan() | x.sinh() | x.cosh() | x.asinh() | x.acosh() | x.atanh() | x.floor()
        x.ceil() | x.round() | x.round(decimals=2) | x.round(decimals=-1) | x.trunc() | x.frac()
        torch.fix(x) | x % 2 | x % -1.5 | torch.fmod(x, 2.0) | x - x.detach() // 2 | torch.sinc(x)
        torch.div(x, 3.0, rounding_mode="trunc") | torch.div(x, 3.0, rounding_mode="floor")
        x**0 | x**0.5 | abs(x) ** -0.5 | x**2 | x**-1 | x**8 | x**-8 | x**0.3 | x**-2.7
        x**10 | x**-9 | x.expand(x.shape) | x.view(x.shape) | x.reshape(x.shape)
        2**x | 2.5**x | (-2.0) ** x | 0.0**x | torch.pow(x, torch.tensor(3.0)) | x.square()
        x.rsqrt() | x.reciprocal() | 2 / x | x.sign() | x.sgn() | torch.copysign(x, -1.0) | x.abs()
        torch.where(torch.signbit(x), x, 2 * x) | torch.where(torch.isnan(x), 1.0, x) | x.erfc()
        torch.where(torch.isinf(x), 1.0, x) | torch.where(torch.isfinite(x), x, 1.0)
        torch.where(torch.isneginf(x), 1.0, x) | torch.nan_to_num(x, 1.0, 2.0, -3.0) | torch.erf(x)
        torch.where(x > 0, x.sqrt(), 0.0) | torch.where(x > 0, 1, 0) * x | x.masked_fill(x > 1, 0.5)
        x.clamp(-1, 1) | x.clamp(min=0.3) | x.clip(max=0.3) | x.clamp_min(0.3) | x.clamp_max(0.3)
        F.relu(x) | F.relu6(x) | F.elu(x, 0.5) | F.celu(x, 0.5) | F.selu(x) | F.gelu(x) | F.silu(x)
        F.gelu(x, approximate="tanh") | F.mish(x) | F.softplus(x) | F.softplus(x, 2.0, 5.0)
        F.softsign(x) | F.tanhshrink(x) | F.softshrink(x, 0.3) | F.hardshrink(x, 0.3)
        F.threshold(x, 0.3, 20) | F.leaky_relu(x, 0.1) | F.logsigmoid(x) | F.hardtanh(x, -1, 0.3)
        F.hardswish(x) | torch.logit(x) | torch.special.ndtr(x) | torch.special.entr(x)
        torch.deg2rad(x) | torch.rad2deg(x) | torch.angle(x) | torch.xlogy(2.0, x) | +x | -x | 3 - x
        (x > 0).float() * x | (x > 0).double().to(x.dtype) * x | ~(x > 0) * x
        x + (x.round() - x).detach() | torch.where(x > 0, 3, 1).to(x.dtype) * x
        torch.full_like(x, 2.7, dtype=torch.int64) * x | torch.full_like(x, 3, dtype=torch.bool) * x
        torch.full((), 0.1, dtype=torch.float16) * x | torch.full((), -2.7, dtype=torch.int32) * x
        torch.ones_like(x) * x | torch.full_like(x, 3) ** x | torch.sign(x) * x.abs() ** (1 / 3)
    """,
    "x y": """
        x**y | torch.atan2(x, y) | torch.hypot(x, y) | torch.fmod(x, y) | torch.remainder(x, y)
        torch.div(x, y, rounding_mode="floor") | torch.div(x, y, rounding_mode="trunc") | x / y
        torch.copysign(x, y) | torch.maximum(x, y) | torch.minimum(x, y) | torch.fmax(x, y)
        torch.fmin(x, y) | x.clamp(min=y) | x.clamp_max(y) | torch.where(x > y, x, y)
        torch.heaviside(x.detach(), y.detach()) * x | torch.logaddexp(x, y) | torch.logaddexp2(x, y)
        torch.xlogy(x, y) | torch.special.xlog1py(x, y) | torch.ldexp(x, y) | torch.lerp(x, y, 0.3)
        torch.where((x > 0) ^ (y > 0), x, y) | torch.where(torch.logical_xor(x, y), x, y)
        ((x > 0) + (y > 0)) * x | ((x > 0) * (y > 0)) * x | torch.where((x > 0) & ~(y > 0), x, y)
        x.expand_as(y) | x.view_as(y) | (x >= y).to(x) * x | torch.rsub(x, y, alpha=2)
        F.huber_loss(x, y, reduction="none")
    """,
    "x y z": """
        x.clamp(y, z) | torch.lerp(x, y, z) | torch.addcmul(x, y, z, value=0.5)
        torch.addcdiv(x, y, z, value=0.5) | torch.where(x > y, y, z)
    """,
}
EXPRESSIONS = [
    (names, text.strip())
    for names, texts in WRITTEN.items()
    for line in texts.strip().splitlines()
    for text in line.split(" | ")
]


@pytest.mark.parametrize(("names", "text"), EXPRESSIONS, ids=[text for _, text in EXPRESSIONS])
def test_what_users_write_agrees_with_torch(names, text):
    """At extremes too, with autograd's derivative."""
    names = names.split()
    written = eval(f"lambda {', '.join(names)}: {text}")
    mine = cell(states=("h",), gates=("g", "k"), name="written")(
        lambda s, g: (written(*[*s, *g][: len(names)]),)
    )
    values = torch.tensor(EXTREMES[:: (1, 1, 2, 4)[len(names)]], dtype=torch.float64)
    columns = torch.cartesian_prod(*[values] * len(names)).view(-1, len(names)).unbind(1)
    leaves = [x.clone().requires_grad_() for x in columns]
    expected, weights = written(*leaves), torch.full_like(leaves[0], 1.3)
    zeros = [torch.zeros_like(weights)] * (3 - len(names))
    inputs = [*leaves, *zeros]
    close = partial(torch.testing.assert_close, rtol=2e-12, atol=1e-15, equal_nan=True)
    (given,) = evaluated(mine.graphs.forward, inputs)
    close(given, expected.detach())
    gradients = [*map(torch.zeros_like, leaves), *zeros]
    if expected.requires_grad:
        gradients[: len(names)] = torch.autograd.grad(
            expected, leaves, weights, allow_unused=True, materialize_grads=True
        )
    close(evaluated(mine.graphs.derivative, [*inputs, weights]), torch.stack(gradients))
