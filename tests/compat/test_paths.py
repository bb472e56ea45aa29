"""Upstream's import paths, and what is found there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashrnn
from flashrnn import FlashRNNConfig
from flashrnn.compat import installed
from tests.problems import BUILT_IN, call, random_inputs

PATHS = """
import flashrnn
from flashrnn import FlashRNNConfig, flashrnn as function
assert callable(function) and flashrnn.flashrnn is function
import flashrnn.flashrnn
assert flashrnn.flashrnn is function
import flashrnn.flashrnn.flashrnn
assert flashrnn.flashrnn is function
from flashrnn.flashrnn import flashrnn as second, FlashRNNConfig as config
from flashrnn.flashrnn.flashrnn import flashrnn as third, FlashRNNConfig as same
assert function is second is third and config is same is FlashRNNConfig
from flashrnn.flashrnn.vanilla import flashrnn_forward, flashrnn_pointwise_function_registry
from flashrnn.flashrnn import vanilla
from flashrnn.flashrnn.vanilla_fwbw.fwbw import lstm_pt_fwbw, slstm_pt_fwbw
from flashrnn.flashrnn.triton_fused.fwbw import lstm_tr_fwbw, slstm_tr_fwbw
from flashrnn.flashrnn.flashrnn import DTYPE_DICT, DTYPE_DICT_REV, DTYPES, permute_to
from flashrnn.flashrnn.flashrnn import rnn_function_registry, _get_config, _zero_state
from flashrnn.flashrnn.flashrnn import flashrnn_forward
from flashrnn.config import FlashRNNConfig
from flashrnn.functional import flashrnn as fourth
from flashrnn import flashrnn as fifth
import flashrnn
assert fourth is fifth is function is flashrnn.flashrnn
assert type(flashrnn.functional).__name__ == "module"
"""


@pytest.mark.parametrize(
    "first",
    [
        None,
        pytest.param("flashrnn.flashrnn.flashrnn", marks=pytest.mark.slow),
        pytest.param("flashrnn.flashrnn.vanilla", marks=pytest.mark.slow),
    ],
)
def test_every_path_in_a_new_process(first):
    """Whatever is imported first, ``flashrnn.flashrnn`` is the function."""
    before = f"import {first}\n" if first else ""
    subprocess.run([sys.executable, "-c", before + PATHS], check=True)


def test_unknown_names_are_none():
    with pytest.raises(ImportError, match="_permute_input"):
        from flashrnn.flashrnn.flashrnn import _permute_input  # noqa: F401


def test_registry():
    from flashrnn.flashrnn.flashrnn import rnn_function_registry

    assert set(rnn_function_registry) == set(BUILT_IN)
    assert rnn_function_registry["gru"]["gates_states"] == (3, 3, 4, 4, 1)
    for function, entry in rnn_function_registry.items():
        config = FlashRNNConfig(function=function)
        assert entry["gates_states"][-1] == config.num_states
        assert entry["simple_agg"] == config.simple_agg


def test_zero_state_and_config_of_a_call():
    from flashrnn.flashrnn.flashrnn import _get_config, _zero_state

    inputs = random_inputs("lstm", 2, 3, 2, 4, dtype=torch.float32)
    config = _get_config(inputs.Wx, inputs.R, inputs.b, "lstm", "vanilla", "float32")
    config.output_shape, config.initial_val = "SBHTD", [0.0, 0.5]
    states = _zero_state(config, inputs.Wx)
    assert states.shape == (2, 2, 2, 1, 4) and states.dtype == torch.float32
    assert (states[0] == 0).all() and (states[1] == 0.5).all()
    given = flashrnn.flashrnn(inputs.Wx, inputs.R, inputs.b, states, config=config)
    without = flashrnn.flashrnn(inputs.Wx, inputs.R, inputs.b, config=config)
    assert all(map(torch.equal, given, without))
    with pytest.raises(ValueError, match="a config without num_heads or head_dim"):
        _zero_state(FlashRNNConfig(), inputs.Wx)


@pytest.mark.parametrize("function", BUILT_IN)
def test_plain_version(function):
    from flashrnn.flashrnn.vanilla import flashrnn_forward, flashrnn_pointwise_function_registry

    inputs = random_inputs(function, 2, 3, 2, 4)
    every, last = flashrnn_forward(
        inputs.Wx.transpose(0, 1),
        inputs.states.permute(2, 1, 0, 3, 4),
        inputs.R.permute(1, 3, 0, 2),
        inputs.b,
        flashrnn_pointwise_function_registry[function],
    )
    expected = call(function, inputs)
    torch.testing.assert_close(every.permute(2, 1, 0, 3, 4), expected[0])
    torch.testing.assert_close(last.permute(2, 1, 0, 3, 4), expected[1])


@pytest.mark.parametrize("function", ["lstm", "slstm"])
def test_scans(function):
    from flashrnn.flashrnn.triton_fused import fwbw as fused
    from flashrnn.flashrnn.vanilla_fwbw import fwbw

    inputs = random_inputs(function, 2, 3, 2, 4, dtype=torch.float32)
    states = inputs.states.permute(2, 0, 1, 3, 4)
    scan = getattr(fwbw, f"{function}_pt_fwbw")
    config = FlashRNNConfig(gradient_recurrent_clipval=0.1)
    expected = call(function, inputs, config=config)
    every, last = scan(states, inputs.Wx, inputs.R, inputs.b, backward_recurrent_clip_val=0.1)
    assert torch.equal(every.permute(1, 2, 0, 3, 4), expected[0])
    assert torch.equal(last.permute(1, 2, 0, 3, 4), expected[1])
    given = torch.autograd.grad(every.sum(), inputs.R)[0]
    assert torch.equal(given, torch.autograd.grad(expected[0].sum(), inputs.R)[0])
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = scan(states, inputs.Wx, inputs.R, inputs.b, autocast_kernel_dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="backend 'triton' cannot do this call"):
            getattr(fused, f"{function}_tr_fwbw")(states, inputs.Wx, inputs.R, inputs.b)


def test_upstreams_files_among_ours_are_told(monkeypatch, tmp_path):
    installed.check()
    sign = tmp_path / "cuda_init.py"
    sign.touch()
    monkeypatch.setattr(installed, "_SIGN", sign)
    with pytest.raises(ImportError, match="Keep one: `pip uninstall flashrnn flashrnn-jit`"):
        installed.check()
    with pytest.raises(ImportError, match="a module of upstream's, was imported"):
        import flashrnn.flashrnn.cuda_init  # noqa: F401


def test_upstreams_package_cannot_run_among_our_files(tmp_path):
    """Installed over this one, it finds our package of the name of a module of its own."""
    ours = Path(flashrnn.__file__).parent
    both = tmp_path / "flashrnn"
    (both / "flashrnn").mkdir(parents=True)
    for name in ("compat", "flashrnn/cuda_init"):
        (both / name).symlink_to(ours / name)
    (both / "__init__.py").write_text("from .flashrnn import load\n")
    (both / "flashrnn" / "__init__.py").write_text("from .cuda_init import load\n")
    (both / "flashrnn" / "cuda_init.py").write_text("load = print\n")
    done = subprocess.run(
        [sys.executable, "-c", "import flashrnn"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode and "ImportError" in done.stderr and "Keep one" in done.stderr
