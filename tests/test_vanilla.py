"""The vanilla backend is the truth that every other one is held to, so it is held to torch.nn,
to finite differences, and to the contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flashrnn import FlashRNNConfig, available_functions, flashrnn, initial
from flashrnn.cells import resolve
from tests.problems import (
    BUILT_IN,
    Inputs,
    call,
    gradients,
    random_inputs,
    relative_error,
    sparse,
)

small_sizes = {
    "B": st.integers(0, 4),
    "T": st.integers(0, 6),
    "N": st.integers(1, 3),
    "D": st.integers(1, 5),
    "seed": st.integers(0, 2**31),
}


def step_by_step(function, inputs):
    """The equations of DESIGN's contract, one head, one gate and one step at a time."""
    kind = resolve(function)
    Wx, R, b, states = inputs.tensors().values()
    B, T, _, N, D = Wx.shape
    now = [states[s, :, 0] for s in range(len(kind.states))]
    seen = []
    for t in range(T):
        gates = []
        for gate in kind.gates:
            g = torch.zeros(B, N, D, dtype=Wx.dtype)
            if "Wx" in gate.sources:
                g = g + Wx[:, t, kind.gate_names("Wx").index(gate.name)]
            if "b" in gate.sources:
                g = g + b[kind.gate_names("b").index(gate.name)]
            if "R" in gate.sources:
                block = R[kind.gate_names("R").index(gate.name)]
                g = g + torch.einsum("ndp,bnp->bnd", block, now[0])
            gates.append(g)
        now = list(kind.step(tuple(now), tuple(gates)))
        seen.append(torch.stack(now))
    return torch.stack(seen, dim=2), torch.stack(now).unsqueeze(2)


@pytest.mark.parametrize("function", [*BUILT_IN, sparse], ids=str)
@settings(max_examples=25, deadline=None)
@given(sizes=st.fixed_dictionaries(small_sizes | {"B": st.integers(1, 4), "T": st.integers(1, 6)}))
def test_equals_the_equations(function, sizes):
    inputs = random_inputs(function, **sizes)
    expected = step_by_step(function, inputs)
    outputs = call(function, inputs)
    for given_, truth in zip(outputs, expected, strict=True):
        torch.testing.assert_close(given_, truth, rtol=1e-12, atol=1e-13)
    truth = gradients(expected, inputs)
    for name, gradient in gradients(outputs, inputs).items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-11, atol=1e-12)


def nn_weights(module, function, N, D):
    """Wx's linear layer, R and b out of a one-head torch.nn module (see README)."""
    weight_ih, weight_hh = module.weight_ih_l0, module.weight_hh_l0
    bias_ih, bias_hh = module.bias_ih_l0, module.bias_hh_l0
    if function == "gru":
        (r, z, n), (bias_r, bias_z, bias_n) = weight_hh.chunk(3), bias_hh.chunk(3)
        x_r, x_z, x_n = bias_ih.chunk(3)
        R, b = torch.stack([n, r, z]), torch.stack([bias_n, x_r + bias_r, x_z + bias_z, x_n])
    else:
        gates = {"lstm": 4, "elman": 1}[function]
        R, b = weight_hh.view(gates, D, D), (bias_ih + bias_hh).view(gates, D)
    return weight_ih, R.unsqueeze(1), b.unsqueeze(1)


