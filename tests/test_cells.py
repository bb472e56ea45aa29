"""Which functions may be cells, their names, and the errors for those that may not."""

import collections
import contextvars
import copy
import ctypes
import decimal
import io
import math
import multiprocessing
import os
import pickle
import random
import sys
import threading
import timeit
import types
from types import SimpleNamespace

import numpy
import pytest
import torch

import flashrnn
from flashrnn import CellError, cell, register
from flashrnn.cells import elman, gru, resolve
from flashrnn.cells.graph import evaluate
from flashrnn.cells.spec import _registered, cell_of
from flashrnn.cells.traced import clipped, parsed
from flashrnn.nn import masks
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
def test_a_copy_is_the_cell_itself(copied):
    assert copied(gru) is gru is cell_of(gru.handle)


def at_module_level(states, gates):
    return (torch.tanh(gates[0]) * 0.5,)


wrapped = step_of(at_module_level)


@step_of
def decorated(states, gates):
    return (torch.tanh(gates[0]) * 0.25,)


class Layer(torch.nn.Module):
    """A module that holds a cell, as a user's layer does."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell


@pytest.mark.parametrize(
    "given", [gru, wrapped, decorated], ids=["built in", "by object", "by name"]
)
def test_cells_pickle(given):
    again = pickle.loads(pickle.dumps(given))
    assert again.traced == given.traced
    saved = io.BytesIO()
    torch.save(Layer(given), saved)
    saved.seek(0)
    assert torch.load(saved, weights_only=False).cell.traced == given.traced
    assert (
        pickle.loads(pickle.dumps(gru)) is gru
        and pickle.loads(pickle.dumps(decorated)) is decorated
    )


def test_cells_reach_a_spawned_process():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map(fingerprint_of, [gru, wrapped, decorated])
    assert found == [gru.fingerprint, wrapped.fingerprint, decorated.fingerprint]


def fingerprint_of(cell):
    return cell.fingerprint


def test_equal_cells_are_one_to_caches():
    """What is compiled for a cell serves one that a factory makes anew; another name is another."""

    def made(name="mine"):
        return cell(states=("h",), gates=("g",), name=name)(at_module_level).traced

    assert made() == made() and len({made(), made()}) == 1
    assert made() != made("other") and made() != gru.traced


def test_a_traced_cell_is_made_of_its_text():
    for given in (gru.traced, clipped(gru.traced), wrapped.traced):
        again, _ = parsed(given.text)
        assert again == given and again.graphs == given.graphs and again.clips == given.clips
    with pytest.raises(ValueError, match="does not know: frobnicate"):
        parsed(gru.traced.text.replace('"tanh"', '"frobnicate"'))


def test_clipping_is_a_number_of_the_graphs():
    """Values on a bound and beyond it, and their derivatives, as torch.clamp has them."""
    traced = clipped(wrapped.traced)
    for g, bound in ((0.1, 0.3), (9.0, 0.3), (-9.0, 0.3), (0.0, 1e-3), (math.nan, 0.3)):
        gate = torch.tensor(g, dtype=torch.float64, requires_grad=True)
        (h,) = at_module_level((), (gate,))
        h = h.clamp(-bound, bound)
        h.backward(torch.tensor(2.0, dtype=torch.float64))
        (given,) = evaluate(traced.graphs.forward, (0.5, g, bound))
        d_h, d_g = evaluate(traced.graphs.derivative, (0.5, g, 2.0, bound))
        expected = torch.tensor([h.item(), 0.0, gate.grad.item()])
        torch.testing.assert_close(torch.tensor([given, d_h, d_g]), expected, equal_nan=True)


@pytest.mark.parametrize("name", [5, b"mine", ("mine",)])
def test_names_are_strings(name):
    with pytest.raises(TypeError, match="name is a string"):
        register(wrapped, name)
    with pytest.raises(TypeError, match="name is a string"):
        cell(states=("h",), gates=("g",), name=name)(at_module_level)
    with pytest.raises(ValueError, match="at least one character"):
        register(wrapped, "")
    with pytest.raises(ValueError, match=r"unknown function 'lsmt'.*'lstm'"):
        resolve("lsmt")


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
LEARNED = torch.nn.Parameter(torch.tensor(2.0))
LAYER = torch.nn.PReLU()


def if_on_dtype(states, gates):
    return (gates[0] * 2 if gates[0].dtype == torch.float64 else gates[0],)


def if_on_device(states, gates):
    return (gates[0] * 2 if gates[0].device.type == "cpu" else gates[0],)


def if_on_requires_grad(states, gates):
    return (gates[0] * 2 if gates[0].requires_grad else gates[0],)


def two_dimensions(states, gates):
    _rows, columns = gates[0].shape
    return (gates[0] / columns,)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (if_on_data, r"looks at a tensor's values in Python .*line \d+.*torch.where"),
        (lambda s, g: (s[0] * g[0].max().item(),), "tensor's values"),
        (lambda s, g: (s[0] * g[0].tolist()[0][0],), "tolist"),
        (lambda s, g: (torch.softmax(g[0], -1),), "_softmax.*not pointwise"),
        (lambda s, g: (g[0] - g[0].mean(),), "mean.*not pointwise"),
        (lambda s, g: (g[0].roll(1, -1),), "not pointwise"),
        (lambda s, g: (g[0].cumsum(-1),), "cumsum.*not pointwise"),
        (lambda s, g: (g[0] / g[0].norm(),), "norm.*not pointwise"),
        (lambda s, g: (torch.stack([g[0], s[0]]).sum(0),), "stack.*not pointwise"),
        (lambda s, g: (torch.cat([g[0], s[0]]),), r"shape \(4, 3\).*Before that, .*cat.*pointwise"),
        (lambda s, g: (g[0].sum(),), r"shape \(\).*Before that, .*sum.*not pointwise"),
        (lambda s, g: (torch.heaviside(g[0], s[0]),), r"derivative for aten::heaviside.*x.detach"),
        (lambda s, g: (torch.where(g[0] > 0, 3, 1) & 2 * s[0],), "bitwise_and"),
        (lambda s, g: (~torch.where(g[0] > 0, 3, 1) * s[0],), "bitwise_not.*table"),
        (lambda s, g: (torch.where(g[0] > 0, 7, 1) // 2 * s[0],), "floor_divide"),
        (
            lambda s, g: (torch.div((g[0] > 0) * 7, 2, rounding_mode="trunc") * s[0],),
            r"div.Tensor_mode.*table",
        ),
        (lambda s, g: (g[0].long() * s[0],), r"converts torch.float64 to torch.int64.*torch.trunc"),
        (lambda s, g: (torch.dropout(g[0], 0.5, True),), "random"),
        (lambda s, g: (torch.special.bessel_j0(g[0]),), "bessel_j0.*table.*sigmoid"),
        (lambda s, g: (g[0] + torch.rand(()),), "random"),
        (lambda s, g: (g[0].clone().mul_(2),), "in place"),
        (lambda s, g: (s[0].add_(g[0]),), "in place"),
        (lambda s, g: (g[0] + torch.ones(3, dtype=torch.float64),), r"shape \(3,\).*full_like"),
        (lambda s, g: (g[0] + CAPTURED,), r"captures a tensor of shape \(3,\)"),
        # What a cell looks at beside values.
        (lambda s, g: (g[0] / s[0].shape[-1],), r"looks at a tensor's shape .*line \d+.*full_like"),
        (lambda s, g: (g[0] / s[0].size(-1),), "looks at a tensor's size"),
        (lambda s, g: (g[0] / s[0].size()[-1],), "looks at a tensor's shape"),
        (lambda s, g: (g[0] / s[0].numel(),), "looks at a tensor's numel"),
        (lambda s, g: (g[0] / len(s[0]),), "looks at a tensor's __len__"),
        (lambda s, g: (g[0] / s[0].ndim,), "looks at a tensor's ndim"),
        (lambda s, g: (g[0] / s[0].stride(0),), "looks at a tensor's stride"),
        (lambda s, g: (g[0] / s[0].element_size(),), "looks at a tensor's element_size"),
        (lambda s, g: (g[0] / len(s[0].shape),), "looks at a tensor's shape"),
        (lambda s, g: (g[0] / math.prod(s[0].shape),), "looks at a tensor's shape"),
        (lambda s, g: (g[0] * torch.zeros(*s[0].shape),), "looks at a tensor's shape"),
        (two_dimensions, "looks at a tensor's shape"),
        (if_on_device, r"looks at a tensor's device"),
        (lambda s, g: (g[0] * (g[0].device == "cpu"),), "looks at a tensor's device"),
        (lambda s, g: (g[0] * torch.device(g[0].device).index,), "device"),
        (lambda s, g: (g[0] * (1 + g[0].is_cuda),), "looks at a tensor's is_cuda"),
        (if_on_requires_grad, "looks at a tensor's requires_grad"),
        (lambda s, g: (g[0] * (g[0].grad_fn is None),), "looks at a tensor's grad_fn"),
        (lambda s, g: (g[0] * g[0].is_contiguous(),), "looks at a tensor's is_contiguous"),
        (if_on_dtype, "one function in float64 and another in float32"),
        (lambda s, g: (g[0] + torch.finfo(g[0].dtype).eps,), r"another in float32.*torch.finfo"),
        (lambda s, g: (g[0] * g[0].dtype.itemsize,), "another in float32"),
        (lambda s, g: (g[0] * random.random(),), "at its next call"),
        # Tensors that a cell captures.
        (lambda s, g: (g[0] * LEARNED,), r"captures a tensor of shape \(\).*line \d+.*\(\"b\",\)"),
        (lambda s, g: (g[0] * LEARNED.detach(),), "captures a tensor"),
        (lambda s, g: (g[0] * LEARNED.item(),), "captures a tensor"),
        (lambda s, g: (g[0] * float(LEARNED),), "captures a tensor"),
        (lambda s, g: (g[0] * CAPTURED.tolist()[0],), "captures a tensor"),
        (lambda s, g: (g[0] * CAPTURED.shape[0],), "captures a tensor"),
        (lambda s, g: (g[0] * torch.sigmoid(LEARNED),), "captures a tensor"),
        (lambda s, g: (LAYER(g[0]),), "captures a tensor"),
        (lambda s, g: (torch.where(g[0] > LEARNED, g[0], s[0]),), "captures a tensor"),
        (lambda s, g: (g[0] * torch.from_numpy(numpy.ones(())),), "captures a tensor"),
        (lambda s, g: (g[0].float().double(),), "converts torch.float64 to torch.float32"),
        (lambda s, g: (g[0].sum(-1),), "shape"),
        (lambda s, g: (g[0].float(),), "dtype torch.float32"),
        (lambda s, g: g[0], "returned Tensor; accepted is a tuple of 1 new states"),
        (lambda s, g: (g[0], g[0]), "returned 2 tensors; expected 1"),
        (lambda s, g: (0.0,), "returned float"),
        (lambda s, g: (g[0] @ g[0],), r"failed while it was traced.*Before that, .*mm"),
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


LIST, ARRAY, NUMBER = [2.0], numpy.array([2.0, 5.0]), numpy.float64(2.0)
OPTIONS = SimpleNamespace(factor=2.0, table={"factor": 2.0}, act=torch.nn.LeakyReLU(2.0))


class Owner:
    """An object whose method is a step."""

    def __init__(self):
        self.factor = 2.0

    def step(self, states, gates):
        return (gates[0] * self.scaled(),)

    def scaled(self):
        return self.factor


OWNER = Owner()
ACTS = {2.0: lambda x: 2 * x, 3.0: lambda x: 3 * x}
ACT = ACTS[2.0]


def global_factor(states, gates):
    return (gates[0] * helper(),)


def helper():
    return NUMBER


def closure():
    factor = 2.0

    def step(states, gates):
        return (sum((gates[0] * x for x in [factor]), 0.0),)

    def change(value):
        nonlocal factor
        factor = value

    return step, change


def scaling(factor):
    def scaled(x):
        return x * factor

    def change(value):
        nonlocal factor
        factor = value

    return scaled, change


(HALVED, _), (SCALED, CHANGE_SCALED) = scaling(0.5), scaling(2.0)


def two_closures_of_one_function(states, gates):
    return (SCALED(2 * HALVED(gates[0])),)


class Link:
    """Each of a ring of objects calls the next one's method; the last one has a factor."""

    def scaled(self, x, depth=0):
        return x * self.factor if depth == 2 else self.next.scaled(x, depth + 1)


