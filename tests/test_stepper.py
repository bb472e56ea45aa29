"""A step at a time: the bits of flashrnn() over T = 1, states in place, and its errors."""

import copy
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrnn import FlashRNNConfig, Stepper, cell, flashrnn, step
from flashrnn.problem import carry_dtype
from tests.emulation import fused_emulation, needs_compiler  # noqa: F401
from tests.kernels.test_triton import interpreter, needs_triton  # noqa: F401
from tests.problems import BUILT_IN, random_inputs, sparse

D = 8


@pytest.fixture(params=["vanilla", pytest.param("triton", marks=needs_triton)])
def backend(request, interpreter):  # noqa: F811
    return request.param


def step_inputs(function, B, N, D, dtype=torch.float32, seed=0):
    """R, b, and wx and states of a step; leaves nothing to differentiate."""
    inputs = random_inputs(function, B, 1, N, D, dtype, seed=seed)
    Wx, R, b, states = (x.detach() for x in inputs.tensors().values())
    return R, b, Wx.squeeze(1), states.squeeze(2)


def by_flashrnn(R, b, wx, states, *arguments, **options):
    _, last = flashrnn(wx.unsqueeze(1), R, b, states.unsqueeze(2), *arguments, **options)
    return last.squeeze(2)


def strided(x):
    """The same values, no dimension contiguous."""
    return torch.stack([x.mT, x.mT], dim=-1)[..., 0].mT


@settings(max_examples=15, deadline=None)
@given(
    function=st.sampled_from([*BUILT_IN, sparse]),
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 2), st.sampled_from([1, 5, 16])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    change=st.sampled_from([lambda x: x, strided]),
    options=st.sampled_from([{}, {"forward_clipval": 0.3}]),
    seed=st.integers(0, 99),
)
def test_the_bits_are_those_of_a_sequence_of_one(function, sizes, dtype, change, options, seed):
    """Of new memory, of given memory, and of states in place."""
    R, b, wx, states = step_inputs(function, *sizes, dtype, seed)
    config = FlashRNNConfig(**options)
    expected = by_flashrnn(R, b, wx, states, function, config=config)
    stepper = Stepper(R, b, function, config=config)
    wx, inplace, out = change(wx), states.clone(), torch.full_like(expected, torch.nan)
    assert torch.equal(stepper(wx, change(states)), expected)
    assert stepper(wx, change(states), out) is out and torch.equal(out, expected)
    assert stepper(wx, inplace, out=inplace) is inplace and torch.equal(inplace, expected)
    assert torch.equal(step(wx, R, b, states, function, config=config), expected)


@needs_triton
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_a_backend_without_a_stepper_of_its_own(dtype):
    R, b, wx, states = step_inputs("slstm", 3, 2, D, dtype)
    expected = by_flashrnn(R, b, wx, states, "slstm", "triton")
    stepper = Stepper(R, b, "slstm", "triton")
    assert stepper.backend == "triton"
    assert torch.equal(stepper(wx, states), expected)
    assert stepper(wx, states, states) is states and torch.equal(states, expected)


def test_steps_in_place_are_a_sequence(backend):
    T = 4
    inputs = random_inputs("lstm", 3, T, 2, D, torch.bfloat16)
    Wx, R, b, states = (x.detach() for x in inputs.tensors().values())
    every, last = flashrnn(Wx, R, b, states, backend=backend)
    stepper, carried = Stepper(R, b, backend=backend), states.squeeze(2).clone()
    for t in range(T):
        stepper(Wx[:, t], carried, out=carried)
        assert torch.equal(carried.to(torch.bfloat16), every[:, :, t])
    assert torch.equal(carried, last.squeeze(2))


def test_states_begin_as_the_config_says(backend):
    R, b, wx, _ = step_inputs("lstm", 3, 2, D)
    config = FlashRNNConfig(initial_val=(0.5, -1.0))
    given = Stepper(R, b, backend=backend, config=config)(wx)
    start = torch.tensor([0.5, -1.0]).view(2, 1, 1, 1).expand(2, 3, 2, D)
    assert torch.equal(given, by_flashrnn(R, b, wx, start, backend=backend))


