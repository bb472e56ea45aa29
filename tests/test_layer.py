"""A layer as one node of autograd: the numbers of its parts, one node, and its errors."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from flashrnn import FlashRNNConfig, flashrnn, recurrent_layer
from flashrnn.backends import library
from tests.kernels.test_triton import interpreter, needs_triton  # noqa: F401
from tests.layers import NAMES, and_gradients, layer_inputs, results, two_nodes
from tests.problems import BUILT_IN, random_weights, relative_error, sparse
from tests.sequences import KINDS, random_ragged


@pytest.fixture(params=["vanilla", pytest.param("triton", marks=needs_triton)])
def backend(request, interpreter):  # noqa: F811
    return request.param


@settings(max_examples=10, deadline=None)
@given(
    function=st.sampled_from([*BUILT_IN, sparse]),
    sizes=st.tuples(*[st.integers(0, 3)] * 2, st.integers(0, 5), st.integers(1, 2)),
    D=st.sampled_from([1, 5, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    asked=st.sets(st.sampled_from(NAMES), min_size=1),
    seed=st.integers(0, 99),
)
@needs_triton
@pytest.mark.usefixtures("interpreter")
def test_the_bits_are_those_of_the_two_parts(function, sizes, D, dtype, asked, seed):
    """Of every result and gradient, whichever gradients are asked for, also of empty batches."""
    inputs = layer_inputs(function, *sizes, D, dtype, seed)
    for leaf, name in zip(inputs, NAMES, strict=True):
        leaf.requires_grad_(name in asked)
    given = results(recurrent_layer, inputs, asked, function, "triton")
    assert given[0].grad_fn.name() == given[1].grad_fn.name() == "LayerBackward"
    expected = results(two_nodes, inputs, asked, function, "triton")
    for found, true in zip(given, expected, strict=True):
        torch.testing.assert_close(found, true, rtol=0, atol=0, equal_nan=True)


@needs_triton
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("kind", [KINDS[2], *KINDS[-2:]], ids=str)
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("backend", ["triton", "vanilla"])
def test_options_of_sequences(backend, kind, rank):
    """The bits are those of the two parts, also of a packed x [total, I]."""
    packed = kind.get("ragged") == "packed"
    if rank == 2 and not packed:
        pytest.skip("only a packed x may lack a dimension")
    case = random_ragged("lstm", 3, 5, 2, 8, dtype=torch.float32, **kind)
    _, R, b, states = case.inputs.tensors().values()
    _, W, *_ = layer_inputs("lstm", 3, 5, 7, 2, 8)
    features, rows = W.shape[-1], case.inputs.Wx.shape[3 - rank : 2]
    x = torch.randn(*rows, features, generator=torch.Generator().manual_seed(0)).requires_grad_()
    options = {"backend": backend, "reset_states": case.reset_states, **case.options}
    leaves = [x, W, R, b, states, case.reset_states]

    def and_gradients_of(outputs):
        asked = [leaf for leaf in leaves if leaf is not None]
        return *outputs, *torch.autograd.grad(outputs, asked, random_weights(outputs, seed=1))

    given = recurrent_layer(x, W, R, b, states, **options)
    if backend == "triton":
        assert given[1].grad_fn.name() == "LayerBackward"
    Wx = linear(x, W.flatten(0, 2)).unflatten(-1, W.shape[:3])
    expected = flashrnn(Wx, R, b, states, **options)
    for found, true in zip(and_gradients_of(given), and_gradients_of(expected), strict=True):
        torch.testing.assert_close(found, true, rtol=0, atol=0)


def test_weights_of_torch_nn_fit_without_a_copy(backend):
    lstm = torch.nn.LSTM(7, 6, batch_first=True)
    x = torch.randn(3, 4, 7, requires_grad=True)
    W, R = lstm.weight_ih_l0.view(4, 1, 6, 7), lstm.weight_hh_l0.view(4, 1, 6, 6)
    states, last = recurrent_layer(
        x, W, R, (lstm.bias_ih_l0 + lstm.bias_hh_l0).view(4, 1, 6), backend=backend
    )
    h, (last_h, last_c) = lstm(x)
    torch.testing.assert_close(states[0].flatten(2), h, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last[:, :, 0, 0], torch.cat([last_h, last_c]), rtol=1e-5, atol=1e-6)
    leaves = [x, *lstm.parameters()]
    weight = torch.randn_like(h)
    given = torch.autograd.grad(states[0].flatten(2), leaves, weight)
    for found, true in zip(given, torch.autograd.grad(h, leaves, weight), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layout",
    ["time-major", *(pytest.param(x, marks=pytest.mark.slow) for x in ("sliced", "expanded"))],
)
def test_x_of_any_strides(backend, layout):
    inputs = layer_inputs("gru", 3, 4, 5, 1, 8)
    leaf = {
        "time-major": torch.randn(4, 3, 5),
        "sliced": torch.randn(3, 4, 9),
        "expanded": torch.randn(5),
    }[layout].requires_grad_()
    x = {
        "time-major": lambda: leaf.transpose(0, 1),
        "sliced": lambda: leaf[..., 2:7],
        "expanded": lambda: leaf.expand(3, 4, 5),
    }[layout]()
    runs = []
    for one in (x, x.contiguous()):
        outputs = recurrent_layer(one, *inputs[1:], function="gru", backend=backend)
        weights = random_weights(outputs, seed=1)
        runs.append([*outputs, *torch.autograd.grad(outputs, [leaf, *inputs[1:]], weights)])
    for found, true in zip(*runs, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)


def test_time_major_x_is_not_copied(monkeypatch):
    """A batch of sequences with time first is multiplied in the order in which it lies."""
    multiplied = []

    def noting(x, *weights):
        multiplied.append(x.data_ptr())
        return linear(x, *weights)

    monkeypatch.setattr(library, "linear", noting)
    x, *others = layer_inputs("lstm", 3, 2, 5, 1, 8)
    time_major = x.detach().transpose(0, 1).contiguous()
    states, _ = recurrent_layer(time_major.transpose(0, 1), *others, backend="vanilla")
    assert multiplied == [time_major.data_ptr()]
    torch.testing.assert_close(states, two_nodes(x, *others, "lstm", "vanilla")[0])


@pytest.mark.parametrize("config", [None, FlashRNNConfig(dtype="float16")])
def test_autocast(backend, config):
    """The product and the scan are in its dtype, or the config's; gradients in the inputs'."""
    inputs = layer_inputs("lstm", 3, 2, 5, 1, 8)
    dtype = torch.bfloat16 if config is None else torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = recurrent_layer(*inputs, "lstm", backend, config=config)
    given = and_gradients(outputs, inputs)
    cast = [leaf.detach().to(dtype).requires_grad_() for leaf in inputs[:4]] + inputs[4:]
    expected = results(two_nodes, cast, NAMES, "lstm", backend)
    assert given[0].dtype == dtype and given[1].dtype == torch.float32
    for found, true, leaf in zip(given, expected, [None, None, *inputs], strict=True):
        if leaf is not None:
            assert found.dtype == leaf.dtype == torch.float32
        torch.testing.assert_close(found, true.to(found.dtype), rtol=0, atol=0)


def test_autocast_is_ignored_where_the_config_says_so(backend):
    inputs = layer_inputs("lstm", 3, 2, 5, 1, 8)
    config = FlashRNNConfig(enable_automatic_mixed_precision=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = recurrent_layer(*inputs, "lstm", backend, config=config)
    expected = results(two_nodes, inputs, NAMES, "lstm", backend)
    assert all(map(torch.equal, and_gradients(outputs, inputs), expected))


@needs_triton
@pytest.mark.usefixtures("interpreter")
def test_a_fused_backward_pass_within_autocast_is_in_the_dtype_of_the_forward():
    inputs = layer_inputs("lstm", 3, 2, 5, 1, 8)
    outputs = recurrent_layer(*inputs, backend="triton")
    loss = outputs[0].square().sum()
    x, W = inputs[:2]
    expected = torch.autograd.grad(loss, [x, W], retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, torch.autograd.grad(loss, [x, W]), expected))


@needs_triton
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("returned", ["all", "h", "last"])
@pytest.mark.parametrize("frozen", [(), ("R", "b", "states")], ids=str)
def test_a_fused_node_is_not_differentiated_twice(returned, frozen):
    """An error, and no derivative without a part of it, whatever a graph of the gradient reads."""
    inputs = layer_inputs("lstm", 2, 3, 4, 1, 8)
    for leaf, name in zip(inputs, NAMES, strict=True):
        leaf.requires_grad_(name not in frozen)
    trained = [leaf for leaf in inputs if leaf.requires_grad]
    for asked in (trained, inputs[:1], inputs[1:2]):
        _, last = recurrent_layer(*inputs, backend="triton", return_states=returned)
        (first, *_) = torch.autograd.grad(last.sum(), asked, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(first.square().sum(), inputs[:2], allow_unused=True)


def test_vanilla_is_differentiated_twice():
    inputs = [x.detach().double().requires_grad_() for x in layer_inputs("gru", 2, 2, 2, 1, 2)]

    def layer(*leaves):
        return recurrent_layer(*leaves, function="gru", backend="vanilla")

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


@needs_triton
@pytest.mark.usefixtures("interpreter")
def test_batched_gradients():
    """vmap over the backward pass, as torch.autograd's is_grads_batched has it."""
    inputs = layer_inputs("gru", 2, 3, 4, 1, 8)
    weights = torch.randn(3, 1, 2, 3, 1, 8)
    outputs, _ = recurrent_layer(*inputs, function="gru", backend="triton")
    given = torch.autograd.grad(outputs, inputs, weights, is_grads_batched=True, retain_graph=True)
    for k, weight in enumerate(weights):
        expected = torch.autograd.grad(outputs, inputs, weight, retain_graph=True)
        for found, true in zip(given, expected, strict=True):
            torch.testing.assert_close(found[k], true, rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.usefixtures("interpreter")
def test_tensors_that_kernels_cannot_read_go_through_two_nodes():
    """Here a view whose memory has other values; the numbers are right all the same."""
    x, *others = layer_inputs("lstm", 2, 2, 4, 1, 8)
    expected = results(recurrent_layer, [-x.detach().requires_grad_(), *others], ["W"], "lstm")
    negated = torch._neg_view(x.detach())
    outputs = recurrent_layer(negated, *others, backend="triton")
    assert outputs[0].grad_fn.name() != "LayerBackward"
    given = and_gradients(outputs, [negated, *others], ["W"])
    for found, true in zip(given, expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)


def test_transforms_take_vanilla():
    inputs = [x.detach() for x in layer_inputs("elman", 2, 3, 4, 1, 8)]

    def loss(*leaves):
        return recurrent_layer(*leaves, function="elman")[0].square().sum()

    given = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(*inputs)
    leaves = [x.requires_grad_() for x in inputs]
    for found, true in zip(given, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(found, true)


@needs_triton
@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_a_compiler_sees_the_product_and_the_scan():
    torch.compiler.reset()
    seen = []

    def remember(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    inputs = layer_inputs("lstm", 2, 3, 4, 1, 8)
    compiled = torch.compile(recurrent_layer, backend=remember, fullgraph=True)
    given = results(compiled, inputs, NAMES, "lstm", "triton")
    assert any("linear" in name for name in seen) and any("scan" in name for name in seen)
    expected = results(recurrent_layer, inputs, NAMES, "lstm", "triton")
    assert all(map(torch.equal, given, expected))


@needs_triton
@pytest.mark.usefixtures("interpreter")
def test_hooks_on_saved_tensors_and_two_backward_passes():
    """What the node keeps passes through the hooks, Wx is no part of it, and it may run twice."""
    inputs = layer_inputs("lstm", 2, 3, 4, 1, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.shape) or x.clone(), lambda x: x
    ):
        outputs = recurrent_layer(*inputs, backend="triton")
    x, W, R, _, states = (tuple(leaf.shape) for leaf in inputs)
    gates = (2, 3, 4, 1, 8)
    assert sorted(kept) == sorted([x, W, R, states, tuple(outputs[0].shape), gates])
    loss = outputs[0].square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, inputs)))