RING = [Link() for _ in range(3)]
for one, other in zip(RING, [*RING[1:], RING[0]], strict=True):
    one.next = other


def default_of(states, gates, factors=LIST):
    return (gates[0] * factors[0],)


IN_CLOSURE, CHANGE_CLOSURE = closure()


class Settings:
    """Numbers of a class; its objects have none of their own."""

    factor = 2.0


SETTINGS, MODULE = Settings(), types.ModuleType("settings_of_a_test")
sys.modules[MODULE.__name__] = MODULE
DEQUE, BYTES, C_DOUBLE = collections.deque([2.0]), bytearray([2]), ctypes.c_double(2.0)
DECIMAL = decimal.Decimal(2)


def read(x, settings):
    return x * settings.factor


def another_name(states, gates):
    settings = SETTINGS
    return (gates[0] * settings.factor,)


def imported_within(states, gates):
    import settings_of_a_test

    return (gates[0] * settings_of_a_test.factor,)


def imported_by_name(states, gates):
    from settings_of_a_test import factor

    return (gates[0] * factor,)


class Derived(Owner):
    """What it calls is found at run time."""

    def scaled(self):
        return super().scaled() * helper() / 2


DERIVED, BY_NAME, CHOICE = Derived(), {"helper": helper}, ["helper"]


