"""Backend ``triton`` without a GPU: its kernels run by Triton's interpreter."""

import importlib.util
import os
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flashrnn import cell, flashrnn, functional
from flashrnn.backends import autograd
from flashrnn.cells import resolve
from flashrnn.problem import Problem
from flashrnn.tiling import ScanPlan, plan_scan
from tests.fused import (  # noqa: F401
    DTYPES,
    OPTIONS,
    all_strided,
    continues_exactly,
    hold_to_vanilla,
    poisoned,
    round_as_a_gpu,
    same_without_gradients,
)
from tests.problems import BUILT_IN, call, gradients, random_inputs, sparse, wide

# Triton's own library is interpreted or not as the variable says when it is first imported.
needs_triton = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs Triton and TRITON_INTERPRET=1, with which `make test` runs this file by itself",
)


@pytest.fixture
def interpreter(monkeypatch):
    """Triton's interpreter, mended."""
    round_as_a_gpu(monkeypatch)


@pytest.fixture
def on_the_cpu(interpreter, poisoned):  # noqa: F811
    """The interpreter, and NaN in whatever the backend allocates."""


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse, wide], ids=str)
@pytest.mark.parametrize("sizes", [(3, 4, 2, 5), (9, 3, 1, 40)], ids=str)
def test_equals_vanilla(on_the_cpu, kind, dtype, sizes):
    hold_to_vanilla("triton", kind, *sizes, dtype)


@needs_triton
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 64, 1, 16), (17, 2, 5, 17), (2, 2, 1, 128)])
def test_sizes(on_the_cpu, sizes):
    hold_to_vanilla("triton", "lstm", *sizes, torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("sizes", [(0, 3, 2, 8), (3, 0, 2, 8)], ids=str)
def test_empty(on_the_cpu, sizes):
    hold_to_vanilla("triton", "slstm", *sizes, torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(on_the_cpu, dtype, options):
    """In float32 R is read again at every step, in bfloat16 it stays: both ways."""
    hold_to_vanilla("triton", "lstm", 5, 4, 2, 24, dtype, **options)


@needs_triton
def test_any_strides(on_the_cpu):
    hold_to_vanilla("triton", "gru", 3, 4, 2, 24, torch.bfloat16, change=all_strided)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of exp where it is inf.
@pytest.mark.parametrize("kind", BUILT_IN)
def test_extremes_give_no_nan(on_the_cpu, kind):
    inputs = random_inputs(kind, 9, 2, 1, 4, dtype=torch.float32)
    with torch.no_grad():
        inputs.Wx.copy_(100 * torch.randint(-3, 4, inputs.Wx.shape))
        inputs.states.zero_()
    outputs = call(kind, inputs, backend="triton")
    found = gradients(outputs, inputs)
    assert all(x.isfinite().all() for x in (*outputs, *found.values()))


@needs_triton
def test_no_gradient_asked_for(on_the_cpu):
    assert same_without_gradients("triton")


@needs_triton
def test_continues_a_sequence_exactly(on_the_cpu):
    assert continues_exactly("triton")


@needs_triton
def test_operators_pass_opcheck(interpreter):
    Wx, R, b, states = random_inputs("gru", 2, 3, 2, 8, torch.float32).tensors().values()
    named = ("triton", resolve("gru").traced.text)
    torch.library.opcheck(autograd.scan, (Wx, R, b, states, *named, True, False, None, None))
    R, states = R.detach(), states.detach()
    every_state, last_states, gates = autograd.scan(
        Wx.detach(), R, b.detach(), states, *named, True, False, None, None
    )
    saved = (R, states, every_state, gates)
    asked = (torch.ones_like(every_state), torch.ones_like(last_states))
    torch.library.opcheck(autograd.scan_backward, (*saved, *asked, *named, False, None, None))


def coupled(states, gates):
    _, c = states
    f, z, o = gates
    c = torch.sigmoid(f) * c + (1 - torch.sigmoid(f)) * torch.tanh(z)
    return torch.sigmoid(o) * torch.tanh(c), c


@pytest.fixture
def uncompiled():
    torch.compiler.reset()


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "own_cell", "autocast"),
    [
        ("triton", False, False),
        ("triton", True, False),
        ("triton", False, True),
        ("auto", True, True),
    ],
)
def test_compiled_whole(interpreter, uncompiled, backend, own_cell, autocast):
    """One graph, the same bits, and a second graph for sizes that change but no third."""
    own = cell(states=("h", "c"), gates=("f", "z", "o"))
    # Of two, so that the one that is compiled has not been traced yet.
    kind, same = (own(coupled), own(coupled)) if own_cell else ("lstm", "lstm")

    def step(*tensors):
        with torch.autocast("cpu", enabled=autocast):
            return flashrnn(*tensors, function=kind, backend=backend)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for sizes in [(2, 3), (2, 3), (3, 4), (5, 6)]:
        inputs = random_inputs(same, *sizes, 2, 8, torch.float32)
        given = compiled(*inputs.tensors().values())
        found = gradients(given, inputs)
        outputs = step(*inputs.tensors().values())
        expected = gradients(outputs, inputs)
        assert given[0].dtype == (torch.bfloat16 if autocast else torch.float32)
        assert all(torch.equal(x, y) for x, y in zip(given, outputs, strict=True))
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert counter.frame_count == 2