@pytest.mark.parametrize(
    ("function", "kind"), [("lstm", nn.LSTM), ("gru", nn.GRU), ("elman", nn.RNN)]
)
@settings(max_examples=20, deadline=None)
@given(B=st.integers(1, 5), T=st.integers(1, 9), D=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_equals_torch_nn(function, kind, B, T, D, seed):
    torch.manual_seed(seed)
    module = kind(3, D, batch_first=True).double()
    x = torch.randn(B, T, 3, dtype=torch.float64, requires_grad=True)
    start = torch.randn(2 if function == "lstm" else 1, 1, B, D, dtype=torch.float64)
    start.requires_grad_()
    out, last = module(x, tuple(start) if function == "lstm" else start[0])
    last = torch.stack(last) if function == "lstm" else last.unsqueeze(0)

    weight, R, b = nn_weights(module, function, 1, D)
    Wx = (x @ weight.T).view(B, T, -1, 1, D)
    states, last_states = flashrnn(
        Wx, R, b, states=start.view(-1, B, 1, 1, D), function=function, backend="vanilla"
    )
    torch.testing.assert_close(states[0].flatten(2), out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last_states.view_as(last), last, rtol=1e-12, atol=1e-12)

    leaves = [x, start, *module.parameters()]
    weights = [torch.randn_like(out), torch.randn_like(last)]
    expected = torch.autograd.grad([out, last], leaves, weights)
    found = torch.autograd.grad([states[0].flatten(2), last_states.view_as(last)], leaves, weights)
    for gradient, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "clipval"),
    [
        # A clip knows nothing of the cell.
        pytest.param(kind, clipval, marks=pytest.mark.slow if clipval and kind != "elman" else [])
        for clipval in (None, 0.4)
        for kind in (*BUILT_IN, sparse)
    ],
    ids=str,
)
def test_first_and_second_derivative(function, clipval):
    """Against finite differences. Of sLSTM's outputs only h may be asked: m' passes none on by
    design, and c' and n' are scaled by it."""
    inputs, config = random_inputs(function, 2, 3, 2, 2), FlashRNNConfig(forward_clipval=clipval)

    def outputs(*leaves):
        states, last_states = call(function, Inputs(*leaves), config=config)
        return (states[0],) if function == "slstm" else (states, last_states)

    leaves = tuple(inputs.tensors().values())
    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(outputs, leaves)


@pytest.mark.parametrize("function", BUILT_IN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.fixed_dictionaries(small_sizes | {"N": st.integers(1, 3), "D": st.integers(1, 40)}),
    cut=st.integers(0, 6),
)
def test_splitting_a_sequence_changes_no_bit(function, dtype, sizes, cut):
    inputs = random_inputs(function, **sizes, dtype=dtype)
    cut = min(cut, sizes["T"])
    states, last = call(function, inputs)
    Wx, R, b, start = inputs.tensors().values()
    first, between = flashrnn(Wx[:, :cut], R, b, start, function)
    second, final = flashrnn(Wx[:, cut:], R, b, between, function)
    assert torch.equal(torch.cat([first, second], dim=2), states)
    assert torch.equal(final, last)
    assert torch.equal(
        last[:, :, 0].to(dtype), states[:, :, -1] if sizes["T"] else start[:, :, 0].to(dtype)
    )


@pytest.mark.parametrize("function", [*BUILT_IN, sparse], ids=str)
@settings(max_examples=25, deadline=None)
@given(sizes=st.fixed_dictionaries(small_sizes))
def test_shapes_and_layout_of_what_is_returned(function, sizes):
    B, T, N, D = (sizes[name] for name in "BTND")
    inputs = random_inputs(function, **sizes)
    states, last_states = call(function, inputs)
    S = len(resolve(function).states)
    assert states.shape == (S, B, T, N, D) and states.is_contiguous()
    assert last_states.shape == (S, B, 1, N, D) and last_states.is_contiguous()
    for name, gradient in gradients((states, last_states), inputs).items():
        assert gradient.shape == inputs.tensors()[name].shape
        assert gradient.isfinite().all()


@pytest.mark.parametrize("function", BUILT_IN)
def test_strides_do_not_matter(function):
    """Views of all kinds: permuted, every second element, expanded."""
    inputs = random_inputs(function, 3, 5, 2, 4)
    expected = call(function, inputs)
    Wx, R, b, states = (x.detach() for x in inputs.tensors().values())
    views = Inputs(
        Wx=Wx.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0).requires_grad_(),
        R=R.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_(),
        b=torch.stack([b, b], dim=-1).flatten(2)[..., ::2].requires_grad_(),
        states=states.flip(0).contiguous().flip(0).transpose(1, 3).contiguous().transpose(1, 3),
    )
    views.states.requires_grad_()
    outputs = call(function, views)
    torch.testing.assert_close(outputs, expected, rtol=1e-13, atol=1e-13)
    truth = gradients(expected, inputs)
    for name, gradient in gradients(outputs, views).items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", BUILT_IN)
