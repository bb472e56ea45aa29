"""What is asked of devices, drivers and contexts, and what a call leaves behind; without a GPU."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from flashrnn import backends
from flashrnn.backends import requirements
from flashrnn.cells import lstm
from flashrnn.jit import context, nvrtc
from flashrnn.problem import Problem
from tests import fake_driver
from tests.on_fake_driver import TESTS
from tests.test_jit import needs_nvrtc

# ---- tensors that are not on a GPU

ON_THE_CPU = """
import sys, torch

def refuse(*_, **__):
    raise RuntimeError("CUDA was asked")

for name in ("_lazy_init", "init", "is_available", "device_count", "current_device",
             "current_stream", "get_device_properties", "get_device_capability",
             "is_current_stream_capturing"):
    setattr(torch.cuda, name, refuse)
torch._C._cuda_init = refuse
torch._C._cuda_getDeviceCount = refuse

from flashrnn import FlashRNNConfig, flashrnn

def inputs():
    shapes = (2, 3, 4, 2, 8), (4, 2, 8, 8), (4, 2, 8)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]

for backend in ("auto", "vanilla"):
    for config in (None, FlashRNNConfig(initial_val=(0.0, 1.0)), FlashRNNConfig(forward_clipval=1)):
        states, _ = flashrnn(*inputs(), config=config, backend=backend)
        states.sum().backward()
        with torch.autocast("cpu"):
            flashrnn(*inputs(), config=config, backend=backend)
for backend in ("cuda_fused", "triton", "cuda"):
    try:
        flashrnn(*inputs(), backend=backend)
    except ValueError as error:
        assert f"backend '{backend}' cannot do this call" in str(error) and "cpu" in str(error)
    else:
        raise AssertionError(backend)
assert "cuda.bindings.driver" not in set(sys.modules) - before
assert not torch.cuda.is_initialized()
"""
BEFORE = "import sys, torch; before = set(sys.modules)\n"
FORKED = f"""
import multiprocessing, sys

def work():
    exec({ON_THE_CPU!r}, {{"before": before}})

child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join()
assert child.exitcode == 0
"""


def test_tensors_on_the_cpu_ask_nothing_of_cuda():
    """In a forked process, and then in the one that it was forked from."""
    program = BEFORE + FORKED + ON_THE_CPU
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- devices, each for itself


@pytest.fixture
def two_gpus(monkeypatch):
    """The second one is too old."""
    capabilities = {torch.device("cuda", 0): (9, 0), torch.device("cuda", 1): (7, 5)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of old")
    monkeypatch.setattr(requirements, "_unavailable_compiler", lambda: None)
    requirements.missing_gpu.cache_clear()
    yield
    requirements.missing_gpu.cache_clear()


def problem_on(device, dtype=torch.bfloat16):
    return Problem(lstm.traced, 2, 3, 1, 64, dtype, torch.device(device))


@pytest.mark.parametrize("first", [0, 1])
def test_each_gpu_is_asked_for_itself(two_gpus, monkeypatch, first):
    """Whichever comes first."""
    monkeypatch.setattr(backends.load("cuda_fused"), "unsupported", lambda problem: None)
    chosen = {k: backends.best("auto", problem_on(f"cuda:{k}")) for k in (first, 1 - first)}
    assert chosen == {0: "cuda_fused", 1: "vanilla"}
    with pytest.raises(ValueError, match=r"8\.0 or later; cuda:1, GPU of old, has 7\.5"):
        backends.best("cuda", problem_on("cuda:1"))


def test_other_devices_are_named():
    for name in ("cuda_fused", "cuda"):
        with pytest.raises(ValueError, match="the tensors are on meta"):
            backends.best(name, problem_on("meta"))
    assert backends.best("auto", problem_on("meta")) == "vanilla"


# ---- the driver, beside the compiler


@pytest.mark.parametrize(
    ("driver", "compiler", "loads"),
    [
        *[(13000, (13, 0), True), (13020, (13, 0), True), (13000, (13, 5), True)],
        *[(14000, (13, 5), True), (12090, (12, 9), True), (12020, (12, 9), True)],
        *[(12090, (13, 0), False), (11080, (12, 4), False)],
    ],
)
def test_a_driver_loads_what_is_compiled_for_its_cuda(monkeypatch, driver, compiler, loads):
    monkeypatch.setattr(context, "driver_version", lambda: driver)
    monkeypatch.setattr(nvrtc, "_version", lambda: compiler)
    assert (requirements._old_driver() is None) == loads


def test_an_old_driver_is_named_with_what_mends_it(two_gpus, monkeypatch):
    monkeypatch.setattr(context, "driver_version", lambda: 12040)
    monkeypatch.setattr(nvrtc, "_version", lambda: (13, 0))
    monkeypatch.setattr(requirements, "_unavailable_compiler", requirements._old_driver)
    with pytest.raises(ValueError, match=r"NVRTC 13\.0") as raised:
        backends.best("cuda_fused", problem_on("cuda:0"))
    for words in ("is of CUDA 12.4", "update the driver", "pip install", "nvidia-cuda-nvrtc-cu12"):
        assert words in str(raised.value)
    triton = backends.load("triton")
    monkeypatch.setattr(triton, "unavailable", lambda device: None)
    monkeypatch.setattr(triton, "unsupported", lambda problem: None)
    assert backends.best("auto", problem_on("cuda:0")) == "triton"


# ---- on a driver without a GPU


@pytest.fixture(scope="module")
def on_fake_driver(tmp_path_factory):
    """What on_fake_driver.py's functions gave."""
    path = fake_driver.compiled(tmp_path_factory.mktemp("driver"))
    command = [sys.executable, "-m", "tests.on_fake_driver", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, for a driver without a GPU")
@pytest.mark.parametrize("name", [test.__name__ for test in TESTS])
def test_on_a_driver_without_a_gpu(on_fake_driver, name):
    assert on_fake_driver[name] is None, on_fake_driver[name]
