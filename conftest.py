"""What the tests and the docstrings' examples share."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Looking for examples imports every module, and these import Triton.
collect_ignore_glob = ["flashrnn/flashrnn/cuda_init/*.py"]  # An error to import, on purpose.
if not importlib.util.find_spec("triton"):
    collect_ignore_glob.append("flashrnn/kernels/triton/*.py")


# How long an example takes says more about what else the machine does.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_configure() -> None:
    # Problems here are small: threads that share one do little but wait for each other. Processes
    # that tests start read the variable.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and PyTorch sees none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _names_in_examples(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["torch"] = torch


@pytest.fixture(autouse=True)
def _nothing_kept_of_other_tests() -> Iterator[None]:
    """What is kept of calls was prepared by the kernels and the plans of that test."""
    yield
    if calls := sys.modules.get("flashrnn.calls"):
        calls.kept.clear()