def test_dtypes():
    """The given one, autocast's, and states that were rounded."""
    R, b, wx, states = step_inputs("lstm", 3, 2, D)
    for stepper in (
        Stepper(R, b, dtype="bfloat16"),
        Stepper(R, b, config=FlashRNNConfig(dtype="bfloat16")),
        Stepper(R.bfloat16(), b.bfloat16()),
    ):
        assert (stepper.dtype, stepper.carry_dtype) == (torch.bfloat16, torch.float32)
        given = stepper(wx.bfloat16(), states)
        assert given.dtype == torch.float32
        expected = by_flashrnn(R, b, wx, states, dtype="bfloat16")
        assert torch.equal(given, expected)
    rounded = states.bfloat16()
    assert torch.equal(stepper(wx.bfloat16(), rounded), stepper(wx.bfloat16(), rounded.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Stepper(R, b).dtype == torch.bfloat16
    assert all(carry_dtype(dtype) == dtype for dtype in (torch.float32, torch.float64))


def test_autocast_where_a_stepper_is_called_changes_nothing(backend):
    """What it computes in was decided when it was made."""
    R, b, wx, states = step_inputs("lstm", 3, 2, D)
    stepper = Stepper(R, b, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = stepper(wx, states)
    assert torch.equal(given, stepper(wx, states))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_stands_alone(backend, copied):
    """As part of a model that is copied or saved."""
    R, b, wx, states = step_inputs("gru", 3, 2, D)
    R, config = R.clone(), FlashRNNConfig(initial_val=0.5)
    stepper = Stepper(R, b, "gru", backend, config=config, dtype="bfloat16")
    again, wx = copied(stepper), wx.bfloat16()
    expected = stepper(wx, states), stepper(wx)
    R.zero_()
    assert (again.backend, again.dtype) == (backend, torch.bfloat16)
    assert torch.equal(again(wx, states), expected[0]) and torch.equal(again(wx), expected[1])


def test_parameters_are_taken_as_they_are():
    """They require gradients, and what comes out does not; no copy is made where none is needed."""
    R, b, wx, states = step_inputs("lstm", 3, 2, D)
    R.requires_grad_()
    stepper = Stepper(R, b)
    assert stepper._R.data_ptr() == R.data_ptr()
    given = stepper(wx, states)
    assert not given.requires_grad and given.grad_fn is None


def test_a_cell_whose_captured_value_changes(backend):
    scale = [1.0]

    @cell(states=("h",), gates=("g",))
    def scaled(states, gates):
        return (scale[0] * torch.tanh(gates[0]),)

    R, b, wx, states = step_inputs(scaled, 3, 2, D)
    stepper = Stepper(R, b, scaled, backend)
    for value in (1.0, 2.0):
        scale[0] = value
        assert torch.equal(stepper(wx, states), by_flashrnn(R, b, wx, states, scaled, backend))


@pytest.mark.parametrize("transform", ["compile", "vmap"])
def test_graphs_and_transforms(transform):
    R, b, wx, states = step_inputs("gru", 3, 2, D)
    stepper = Stepper(R, b, "gru")
    expected = stepper(wx, states)
    if transform == "compile":
        torch.compiler.reset()
        given = torch.compile(stepper.__call__, backend="aot_eager")(wx, states)
    else:
        given = torch.func.vmap(stepper)(wx[None], states[None]).squeeze(0)
    torch.testing.assert_close(given, expected)


def test_memory_that_is_shared_otherwise_is_refused(backend):
    R, b, wx, states = step_inputs("lstm", 3, 2, D)
    stepper = Stepper(R, b, backend=backend)
    expected = stepper(wx, states)
    memory = torch.zeros(2 * states.numel() + 1)
    first, second = (memory[k * states.numel() :][: states.numel()] for k in (0, 1))
    # Two parts of one memory are as good as two memories.
    first.view_as(states).copy_(states)
    assert torch.equal(stepper(wx, first.view_as(states), second.view_as(states)), expected)
    shifted = memory[1 : 1 + states.numel()].view_as(states)
    with pytest.raises(ValueError, match="out shares a part of its memory with states"):
        stepper(wx, first.view_as(states), shifted)
    # In place, but not element by element.
    with pytest.raises(ValueError, match="out shares a part of its memory with states"):
        stepper(wx, states[:, :1].expand(2, 3, 2, D), states)
    with pytest.raises(ValueError, match="out shares a part of its memory with wx"):
        stepper(memory[: wx.numel()].view_as(wx), states, first.view_as(states))


def replaced(**given):
    R, b, wx, states = step_inputs("lstm", 3, 2, D)
    return {"R": R, "b": b, "wx": wx, "states": states, "out": None, **given}


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"R": [1.0]}, TypeError, "R is list; accepted is a torch.Tensor"),
        ({"R": torch.zeros(4, D, D)}, ValueError, "accepted are 4 dimensions, [Gr, N, D, D]"),
        ({"R": torch.zeros(3, 2, D, D)}, ValueError, "R holds 3 gates; lstm takes 4"),
        ({"R": torch.zeros(4, 2, D, 9)}, ValueError, "R has shape (4, 2, 8, 9); with"),
        ({"b": torch.zeros(4, 3, D)}, ValueError, "b has shape (4, 3, 8); with"),
        ({"b": torch.zeros(4, 2, D).double()}, TypeError, "R torch.float32, b torch.float64"),
        ({"b": torch.zeros(4, 2, D, device="meta")}, ValueError, "R on cpu, b on meta"),
        ({"wx": None}, TypeError, "wx is NoneType; accepted is a torch.Tensor"),
        ({"wx": torch.zeros(3, 1, 4, 2, D)}, ValueError, "4 dimensions, [B, Gw, N, D]"),
        ({"wx": torch.zeros(3, 3, 2, D)}, ValueError, "wx holds 3 gates; lstm takes 4 there: i"),
        (
            {"wx": torch.zeros(3, 4, 2, 9)},
            ValueError,
            "wx has shape (3, 4, 2, 9); with this R and wx it must be (3, 4, 2, 8), [B, Gw, N, D]",
        ),
        (
            {"wx": torch.zeros(3, 4, 2, D).half()},
            TypeError,
            "wx is torch.float16; accepted is torch.float32 by a stepper that computes in",
        ),
        ({"wx": torch.zeros(3, 4, 2, D, device="meta")}, ValueError, "wx is on meta, R and b on"),
        ({"states": [0.0]}, TypeError, "states is list; accepted is a torch.Tensor"),
        ({"states": torch.zeros(2, 3, 1, 2, D)}, ValueError, "4 dimensions, [S, B, N, D]"),
        ({"states": torch.zeros(2, 4, 2, D)}, ValueError, "it must be (2, 3, 2, 8), [S, B, N, D]"),
        ({"states": torch.zeros(2, 3, 2, D).double()}, TypeError, "states is torch.float64"),
        ({"out": 1}, TypeError, "out is int; accepted is a torch.Tensor"),
        ({"out": torch.zeros(2, 3, 2, 9)}, ValueError, "out has shape (2, 3, 2, 9)"),
        ({"out": torch.zeros(2, 3, 2, D).half()}, TypeError, "out is torch.float16; accepted is"),
        ({"out": torch.zeros(2, 3, D, 2).mT}, ValueError, "accepted is a contiguous tensor"),
        (
            {"wx": torch.zeros(3, 4, 2, D, requires_grad=True)},
            RuntimeError,
            "a gradient is required of wx, states or out, and none flows through a step",
        ),
        (
            {"states": torch.zeros(2, 3, 2, D, requires_grad=True)},
            RuntimeError,
            "call it within torch.no_grad(), or take flashrnn() with T = 1",
        ),
    ],
)
def test_refused(given, error, words):
    arguments = replaced(**given)
    with pytest.raises(error, match=re.escape(words)):
        step(**arguments)


