"""A plugin for pytest: upstream's own tests, out of a clone of its repository, with this package.

``make test-upstream`` runs it; docs/upstream.md has the counts. The tests ask for a GPU, with
backends ``cuda_fused`` and ``cuda``, and compare with ``vanilla``; they catch any ``ValueError``,
which is a failure here. Nothing else of them changes where there is a GPU. Without one the device
is the CPU, the backend ``vanilla`` (or ``triton``, by its interpreter), and larger sizes are cut.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

SIZES_OF_A_CPU = {"batch_size": 16, "num_heads": 16, "head_dim": 64, "sequence_size": 24}

# What a comparison calls upstream's plain version by, in place of a backend's name.
PLAIN = "upstream's vanilla"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("upstream")
    group.addoption("--clone", type=Path, required=True, help="a clone of upstream's repository")
    group.addoption("--backend", help="the backend to test; default: those that the tests name")
    group.addoption(
        "--against",
        choices=["ours", "upstream"],
        default="ours",
        help="compare with this package's vanilla, as the tests have it, or with upstream's",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    clone: Path = config.getoption("--clone").resolve() / "flashrnn"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = config.getoption("--backend") or (None if device == "cuda" else "vanilla")

    # The tests import flashrnn.tests.utils, and flashrnn is this package.
    package = types.ModuleType("flashrnn.tests")
    package.__path__ = [str(clone / "tests")]
    sys.modules[package.__name__] = package
    utils: Any = importlib.import_module("flashrnn.tests.utils")
    if config.getoption("--against") == "upstream":
        utils.flashrnn = _either(utils.flashrnn, _upstreams_vanilla(clone))
        compared = {"backend_cmp": PLAIN}
    else:
        compared = {}

    model_test, create_inputs = utils.model_test, utils.create_inputs

    @functools.wraps(model_test)
    def with_errors(**options: Any) -> bool:
        if backend:
            options["backend"] = backend
        if device == "cpu":
            options |= {name: min(options[name], most) for name, most in SIZES_OF_A_CPU.items()}
        try:
            return model_test(**options | compared | {"device": device})
        except ValueError as error:
            # No subclass of Exception: the tests cannot catch it.
            pytest.fail(f"{type(error).__name__}: {error}")

    @functools.wraps(create_inputs)
    def on_the_device(batch_size: int, **options: Any) -> Any:
        if device == "cpu" and batch_size * options["sequence_size"] > 1024:
            pytest.skip("too large for a CPU, and compared with a layer of this size")
        return create_inputs(batch_size, **options | {"device": device})

    utils.model_test, utils.create_inputs = with_errors, on_the_device


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def _upstreams_vanilla(clone: Path) -> types.ModuleType:
    """Upstream's plain version, which imports nothing but PyTorch."""
    path = clone / "flashrnn" / "vanilla" / "__init__.py"
    spec = importlib.util.spec_from_file_location("upstreams_vanilla", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _either(ours: Any, plain: Any) -> Any:
    """``flashrnn()`` of this package, or of upstream's plain version where that is asked for."""

    def flashrnn(
        Wx: torch.Tensor,
        R: torch.Tensor,
        b: torch.Tensor,
        states: torch.Tensor | None = None,
        function: str = "lstm",
        *,
        backend: str,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if backend != PLAIN:
            return ours(Wx, R, b, states, function=function, backend=backend, **options)
        assert states is not None
        every, last = plain.flashrnn_forward(
            Wx.transpose(0, 1),  # T B G N D, and 1 B S N D of the states
            states.permute(2, 1, 0, 3, 4),
            R.permute(1, 3, 0, 2),  # N P G D
            b,
            plain.flashrnn_pointwise_function_registry[function],
        )
        # T B S N D of both to S B T N D; the last in the dtype that this package has it in.
        last = last.to(torch.promote_types(last.dtype, torch.float32))
        return every.permute(2, 1, 0, 3, 4), last.permute(2, 1, 0, 3, 4)

    return flashrnn