@needs_triton
@pytest.mark.usefixtures("interpreter")
def test_no_gradient_is_asked_for_nothing_is_kept():
    inputs = layer_inputs("lstm", 2, 3, 4, 1, 8)
    expected = recurrent_layer(*inputs, backend="triton")
    with torch.no_grad():
        given = recurrent_layer(*inputs, backend="triton")
    assert all(map(torch.equal, given, expected)) and given[0].grad_fn is None


def test_initial_states_are_those_of_the_config(backend):
    inputs = layer_inputs("lstm", 2, 3, 4, 1, 8)
    config = FlashRNNConfig(initial_val=(0.5, -1.0))
    given, _ = recurrent_layer(*inputs[:4], backend=backend, config=config)
    start = torch.tensor([0.5, -1.0]).view(2, 1, 1, 1, 1).expand(2, 2, 1, 1, 8)
    expected, _ = recurrent_layer(*inputs[:4], start, backend=backend)
    assert relative_error(given, expected) == 0


@pytest.mark.parametrize(
    ("replaced", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "x is list; accepted is a torch.Tensor"),
        ({"x": torch.zeros(3, 5)}, ValueError, "x has shape (3, 5); accepted are 3 dimensions"),
        (
            {"W": torch.zeros(64, 5)},
            ValueError,
            "W has shape (64, 5); accepted are 4 dimensions, [Gw, N, D, I]",
        ),
        ({"W": torch.zeros(3, 2, 8, 5)}, ValueError, "W holds 3 gates; lstm takes 4 there: i, f"),
        (
            {"W": torch.zeros(4, 2, 9, 5)},
            ValueError,
            "W has shape (4, 2, 9, 5), 2 heads of 9 units, and R (4, 2, 8, 8), 2 of 8; accepted",
        ),
        (
            {"W": torch.zeros(4, 2, 8, 6)},
            ValueError,
            "x has shape (3, 4, 5), 5 features, and W (4, 2, 8, 6), for 6; accepted are",
        ),
        ({"W": torch.zeros(4, 0, 8, 5)}, ValueError, "0 heads of 8 units"),
        ({"R": torch.zeros(4, 2, 8, 9)}, ValueError, "R has shape (4, 2, 8, 9); with this input"),
        ({"states": torch.zeros(2, 3, 2, 8)}, ValueError, "5 dimensions, [S, B, 1, N, D]"),
        ({"W": torch.zeros(4, 2, 8, 5).half()}, TypeError, "x torch.float32, W torch.float16"),
        ({"W": torch.zeros(4, 2, 8, 5, device="meta")}, ValueError, "x on cpu, W on meta"),
        ({"config": 3}, TypeError, "config is int"),
        ({"backend": None}, TypeError, "backend is NoneType"),
    ],
)
def test_refused(replaced, error, words):
    arguments = dict(zip(NAMES, layer_inputs("lstm", 3, 4, 5, 2, 8), strict=True))
    with pytest.raises(error, match=re.escape(words)):
        recurrent_layer(**{**arguments, **replaced})


def test_an_input_whose_rows_lie_evenly_is_not_copied(monkeypatch):
    """A slice of features is multiplied as it lies; one that is turned by time is copied first."""
    copied = []

    def contiguous(x):
        copied.append(x)
        return x.contiguous()

    monkeypatch.setattr(library, "contiguous", contiguous)
    d_Wx, W = torch.randn(3, 4, 2, 1, 5), torch.randn(10, 6)
    sliced = torch.randn(3, 4, 9)[..., :6]
    turned = sliced.transpose(0, 1).contiguous().transpose(0, 1)
    expected = torch.einsum("btgnd,bti->gndi", d_Wx, sliced).view(10, 6)
    for x, copies in ((sliced, 0), (turned, 1)):
        _, d_W = library.factors_gradients(d_Wx, x, W, needs_x=False, needs_W=True)
        torch.testing.assert_close(d_W, expected)
        assert len(copied) == copies