@pytest.mark.parametrize(
    ("dtype", "bound_states", "bound_gradients"),
    [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 3e-3, 7e-3), (torch.float16, 3e-4, 1e-3)],
)
def test_precision_against_float64(function, dtype, bound_states, bound_gradients):
    """The bounds of DESIGN section 6, at T = 64."""
    rounded = random_inputs(function, 4, 64, 2, 32, dtype=dtype)
    exact = rounded.to(torch.float64)
    outputs, truth = call(function, rounded), call(function, exact)
    assert outputs[0].dtype == dtype
    assert outputs[1].dtype == (torch.float32 if dtype.itemsize == 2 else dtype)
    for s in range(len(resolve(function).states)):
        assert relative_error(outputs[0][s], truth[0][s]) < bound_states
    expected = gradients(truth, exact)
    for name, gradient in gradients(outputs, rounded).items():
        assert relative_error(gradient, expected[name]) < bound_gradients


@pytest.mark.parametrize("function", BUILT_IN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extreme_inputs_stay_finite(function, dtype):
    """Pre-activations of ±300 in every combination of gates, twice over."""
    kind = resolve(function)
    G = len(kind.fed_by("Wx"))
    corners = torch.cartesian_prod(*[torch.tensor([-300.0, 0.0, 300.0])] * G).view(-1, G)
    Wx = corners.repeat(1, 1, 1).transpose(0, 1)[:, :, :, None, None].repeat(1, 2, 1, 1, 3)
    Wx[:, 1] = Wx[:, 1].flip(0)
    inputs = random_inputs(function, len(corners), 2, 1, 3, dtype=dtype)
    with torch.no_grad():
        inputs.Wx.copy_(Wx)
        inputs.states.zero_()
    outputs = call(function, inputs)
    assert all(x.isfinite().all() for x in outputs)
    assert all(x.isfinite().all() for x in gradients(outputs, inputs).values())


def test_slstm_first_step_does_not_depend_on_the_stabilizer_of_an_empty_state():
    """m' = i where n = 0: the first input counts fully, however small its gate."""
    inputs = random_inputs("slstm", 2, 1, 1, 3)
    with torch.no_grad():
        inputs.states.zero_()
        inputs.Wx[:, 0, 0] = -40.0
    states, _ = call("slstm", inputs)
    i, _, z, o = (
        inputs.Wx
        + torch.einsum("gndp,bnp->bgnd", inputs.R, inputs.states[0, :, 0])[:, None]
        + inputs.b
    ).unbind(2)
    torch.testing.assert_close(states[0], torch.sigmoid(o) * torch.tanh(z))
    torch.testing.assert_close(states[3], i)


# Options


def test_initial_states_default_to_zeros_or_initial_val():
    inputs = random_inputs("lstm", 2, 3, 2, 4)
    Wx, R, b, states = inputs.tensors().values()
    zeros, ones = torch.zeros_like(states), torch.ones_like(states)
    assert torch.equal(flashrnn(Wx, R, b)[0], flashrnn(Wx, R, b, zeros)[0])
    one = FlashRNNConfig(initial_val=1.0)
    assert torch.equal(flashrnn(Wx, R, b, config=one)[0], flashrnn(Wx, R, b, ones)[0])
    each = FlashRNNConfig(initial_val=(0.0, 1.0))
    mixed = torch.stack([zeros[0], ones[1]])
    assert torch.equal(flashrnn(Wx, R, b, config=each)[0], flashrnn(Wx, R, b, mixed)[0])
    with pytest.raises(ValueError, match=r"3 values.*one for each of the states \(h, c\)"):
        flashrnn(Wx, R, b, config=FlashRNNConfig(initial_val=(0.0, 0.0, 0.0)))


@pytest.mark.parametrize("function", BUILT_IN)
def test_gradient_recurrent_cut(function):
    """Equal to a loop in which h is detached before it meets R."""
    inputs = random_inputs(function, 2, 4, 2, 3)
    outputs = call(function, inputs, config=FlashRNNConfig(gradient_recurrent_cut=True))
    plain = call(function, inputs)
    assert torch.equal(outputs[0], plain[0])
    found, uncut = gradients(outputs, inputs), gradients(plain, inputs)

    # One step at a time: R sees a detached h, the cell the attached states.
    kind, (Wx, R, b, states) = resolve(function), inputs.tensors().values()
    now = [states[s, :, 0] for s in range(len(kind.states))]
    seen = []
    for t in range(4):
        product = torch.einsum("gndp,bnp->gbnd", R, now[0].detach())
        gates = [torch.zeros(2, 2, 3, dtype=torch.float64) for _ in kind.gates]
        for source, tensors in (("Wx", Wx[:, t].unbind(1)), ("R", product), ("b", b)):
            for k, tensor in zip(kind.fed_by(source), tensors, strict=True):
                gates[k] = gates[k] + tensor
        now = list(kind.step(tuple(now), tuple(gates)))
        seen.append(torch.stack(now))
    expected = gradients((torch.stack(seen, dim=2), torch.stack(now).unsqueeze(2)), inputs)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-13)
    assert relative_error(found["Wx"], uncut["Wx"]) > 1e-3


