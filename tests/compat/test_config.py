"""FlashRNNConfig as upstream's users make, change and read it."""

import copy
import pickle
from dataclasses import asdict, dataclass, replace

import pytest
import torch

from flashrnn import FlashRNNConfig, cell, flashrnn
from tests.problems import random_inputs


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({}, (None, None, None)),
        ({"hidden_dim": 12}, (12, 1, 12)),
        ({"hidden_dim": 12, "num_heads": 3}, (12, 3, 4)),
        ({"hidden_dim": 12, "head_dim": 4}, (12, 3, 4)),
        ({"num_heads": 3, "head_dim": 4}, (12, 3, 4)),
        ({"hidden_dim": -1, "num_heads": 3, "head_dim": 4}, (12, 3, 4)),
        ({"num_heads": 3}, (None, 3, None)),
    ],
)
def test_sizes_follow_from_each_other(given, sizes):
    config = FlashRNNConfig(**given)
    assert (config.hidden_dim, config.num_heads, config.head_dim) == sizes
    assert config.input_dim == (None if sizes[0] is None else 4 * sizes[0])


def test_sizes_that_contradict_each_other_are_refused():
    for sizes in (
        {"hidden_dim": 13, "num_heads": 3},
        {"num_heads": 2, "head_dim": 3, "hidden_dim": 7},
    ):
        with pytest.raises(ValueError, match="accepted is hidden_dim = num_heads · head_dim"):
            FlashRNNConfig(**sizes)


def test_gates_and_states_follow_from_the_function():
    config = FlashRNNConfig(function="gru", num_states=4)
    numbers = ("num_gates_r", "num_gates_w", "num_gates_i", "num_gates_t", "num_states")
    assert [getattr(config, name) for name in numbers] == [3, 3, 4, 4, 1]
    assert config.simple_agg is False
    config.function = "lstm"
    assert [getattr(config, name) for name in numbers] == [4, 4, 4, 4, 2]
    assert config.simple_agg is True

    @cell(states=("h",), gates=("z", "n"))
    def light(states, gates):
        return (torch.tanh(gates[0] + gates[1]),)

    config.function = light
    assert [getattr(config, name) for name in numbers] == [2, 2, 2, 2, 1]


def test_torch_dtypes():
    config = FlashRNNConfig(dtype="float16", dtype_b="float32", dtype_w="float16")
    assert config.torch_dtype == config.torch_dtype_r == config.torch_dtype_s == torch.float16
    assert config.torch_dtype_b == torch.float32
    assert FlashRNNConfig().torch_dtype == torch.bfloat16
    assert FlashRNNConfig(dtype=torch.float64).torch_dtype_w == torch.float64


def test_positional_fields_have_upstreams_order():
    config = FlashRNNConfig("vanilla", "gru", True, 1.0, 2.0)
    assert (config.backend, config.function) == ("vanilla", "gru")
    assert config.gradient_recurrent_cut is True
    assert (config.gradient_recurrent_clipval, config.forward_clipval) == (1.0, 2.0)


def test_an_unknown_field_names_the_nearest():
    words = "unknown field of FlashRNNConfig 'num_head'. Did you mean 'num_heads'\\? Accepted: "
    with pytest.raises(TypeError, match=words):
        FlashRNNConfig(num_head=3)


def test_subclasses():
    @dataclass
    class Wider(FlashRNNConfig):
        backend: str | None = "vanilla"
        num_heads: int | None = 2
        factor: float = 2.0

        def __post_init__(self):
            super().__post_init__()
            self.note = "own attribute"

    class Own(FlashRNNConfig):
        def __init__(self, width):
            super().__init__(hidden_dim=width, num_heads=1)

    inputs = random_inputs("lstm", 2, 3, 2, 4)
    expected = flashrnn(**inputs.tensors())
    wider = Wider(factor=3.0, function="lstm")
    assert wider.note == "own attribute" and wider.of_upstream
    assert all(map(torch.equal, flashrnn(**inputs.tensors(), config=wider), expected))
    assert Own(width=8).head_dim == 8
    with pytest.raises(TypeError, match=r"field of Wider 'factr'\. Did you mean 'factor'"):
        Wider(factr=3.0)
    with pytest.raises(TypeError, match=r"field of Own 'widht'\. Did you mean 'width'"):
        Own(widht=8)
    with pytest.raises(ValueError, match=r"config\.num_heads=2; Wx has num_heads 3"):
        flashrnn(**random_inputs("lstm", 2, 3, 3, 4).tensors(), config=wider)


