"""Heads computed with more units than they have, whose rows are then whole pieces of 16 bytes."""

import math
from functools import cache

import pytest
import torch

from flashrnn import FlashRNNConfig, Stepper, ahead, cell, flashrnn, nn, padded, recurrent_layer
from flashrnn.backends import cuda_fused
from flashrnn.backends import padding as padding_launches
from flashrnn.backends.fused import plans
from flashrnn.cells import resolve
from flashrnn.cells.bounds import stays_finite
from flashrnn.kernels import registry
from tests.emulation import fused_emulation, needs_compiler  # noqa: F401
from tests.gpus import H200, planned
from tests.layers import NAMES, layer_inputs, results
from tests.nn.against import tensors
from tests.patterns import bounded_follows_vanilla
from tests.problems import call, gradients, random_inputs, random_weights, relative_error
from tests.sequences import KINDS, gradients_of, random_ragged

EPSILON = {torch.bfloat16: 2**-8, torch.float32: 2**-20}


@pytest.fixture
def padding(monkeypatch, fused_emulation):  # noqa: F811
    """Heads are computed with units in eights. Says with how many calls were."""
    computed = []
    forward = cuda_fused.forward

    def noting(problem, *arguments, **further):
        computed.append(problem.D)
        return forward(problem, *arguments, **further)

    @cache
    def units_for(problem, steps, most_steps, precision, gpu, features):
        return -(-problem.D // 8) * 8 if steps > 1 else problem.D

    monkeypatch.setattr(registry, "is_small", lambda D: D <= 20)
    monkeypatch.setattr(registry, "padded_units", units_for)
    monkeypatch.setattr(cuda_fused, "forward", noting)
    return computed


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru", "elman"])
@pytest.mark.parametrize("D", [21, 26])
def test_a_call(padding, kind, dtype, D):
    """Results and gradients, by the sizes that were asked for."""
    inputs = random_inputs(kind, 5, 4, 2, D, dtype)
    exact = inputs.to(torch.float64)
    outputs = call(kind, inputs, backend="cuda_fused")
    truth, plain = call(kind, exact, backend="vanilla"), call(kind, inputs, backend="vanilla")
    assert set(padding) == {-(-D // 8) * 8}
    assert all(output.is_contiguous() for output in outputs)
    found, right, near = (
        [*results, *gradients(results, of).values()]
        for results, of in ((outputs, inputs), (truth, exact), (plain, inputs))
    )
    for one, other, third in zip(found, right, near, strict=True):
        assert one.shape == other.shape
        allowed = 2 * relative_error(third, other) + EPSILON[dtype]
        assert relative_error(one, other) <= allowed


@needs_compiler
@pytest.mark.parametrize("asked", [("x",), ("W", "b"), NAMES], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_layer(padding, kind, asked):
    inputs = layer_inputs(kind, 5, 3, 9, 2, 21)
    for leaf, name in zip(inputs, NAMES, strict=True):
        leaf.requires_grad_(name in asked)
    given = results(recurrent_layer, inputs, asked, kind, "cuda_fused")
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in inputs]
    truth = results(recurrent_layer, exact, asked, kind, "vanilla")
    assert set(padding) == {24}
    for one, other in zip(given, truth, strict=True):
        assert one.shape == other.shape and relative_error(one, other) <= 1e-5


@needs_compiler
def test_a_layer_without_gradients(padding):
    inputs = [leaf.detach() for leaf in layer_inputs("lstm", 5, 3, 9, 2, 21)]
    given = recurrent_layer(*inputs, "lstm", "cuda_fused", return_states="h")
    truth = recurrent_layer(*inputs, "lstm", "vanilla", return_states="h")
    assert padding == [24]
    for one, other in zip(given, truth, strict=True):
        assert one.shape == other.shape and relative_error(one, other) <= 1e-5
        assert one.is_contiguous()


@needs_compiler
@pytest.mark.parametrize("asked", [(), NAMES], ids=str)
def test_a_layer_without_features(padding, asked):
    leaves = layer_inputs("lstm", 5, 4, 0, 2, 21)
    for leaf, name in zip(leaves, NAMES, strict=True):
        leaf.requires_grad_(name in asked)
    found, right = (
        recurrent_layer(*leaves, "lstm", backend) for backend in ("cuda_fused", "vanilla")
    )
    assert padding == [24]
    for one, other in zip(found, right, strict=True):
        assert relative_error(one, other) <= 1e-5
    if asked:
        gradients = (torch.autograd.grad(outputs[0].sum(), leaves) for outputs in (found, right))
        for one, other in zip(*gradients, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_results_changed_in_place_are_found_changed(padding):
    """Backward needs them, as a graph does to find the call."""
    inputs = random_inputs("lstm", 5, 4, 2, 21, torch.float32)
    states, _ = call("lstm", inputs, backend="cuda_fused")
    states.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        states.sum().backward()
    assert padding == [24]


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_recurrent_cut": True},
        {"gradient_recurrent_clipval": 0.01},
        {"forward_clipval": 0.3},
        {"initial_val": (0.5, -0.25)},
    ],
    ids=str,
)
def test_config(padding, options):
    """Clips and initial values also hold with additional units, of which a gradient's clip has
    none."""
    inputs, config = random_inputs("lstm", 5, 4, 2, 21, torch.float32), FlashRNNConfig(**options)
    if "initial_val" in options:
        inputs.states = None
    given = call("lstm", inputs, backend="cuda_fused", config=config)
    truth = call("lstm", inputs, backend="vanilla", config=config)
    leaves = [x for x in (inputs.Wx, inputs.R, inputs.b, inputs.states) if x is not None]
    weights = random_weights(given, seed=1)
    given, truth = (
        [*outputs, *torch.autograd.grad(outputs, leaves, weights, materialize_grads=True)]
        for outputs in (given, truth)
    )
    assert set(padding) == ({21} if "gradient_recurrent_clipval" in options else {24})
    for one, other in zip(given, truth, strict=True):
        assert one.shape == other.shape and relative_error(one, other) <= 1e-5


@needs_compiler
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_options_of_sequences(padding, kinds):
    """What resets go back to has units, too."""
    case = random_ragged("lstm", 5, 6, 2, 21, dtype=torch.float32, **kinds)
    outputs, truth = case.call("cuda_fused"), case.call("vanilla")
    assert set(padding) == {24}
    for one, other in zip(outputs, truth, strict=True):
        assert relative_error(one, other) <= 1e-5
    found, right = gradients_of(case, outputs), gradients_of(case, truth)
    for name, other in right.items():
        assert relative_error(found[name], other) <= 1e-5, name


@needs_compiler
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_module(padding, layers, batch_first):
    torch.manual_seed(0)
    ours = nn.LSTM(9, 21, layers, batch_first=batch_first, backend="cuda_fused")
    theirs = torch.nn.LSTM(9, 21, layers, batch_first=batch_first)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 5, 9)
    given, truth = tensors(ours(x)), tensors(theirs(x))
    assert padding == [24] * layers
    for one, other in zip(given, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    given[0].sum().backward()
    truth[0].sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def called(how):
    """States of a call, of a layer, or of torch.nn's kind of layer, and the leaves."""
    if how == "call":
        Wx, R, b = (torch.randn(size, requires_grad=True) for size in CALL)
        return flashrnn(Wx, R, b, backend="cuda_fused")[0], [Wx, R, b]
    if how == "layer":
        leaves = layer_inputs("lstm", 5, 4, 9, 1, 21)
        return recurrent_layer(*leaves, backend="cuda_fused", return_states="h")[0], leaves
    module, x = nn.LSTM(9, 21, backend="cuda_fused"), torch.randn(4, 5, 9, requires_grad=True)
    return module(x)[0], [x, *module.parameters()]


CALL = (5, 4, 4, 1, 21), (4, 1, 21, 21), (4, 1, 21)
HOW = ("call", "layer", "module")


@needs_compiler
@pytest.mark.parametrize("how", HOW)
def test_graphs_of_gradients_and_gradients_of_a_batch(padding, how):
    """Where nothing can be launched PyTorch's operations pad; a second derivative is refused."""
    output, leaves = called(how)
    upstream = torch.randn(3, *output.shape)
    plain = [torch.autograd.grad(output, leaves, one, retain_graph=True) for one in upstream]
    graph = torch.autograd.grad(output, leaves, upstream[0], create_graph=True)
    batch = torch.autograd.grad(output, leaves, upstream, retain_graph=True, is_grads_batched=True)
    assert set(padding) == {24}
    for k, found in enumerate(batch):
        torch.testing.assert_close(graph[k], plain[0][k])
        torch.testing.assert_close(found, torch.stack([one[k] for one in plain]))
    with pytest.raises(NotImplementedError, match="second derivative"):
        graph[0].sum().backward()


@needs_compiler
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("trained", [False, True])
def test_a_call_like_one_before(padding, monkeypatch, how, trained):
    """It has the bits of the first one, and so have its gradients."""
    found, run = [], padded._Repeated.run
    monkeypatch.setattr(
        padded._Repeated, "run", lambda *given: found.append(run(*given)) or found[-1]
    )
    runs = []
    for _ in range(3):
        torch.manual_seed(0)
        with torch.set_grad_enabled(trained):
            output, leaves = called(how)
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        given = torch.autograd.grad(output, leaves, weights) if trained else ()
        runs.append([output.detach(), *given])
        assert output.is_contiguous()
    assert len(found) >= (2 if trained else 1) and None not in found
    for others in runs[1:]:
        for one, other in zip(runs[0], others, strict=True):
            assert torch.equal(one, other) and one.shape == other.shape


@needs_compiler
@pytest.mark.parametrize("how", HOW)
def test_what_is_kept_may_lie_elsewhere(padding, how):
    """Hooks on saved tensors may copy them, and change their strides."""
    torch.manual_seed(0)
    output, leaves = called(how)
    weights = torch.randn(output.shape)
    expected = torch.autograd.grad(output, leaves, weights)

    def turned(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x.clone()

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(turned, lambda x: x):
        output, leaves = called(how)
    found = torch.autograd.grad(output, leaves, weights)
    assert set(padding) == {24}
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@needs_compiler
def test_a_step_has_the_bits_of_a_call(padding):
    """A single step is never padded."""
    inputs = random_inputs("gru", 5, 1, 2, 21, torch.bfloat16)
    Wx, R, b, states = (x.detach() for x in inputs.tensors().values())
    _, last = flashrnn(Wx, R, b, states, "gru", "cuda_fused")
    assert padding == [21]
    stepped = Stepper(R, b, "gru", "cuda_fused")(Wx[:, 0], states.squeeze(2))
    assert torch.equal(stepped, last.squeeze(2))


@needs_compiler
@pytest.mark.parametrize("kind", ["lstm", "gru", "elman"])
def test_finite_infinite_and_nan_where_vanilla_has_them(padding, kind):
    """The additional units make nothing NaN that is not."""
    bounded_follows_vanilla("cuda_fused", kind, 4, 3, 2, 21)
    assert set(padding) == {24}


@needs_compiler
@pytest.mark.parametrize("kind", ["lstm", "gru", "elman"])
def test_an_infinite_input_of_a_layer(padding, kind):
    """It makes gates infinite, which these cells bound."""
    inputs = [leaf.detach() for leaf in layer_inputs(kind, 5, 4, 9, 2, 21)]
    inputs[0][1, 1, 3] = math.inf
    given = recurrent_layer(*inputs, kind, "cuda_fused")
    truth = recurrent_layer(*inputs, kind, "vanilla")
    assert padding == [24]
    for one, other in zip(given, truth, strict=True):
        assert torch.equal(one.isnan(), other.isnan()) and not other.isnan().all()
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-4, atol=1e-5)


@cell(states=("h",), gates={"g": ("Wx", "R", "b")})
def halves(states, gates):
    """Its h is 1/2 where its gate is 0."""
    return (torch.sigmoid(gates[0]),)


@cell(states=("h",), gates={"g": ("Wx", "R", "b")})
def unbounded(states, gates):
    """Its h may be as large as its gate."""
    return (torch.relu(gates[0]),)


@cell(states=("h", "c"), gates={"g": ("Wx", "R", "b")})
def doubling(states, gates):
    """A state that is infinite after some steps."""
    c = 2 * states[1] + torch.tanh(gates[0])
    return torch.tanh(c), c


@cell(states=("h", "c"), gates={"g": ("Wx", "R", "b")})
def steep_at_zero(states, gates):
    """A slope that is infinite where a state is 0."""
    c = torch.sqrt(states[1]) + torch.sigmoid(gates[0])
    return torch.tanh(c), c


@cell(states=("h", "c"), gates={"g": ("Wx", "R", "b")})
def undefined_below_zero(states, gates):
    """NaN where a state is negative."""
    c = 0.5 * states[1] + torch.tanh(gates[0])
    return torch.tanh(c**1.5), c


@cell(states=("h", "c"), gates={"g": ("Wx", "R", "b")})
def undefined_at_zero(states, gates):
    """NaN where a state is 0."""
    c = 0.5 * states[1] + torch.sigmoid(gates[0])
    return torch.remainder(torch.tanh(gates[0]), torch.sign(states[1])), c


@cell(states=("h",), gates={"g": ("Wx", "R", "b")})
def multiplied(states, gates):
    """NaN where h is 0 and its gate is infinite."""
    return (torch.tanh(states[0] * gates[0]),)


REFUSED = (undefined_below_zero, undefined_at_zero, multiplied)


def test_cells_whose_states_and_slopes_stay_finite():
    kinds = ("lstm", "gru", "elman", "slstm", halves, unbounded, doubling, steep_at_zero)
    finite = [stays_finite(resolve(kind).traced, 512, 3e38) for kind in kinds]
    assert finite == [True, True, True, False, True, False, False, False]
    assert not any(stays_finite(kind.traced, 1, 3e38) for kind in REFUSED)
    # As many steps as a state takes to the largest number.
    assert stays_finite(doubling.traced, 32, 3e38) and not stays_finite(doubling.traced, 32, 65504)
    assert stays_finite(resolve("lstm").traced, 4096, 3e38)
    assert not stays_finite(resolve("lstm").traced, 4097, 3e38)


def units(kind, B, T, D, dtype=torch.bfloat16, precision="bfloat16", features=640):
    problem = planned(kind, B, 1, D, dtype)
    return registry.padded_units(problem, T, T, precision, H200, features)


def test_heads_that_are_padded():
    """Those whose calls take the GPU longer than the host, and less time with more units."""
    assert units("lstm", 1024, 64, 650) == 656 and units("lstm", 128, 4, 650) == 650
    assert units("gru", 4096, 64, 650) == 656
    assert units("lstm", 1024, 64, 650, torch.float32, "tf32") == 652
    # Few sequences of many steps.
    assert units("elman", 9, 988, 157) == 160 and units("elman", 9, 150, 157) == 157
    assert units("lstm", 8, 400, 1150) == 1152
    # A layer whose input's rows are whole pieces has less to gain by its products, and more weights
    # to copy; a call has Wx to copy.
    assert units("lstm", 64, 64, 1150, features=1151) == 1152
    assert units("lstm", 64, 64, 1150, features=16384) == 1150
    assert units("lstm", 256, 24, 650, features=651) == 656
    assert (
        units("lstm", 256, 24, 650, features=640) == units("lstm", 256, 24, 650, features=0) == 650
    )
    # So many as there are; small heads; states that may become infinite.
    assert units("lstm", 1024, 64, 1152) == 1152
    assert units("lstm", 4096, 64, 100) == 100
    assert units(unbounded, 1024, 640, 1150) == units("slstm", 1024, 64, 1150) == 1150
    assert units(halves, 1024, 640, 1150) == 1152


def test_calls_of_too_many_elements_are_not_padded(monkeypatch):
    problem = planned("lstm", 1024, 1, 650, torch.bfloat16)
    given = 650, "bfloat16", H200
    padded_units = cuda_fused._padded_units.__wrapped__
    assert padded_units(problem, *given) == 656
    monkeypatch.setattr(padding_launches, "too_large", lambda problem, features: True)
    assert padded_units(problem, *given) == 650


def test_without_gradients_there_is_less_to_compute_and_less_to_copy():
    problem = planned("elman", 9, 1, 157, torch.bfloat16, needs_gradient=False)
    given = "bfloat16", H200, 157
    assert registry.padded_units(problem, 350, 350, *given) == 160
    assert units("elman", 9, 350, 157) == 157


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("lstm,B=512,N=1,D=430,bfloat16", (430, 432)),
        # In float16 its states are known to stay finite for 1024 steps.
        ("lstm,B=512,N=1,D=430,float16", (430, 432)),
        ("elman,B=1230,N=1,D=843,tf32", (843, 844)),
    ],
)
def test_programs_compiled_ahead_are_those_of_calls(shape, sizes):
    """Of few steps and of many."""
    found = ahead._programs(shape, H200, "cuda_fused", False, None)
    texts = ["".join(parts.values()) for _, parts in found]
    for D in sizes:
        assert any(f"constexpr int D = {D};" in text for text in texts)
    # What tensors get their sizes by.
    assert sum("pad(CALL)" in text for text in texts) > 0


def test_steps_of_packed_sequences(monkeypatch):
    """Of lengths that only the GPU knows: the rows, shared equally."""
    monkeypatch.setattr(plans, "gpu_of", lambda problem: H200)
    asked = []

    def noting(problem, steps, most_steps, *others):
        asked.append((steps, most_steps))
        return problem.D

    monkeypatch.setattr(registry, "padded_units", noting)
    problem = planned("lstm", 1024, 1, 650, torch.bfloat16)._replace(ragged=True, packed=True)
    for T, longest in ((2048, None), (2048, 9), (1024, None), (2048, 0)):
        cuda_fused.padded_units(problem._replace(T=T, longest=longest), 650)
    assert asked == [(2, 2048), (9, 9), (1, 1024), (0, 0)]