@needs_triton
def test_compiled_without_states_and_for_several_heads(interpreter, uncompiled):
    """N and D decide the plan, and get a graph each; what the eager call keeps is not touched."""
    compiled = torch.compile(
        partial(flashrnn, function="elman", backend="triton"), fullgraph=True, backend="aot_eager"
    )
    for N, D in [(1, 8), (2, 8), (2, 17), (1, 8)]:
        Wx, R, b, _ = random_inputs("elman", 2, 3, N, D, torch.float32).tensors().values()
        expected = flashrnn(Wx, R, b, function="elman", backend="triton")
        assert all(map(torch.equal, compiled(Wx, R, b), expected))


@needs_triton
def test_compiled_call_that_cannot_be_says_why(uncompiled):
    inputs = random_inputs("lstm", 2, 3, 1, 8, torch.float64)
    compiled = torch.compile(
        partial(flashrnn, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match=r"cannot do this call: dtype float64"):
        compiled(*inputs.tensors().values())


@needs_triton
def test_default_states_of_inference_serve_training(interpreter, monkeypatch):
    monkeypatch.setattr(functional, "_zeros", {})
    Wx, R, b, _ = random_inputs("lstm", 2, 3, 1, 8, torch.float32).tensors().values()
    with torch.inference_mode():
        expected, _ = flashrnn(Wx, R, b, backend="triton")
    states, _ = flashrnn(Wx, R, b, backend="triton")
    states.sum().backward()
    assert torch.equal(states, expected)


@needs_triton
def test_gradient_of_a_gradient_is_refused(interpreter):
    inputs = random_inputs("lstm", 2, 3, 1, 8, torch.float32)
    states, _ = call("lstm", inputs, backend="triton")
    (d_Wx,) = torch.autograd.grad(states.sum(), inputs.Wx, create_graph=True)
    with pytest.raises(NotImplementedError, match="'triton' has no second derivative"):
        torch.autograd.grad(d_Wx.sum(), inputs.R)


# Plans


def problem(kind, D, dtype):
    return Problem(resolve(kind), 16, 8, 2, D, dtype, torch.device("cuda"))


@pytest.mark.parametrize("shared_memory", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plans_cover_every_head_up_to_128(dtype, exact, shared_memory):
    for kind in BUILT_IN:
        for D in range(1, 129):
            plan = plan_scan(problem(kind, D, dtype), exact, shared_memory)
            assert isinstance(plan, ScanPlan), plan
            assert plan.DD >= D and plan.DD & (plan.DD - 1) == 0 and 1 <= plan.warps <= 16


def test_a_larger_head_is_refused_with_the_reason():
    assert "a head of 129 units; it takes up to 128" in plan_scan(
        problem("lstm", 129, torch.bfloat16), False, 227 * 1024
    )
