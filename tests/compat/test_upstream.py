"""The plugin that runs upstream's own tests, on tests laid out as those are."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

UTILS = """
import torch
from flashrnn import flashrnn

def create_inputs(batch_size, sequence_size, num_heads, head_dim, device="cuda", **options):
    shape = (batch_size, sequence_size, 1, num_heads, head_dim)
    R = torch.randn(1, num_heads, head_dim, head_dim, device=device) / head_dim
    return torch.randn(shape, device=device), R, torch.randn(1, num_heads, head_dim, device=device)

def model_test(*, backend="cuda_fused", backend_cmp="vanilla", device="cuda", **sizes):
    Wx, R, b = create_inputs(sizes.pop("batch_size"), device=device, **sizes)
    states = torch.randn(1, len(Wx), 1, *b.shape[1:], device=device)
    if sizes["num_heads"] == 3:
        R = R[:, :1]
    (given, _), (expected, _) = (
        flashrnn(Wx, R, b, states, function="elman", backend=backend)
        for backend in (backend, backend_cmp)
    )
    return torch.allclose(given, expected, atol=1e-4)
"""

TESTS = """
import pytest
from flashrnn.tests.utils import create_inputs, model_test

def held(num_heads):
    try:
        assert model_test(batch_size=500, sequence_size=300, num_heads=num_heads, head_dim=1000)
    except ValueError:
        pass

def test_good():
    held(num_heads=2)

def test_swallowed():
    held(num_heads=3)

def test_large():
    create_inputs(batch_size=500, sequence_size=300, num_heads=1, head_dim=1000)
"""

# The equations of an Elman network, in the layouts of upstream's plain version.
VANILLA = """
import torch

def forward(Wx, states, R, b, pointwise):
    every = torch.zeros_like(Wx)
    h = states[0]
    for t in range(len(Wx)):
        product = torch.einsum("bnp,npgd->bgnd", h[:, 0], R)
        h = every[t] = pointwise(Wx[t] + product + b)
    return every, h[None]

flashrnn_forward = forward
flashrnn_pointwise_function_registry = {"elman": FUNCTION}
"""


@pytest.fixture
def clone(tmp_path):
    files = {
        "pyproject.toml": "",
        "flashrnn/tests/utils.py": UTILS,
        "flashrnn/tests/test_some.py": TESTS,
        "flashrnn/flashrnn/vanilla/__init__.py": VANILLA.replace("FUNCTION", "torch.tanh"),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def counts(clone, *options):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.compat.upstream", "-c"]
    command += [clone / "pyproject.toml", "--clone", clone, *options, clone / "flashrnn" / "tests"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout


@pytest.mark.slow
def test_errors_that_tests_catch_are_failures(clone):
    """And sizes are those of a CPU, where there is no GPU."""
    told = counts(clone)
    assert "FAILED" in told and "test_swallowed" in told
    assert "1 failed, 1 passed, 1 skipped" in told


@pytest.mark.slow
def test_comparison_with_the_plain_version_of_the_clone(clone):
    assert "1 failed, 1 passed" in counts(clone, "--against", "upstream")
    vanilla = clone / "flashrnn" / "flashrnn" / "vanilla" / "__init__.py"
    vanilla.write_text(VANILLA.replace("FUNCTION", "torch.sin"))
    assert "2 failed" in counts(clone, "--against", "upstream")
