"""Calls as users of the upstream package write them."""

import inspect
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrnn import FlashRNNConfig, flashrnn
from flashrnn.cells import resolve
from flashrnn.compat import call as compat
from flashrnn.config import LAYOUTS
from tests.problems import BUILT_IN, call, gradients, random_inputs
from tests.sequences import KINDS, random_ragged

B, T, N, D = 2, 3, 2, 4


def in_layout(tensor, name, letters):
    """The tensor, which is in our layout, as a view in another."""
    ours = LAYOUTS[name]
    return tensor.permute([ours.index(letter) for letter in letters.replace("N", "H")])


def layout(name):
    heads = st.sampled_from("HN")
    letters = st.permutations(LAYOUTS[name]).map("".join)
    return st.tuples(letters, heads).map(lambda x: x[0].replace("H", x[1]))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(BUILT_IN),
    layout("input_shape"),
    layout("output_shape"),
    layout("recurrent_shape"),
    layout("bias_shape"),
    st.booleans(),
)
def test_every_layout_computes_the_same(function, of_Wx, of_states, of_R, of_b, with_states):
    inputs = random_inputs(function, B, T, N, D)
    expected = call(function, inputs)
    expected_gradients = gradients(expected, inputs)
    config = FlashRNNConfig(
        function=function,
        input_shape=of_Wx,
        output_shape=of_states,
        recurrent_shape=of_R,
        bias_shape=of_b,
    )
    given = flashrnn(
        in_layout(inputs.Wx, "input_shape", of_Wx),
        in_layout(inputs.R, "recurrent_shape", of_R),
        in_layout(inputs.b, "bias_shape", of_b),
        in_layout(inputs.states, "output_shape", of_states),
        config=config,
    )
    views = tuple(in_layout(x, "output_shape", of_states) for x in expected)
    assert all(map(torch.equal, given, views))
    # Results are views: in our order of dimensions they are contiguous.
    back = [of_states.replace("N", "H").index(letter) for letter in LAYOUTS["output_shape"]]
    assert given[0].permute(back).is_contiguous()
    ours = tuple(x.permute(back) for x in given)
    found = gradients(ours, inputs)
    assert all(torch.equal(found[name], expected_gradients[name]) for name in found)


def test_inputs_reach_the_call_as_views(monkeypatch):
    seen = {}

    def spy(Wx, R, b, states, *rest, **options):
        seen.update(Wx=Wx, R=R, b=b, states=states)
        return flashrnn(Wx, R, b, states, *rest, **options)

    monkeypatch.setattr(compat.functional, "flashrnn", spy)
    inputs = random_inputs("lstm", B, T, N, D)
    letters = {"Wx": "TBHDG", "R": "HPGD", "b": "HGD", "states": "SBHTD"}
    names = dict(
        zip(letters, ("input_shape", "recurrent_shape", "bias_shape", "output_shape"), strict=True)
    )
    given = {name: in_layout(getattr(inputs, name), names[name], letters[name]) for name in letters}
    config = FlashRNNConfig(**{names[name]: letters[name] for name in letters})
    flashrnn(**given, config=config)
    for name, tensor in seen.items():
        assert tensor.data_ptr() == getattr(inputs, name).data_ptr()
        assert tensor.stride() == getattr(inputs, name).stride()


def test_upstreams_positional_order():
    inputs = random_inputs("slstm", B, T, N, D, dtype=torch.float32)
    tensors = tuple(inputs.tensors().values())
    expected = flashrnn(*tensors, function="slstm")
    config = FlashRNNConfig(forward_clipval=0.1)
    clipped = flashrnn(*tensors, function="slstm", config=config)
    assert not torch.equal(expected[0], clipped[0])
    for further, result in (
        ((None,), expected),
        ((None, "vanilla"), expected),
        ((None, "vanilla", "float32"), expected),
        (("vanilla",), expected),  # Our own order.
        ((config, "vanilla"), clipped),
        ((config, "vanilla", "float32"), clipped),
        ((config,), clipped),
    ):
        assert all(map(torch.equal, flashrnn(*tensors, "slstm", *further), result))
    by_name = flashrnn(*tensors, "slstm", "vanilla", config=config)
    assert all(map(torch.equal, by_name, clipped))
    half = flashrnn(*tensors, "slstm", None, "vanilla", "bfloat16")
    assert half[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("further", "named", "words"),
    [
        (("vanilla", "bfloat16"), {}, "'vanilla' and 1 more after function"),
        (("vanilla",), {"backend": "cuda"}, "backend is given twice, 'vanilla' and 'cuda'"),
        ((None, "vanilla"), {"backend": "cuda"}, "backend is given twice, by position and by name"),
        ((FlashRNNConfig(),), {"config": FlashRNNConfig()}, "config is given twice"),
        ((None, "vanilla", "float32"), {"dtype": "float16"}, "dtype is given twice"),
        ((None, "vanilla", "float32", 1), {}, "9 arguments by position"),
        (({"backend": "vanilla"},), {}, "the sixth argument is dict"),
    ],
)
def test_mixed_orders_are_refused(further, named, words):
    tensors = tuple(random_inputs("lstm", B, T, N, D).tensors().values())
    with pytest.raises(TypeError, match=words) as error:
        flashrnn(*tensors, "lstm", *further, **named)
    assert "By name there is no order" in str(error.value)


