"""Kernels compiled before their call: ahead of time, or beside forward. No GPU is used."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from flashrnn import FlashRNNConfig, cell, compile_ahead, register
from flashrnn.__main__ import main
from flashrnn.jit import background, nvrtc
from tests import fake_driver
from tests.test_jit import KERNEL, compiled, folder, forget, needs_nvrtc, needs_users

__all__ = ["compiled", "folder"]  # fixtures

pytestmark = needs_nvrtc
SMALL = "elman,B=4,N=2,D=16,bfloat16"
WIDE = "elman,B=4,N=1,D=136,bfloat16"

CALLS = """
import sys
import torch
from tests import fake_driver
fake_driver.install(sys.argv[1])
from flashrnn.backends import load
from flashrnn.cells import resolve
from flashrnn.jit import nvrtc
from flashrnn.kernels.per_step import runs
from flashrnn.problem import Problem

def refuse(source, arch, names):
    raise AssertionError(f"compiled: {names[-1]}")

nvrtc._compile = refuse
runs._new_record = lambda stepper: torch.empty(stepper.fields, dtype=torch.int64)
from tests.on_fake_driver import call
for shape in sys.argv[2:]:
    backend, name, B, N, D = shape.split(",")
    backend, cell, B, N, D = load(backend), resolve(name).traced, int(B), int(N), int(D)
    for T in (2, 5):
        call(backend, B=B, T=T, N=N, D=D, cell=cell)
        states, last, gates = call(backend, B=B, T=T, N=N, D=D, cell=cell, needs_gradient=True)
        problem = Problem(cell, B, T, N, D, torch.bfloat16, torch.device("cuda", 0), True)
        R = torch.zeros(len(cell.fed_by("R")), N, D, D, dtype=torch.bfloat16)
        initial = torch.zeros_like(last)
        backend.backward(problem, R, initial, states, gates, torch.zeros_like(states), None)
print("done")
"""


OF_LAYERS = """
import sys
import torch
from tests import fake_driver
fake_driver.install(sys.argv[1])
from flashrnn import recurrent_layer
from flashrnn.backends import cuda_fused
from flashrnn.jit import nvrtc

def refuse(source, arch, names):
    raise AssertionError(f"compiled: {names[-1]}")