def test_fields_are_checked_whenever_they_are_set():
    config = FlashRNNConfig()
    for name, value, error, words in (
        ("forward_clipval", -1.0, ValueError, "forward_clipval=-1.0; accepted are positive"),
        ("dtype", "int8", TypeError, "dtype 'int8'; accepted are"),
        ("dtype_b", "int8", TypeError, "dtype_b: dtype 'int8'; accepted are"),
        ("function", "lsmt", ValueError, "Did you mean 'lstm'"),
        ("backend", 3, TypeError, "backend is int; accepted is a name"),
        ("num_heads", 0, ValueError, "num_heads=0; accepted are whole numbers ≥ 1"),
        ("head_dim", 2.0, TypeError, "head_dim is float; accepted are whole numbers"),
        ("batch_size", -1, ValueError, "batch_size=-1; accepted are whole numbers"),
        ("input_shape", "BTGHDX", ValueError, "the letters of BTGHD in any order, H or N"),
        ("bias_shape", ("G", "H", "D"), TypeError, "bias_shape is tuple"),
        ("constants", {"alpha": 1.0}, ValueError, "a cell of your own|A cell of your own"),
        ("trainable_b", "yes", TypeError, "trainable_b='yes'; accepted is a truth value"),
        ("initial_val", None, TypeError, "accepted is one number"),
    ):
        with pytest.raises(error, match=words):
            setattr(config, name, value)
    assert config == FlashRNNConfig() and not config.of_upstream
    config.forward_clipval = 2.0
    assert not config.of_upstream
    config.trainable_r, config.constants = [True, False], {}
    assert config.of_upstream


def test_configs_are_copied_and_compared():
    config = FlashRNNConfig(num_heads=2, head_dim=4, dtype="bfloat16", output_shape="SBNTD")
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config and other.of_upstream
    assert FlashRNNConfig(**asdict(config)) == config
    assert replace(config, dtype="float16").torch_dtype_b == torch.float16
    assert replace(config, function="gru").num_states == 1
    assert config != replace(config, forward_clipval=1.0)


def test_only_what_is_set_makes_a_config_upstreams():
    """Not its copy with the values that follow from its function, nor what was set in between."""
    inputs = random_inputs("lstm", 2, 3, 2, 4, dtype=torch.bfloat16)
    ours = FlashRNNConfig(forward_clipval=1.0)
    changed = copy.copy(ours)
    changed.num_heads, changed.input_shape = 2, "TBGHD"
    assert changed.of_upstream
    changed.num_heads, changed.input_shape = None, "BTGHD"
    for config in (ours, replace(ours), FlashRNNConfig(**asdict(ours)), changed):
        assert config == ours and not config.of_upstream
        assert flashrnn(**inputs.tensors(), config=config)[1].dtype == torch.float32
    sizes = FlashRNNConfig(hidden_dim=8)
    sizes.hidden_dim = None
    assert not sizes.of_upstream and replace(FlashRNNConfig(num_heads=2)).of_upstream


def test_an_unknown_field_cannot_be_set_either():
    config = FlashRNNConfig()
    with pytest.raises(AttributeError, match="Did you mean 'forward_clipval'"):
        config.forward_clip = 0.1

    class Further(FlashRNNConfig):
        pass

    config = Further()
    config.own = 1


@pytest.mark.parametrize("name", ["gradient_recurrent_cut", "enable_automatic_mixed_precision"])
def test_what_is_a_bool_is_held_to_it(name):
    with pytest.raises(TypeError, match=f"{name} is str; accepted are True and False"):
        FlashRNNConfig(**{name: "no"})