def test_a_config_takes_every_keyword_of_the_call():
    """A keyword that flashrnn() gains has to be handed on by the compatible call."""
    ours = set(inspect.signature(flashrnn).parameters) - {"further"}
    assert ours == set(inspect.signature(compat.call).parameters)


@pytest.mark.parametrize("kind", KINDS[-2:], ids=str)
def test_options_of_sequences_in_the_layouts_of_a_config(kind):
    case = random_ragged("lstm", B, T, N, D, **kind)
    expected = case.call("vanilla")
    Wx, *others, states = case.inputs.tensors().values()
    starts = in_layout(case.reset_states, "output_shape", "TBHDS")
    given = flashrnn(
        *(in_layout(Wx, "input_shape", "TBGHD"), *others),
        in_layout(states, "output_shape", "TBHDS"),
        config=FlashRNNConfig(input_shape="TBGHD", output_shape="TBHDS"),
        reset_states=starts,
        **case.options,
    )
    expected = [in_layout(x, "output_shape", "TBHDS") for x in expected]
    assert all(map(torch.equal, given, expected))


def test_function_and_backend_come_from_the_config_or_the_call():
    inputs = random_inputs("gru", B, T, N, D)
    tensors = inputs.tensors()
    expected = call("gru", inputs)
    for options in (
        {"config": FlashRNNConfig(function="gru")},
        {"config": FlashRNNConfig(function=resolve("gru"))},
        {"config": FlashRNNConfig(function="gru", backend="vanilla")},
        {"config": FlashRNNConfig(function="gru", backend="vanilla_fwbw"), "function": "gru"},
        {"config": FlashRNNConfig(backend="vanilla"), "function": "gru", "backend": "vanilla"},
    ):
        assert all(map(torch.equal, flashrnn(**tensors, **options), expected))
    with pytest.raises(ValueError, match=r"function='slstm' and config\.function='gru'"):
        flashrnn(**tensors, function="slstm", config=FlashRNNConfig(function="gru"))
    with pytest.raises(ValueError, match=r"backend='cuda' and config\.backend='vanilla'"):
        flashrnn(**tensors, backend="cuda", config=FlashRNNConfig(backend="vanilla"))
    with pytest.raises(ValueError, match="backend 'triton_fused' cannot do this call"):
        flashrnn(**tensors, config=FlashRNNConfig(function="gru", backend="triton_fused"))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_heads": N + 1}, f"config.num_heads={N + 1}; Wx has num_heads {N}"),
        ({"head_dim": D + 1}, f"config.head_dim={D + 1}; Wx has head_dim {D}"),
        ({"hidden_dim": N * D + 1}, f"config.hidden_dim={N * D + 1}; Wx has hidden_dim {N * D}"),
    ],
)
def test_sizes_of_a_config_are_those_of_the_tensors(sizes, words):
    tensors = random_inputs("lstm", B, T, N, D).tensors()
    fitting = FlashRNNConfig(num_heads=N, head_dim=D, hidden_dim=N * D, batch_size=B + 1)
    flashrnn(**tensors, config=fitting)
    with pytest.raises(ValueError, match=words):
        flashrnn(**tensors, config=FlashRNNConfig(**sizes))
    changed = FlashRNNConfig(num_heads=N)
    for name, size in sizes.items():
        setattr(changed, name, size)
    with pytest.raises(ValueError, match=words):
        flashrnn(**tensors, config=changed)


def test_bad_tensors_with_a_config():
    tensors = random_inputs("lstm", B, T, N, D).tensors()
    config = FlashRNNConfig(input_shape="TBGHD", dtype="float32")
    for replaced, error, words in (
        ({"Wx": [1.0]}, TypeError, "Wx is list; accepted is a torch.Tensor"),
        ({"R": None}, TypeError, "R is NoneType"),
        ({"Wx": tensors["Wx"][0]}, ValueError, r"accepted are 5 dimensions, \[T, B, G, H, D\] as"),
    ):
        with pytest.raises(error, match=words):
            flashrnn(**{**tensors, **replaced}, config=config)


