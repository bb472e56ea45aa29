"""The CUDA kernels as plain C++ on the CPU, thread by thread (emulation.h).

The compiled text is the program that NVRTC gets, except for ptx.cuh.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashrnn.backends import cuda, cuda_fused, steps
from flashrnn.jit import launch, nvrtc
from flashrnn.kernels import registry
from flashrnn.kernels.per_step import runs
from flashrnn.kernels.plan import Plan
from flashrnn.problem import Problem
from tests.gpus import H200

HEADER = Path(__file__).with_name("emulation.h")
COMPILE = (
    *("g++", "-std=c++17", "-O1", "-ffp-contract=off", "-w", "-fPIC"),
    # Some compilers define this by default; it forbids longjmp to another stack.
    "-U_FORTIFY_SOURCE",
    # Every access checks that its address is aligned for its type.
    "-fsanitize=alignment",
)
# Without the compiler's run-time library for these checks: emulation.h reports them.
LINK = ("g++", "-shared")

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++, to compile the kernels for the CPU"
)


# Where compiled programs are kept, for all tests and processes; pytest's folder, which git ignores.
FOLDER = Path(__file__).parents[1] / ".pytest_cache" / "emulation"
# More than one run of all tests takes.
_MOST_KEPT = 2000


class Library:
    """A program compiled by g++. It is compiled once, and kept for later runs of the tests."""

    def __init__(self, source: str) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        header = HEADER.read_text(encoding="utf-8")
        parts = [header, source, *COMPILE, *LINK, _compiler()]
        key = sha256("\0".join(parts).encode()).hexdigest()
        library = FOLDER / f"{key}.so"
        try:
            # The least recently used ones are removed first.
            os.utime(library)
            self.functions = ctypes.CDLL(str(library))
        except OSError:
            # It is not there, or another process has removed it since.
            _compile(source, library)
            self.functions = ctypes.CDLL(str(library))

    def emulate(self, *arguments) -> None:
        """Run a kernel; the program has an entry ``emulate`` for it."""
        run = self.functions.emulate
        run.restype = ctypes.c_char_p
        complaint = run(*arguments)
        assert complaint is None, complaint.decode()


def _compile(source: str, library: Path) -> None:
    kept = sorted(library.parent.glob("*.so"), key=_last_use)
    for path in kept[: max(0, len(kept) - _MOST_KEPT + 1)]:
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        text, compiled, linked = (Path(name) / f"program.{end}" for end in ("cpp", "o", "so"))
        text.write_text(source, encoding="utf-8")
        header = ["-include", str(_header(library.parent))]
        subprocess.run([*COMPILE, *header, "-c", "-o", compiled, text], check=True)
        subprocess.run([*LINK, "-o", linked, compiled], check=True)
        # At once: another process may be at the same program.
        linked.replace(library)


def _last_use(path: Path) -> float:
    """When a library was last used; 0 if another process has removed it since it was listed."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@cache
def _header(folder: Path) -> Path:
    """emulation.h beside its precompiled header, which g++ reads in a fraction of the time."""
    text = HEADER.read_text(encoding="utf-8")
    key = sha256("\0".join([text, *COMPILE, _compiler()]).encode()).hexdigest()
    kept = folder / f"header-{key}"
    if not kept.exists():
        made = Path(tempfile.mkdtemp(dir=folder))
        (made / HEADER.name).write_text(text, encoding="utf-8")
        for outdated in folder.glob("header-*"):
            shutil.rmtree(outdated, ignore_errors=True)
        precompile = [*COMPILE, "-x", "c++-header", "-o", made / f"{HEADER.name}.gch"]
        subprocess.run([*precompile, made / HEADER.name], check=True)
        try:
            made.rename(kept)
        except OSError:
            # Another process was faster.
            shutil.rmtree(made)
    return kept / HEADER.name


