"""What the package asks of PyTorch beyond its public names: the list, and what each one means.

The list is the table of ``CONTRIBUTING.md``. Names that begin with an underscore may change with
any version, so ``make test-oldest`` and ``make test-newest`` run this.
"""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from flashrnn import backends, nn
from flashrnn.backends import autograd
from flashrnn.nn.parameters import parameter

PACKAGE = Path(backends.__file__).parents[1]
aten = torch.ops.aten


# The list


def is_private(name):
    return name.strip("_") != "" and name.startswith("_") and not name.startswith("__")


class Names(ast.NodeVisitor):
    """The private names in a module that this package does not define.

    An attribute of PyTorch's by the name of one of the package's own goes unseen.
    """

    def __init__(self, own):
        self.own = own
        self.roots = {}
        self.found = set()

    def visit_Import(self, node):
        for alias in node.names:
            first = alias.name.partition(".")[0]
            self.roots[alias.asname or first] = alias.name if alias.asname else first
            self.add(alias.name)

    def visit_ImportFrom(self, node):
        for alias in node.names:
            self.roots[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            self.add(f"{node.module}.{alias.name}")

    def visit_Attribute(self, node):
        *_, first = chain = list(attributes_down(node))
        names = [part.attr for part in reversed(chain)]
        if isinstance(first.value, ast.Name) and first.value.id in self.roots:
            self.add(".".join([self.roots[first.value.id], *names]))
        else:
            # Of an object whose kind only running it tells; _replace is any named tuple's.
            self.found |= {n for n in names if is_private(n)} - self.own - {"_replace"}
            self.visit(first.value)

    def visit_Constant(self, node):
        text = node.value if isinstance(node.value, str) else ""
        if is_private(text) and hasattr(aten, text):
            self.found.add(f"torch.ops.aten.{text}")
        elif re.fullmatch(r"torch(\.\w+)+", text):
            self.add(text)

    def add(self, name):
        if name.startswith("torch.") and any(map(is_private, name.split("."))):
            self.found.add(name)


def attributes_down(node):
    while isinstance(node, ast.Attribute):
        yield node
        node = node.value


def private_names(texts):
    """``{name: modules}``: what PyTorch calls its own, and where it is used."""
    trees = {path: ast.parse(text) for path, text in texts.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    defined = {x.name for x in nodes if isinstance(x, ast.FunctionDef | ast.ClassDef)}
    read = {x.attr for x in nodes if isinstance(x, ast.Attribute)}
    read |= {x.id for x in nodes if isinstance(x, ast.Name)}
    read |= {x.name for node in nodes if isinstance(node, ast.ImportFrom) for x in node.names}
    assigned = {
        getattr(x, "attr", getattr(x, "id", None))
        for x in nodes
        if isinstance(getattr(x, "ctx", None), ast.Store)
    }
    found = {}
    for path, tree in trees.items():
        names = Names(defined | assigned)
        names.visit(tree)
        # What the package defines and never reads, PyTorch does.
        overridden = {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)} - read
        for name in names.found | set(filter(is_private, overridden)):
            found.setdefault(name, set()).add(path)
    return found


def table():
    """The rows of ``CONTRIBUTING.md``: name, where, what for, what breaks, test."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, _, text = text.partition("| private name |")
    rows = text.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_every_private_name_is_listed():
    texts = {str(p.relative_to(PACKAGE)): p.read_text("utf-8") for p in PACKAGE.rglob("*.py")}
    listed = {name.strip("`"): set(re.findall(r"`(.*?)`", where)) for name, where, *_ in table()}
    assert private_names(texts) == listed


def test_every_row_names_a_test():
    tests = "".join(p.read_text("utf-8") for p in (PACKAGE.parent / "tests").rglob("test_*.py"))
    for *_, test in table():
        assert f"def {test.strip('`')}(" in tests


def test_a_new_private_name_is_seen():
    text = """
import torch, torch._a
import torch.b._c as d
from torch import nn, _e
from torch._f import g
from flashrnn.h import _i

class _Mode:
    def __init__(self): self._own = torch.nn._j.k(nn._l, d.m, [torch._n("torch._o")])
    def _hook(self): return self._own._p, _Mode, self.__class__, _i._replace, "_to_copy", "_ms"
"""
    names = "_a b._c _e _f.g nn._j.k nn._l b._c.m _n _o ops.aten._to_copy"
    expected = {f"torch.{name}" for name in names.split()} | {"_p", "_hook"}
    assert set(private_names({"module": text})) == expected


# What each one means


class Seen(TorchDispatchMode):
    """What arrives at a mode."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, types))
        return func(*args, **kwargs or {})


def in_another_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def dispatch_modes():
    return torch._C._len_torch_dispatch_stack()


def test_dispatch_modes_are_counted_by_thread():
    assert dispatch_modes() == 0
    with Seen():
        assert dispatch_modes() == 1 and in_another_thread(dispatch_modes) == 0
        with torch.device("cpu"):  # A mode of another kind.
            assert dispatch_modes() == 1
    assert dispatch_modes() == 0


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_recording_is_seen_before_autograd_and_after(pre_dispatch):
    def seen():
        key = torch._C.DispatchKey.PreDispatch
        return dispatch_modes() > 0, torch._C._dispatch_tls_is_dispatch_key_included(key)

    found = []
    make_fx(lambda x: found.append(seen()) or x + 1, pre_dispatch=pre_dispatch)(torch.ones(2))
    assert found == [(not pre_dispatch, pre_dispatch)] and seen() == (False, False)


def test_modes_of_threads_that_overlap_leave_nothing_behind():
    """In a process of its own: in PyTorch 2.9 Dynamo compiles nothing any more afterwards."""
    child = "from tests.test_private_torch import overlap; overlap()"
    subprocess.run([sys.executable, "-c", child], check=True, cwd=Path(__file__).parents[1])


def overlap():
    ready, left = threading.Event(), threading.Event()

    def other():
        with Seen():
            ready.set()
            left.wait()
            return backends.recorded()

    found = []
    thread = threading.Thread(target=lambda: found.append(other()))
    with Seen():
        thread.start()
        ready.wait()
    left.set()
    thread.join()
    assert found == [True] and not backends.recorded()


def test_transforms_are_told():
    active = torch._C._are_functorch_transforms_active
    seen = []

    def told(x):
        seen.append(active() and not in_another_thread(active))
        return x.sum()

    one = torch.ones(2)
    torch.func.grad(told)(one)
    torch.func.vmap(told)(one[None])
    assert seen == [True] * 2 and not active()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing_by_jit_is_told():
    state = torch._C._get_tracing_state
    seen = []

    def told(x):
        seen.append(state() is not None and in_another_thread(state) is None)
        return x.sum()

    torch.jit.trace(told, (torch.ones(2),), check_trace=False)
    assert seen == [True] and state() is None


def test_derivatives_forward_are_told():
    levels = [forward_ad._current_level]
    with forward_ad.dual_level():
        levels.append(forward_ad._current_level)
    levels.append(forward_ad._current_level)
    assert levels == [-1, 0, -1]


def test_current_stream_is_there():
    # PyTorch without CUDA has none, and no call comes to ask for it.
    assert hasattr(torch._C, "_cuda_getCurrentRawStream") == (torch.version.cuda is not None)


@pytest.mark.gpu
def test_current_stream_is_told():
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            handle = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
            assert handle == stream.cuda_stream


class Wrapped(Tensor):
    """As the tensors that a cell is traced with."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls):
        return Tensor._make_wrapper_subclass(cls, (2, 3), dtype=torch.float64)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("no mode took it")


class Answering(Seen):
    """Gives a plain tensor for whatever arrives."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, types))
        return torch.ones(2, 3, dtype=torch.float64)


def test_wrappers_have_a_shape_and_no_operations():
    wrapped = Wrapped().requires_grad_()
    assert wrapped.shape == (2, 3) and wrapped.dtype == torch.float64 and wrapped.requires_grad
    with pytest.raises(RuntimeError, match="no mode took it"):
        wrapped + 1


def test_functions_do_not_hand_the_class_on():
    with Answering():
        assert type(torch.add(Wrapped(), 1)) is Tensor


def test_modes_see_every_operation_of_aten():
    wrapped = Wrapped().requires_grad_()
    with Answering() as mode:
        y = torch.nn.functional.silu(wrapped)
        torch.autograd.grad(y, wrapped, torch.ones(2, 3, dtype=torch.float64))
    operations = [func for func, types in mode.calls if Wrapped in types]
    assert operations == [aten.silu.default, aten.silu_backward.default]
    assert operations[0].__name__ == "silu.default"


def test_names_of_aten_are_what_arrives():
    with Seen() as mode:
        torch.ones(2).to(torch.float64)
        torch._efficientzerotensor((2,))
    names = [func.overloadpacket.__name__ for func, _ in mode.calls]
    assert names == ["ones", "_to_copy", "_efficientzerotensor"]


def test_schemas_tell_what_changes_in_place():
    for mutable in (aten.add_.Tensor, aten.add.out, aten.zero_.default):
        assert mutable._schema.is_mutable
    for pure in (aten.add.Tensor, aten.silu.default, aten.clone.default):
        assert not pure._schema.is_mutable


def test_formulas_compute_what_operations_do():
    x, d = torch.randn(2, 5, dtype=torch.float64)
    op = aten.silu_backward.default
    formula = inspect.unwrap(get_decompositions([op])[op])
    with Seen() as mode:
        found = formula(d, x)
    assert op not in [func for func, _ in mode.calls]
    torch.testing.assert_close(found, op(d, x))
    # Without the casts around it.
    half = formula(d.bfloat16(), x.bfloat16())
    assert half.dtype == torch.bfloat16 and not torch.equal(half, op(d.bfloat16(), x.bfloat16()))
    assert get_decompositions([aten.sort.default]) == {}
    assert aten.sort.default.decompose(x) is NotImplemented


def test_trees_end_at_subclasses():
    class Shape(tuple):
        """As the shapes that a cell sees, which must not be looked into."""

        def __iter__(self):
            raise AssertionError

    shape = Shape((2, 3))
    tree = ([1, {"a": shape}], (torch.ones(1), None))
    assert tree_leaves(tree)[:2] == [1, shape] and tree_leaves(None) == [None]
    mapped = tree_map_only(Tensor, lambda x: x + 1, tree)
    assert mapped[0] == [1, {"a": shape}] and mapped[1][0].item() == 2.0


def test_a_gpu_can_be_kept_busy():
    assert list(inspect.signature(torch.cuda._sleep).parameters) == ["cycles"]


def test_dynamo_is_there():
    assert importlib.util.find_spec("torch._dynamo") is not None


def test_flat_weights_are_found_by_their_names():
    layer = torch.nn.LSTM(2, 3)
    layer._flat_weights_names = ["weight_hh_l0", "weight_ih_l0"]
    layer._all_weights = [["weight_hh_l0"]]
    layer._init_flat_weights()
    assert layer._flat_weights[0] is layer.weight_hh_l0
    assert layer.all_weights == [[layer.weight_hh_l0]]
    layer.weight_ih_l0 = torch.nn.Parameter(torch.zeros(12, 2))
    assert layer._flat_weights[1] is layer.weight_ih_l0


def test_nodes_are_applied_without_what_is_for_torch_func():
    """``autograd.apply`` is ``Function.apply`` but for that."""
    x, others = torch.ones(3, requires_grad=True), torch.ones(3)

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y, factor):
            ctx.save_for_backward(y)
            ctx.factor = factor
            return x * factor, y + 1

        @staticmethod
        def backward(ctx, d_x, d_y):
            (y,) = ctx.saved_tensors
            assert torch.equal(y, others) and ctx.needs_input_grad == (True, False, False)
            return d_x * ctx.factor, None, None

    given, expected = (
        by(x, others, 2.0) for by in (partial(autograd.apply, Doubled), Doubled.apply)
    )
    assert given[0].grad_fn.name() == expected[0].grad_fn.name() == "DoubledBackward"
    for found, right in zip(given, expected, strict=True):
        assert torch.equal(found, right) and found.requires_grad
    (slope,) = torch.autograd.grad(given[0].sum(), x)
    assert torch.equal(slope, torch.full((3,), 2.0))


def test_parameters_are_found_by_their_names():
    """As what has taken their place is, which they are no longer among."""
    layer = nn.LSTM(2, 3)
    assert parameter(layer, "weight_hh_l0") is layer.weight_hh_l0
    layer.weight_hh_l0 = torch.nn.Parameter(torch.ones(12, 3))
    assert parameter(layer, "weight_hh_l0") is layer.weight_hh_l0
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    assert torch.equal(parameter(layer, "weight_hh_l0"), layer.weight_hh_l0)
    other = torch.ones(12, 3)
    # Within functional_call a layer's weights are those that it is given.
    layer = nn.LSTM(2, 3, backend="vanilla")
    given = torch.func.functional_call(layer, {"weight_hh_l0": other}, torch.ones(1, 2, 2))
    with torch.no_grad():
        layer.weight_hh_l0.copy_(other)
    torch.testing.assert_close(layer(torch.ones(1, 2, 2)), given)