def test_last_states_are_float32_unless_upstreams_config_is_used():
    inputs = random_inputs("lstm", B, T, N, D).to(torch.bfloat16)
    every, last = call("lstm", inputs)
    assert last.dtype == torch.float32
    for fields, dtype in (
        ({"num_heads": N}, torch.bfloat16),
        ({"dtype_s": "bfloat16"}, torch.bfloat16),
        ({"dtype_s": "float32"}, torch.float32),
        ({"dtype": "bfloat16", "dtype_s": torch.float32}, torch.float32),
    ):
        given = call("lstm", inputs, config=FlashRNNConfig(**fields))
        assert given[0].dtype == given[1].dtype == dtype
        assert torch.equal(given[0], every.to(dtype)) and torch.equal(given[1], last.to(dtype))


def test_mixed_dtypes_are_cast():
    """As xlstm has them: 16 bits but for the bias, or parameters in float32."""
    inputs = random_inputs("lstm", B, T, N, D, dtype=torch.float32)
    sixteen = inputs.to(torch.bfloat16)
    expected = call("lstm", sixteen)
    tensors = sixteen.tensors()
    given = flashrnn(**{**tensors, "b": inputs.b.bfloat16().float()})
    assert all(map(torch.equal, given, expected))
    config = FlashRNNConfig(dtype="bfloat16", dtype_b="float32", dtype_a="float32")
    wide = {name: getattr(inputs, name) for name in ("R", "b", "states")}
    assert torch.equal(flashrnn(**{**tensors, **wide}, config=config)[0], expected[0])
    with pytest.raises(TypeError, match="accepted is one dtype for all"):
        flashrnn(**{**tensors, "R": inputs.R})


@pytest.mark.parametrize("backend", ["vanilla", "vanilla_fwbw"])
def test_plain_backends_compute_in_the_tensors_dtype(backend):
    """TiRex-2 asks for bfloat16 everywhere, and gets float32 on the CPU."""
    inputs = random_inputs("slstm", B, T, N, D, dtype=torch.float32)
    config = FlashRNNConfig(function="slstm", backend=backend, dtype="bfloat16")
    assert all(map(torch.equal, flashrnn(**inputs.tensors(), config=config), call("slstm", inputs)))
    with torch.autocast("cpu", torch.bfloat16):
        assert flashrnn(**inputs.tensors(), config=config)[0].dtype == torch.bfloat16
    config.backend = None
    assert flashrnn(**inputs.tensors(), config=config)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "bfloat16", "dtype_w": "float16"},
        {"dtype": "float32", "dtype_w": "bfloat16"},
        {"dtype": "float16", "dtype_acc": "bfloat16"},
        {"dtype_g": "float16"},
        {"dtype_w": "bfloat16", "dtype_r": "float64"},
    ],
)
def test_dtypes_that_contradict_each_other_are_refused(fields):
    inputs = random_inputs("lstm", B, T, N, D, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"config\.dtype_.=.* in a computation in torch|dtype_acc"):
        call("lstm", inputs, config=FlashRNNConfig(**fields))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gru_with_three_biases(dtype):
    """(r, z, n); that of g is 0."""
    inputs = random_inputs("gru", B, T, N, D).to(dtype)
    whole = {**inputs.tensors(), "b": torch.cat([torch.zeros_like(inputs.b[:1]), inputs.b[1:]])}
    expected = flashrnn(**whole, function="gru")
    three = inputs.b.detach()[1:].clone().requires_grad_()
    given = flashrnn(**{**whole, "b": three}, function="gru")
    assert all(map(torch.equal, given, expected))
    given[0].sum().backward()
    expected[0].sum().backward()
    assert torch.equal(three.grad, inputs.b.grad[1:])
    with pytest.raises(ValueError, match="b holds 2 gates; gru takes 4 there: g, r, z, n"):
        flashrnn(**{**whole, "b": three.detach()[:2]}, function="gru")


@pytest.mark.parametrize("by_position", [False, True])
def test_compiled_with_upstreams_config(by_position):
    inputs = random_inputs("lstm", B, T, N, D)
    config = FlashRNNConfig(num_heads=N, input_shape="TBGHD", function="lstm", backend="vanilla")
    Wx, R, b = (x.detach() for x in (inputs.Wx.transpose(0, 1), inputs.R, inputs.b))

    def run(Wx):
        if by_position:
            return flashrnn(Wx, R, b, None, "lstm", config)
        return flashrnn(Wx, R, b, config=config)

    torch.compiler.reset()
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert all(map(torch.equal, compiled(Wx), run(Wx)))


def test_permute_to():
    for letters, wanted in itertools.product(("BTGHD", "TBNDG"), ("HBTGD", "BTGND")):
        order = compat.permute_to(letters, wanted)
        found = letters if order is None else "".join(letters[k] for k in order)
        assert found.replace("N", "H") == wanted.replace("N", "H")
    assert compat.permute_to("GHD", "GND") is None
    with pytest.raises(ValueError, match="layouts 'GHD' and 'GHP'"):
        compat.permute_to("GHD", "GHP")