nvrtc._compile = refuse
cuda_fused.unavailable = lambda device: None
for D in (16, 136):
    W, R, b = (
        torch.zeros(4, 2, *sizes, dtype=torch.bfloat16, requires_grad=True)
        for sizes in ((D, 8), (D, D), (D,))
    )
    x = torch.zeros(4, 3, 8, dtype=torch.bfloat16)
    rows = {"cu_seqlens": torch.tensor([0, 3, 5, 9, 12])}
    cuts = {"lengths": torch.tensor([3, 2, 0, 1]), "reset": torch.ones(4, 3, dtype=torch.bool)}
    both = {"reverse": [False, True]}
    for given, options in ((x, {}), (x, both), (x.view(12, 8), rows), (x, cuts)):
        for _ in range(2):
            h = recurrent_layer(
                given, W, R, b, backend="cuda_fused", return_states="h", **options
            )[0]
            h.sum().backward()
        with torch.no_grad():
            recurrent_layer(given, W, R, b, backend="cuda_fused", return_states="h", **options)
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, for a driver without a GPU")
def test_layers_find_what_was_compiled_ahead(folder, tmp_path):
    """Of h alone, with each option of sequences."""
    options = ("", ",reverse", ",cu_seqlens", ",lengths,reset")
    shapes = [f"lstm,B=4,N=2,D={D},bfloat16{option}" for D in (16, 136) for option in options]
    compile_ahead(shapes, "H200")
    driver = str(fake_driver.compiled(tmp_path))
    done = subprocess.run([sys.executable, "-c", OF_LAYERS, driver], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


OF_TORCH_NN = """
import sys
import torch
from tests import fake_driver
fake_driver.install(sys.argv[1])
from flashrnn import nn
from flashrnn.backends import cuda_fused
from flashrnn.jit import nvrtc

def refuse(source, arch, names):
    raise AssertionError(f"compiled: {names[-1]}")

nvrtc._compile = refuse
cuda_fused.unavailable = lambda device: None
for kind in (nn.LSTM, nn.GRU):
    layer = kind(8, 16, backend="cuda_fused", dtype=torch.bfloat16)
    x = torch.zeros(3, 4, 8, dtype=torch.bfloat16)
    for _ in range(2):
        layer(x)[0].sum().backward()
        with torch.no_grad():
            layer(x)
print("done")
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, for a driver without a GPU")
def test_layers_of_torch_nn_find_what_was_compiled_ahead(folder, tmp_path):
    """That of GRU also what its weights go through."""
    compile_ahead([f"{cell},B=4,N=1,D=16,bfloat16" for cell in ("lstm", "gru")], "H200")
    command = [sys.executable, "-c", OF_TORCH_NN, str(fake_driver.compiled(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, for a driver without a GPU")
def test_calls_find_what_was_compiled_ahead(folder, tmp_path):
    """The real path of calls, on a driver without a GPU, with a compiler that refuses."""
    compile_ahead([SMALL, WIDE], "H200")
    compile_ahead([SMALL], "H200", backend="cuda")
    driver = fake_driver.compiled(tmp_path)
    calls = ["cuda_fused,elman,4,2,16", "cuda_fused,elman,4,1,136", "cuda,elman,4,2,16"]

    def process(*calls):
        command = [sys.executable, "-c", CALLS, str(driver), *calls]
        return subprocess.run(command, capture_output=True, text=True)

    done = process(*calls)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
    missing = process("cuda_fused,elman,4,2,24")
    assert "compiled: single_cta/forward.cu" in missing.stderr


def test_each_kernel_is_compiled_once_and_found_the_next_time(folder, compiled, capsys):
    arguments = ["compile", "--gpu", "H200", "--forward-only", SMALL, SMALL.replace("B=4", "B=3")]
    assert main(arguments) == 0
    assert len(compiled) == len(list(folder.iterdir())) == 3
    *rows, seconds = capsys.readouterr().out.splitlines()
    # The scan, a layer's product, and what torch.nn's weights may go through.
    names = ["single_cta/forward.cu", "few_rows/product.cu", "copies/copies.cu"]
    assert [row.split()[:2] for row in rows] == [[SMALL, name] for name in names]
    assert all(row.endswith(" s") for row in rows) and seconds.endswith(" s in all")
    forget()
    assert main(arguments) == 0
    assert len(compiled) == 3
    assert all(x.endswith("was there") for x in capsys.readouterr().out.splitlines()[:3])


def test_options_and_architectures_have_kernels_of_their_own(folder, monkeypatch):
    """Clip values do not: only whether there are any."""
    asked = set()
    monkeypatch.setattr(nvrtc, "_compile", lambda source, *_: asked.add(source) or b"code")

    def count(shape=SMALL, gpu="H200", **options):
        before = len(list(folder.iterdir())) if folder.exists() else 0
        found = compile_ahead([shape], gpu, **options)
        assert len(found) == len({one.name for one in found})
        return len(list(folder.iterdir())) - before

    # Forward, a layer's product, and what torch.nn's weights may go through.
    assert count(forward_only=True) == 3
    # Forward that saves gates, backward, all gradients of few rows, and R's of many and the sums
    # that complete it.
    assert count() == 5
    assert count(config=FlashRNNConfig(gradient_recurrent_clipval=1.0)) == 1
    assert count(config=FlashRNNConfig(gradient_recurrent_clipval=2.0)) == 0
    assert count(config=FlashRNNConfig(forward_clipval=1.0)) == 3
    # The last is the same for both.
    assert count(SMALL.replace("bfloat16", "fp32")) == 8
    assert count(SMALL.replace("bfloat16", "tf32")) == 7
    assert count(gpu="A100") == count(gpu="RTX5090") == 8
    assert len(asked) > 10


def test_cells_of_a_users_own(folder, monkeypatch):
    monkeypatch.setattr(nvrtc, "_compile", lambda *_: b"code")

    @cell(states=("h",), gates=("g",))
    def compiled_ahead(states, gates):
        return (torch.sin(gates[0]),)

    register(compiled_ahead)
    assert len(compile_ahead(["compiled_ahead,B=1,N=1,D=8,bf16"], "L4")) == 8


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ("lstm", {}, "shape 'lstm'; accepted are a cell, B, N and D"),
        ("lstm,B=1,N=1,D=8,float64", {}, "accepted are .* a dtype out of bfloat16"),
        ("lstm,B=0,N=1,D=8,bf16", {}, "'B=0' in shape"),
        ("lstm,B=1,N=1,D=8,bf16,K=2", {}, "'K=2' in shape"),
        ("lsmt,B=1,N=1,D=8,bf16", {}, "unknown function 'lsmt'. Did you mean 'lstm'"),
        ("lstm,B=1,N=1,D=9000,bf16", {}, "cannot do this call: a head of 9000 units"),
        (SMALL, {"gpu": "H2000"}, "GPU 'H2000'; known are A100"),
        (SMALL, {"backend": "triton"}, "backend 'triton'; accepted are cuda_fused, cuda"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_what_can(folder, shape, options, words):
    with pytest.raises(ValueError, match=words):
        compile_ahead([shape], **{"gpu": "H200", **options})
    assert not folder.exists()


def test_without_a_gpu_one_is_to_be_named(folder, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["compile", SMALL]) == 2
    assert "this machine has no GPU: name one out of A100" in capsys.readouterr().err


def test_a_folder_that_takes_nothing_is_told(folder, monkeypatch):
    monkeypatch.setattr(nvrtc, "_write", lambda *_: None)
    with pytest.raises(RuntimeError, match="FLASHRNN_CACHE_DIR"):
        compile_ahead([SMALL], "H200", forward_only=True)


READS = """
import os, sys
from flashrnn import compile_ahead
from flashrnn.jit import nvrtc
compile_ahead([sys.argv[1]], "H200", forward_only=True)  # What it imports, the user may not.
os.setuid(1234)
nvrtc._compile = None
nvrtc._cubin.cache_clear()
kernels = compile_ahead([sys.argv[1]], "H200", forward_only=True)
print(*[kernel.seconds for kernel in kernels], os.access(os.environ["FLASHRNN_CACHE_DIR"], os.W_OK))
"""


@needs_users
@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs to be root")
def test_a_folder_that_root_shipped_is_read_by_others(monkeypatch):
    """By a user who may not write it, and with no compiler."""
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o755)
        folder = Path(above, "kernels")
        monkeypatch.setenv("FLASHRNN_CACHE_DIR", str(folder))
        forget()
        compile_ahead([SMALL], "H200", forward_only=True, shared=True)
        command = [sys.executable, "-c", READS, SMALL]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["None", "None", "None", "False"], done.stderr


# Beside forward


def wait():
    while any(thread.name == "flashrnn compiles" for thread in threading.enumerate()):
        time.sleep(0.01)


def test_a_program_is_compiled_meanwhile_and_once(folder, compiled):
    background.compile_soon([KERNEL], "sm_90")
    assert nvrtc.compile_program(KERNEL, "sm_90").startswith(b"\x7fELF")
    wait()
    assert len(compiled) == 1


def test_who_needs_a_program_that_failed_gets_the_error(folder, compiled):
    broken = {"mine.cu": "int f( {"}
    background.compile_soon([broken], "sm_90")
    wait()
    assert len(compiled) == 1
    with pytest.raises(nvrtc.CompileError, match=r"mine\.cu"):
        nvrtc.compile_program(broken, "sm_90")


def test_no_more_threads_than_processors(folder, monkeypatch):
    running, most, release = [], [], threading.Event()

    def slow(parts, arch):
        running.append(parts)
        most.append(len(running))
        release.wait(60)

    monkeypatch.setattr(nvrtc, "compile_program", slow)
    background.compile_soon([KERNEL] * 100, "sm_90")
    release.set()
    wait()
    assert len(most) <= os.cpu_count()
    background.compile_soon([KERNEL], "sm_90")
    wait()
    assert len(most) >= 2


LEAVES = """
import sys, time
from flashrnn import ahead
from flashrnn.jit import background, nvrtc
from flashrnn.backends import cuda_fused
from flashrnn.kernels.gpu import MODELS
nvrtc.version()
problem, precision = ahead._parsed("lstm,B=4,N=2,D=64,bfloat16", ahead.FlashRNNConfig())
limits = MODELS["H200"].limits
background.compile_soon(cuda_fused.programs(problem, limits, precision, True), "sm_90a")
"""


@pytest.mark.parametrize(
    "wait",
    [0.1, *(pytest.param(0.1 * k, marks=pytest.mark.slow) for k in range(3, 13, 2))],
)
def test_a_process_may_end_meanwhile(folder, wait):
    done = subprocess.run(
        [sys.executable, "-c", f"{LEAVES}time.sleep({wait})"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")


FORKS = """
import os
time.sleep(0.05)
if child := os.fork():
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))
nvrtc.compile_program({"k": "__global__ void k() {}"}, "sm_90")
background.compile_soon(cuda_fused.programs(problem, limits, precision, True), "sm_90a")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_a_process_may_be_forked_meanwhile(folder):
    """The child's compiler works: no lock is held there by a thread that it does not have."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEAVES + FORKS],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")
