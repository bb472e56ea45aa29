"""Calls like one before, and their gradients, by what their backend has kept of that one."""

from typing import NamedTuple

import pytest
import torch

from flashrnn import FlashRNNConfig, calls, flashrnn, nn, padded, recurrent_layer
from flashrnn.backends import cuda_fused, kept_calls, library, steps
from flashrnn.backends.fused import plans, repeats
from flashrnn.kernels import few_rows, registry, source
from tests.emulation import emulation, fused_emulation, needs_compiler  # noqa: F401
from tests.fused import poisoned  # noqa: F401
from tests.layers import NAMES, layer_inputs
from tests.problems import random_inputs
from tests.steps import by_steps, forget

pytestmark = needs_compiler
DTYPES = torch.bfloat16, torch.float32


@pytest.fixture
def runs(monkeypatch, fused_emulation, poisoned):  # noqa: F811
    """Which calls were repeated: whether each had its results."""
    found, run = [], repeats.Repeated.run

    def noting(self, given):
        made = run(self, given)
        found.append(made is not None)
        return made

    monkeypatch.setattr(repeats.Repeated, "run", noting)
    return found


def thrice(call, runs, repeats=True):
    """Its results the first time, which later ones have to equal. The first call is found to fit;
    of the second something is kept."""
    first, second, third = call(), call(), call()
    assert (runs and all(runs)) if repeats else not runs
    for others in (second, third):
        for one, other in zip(first, others, strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride()
            assert one.dtype == other.dtype and (
                one.data_ptr() != other.data_ptr() or not one.numel()
            )
    return first


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 4, 2, 24), (2, 3, 1, 136)], ids=str)
@pytest.mark.parametrize("returned", ["all", "h", "last"])
@pytest.mark.parametrize("start", ["none", "given", "one"])
def test_a_call(runs, dtype, sizes, returned, start):
    given = random_inputs("lstm", *sizes, dtype)
    Wx, R, b, states = (x.detach() for x in given.tensors().values())
    states = {"none": None, "given": states, "one": states[:, :1]}[start]
    options = {"backend": "cuda_fused", "return_states": returned}
    thrice(lambda: flashrnn(Wx, R, b, states, **options), runs)
    # Another start is another call, with the same launches.
    if states is not None:
        found, right = (
            flashrnn(Wx, R, b, x, **options)[1] for x in (states + 1, (states + 1).clone())
        )
        assert torch.equal(found, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("D", [20, 136])
def test_a_layer(runs, dtype, kind, D):
    leaves = [x.detach() for x in layer_inputs(kind, 3, 4, 9, 1, D, dtype)]
    by_time = leaves[0].transpose(0, 1).contiguous().transpose(0, 1)
    for x in (leaves[0], by_time):
        runs.clear()
        thrice(lambda x=x: recurrent_layer(x, *leaves[1:], kind, "cuda_fused"), runs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "RNN", "GRU"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_module(runs, dtype, kind, batch_first, bias):
    layer = getattr(nn, kind)(9, 24, batch_first=batch_first, bias=bias, backend="cuda_fused")
    layer, x = layer.to(dtype), torch.randn(5, 4, 9, dtype=dtype)

    def call(x=x):
        with torch.no_grad():
            h, last = layer(x)
            return [h, *(last if kind == "LSTM" else [last])]

    thrice(call, runs)
    # In place, each by itself.
    first = call()
    copies = [x.clone() for x in first]
    first[0].zero_()
    assert torch.equal(first[1], copies[1])
    with torch.no_grad():
        layer.weight_hh_l0 += 1
    assert not torch.equal(call()[0], copies[0])


def differentiated(call, leaves):
    """What a call returns, and the gradients of its first result and of all of them."""

    def both():
        outputs = call()
        weights = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in outputs]
        found = [*outputs]
        for k in (1, len(outputs)):
            given = outputs[:k], leaves, weights[:k]
            found += torch.autograd.grad(*given, retain_graph=True, materialize_grads=True)
        return [x.detach() for x in found]

    return both


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [24, 136])
@pytest.mark.parametrize("start", ["none", "given", "one"])
def test_gradients_of_a_call(runs, dtype, D, start):
    """Of one start for all sequences, too."""
    leaves = [*random_inputs("lstm", 3, 4, 2, D, dtype).tensors().values()]
    states = {"none": None, "given": leaves[3], "one": leaves[3][:, :1]}[start]
    leaves = leaves if start != "none" else leaves[:3]
    options = {"backend": "cuda_fused"}
    thrice(differentiated(lambda: flashrnn(*leaves[:3], states, **options), leaves), runs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("D", [20, 136])
@pytest.mark.parametrize("needed", [NAMES, ("W", "b"), ("x",), ("R",)], ids=str)
def test_gradients_of_a_layer(runs, dtype, kind, D, needed):
    leaves = layer_inputs(kind, 3, 4, 9, 1, D, dtype)
    for leaf, name in zip(leaves, NAMES, strict=True):
        leaf.requires_grad_(name in needed)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    options = {"function": kind, "backend": "cuda_fused", "return_states": "h"}
    thrice(differentiated(lambda: recurrent_layer(*leaves, **options), asked), runs)


@pytest.mark.parametrize("kind", ["LSTM", "RNN", "GRU"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=str)
def test_gradients_of_a_module(runs, kind, options):
    layer = getattr(nn, kind)(9, 24, **options, backend="cuda_fused").bfloat16()
    x = torch.randn(5, 4, 9, dtype=torch.bfloat16, requires_grad=True)

    def call():
        h, last = layer(x)
        return [h, *(last if kind == "LSTM" else [last])]

    thrice(differentiated(call, [x, *layer.parameters()]), runs)


@pytest.fixture(params=["all", "gradients"])
def by_library(request, monkeypatch, runs):
    """The library multiplies, as it does where there are many rows."""
    monkeypatch.setattr(few_rows, "takes", lambda *_: False)
    if request.param == "all":
        monkeypatch.setattr(few_rows, "takes_product", lambda *_: False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("D", [20, 24, 136])
@pytest.mark.parametrize("needed", [(), NAMES, ("W", "b"), ("x",), ("R",)], ids=str)
@pytest.mark.usefixtures("by_library")
def test_a_layer_by_the_library(runs, dtype, kind, D, needed):
    """And its gradients, those that are needed; of a zero start, too."""
    leaves = layer_inputs(kind, 3, 4, 9, 1, D, dtype)
    for leaf, name in zip(leaves, NAMES, strict=True):
        leaf.requires_grad_(name in needed)
    for given in (leaves, leaves[:-1]):
        asked = [leaf for leaf in given if leaf.requires_grad]
        options = {"function": kind, "backend": "cuda_fused", "return_states": "h"}

        def call(given=given, options=options):
            return recurrent_layer(*given, **options)

        runs.clear()
        thrice(differentiated(call, asked) if needed else call, runs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("D", [24, 136])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=str)
@pytest.mark.usefixtures("by_library")
def test_a_module_by_the_library(runs, dtype, kind, D, options):
    layer = getattr(nn, kind)(9, D, **options, backend="cuda_fused").to(dtype)
    x = torch.randn(5, 4, 9, dtype=dtype, requires_grad=True)

    def call():
        h, last = layer(x)
        return [h, *(last if kind == "LSTM" else [last])]

    found = thrice(differentiated(call, [x, *layer.parameters()]), runs)
    theirs = getattr(torch.nn, kind)(9, D, **options)
    theirs.load_state_dict(layer.state_dict())
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found[0].float(), theirs(x.float())[0], rtol=limit, atol=limit)


def test_nothing_is_multiplied_twice(runs, monkeypatch):
    """Where a tensor begins at an address that launches that are kept cannot take."""
    monkeypatch.setattr(few_rows, "takes_product", lambda *_: False)
    multiplied, linear = [], library.linear
    monkeypatch.setattr(library, "linear", lambda *x: multiplied.append(x) or linear(*x))
    x, W, R, b, _ = (x.detach() for x in layer_inputs("lstm", 3, 4, 9, 1, 24, torch.bfloat16))
    shifted = torch.empty(R.numel() + 1, dtype=R.dtype)[1:].view(R.shape).copy_(R)
    for given, done in ((R, [True]), (shifted, [])):
        thrice(lambda given=given: recurrent_layer(x, W, given, b, backend="cuda_fused"), [True])
        multiplied.clear()
        runs.clear()
        recurrent_layer(x, W, given, b, backend="cuda_fused")
        assert [each for each in runs if each] == done and len(multiplied) == 1


@pytest.mark.usefixtures("emulation")
def test_backends_that_keep_nothing_prepare_nothing(monkeypatch):
    monkeypatch.setattr(kept_calls, "without_memory", lambda tensors: pytest.fail("prepared"))
    layer, x = nn.LSTM(9, 24, backend="cuda"), torch.randn(5, 4, 9)
    for _ in range(3):
        layer(x)
    assert not calls.kept


@pytest.mark.usefixtures("by_library")
def test_autocast_is_none_of_a_product_that_is_kept(runs):
    """A dtype that is asked for holds within autocast, too."""
    leaves = [x.detach() for x in layer_inputs("lstm", 3, 4, 9, 1, 24, torch.float32)]
    options = {"backend": "cuda_fused", "dtype": torch.float32}

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return recurrent_layer(*leaves, **options)

    found = thrice(call, runs)
    assert torch.equal(found[0], recurrent_layer(*leaves, **options)[0])


def test_a_graph_of_the_gradient_and_a_hook_are_none_of_it(runs):
    """What is kept is for launches alone."""
    leaves = layer_inputs("lstm", 3, 4, 9, 1, 20, torch.float32)

    def call():
        return recurrent_layer(*leaves, backend="cuda_fused", return_states="h")[0]

    plain = [torch.autograd.grad(call().sum(), leaves) for _ in range(3)][-1]
    graph = torch.autograd.grad(call().sum(), leaves, create_graph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        hooked = torch.autograd.grad(call().sum(), leaves)
    for one, other, third in zip(plain, graph, hooked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert torch.equal(one, third)
    with pytest.raises(NotImplementedError, match="second derivative"):
        graph[0].sum().backward()


@pytest.mark.parametrize("trained", [False, True])
def test_each_call_has_its_own_start(runs, trained):
    """Starts of a config are no part of what is kept, and are refused where they do not fit."""
    leaves = [*random_inputs("lstm", 3, 4, 2, 24, torch.float32).tensors().values()][:3]

    def call(values, backend="cuda_fused"):
        config = FlashRNNConfig(initial_val=values)
        with torch.set_grad_enabled(trained):
            return flashrnn(*leaves, backend=backend, config=config)[0]

    for values in (
        (0.5, 0.5),
        (0.5, 0.5),
        (0.5, 0.5),
        (-0.25, -0.25),
        (1.0, 2.0),
        (0.0, 0.0),
        (1.0, 2.0),
    ):
        for _ in range(2):
            found, right = call(values), call(values, "vanilla")
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert all(runs) and len(runs) > 5
    with pytest.raises(ValueError, match="initial_val"):
        call((1.0, 2.0, 3.0))


@pytest.mark.parametrize("of", ["strided", "expanded"])
def test_biases_that_are_copied(runs, of):
    layer = nn.LSTM(9, 24, backend="cuda_fused")
    bias = torch.randn(192)[::2] if of == "strided" else torch.randn(1).expand(96)
    layer.bias_ih_l0 = torch.nn.Parameter(bias)
    theirs, x = torch.nn.LSTM(9, 24), torch.randn(5, 4, 9)
    theirs.load_state_dict(layer.state_dict())
    for _ in range(3):
        torch.testing.assert_close(layer(x)[0], theirs(x)[0], rtol=1e-4, atol=1e-5)
    assert len(runs) == 2 and all(runs)


def test_keeping_takes_no_memory(runs, monkeypatch):
    """The results of the second call are all that it allocates."""
    leaves = layer_inputs("lstm", 3, 4, 9, 1, 20, torch.bfloat16)
    counted, new_empty = [], torch.Tensor.new_empty

    def counting(self, *sizes, **options):
        counted.append(self.device.type)
        return new_empty(self, *sizes, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", counting)
    counts = []
    for _ in range(2):
        counted.clear()
        recurrent_layer(*leaves, backend="cuda_fused")[0].sum().backward()
        counts.append(counted.count("cpu"))
    assert counts[1] <= counts[0]


def test_what_is_no_longer_current_is_kept_anew(runs, monkeypatch):
    given = random_inputs("lstm", 3, 4, 1, 24, torch.float32)
    Wx, R, b, _ = (x.detach() for x in given.tensors().values())
    thrice(lambda: flashrnn(Wx, R, b, backend="cuda_fused"), runs)
    monkeypatch.setattr(source, "precision_of", lambda problem: "tf32")
    runs.clear()
    thrice(lambda: flashrnn(Wx, R, b, backend="cuda_fused"), runs)


def test_each_call_asks_for_its_settings(runs, monkeypatch):
    """A kept call of float32 is not that of another precision."""
    given = random_inputs("lstm", 3, 4, 1, 24, torch.float32)
    Wx, R, b, _ = (x.detach() for x in given.tensors().values())

    def call():
        return flashrnn(Wx, R, b, backend="cuda_fused")

    first, _ = thrice(call, runs)
    monkeypatch.setattr(source, "precision_of", lambda problem: "tf32")
    before = len(runs)
    assert not torch.equal(call()[0], first) and len(runs) == before


def test_a_part_of_the_gpu_is_another(runs, monkeypatch):
    given = random_inputs("lstm", 2, 3, 1, 136, torch.bfloat16)
    Wx, R, b, _ = (x.detach() for x in given.tensors().values())
    thrice(lambda: flashrnn(Wx, R, b, backend="cuda_fused"), runs)
    part = plans.gpu_of(None)._replace(multiprocessors=40)
    monkeypatch.setattr(plans, "gpu_of", lambda problem: part)
    before = len(runs)
    flashrnn(Wx, R, b, backend="cuda_fused")
    assert len(runs) == before


def test_what_is_not_kept(runs, monkeypatch):
    """Calls of tensors that are copied or cast first."""
    given = random_inputs("lstm", 3, 4, 1, 136, torch.bfloat16)
    Wx, R, b, states = (x.detach() for x in given.tensors().values())
    turned = R.transpose(2, 3).contiguous().transpose(2, 3)
    cast = Wx.float(), R.float(), b.float(), states
    for arguments in ((Wx, turned, b), cast):

        def call(arguments=arguments):
            return flashrnn(*arguments, backend="cuda_fused", dtype=torch.bfloat16)

        thrice(call, runs, False)
    assert set(calls.kept.values()) <= {None}


class StepByStep(NamedTuple):
    """Which directions are computed so, and those of the calls that were repeated: backward?"""

    directions: tuple[bool, ...]
    repeated: list[bool]


@pytest.fixture(params=[(False,), (True,), (False, True)], ids=["forward", "backward", "both"])
def step_by_step(request, monkeypatch, runs):
    """``runs`` has these calls, too."""
    found, run = StepByStep(request.param, []), repeats._Steps.run

    def noting(self, given):
        found.repeated.append(self.plan.backward)
        runs.append(run(self, given))
        return runs[-1]

    monkeypatch.setattr(repeats._Steps, "run", noting)
    # The CPU has no product of 16 bits that it gives in float32.
    monkeypatch.setattr(steps, "multiply", lambda a, b, to: to.copy_(a.float() @ b.float()))
    by_steps(monkeypatch, request.param)
    yield found
    forget()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("lstm", torch.bfloat16), ("gru", torch.float32)], ids=str
)
@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("D", [136, 133])
@pytest.mark.parametrize("needed", [NAMES, ("x",), ("W", "b"), ("R",)], ids=str)
def test_step_by_step(runs, step_by_step, monkeypatch, dtype, kind, multiplies, D, needed):
    """With and without gradients, and a layer's product by kernels and by the library; heads of 133
    units with more of them."""
    monkeypatch.setattr(
        cuda_fused, "padded_units", lambda problem, _: registry.wide_units(problem, problem.steps)
    )
    if not multiplies:
        monkeypatch.setattr(few_rows, "takes_product", lambda *_: False)
    leaves = dict(zip(NAMES, layer_inputs(kind, 3, 4, 9, 1, D, dtype), strict=True))
    leaves["Wx"] = random_inputs(kind, 3, 4, 1, D, dtype).Wx
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in needed or (name == "Wx" and "x" in needed))
    options = {"function": kind, "backend": "cuda_fused", "return_states": "h"}
    for function, names in ((recurrent_layer, NAMES), (flashrnn, ("Wx", *NAMES[2:]))):
        given = [leaves[name] for name in names]
        asked = [leaf for leaf in given if leaf.requires_grad]

        def call(function=function, given=given):
            return function(*given, **options)

        runs.clear()
        step_by_step.repeated.clear()
        thrice(differentiated(call, asked), runs)
        assert {*step_by_step.repeated} == {*step_by_step.directions}
        runs.clear()
        step_by_step.repeated.clear()
        with torch.no_grad():
            thrice(call, runs)
        assert {*step_by_step.repeated} == {*step_by_step.directions} - {True}
    forwards = {type(each.forward) for each in calls.kept.values()}
    assert (padded._Repeated in forwards) == (D == 133)


def test_modules_step_by_step(runs, step_by_step):
    for kind in ("LSTM", "GRU"):
        layer = getattr(nn, kind)(9, 136, backend="cuda_fused").bfloat16()
        x = torch.randn(5, 4, 9, dtype=torch.bfloat16, requires_grad=True)

        def call(layer=layer, x=x):
            return layer(x)[:1]

        runs.clear()
        step_by_step.repeated.clear()
        thrice(differentiated(call, [x, *layer.parameters()]), runs)
        assert {*step_by_step.repeated} == {*step_by_step.directions}


@pytest.mark.parametrize("changed", ["products", "precision", "GPU"])
def test_what_steps_rest_on(step_by_step, monkeypatch, changed):
    """It may change between forward and backward."""
    leaves = layer_inputs("lstm", 3, 4, 9, 1, 136, torch.float32)

    def call():
        return recurrent_layer(*leaves, backend="cuda_fused", return_states="h")[0]

    upstream = torch.ones(1, 3, 4, 1, 136)
    for _ in range(3):
        torch.autograd.grad(call(), leaves, upstream)
    assert {*step_by_step.repeated} == {*step_by_step.directions}
    output = call()
    step_by_step.repeated.clear()
    if changed == "products":
        monkeypatch.setattr(steps, "may_be_faster", lambda problem: False)
    elif changed == "precision":
        monkeypatch.setattr(source, "precision_of", lambda problem: "tf32")
    else:
        part = plans.gpu_of(None)._replace(multiprocessors=40)
        monkeypatch.setattr(plans, "gpu_of", lambda problem: part)
    torch.autograd.grad(output, leaves, upstream)
    call()
    assert not step_by_step.repeated


def test_many_sequences_of_a_wide_head(runs, monkeypatch):
    """Unless settings change by which they may be computed in steps."""
    given = random_inputs("lstm", 3, 4, 1, 136, torch.bfloat16)
    Wx, R, b, _ = (x.detach() for x in given.tensors().values())
    monkeypatch.setattr(steps, "FEWEST", 1)
    thrice(lambda: flashrnn(Wx, R, b, backend="cuda_fused"), runs)
    monkeypatch.setattr(steps, "may_be_faster", lambda problem: False)
    before = len(runs)
    flashrnn(Wx, R, b, backend="cuda_fused")
    assert len(runs) == before


def test_a_tensor_that_begins_elsewhere(runs):
    given = random_inputs("lstm", 3, 4, 2, 24, torch.bfloat16)
    Wx, R, b, _ = (x.detach() for x in given.tensors().values())
    expected = thrice(lambda: flashrnn(Wx, R, b, backend="cuda_fused"), runs)
    shifted = torch.empty(Wx.numel() + 1, dtype=Wx.dtype)[1:].view(Wx.shape).copy_(Wx)
    found = flashrnn(shifted, R, b, backend="cuda_fused")
    assert runs[-1] is False
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
