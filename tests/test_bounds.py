"""The bounds of a graph's values hold, in float64 and in float32."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrnn.cells import elman, gru, lstm, slstm
from flashrnn.cells.bounds import ANYTHING, bound_of_h, intervals
from flashrnn.cells.graph import GraphBuilder
from flashrnn.cells.operations import OPERATIONS
from flashrnn.cells.traced import FORWARD_CLIPVAL, TracedCell, clipped
from flashrnn.kernels.source import exponent_of_h
from tests.patterns import linear, summing
from tests.patterns import root as root_cell
from tests.problems import sparse, wide
from tests.stress.cells import CELLS as HARD_CELLS
from tests.test_graphs import ARITIES, EXTREMES, everything

CELLS = {
    own.name: own
    for own in (elman, lstm, gru, slstm, sparse, wide, everything, linear, summing, root_cell)
} | {name: own for name, own in HARD_CELLS.items() if not isinstance(own, str)}
NUMBERS = [*EXTREMES, 3e38, -3e38, 1e300, -1e300, 1e-30, 1e-45, 2.0**-120, 0.999]
numbers = st.one_of(st.sampled_from(NUMBERS), st.floats(-4, 4), st.floats())


def traced(own):
    return TracedCell(own.name, own.states, own.gates, own.graphs)


def in_torch(x, arguments, dtype):
    """One operation, a truth value being 0 or 1."""
    tensors = [torch.tensor(a, dtype=dtype) for a in arguments]
    if x.operation == "where":
        tensors[0] = tensors[0] != 0
    return getattr(torch, x.operation)(*tensors).to(dtype).item()


def in_python(x, arguments):
    # Python's own sine of infinity is an error; the table's has been asked for finite ones.
    if x.operation in ("sin", "cos") and math.isinf(arguments[0]):
        return math.nan
    return float(OPERATIONS[x.operation].python(*arguments))


def check(graph, inputs):
    """Hold every value of a graph to its interval."""
    known = intervals(graph)
    named = dict(zip(graph.inputs, inputs, strict=True))
    for dtype in (None, torch.float32, torch.float64):
        values = dict(named)
        for x in graph.body:
            arguments = [values.get(a, a) for a in x.arguments]
            value = in_python(x, arguments) if dtype is None else in_torch(x, arguments, dtype)
            values[x.name] = value
            least, largest = known[x.name]
            inside = math.isnan(value) or least <= value <= largest
            assert inside, (str(x), dtype, value, known[x.name])


@pytest.mark.parametrize("name", CELLS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_bounds_hold_for_cells(name, data):
    for cell in (traced(CELLS[name]), clipped(traced(CELLS[name]))):
        graph = cell.graphs.forward
        inputs = [data.draw(numbers) for _ in graph.inputs]
        if graph.inputs[-1] == FORWARD_CLIPVAL:
            inputs[-1] = data.draw(st.floats(0, exclude_min=True))
        check(graph, inputs)


@st.composite
def graphs(draw):
    builder = GraphBuilder()
    names = ["a", "b", "c"]
    arguments = st.deferred(
        lambda: st.one_of(st.sampled_from(names), st.sampled_from(names), numbers)
    )
    for _ in range(draw(st.integers(1, 12))):
        operation = draw(st.sampled_from(list(OPERATIONS)))
        names.append(
            builder.emit(operation, *(draw(arguments) for _ in range(ARITIES.get(operation, 1))))
        )
    return builder.graph(("a", "b", "c"), names[3:])


@settings(max_examples=300, deadline=None)
@given(graph=graphs(), inputs=st.tuples(numbers, numbers, numbers))
def test_bounds_hold_for_any_graph(graph, inputs):
    check(graph, inputs)


@pytest.mark.parametrize("name", list(OPERATIONS))
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_bounds_hold_for_each_operation_of_bounded_numbers(name, data):
    builder = GraphBuilder()
    bounded = []
    for source in "abc"[: ARITIES.get(name, 1)]:
        x = builder.emit("sigmoid", source)
        scaled = builder.emit("mul", x, data.draw(numbers))
        bounded.append(builder.emit("add", scaled, data.draw(numbers)))
    graph = builder.graph(("a", "b", "c"), [builder.emit(name, *bounded)])
    check(graph, [data.draw(numbers) for _ in range(3)])


@pytest.mark.parametrize(
    ("own", "bound", "exponent"),
    [
        *[(elman, 1, 1), (lstm, 1, 1), (everything, 1.25, 1)],
        *[(own, None, None) for own in (gru, slstm, linear)],
    ],
    ids=str,
)
def test_bounds_of_h(own, bound, exponent):
    for cell in (traced(own), clipped(traced(own))):
        found = bound_of_h(cell.graphs.forward)
        assert found is None if bound is None else bound <= found < 1.01 * bound
        assert exponent_of_h(cell) == exponent


def test_every_operation_has_a_rule():
    """One that narrows, or a truth value's."""
    for name, operation in OPERATIONS.items():
        builder = GraphBuilder()
        half = [builder.emit("sigmoid", source) for source in "abc"[: ARITIES.get(name, 1)]]
        away_from_0 = [builder.emit("add", x, 1.0) for x in half]
        graph = builder.graph(("a", "b", "c"), [builder.emit(name, *away_from_0)])
        found = intervals(graph)[graph.outputs[0]]
        assert found != ANYTHING, name
        assert not operation.returns_bool or (found[0] <= 0 and found[1] >= 1)
        for x in NUMBERS:
            check(graph, [x] * 3)


def bound(*operations):
    """The bound of what the last of some operations makes; ``v0`` is the first's result."""
    builder = GraphBuilder()
    for operation, *arguments in operations:
        last = builder.emit(operation, *arguments)
    return bound_of_h(builder.graph(("a", "b"), [last]))


def test_what_is_unbounded():
    sigmoid = ("sigmoid", "a")
    assert bound(sigmoid, ("mul", "v0", "b")) is None
    assert bound(sigmoid, ("div", 1.0, "v0")) is None
    # Float32 rounds the constant to 1, and a product past its largest number to infinity.
    assert bound(sigmoid, ("mul", "v0", 1 - 1e-9), ("sub", 1.0, "v1"), ("div", 1.0, "v2")) is None
    assert bound(sigmoid, ("mul", "v0", 1e30), ("mul", "v1", 1e10)) is None
    assert bound(("sub", math.inf, "a")) is None


def test_what_is_bounded():
    assert bound(("maximum", "a", -2.0), ("minimum", "v0", 1.0)) == pytest.approx(2, rel=0.01)
    assert bound(("abs", "a"), ("add", "v0", 0.5), ("div", 3.0, "v1")) == pytest.approx(6, rel=0.01)
    assert bound(("minimum", "a", 1.0), ("exp", "v0")) == pytest.approx(math.e, rel=0.01)
    assert bound(("gt", "a", "b"), ("where", "v0", 2.0, -3.0)) == pytest.approx(3, rel=0.01)