@cell(states=("h",), gates=("g",))
def inner_cell(states, gates):
    return (gates[0] * NUMBER,)


def change_number(x):
    globals().update(NUMBER=numpy.float64(x))


class Identity(torch.autograd.Function):
    """Its derivative, which is the user's, captures a value."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float(NUMBER)


# Where the captured value does not stand at the end of names, attributes and items.
INDIRECT = {
    "deque": (lambda s, g: (g[0] * sum(DEQUE),), lambda x: DEQUE.__setitem__(0, x)),
    "bytes": (lambda s, g: (g[0] * sum(BYTES),), lambda x: BYTES.__setitem__(0, int(x))),
    "number of C": (
        lambda s, g: (g[0] * getattr(C_DOUBLE, "val" + "ue"),),
        lambda x: setattr(C_DOUBLE, "value", x),
    ),
    "decimal": (
        lambda s, g: (g[0] * float(DECIMAL),),
        lambda x: globals().update(DECIMAL=decimal.Decimal(x)),
    ),
    "class": (lambda s, g: (read(g[0], Settings),), lambda x: setattr(Settings, "factor", x)),
    "object": (lambda s, g: (read(g[0], SETTINGS),), lambda x: setattr(Settings, "factor", x)),
    "another name": (another_name, lambda x: setattr(Settings, "factor", x)),
    "module": (lambda s, g: (read(g[0], MODULE),), lambda x: setattr(MODULE, "factor", x)),
    "import": (imported_within, lambda x: setattr(MODULE, "factor", x)),
    "import of a name": (imported_by_name, lambda x: setattr(MODULE, "factor", x)),
    "method": (lambda s, g: (g[0] * DERIVED.scaled(),), change_number),
    "method of a base class": (
        lambda s, g: (g[0] * DERIVED.scaled(),),
        lambda x: setattr(DERIVED, "factor", x),
    ),
    "dictionary of functions": (lambda s, g: (g[0] * BY_NAME[CHOICE[0]](),), change_number),
    "environment": (
        lambda s, g: (g[0] * float(os.getenv("FACTOR_OF_A_TEST")),),
        lambda x: os.environ.__setitem__("FACTOR_OF_A_TEST", str(x)),
    ),
    "cell of a layer": (masks.evaluated(inner_cell, (0.0,)).step, change_number),
}


@pytest.mark.parametrize(
    ("step", "change"),
    [
        (IN_CLOSURE, CHANGE_CLOSURE),
        (global_factor, lambda x: globals().update(NUMBER=numpy.float64(x))),
        (lambda s, g: (g[0] * LIST[0],), lambda x: LIST.__setitem__(0, x)),
        (lambda s, g: (g[0] * max(LIST),), lambda x: LIST.__setitem__(0, x)),
        (two_closures_of_one_function, CHANGE_SCALED),
        (lambda s, g: (RING[0].scaled(g[0]),), lambda x: setattr(RING[2], "factor", x)),
        (default_of, lambda x: LIST.__setitem__(0, x)),
        (lambda s, g: (g[0] * ARRAY[0],), lambda x: ARRAY.__setitem__(0, x)),
        (lambda s, g: (g[0] * float(ARRAY.min()),), lambda x: ARRAY.__setitem__(0, x)),
        (lambda s, g: (g[0] * OPTIONS.factor,), lambda x: setattr(OPTIONS, "factor", x)),
        (lambda s, g: (g[0] * vars(OPTIONS)["factor"],), lambda x: setattr(OPTIONS, "factor", x)),
        (lambda s, g: (g[0] * OPTIONS.table["factor"],), lambda x: OPTIONS.table.update(factor=x)),
        (lambda s, g: (-OPTIONS.act(-g[0]),), lambda x: setattr(OPTIONS.act, "negative_slope", x)),
        (OWNER.step, lambda x: setattr(OWNER, "factor", x)),
        (lambda s, g: (ACT(g[0]),), lambda x: globals().update(ACT=ACTS[x])),
        *INDIRECT.values(),
    ],
    ids=[
        *(
            "closure",
            "global of a helper",
            "item",
            "list",
            "closures",
            "ring",
            "default",
            "array item",
            "array",
        ),
        *("attribute", "object", "item of an attribute", "module", "method", "function"),
        *(f"indirectly, {name}" for name in INDIRECT),
    ],
)
def test_a_captured_value_that_changes_makes_another_cell(step, change):
    """The result follows it, and what was computed before keeps its own derivative."""
    mine, Wx = step_of(step), torch.ones(1, 1, 1, 1, 1, requires_grad=True)
    zeros = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1)

    def run():
        return flashrnn.flashrnn(Wx, *zeros, function=mine)[0]

    change(2.0)
    before, unchanged = run(), mine.traced
    assert before.item() == 2.0 and mine.traced is unchanged
    try:
        change(3.0)
        after, changed = run(), mine.traced
        assert after.item() == 3.0 and changed != unchanged
        assert str(unchanged.graphs.forward) != str(changed.graphs.forward)
        assert torch.autograd.grad(before, Wx)[0].item() == 2.0
        assert torch.autograd.grad(after, Wx)[0].item() == 3.0
    finally:
        change(2.0)
    assert run().item() == 2.0 and mine.traced == unchanged


def test_a_function_of_no_module_is_a_step():
    """As those that a program writes and compiles."""
    names = {"torch": torch}
    exec("def step(states, gates):\n    return (torch.tanh(gates[0]),)", names)
    assert step_of(names["step"]).graphs == elman.graphs


def test_a_derivative_of_the_users_captures_too():
    mine = step_of(lambda s, g: (Identity.apply(g[0]),))
    found = []
    try:
        for value in (2.0, 3.0):
            change_number(value)
            found.append(evaluate(mine.graphs.derivative, (0.0, 0.0, 1.0))[1])
    finally:
        change_number(2.0)
    assert found == [2.0, 3.0]


def test_signs_and_kinds_of_captured_values_count():
    """Values that compare equal in Python may compute different results."""
    values = [0.0]
    inverse = step_of(lambda s, g: (1 / (g[0] * values[0]),))
    found = []
    for value in (0.0, -0.0, 1.0, True):
        values[0] = value
        found.append(evaluate(inverse.graphs.forward, (0.0, 1.0))[0])
    assert found == [math.inf, -math.inf, 1.0, 1.0]


@pytest.mark.parametrize("kind", [threading.local, lambda: contextvars.ContextVar("factor")])
def test_what_differs_from_thread_to_thread_is_refused(kind):
    """A cell is traced in a thread of its own."""
    mine = kind()
    with pytest.raises(CellError, match=r"captures `mine`, a \w+, which differs from thread to"):
        _ = step_of(lambda s, g: (g[0] * getattr(mine, "factor", 2.0),)).traced


def test_what_an_import_runs_is_no_part_of_a_step(tmp_path, monkeypatch):
    """A module may do anything when it is imported first, which may be while a cell is traced."""
    text = """