@cache
def _compiler() -> str:
    """The compiler's version, and the machine for which it compiles."""
    command = ["g++", "-dumpfullversion", "-dumpmachine"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def emulated(parts: dict[str, str]) -> str:
    """The program's text without ptx.cuh and wgmma.cuh, which emulation.h replaces."""
    assembly = dict.fromkeys(parts.keys() & {"common/ptx.cuh", "common/wgmma.cuh"}, "")
    return nvrtc.join({**parts, **assembly})


class EmulatedStepper:
    """Stands in for runs.Stepper: a step is computed as soon as it is enqueued."""

    def __init__(self, library: Library, fields: int, grid: int, threads: int, sizes: tuple):
        self.block = (ctypes.c_int64 * fields)()
        self.library, self.grid, self.threads, self.sizes = library, grid, threads, sizes

    def run(self, fields: tuple[int, ...], count: int) -> None:
        done, sizes = 0, [ctypes.c_int64(size) for size in self.sizes]
        for length in runs.lengths(count):
            self.block[:] = (*fields, done)
            for ahead in range(length):
                self.library.emulate(self.block, ahead, *sizes, self.grid, self.threads)
            done += length


class EmulatedKernel:
    """Stands in for the kernels of ``cuda_fused``.

    Its CTAs run one after another, or those that wait for each other at once: all of a cooperative
    launch, or a cluster's.
    """

    def __init__(self, library: Library, shape: launch.Shape):
        self.library, self.shape = library, shape

    def launch(self, shape: launch.Shape, fields: tuple[int, ...]) -> None:
        call = (ctypes.c_int64 * len(fields))(*fields)
        at_once = shape.grid if shape.cooperative else shape.cluster_size or 1
        self.library.emulate(call, shape.grid, shape.threads, shape.shared_memory, at_once)

    def kept(self, shape: launch.Shape, fields: tuple[int, ...]) -> SimpleNamespace:
        arguments = list(fields)
        return SimpleNamespace(arguments=arguments, enqueue=lambda: self.launch(shape, arguments))


def plan_taken(problem: Problem, backward: bool) -> Plan:
    """The plan by which ``cuda_fused`` computes a problem."""
    return cuda_fused._plan(problem, backward, cuda_fused._gpu(problem))


def multiply(left: torch.Tensor, right: torch.Tensor, product: torch.Tensor) -> None:
    """Stands in for the library's product of 16 bits, which PyTorch has on GPUs alone."""
    torch.bmm(left.float(), right.float(), out=product)


def emulate_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let programs of one kernel, and the library between them, run on the CPU."""

    @cache
    def library(name: str, source: str) -> Library:
        (parameters,) = re.findall(r"^#define CALL (.*)$", source, re.MULTILINE)
        passed = ", ".join(f"Argument{{a[{i}]}}" for i in range(parameters.count(",") + 1))
        entry = (
            # The kernel may be in a namespace: extern "C", this declares the same function.
            f'extern "C" void {name}(CALL);\n'
            f'extern "C" const char* emulate(long long* a, int grid, int threads, int shared,\n'
            f"                               int at_once) {{\n"
            f"    const auto kernel = [=] {{ {name}({passed}); }};\n"
            f"    return run_kernel(grid, threads, kernel, shared, at_once);\n}}\n"
        )
        return Library(source + entry)

    def kernel(entry, parts, shape, device):
        return EmulatedKernel(library(entry, emulated(parts)), shape)

    for module in (cuda_fused, steps):
        monkeypatch.setattr(module, "_kernel", kernel)
    monkeypatch.setattr(steps, "multiply", multiply)


@pytest.fixture
def fused_emulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Backend ``cuda_fused`` runs on the CPU, by the plans of an H200."""

    def forget() -> None:
        plans = (registry.best_plan, registry.plan_steps)
        for cached in (*plans, *cuda_fused.KERNELS, *steps.KERNELS):
            cached.cache_clear()

    forget()
    emulate_kernels(monkeypatch)
    monkeypatch.setattr(cuda_fused, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda_fused, "unsupported", lambda problem: None)
    monkeypatch.setattr(cuda_fused, "_gpu", lambda problem: H200)
    monkeypatch.setattr(cuda_fused, "_where", lambda problem: (0, 0))
    monkeypatch.setattr(cuda_fused, "_begin_backward", lambda *_: None)
    yield
    forget()


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Backend ``cuda`` runs on the CPU."""

    @cache
    def library(name: str, source: str) -> Library:
        (record,) = re.findall(rf"{name}\(const (\w+)\* __restrict__ call", source)
        entry = (
            f'extern "C" const char* emulate({record}* call, int ahead, int N, int D,\n'
            f"                               int grid, int threads) {{\n"
            f"    const auto step = [=] {{ per_step::{name}(call, ahead, N, D); }};\n"
            f"    return run_kernel(grid, threads, step);\n}}\n"
        )
        return Library(source + entry)

    def load(name, parts, device):
        return library(name, emulated(parts))

    def stepper(loaded, plan, grid, *sizes):
        return EmulatedStepper(loaded, plan.record.size, grid, plan.threads, sizes)

    def forget() -> None:
        for cached in (cuda._planned_steps, cuda._stepper, cuda._program, *steps.KERNELS):
            cached.cache_clear()

    forget()
    emulate_kernels(monkeypatch)
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "unsupported", lambda problem: None)
    monkeypatch.setattr(cuda, "_gpu", lambda problem: H200)
    monkeypatch.setattr(cuda, "_load", load)
    monkeypatch.setattr(cuda, "_begin_backward", lambda *_: None)
    monkeypatch.setattr(cuda, "_shared_stepper", stepper)
    monkeypatch.setattr(runs, "run", lambda stepper, fields, count: stepper.run(fields, count))
    yield
    forget()