def test_options_are_refused_by_name():
    R, b, *_ = step_inputs("lstm", 3, 2, D)
    for options, error, words in (
        ({"config": 3}, TypeError, "config is int"),
        ({"backend": None}, TypeError, "backend is NoneType"),
        ({"backend": "vanila"}, ValueError, "Did you mean 'vanilla'"),
        ({"function": "lsmt"}, ValueError, "Did you mean 'lstm'"),
        ({"dtype": "int8"}, TypeError, "dtype 'int8'"),
    ):
        with pytest.raises(error, match=words):
            Stepper(R, b, **options)


class Decay:
    """A step that is compared by its content, as a dataclass's instances are: it has no hash."""

    __hash__ = None

    def __eq__(self, other):
        return isinstance(other, Decay)

    def __call__(self, states, gates):
        return (0.5 * states[0] + torch.tanh(gates[0]),)


@needs_compiler
def test_a_step_without_a_hash(fused_emulation):  # noqa: F811
    """Caches of kernels know the cell as it is traced, and neither hash nor keep its function."""
    decay = cell(states=("h",), gates=("g",), name="decay")(Decay())
    R, b, wx, states = step_inputs(decay, 2, 1, 16)
    expected = by_flashrnn(R, b, wx, states, decay, "cuda_fused")
    assert torch.equal(Stepper(R, b, decay, "cuda_fused")(wx, states), expected)