import threading
found = threading.local()
def prepare():
    found.value = 1.0
    return 2.0
factor = prepare()
"""
    (tmp_path / "imported_by_a_step.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def step(states, gates):
        from imported_by_a_step import factor

        return (gates[0] * factor,)

    mine = step_of(step)
    assert evaluate(mine.graphs.forward, (0.0, 1.0)) == (2.0,)
    monkeypatch.setattr(sys.modules["imported_by_a_step"], "factor", 3.0)
    assert evaluate(mine.graphs.forward, (0.0, 1.0)) == (3.0,)


def test_an_import_that_the_step_never_reaches_is_not_made(tmp_path, monkeypatch):
    (tmp_path / "never_imported.py").write_text("number = 2.0", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    is_wanted = False

    def step(states, gates):
        if is_wanted:
            from never_imported import number

            return (gates[0] * number,)
        return (gates[0],)

    assert evaluate(step_of(step).graphs.forward, (0.0, 1.0)) == (1.0,)
    assert "never_imported" not in sys.modules


def test_an_object_too_large_to_compare_is_refused():
    large = SimpleNamespace(numbers=list(range(5000)))
    with pytest.raises(
        CellError, match=r"captures `large`, a SimpleNamespace too large to compare"
    ):
        _ = step_of(lambda s, g: (g[0] * len(vars(large)),)).traced


def test_captured_values_are_compared_at_once():
    """In about a microsecond: in no more time than thirty calls of an empty function take."""
    a, b, c = 0.5, 1.5, 2.5
    mine = step_of(lambda s, g: (torch.tanh(a * g[0] + b) * c,))
    built_in, _ = elman.traced, mine.traced

    def nothing():
        pass

    def seconds(function):
        return timeit.timeit(function, number=2000)

    # The least of ratios of neighbours in time: a processor that others use changes its speed.
    ratios = [seconds(lambda: mine.traced) / seconds(nothing) for _ in range(20)]
    assert min(ratios) < 30
    assert elman.traced is built_in