def test_gradient_recurrent_clipval():
    """Elman, one unit, R = 5: what comes back through R is ±clipval at every step."""
    T, clipval = 5, 0.01
    Wx = torch.zeros(1, T, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    R = torch.full((1, 1, 1, 1), 5.0, dtype=torch.float64)
    b = torch.zeros(1, 1, 1, dtype=torch.float64)
    config = FlashRNNConfig(gradient_recurrent_clipval=clipval)
    states, _ = flashrnn(Wx, R, b, function="elman", config=config)
    states[0, 0, -1].sum().backward()
    # h stays 0, so tanh' = 1: the last step gets 1, each one before clipval.
    expected = torch.tensor([clipval] * (T - 1) + [1.0], dtype=torch.float64)
    torch.testing.assert_close(Wx.grad.flatten(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("function", available_functions())
def test_forward_clipval_bounds_h_alone(function):
    inputs = random_inputs(function, 3, 6, 2, 4)
    clipped, last = call(function, inputs, config=FlashRNNConfig(forward_clipval=0.1))
    free, _ = call(function, inputs)
    assert clipped[0].abs().max() == 0.1 and last[0].abs().max() <= 0.1
    torch.testing.assert_close(clipped[0, :, 0], free[0, :, 0].clamp(-0.1, 0.1))
    assert not torch.equal(clipped[0, :, 1:], free[0, :, 1:].clamp(-0.1, 0.1))
    assert torch.equal(clipped[1:, :, 0], free[1:, :, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_numbers_beyond_a_dtype_are_infinite(dtype):
    """As float32 has 1e39: a bound that bounds nothing, a start that is infinite."""
    inputs = random_inputs("lstm", 2, 3, 1, 4, dtype)
    beyond = FlashRNNConfig(forward_clipval=1e39, gradient_recurrent_clipval=1e39)
    expected, given = (call("lstm", inputs, config=config) for config in (None, beyond))
    assert all(map(torch.equal, given, expected))
    found = [gradients(outputs, inputs) for outputs in (given, expected)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    for value in (-1e39, (0.0, -1e39)):
        config = FlashRNNConfig(initial_val=value)
        _, last = flashrnn(inputs.Wx[:, :0], inputs.R, inputs.b, config=config)
        assert (last[1] == torch.tensor(-1e39, dtype=torch.float64).to(last.dtype)).all()


@pytest.mark.parametrize("option", ["gradient_recurrent_clipval", "forward_clipval"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 10**400])
def test_clip_values_must_be_positive(option, value):
    with pytest.raises(ValueError, match=f"{option}=.*positive"):
        FlashRNNConfig(**{option: value})


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("forward_clipval", "1", "forward_clipval is str; accepted are positive numbers, or None"),
        ("gradient_recurrent_clipval", [1.0], "gradient_recurrent_clipval is list; accepted are"),
        ("initial_val", "10", "initial_val='10'; accepted is one number, or one for each state"),
        ("initial_val", None, "initial_val=None; accepted is one number"),
        ("initial_val", 10**400, "accepted is one number"),
        ("initial_val", (0.0, None), r"initial_val=\(0.0, None\); accepted is one number"),
        ("allow_tf32", 1, "allow_tf32 is int; accepted are True, False and None"),
    ],
)
def test_values_of_other_types_are_refused(option, value, words):
    with pytest.raises(TypeError, match=words):
        FlashRNNConfig(**{option: value})


def test_dtype_casts_the_inputs_and_the_argument_comes_first():
    inputs = random_inputs("lstm", 2, 3, 2, 4, dtype=torch.float32)
    expected = call("lstm", inputs.to(torch.bfloat16))
    for options in (
        {"dtype": torch.bfloat16},
        {"dtype": "bfloat16"},
        {"config": FlashRNNConfig(dtype="bfloat16")},
        {"config": FlashRNNConfig(dtype="float64"), "dtype": "bfloat16"},
    ):
        outputs = call("lstm", inputs, **options)
        assert outputs[0].dtype == torch.bfloat16
        assert torch.equal(outputs[0], expected[0]) and torch.equal(outputs[1], expected[1])
    assert call("lstm", inputs)[0].dtype == torch.float32
    found = gradients(call("lstm", inputs, dtype="bfloat16"), inputs)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    with pytest.raises(TypeError, match=r"dtype 'int8'; accepted are float16, bfloat16"):
        call("lstm", inputs, dtype="int8")


def test_autocast():
    inputs = random_inputs("lstm", 2, 3, 2, 4, dtype=torch.float32)
    expected = call("lstm", inputs.to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = call("lstm", inputs)
        assert outputs[0].dtype == torch.bfloat16 and torch.equal(outputs[0], expected[0])
        half = call("lstm", inputs, config=FlashRNNConfig(dtype="float16"))
        assert half[0].dtype == torch.float16
        ignored = FlashRNNConfig(enable_automatic_mixed_precision=False)
        exact = call("lstm", inputs, config=ignored)
        assert exact[0].dtype == torch.float32
    assert torch.equal(exact[0], call("lstm", inputs)[0])
    assert inputs.Wx.dtype == torch.float32


@pytest.mark.parametrize("grad", [True, False])
def test_inputs_are_left_alone(grad):
    inputs = random_inputs("gru", 2, 3, 2, 4)
    before = {name: x.detach().clone() for name, x in inputs.tensors().items()}
    with torch.set_grad_enabled(grad):
        states, last_states = call("gru", inputs)
        with torch.no_grad():
            states.zero_(), last_states.zero_()
    assert all(torch.equal(x, before[name]) for name, x in inputs.tensors().items())


def test_default_states_are_no_fake_of_an_earlier_call(monkeypatch):
    monkeypatch.setattr(initial, "_zeros", {})
    Wx, R, b, states = random_inputs("lstm", 2, 3, 1, 4).tensors().values()
    with FakeTensorMode():
        flashrnn(*(torch.ones(x.shape, dtype=x.dtype) for x in (Wx, R, b)))
    expected = flashrnn(Wx, R, b, torch.zeros_like(states))
    assert all(map(torch.equal, flashrnn(Wx, R, b), expected))


@pytest.mark.parametrize("return_states", ["all", "h"])
def test_a_slice_only_where_states_are_left_out(return_states):
    """Of all of them it would be a node of autograd, whose gradient is zeros and a copy."""
    inputs = random_inputs("lstm", 2, 3, 1, 4, torch.float32)
    states, _ = flashrnn(*inputs.tensors().values(), backend="vanilla", return_states=return_states)
    assert states._is_view() == (return_states == "h")
