"""The CUDA kernels as plain C++ on the CPU, thread by thread (emulation.h, emulation.cpp).

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

from flashrnn import calls
from flashrnn.backends import (
    copies,
    cuda,
    cuda_fused,
    few_rows,
    padding,
    steps,
    tables,
)
from flashrnn.backends.fused import compiled, plans, scans
from flashrnn.jit import launch, nvrtc
from flashrnn.kernels import registry
from flashrnn.kernels.per_step import runs
from flashrnn.kernels.plan import Plan
from flashrnn.problem import Problem
from tests.gpus import H200

HEADER = Path(__file__).with_name("emulation.h")
SCHEDULER = HEADER.with_suffix(".cpp")
_GXX = (
    *("g++", "-std=c++17", "-w", "-fPIC"),
    # Some compilers define this by default; it forbids longjmp to another stack.
    "-U_FORTIFY_SOURCE",
)
COMPILE = (
    *(*_GXX, "-O1", "-ffp-contract=off"),
    # Every access checks that its address is aligned for its type.
    "-fsanitize=alignment",
)
# It is run more than compiled.
COMPILE_SCHEDULER = (*_GXX, "-O2")
# Without the compiler's run-time library for these checks: emulation.cpp reports them.
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
        library = FOLDER / f"{_hash(source)}.so"
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
        common = _common(library.parent)
        header = ["-include", common / HEADER.name]
        subprocess.run([*COMPILE, *header, "-c", "-o", compiled, text], check=True)
        subprocess.run([*LINK, "-o", linked, compiled, common / "scheduler.o"], check=True)
        # At once: another process may be at the same program.
        linked.replace(library)


def _last_use(path: Path) -> float:
    """When a library was last used; 0 if another process has removed it since it was listed."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@cache
def _common(folder: Path) -> Path:
    """What all programs share, compiled: emulation.h beside its precompiled header, scheduler.o.

    They are most of a program, and take most of the time to compile.
    """
    kept = folder / f"common-{_hash('')}"
    if not kept.exists():
        made = Path(tempfile.mkdtemp(dir=folder))
        for other in folder.glob("common-*"):
            # Not one that another process has just made.
            if other != kept:
                shutil.rmtree(other, ignore_errors=True)
        shutil.copy(HEADER, made)
        precompile = [*COMPILE, "-x", "c++-header", "-o", made / f"{HEADER.name}.gch"]
        subprocess.run([*precompile, made / HEADER.name], check=True)
        # Where it lies: it must not meet a header that is precompiled with other options.
        scheduler = [*COMPILE_SCHEDULER, "-c", "-o", made / "scheduler.o"]
        subprocess.run([*scheduler, SCHEDULER], check=True)
        try:
            made.rename(kept)
        except OSError:
            # Another process was faster.
            shutil.rmtree(made)
    return kept


def _hash(source: str) -> str:
    """Of all that a program's machine code depends on."""
    common = [x.read_text(encoding="utf-8") for x in (HEADER, SCHEDULER)]
    parts = [source, *common, *COMPILE, *COMPILE_SCHEDULER, *LINK, _compiler()]
    return sha256("\0".join(parts).encode()).hexdigest()


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
        sizes = shape.grid, shape.threads, shape.shared_memory, at_once, shape.cluster_size
        self.library.emulate(call, *sizes)

    def kept(
        self, shape: launch.Shape, fields: tuple[int, ...], zeros: launch.Zeros | None = None
    ) -> SimpleNamespace:
        arguments = list(fields)

        def enqueue() -> None:
            one_by_one([(self, shape, arguments)], zeros)

        return SimpleNamespace(arguments=arguments, enqueue=enqueue)


def plan_taken(problem: Problem, backward: bool) -> Plan:
    """The plan by which ``cuda_fused`` computes a problem."""
    return plans.plan_of(problem, backward, plans.gpu_of(problem))


@cache
def _library(name: str, source: str) -> Library:
    """A program of one kernel whose parameters are those of ``CALL``."""
    (parameters,) = re.findall(r"^#define CALL (.*)$", source, re.MULTILINE)
    passed = ", ".join(f"Argument{{a[{i}]}}" for i in range(parameters.count(",") + 1))
    entry = (
        # The kernel may be in a namespace: extern "C", this declares the same function.
        f'extern "C" void {name}(CALL);\n'
        f'extern "C" const char* emulate(long long* a, int grid, int threads, int shared,\n'
        f"                               int at_once, int cluster_size) {{\n"
        f"    const auto kernel = [=] {{ {name}({passed}); }};\n"
        f"    return run_kernel(grid, threads, kernel, shared, at_once, cluster_size);\n}}\n"
    )
    return Library(source + entry)


def _emulated_kernel(entry, parts, shape, device) -> EmulatedKernel:
    """Stands in for :func:`flashrnn.jit.kernel.load`."""
    return EmulatedKernel(_library(entry, emulated(parts)), shape)


def _multiply(left: torch.Tensor, right: torch.Tensor, product: torch.Tensor) -> None:
    """Stands in for the library's product of 16 bits, which PyTorch has on GPUs alone."""
    torch.bmm(left.float(), right.float(), out=product)


def _emulate_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let programs of one kernel, and the library between them, run on the CPU."""
    for module in (copies, few_rows, padding, scans, steps, tables):
        monkeypatch.setattr(module, "_kernel", _emulated_kernel)
    for module in (copies, few_rows, padding, scans):
        monkeypatch.setattr(module, "launch_in_turn", one_by_one)
    monkeypatch.setattr(steps, "multiply", _multiply)


def begin_nothing(problem, gpu, precision, of_few_rows) -> None:
    """Stands in for ``compiled.begin_backward``."""


def one_by_one(launches, zeros=None) -> None:
    """Stands in for :func:`flashrnn.jit.kernel.launch_in_turn`."""
    if zeros is not None:
        ctypes.memset(zeros.address, 0, 4 * zeros.words)
    for kernel, shape, fields in launches:
        kernel.launch(shape, fields)


@pytest.fixture
def fused_emulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Backend ``cuda_fused`` runs on the CPU, by the plans of an H200."""

    def forget() -> None:
        of_plans = (registry.best_plan, registry.plan_steps, registry.padded_units)
        of_plans += (cuda_fused._padded_units,)
        of_rows = (few_rows._taken, few_rows._input, few_rows._asked, few_rows.gives_R)
        for cached in (*of_plans, *of_rows, *cuda_fused.KERNELS, *steps.KERNELS, *tables.KERNELS):
            cached.cache_clear()
        calls.kept.clear()

    forget()
    _emulate_kernels(monkeypatch)
    monkeypatch.setattr(cuda_fused, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda_fused, "unsupported", lambda problem: None)
    monkeypatch.setattr(plans, "gpu_of", lambda problem: H200)
    monkeypatch.setattr(few_rows, "whole", lambda device: H200)
    monkeypatch.setattr(plans, "stream_of", lambda problem: (0, 0))
    monkeypatch.setattr(compiled, "begin_backward", begin_nothing)
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
        own = (cuda._planned_steps, cuda._stepper, cuda._program)
        for cached in (*own, *steps.KERNELS, *tables.KERNELS):
            cached.cache_clear()

    forget()
    _emulate_kernels(monkeypatch)
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "unsupported", lambda problem: None)
    monkeypatch.setattr(cuda, "_gpu", lambda problem: H200)
    monkeypatch.setattr(cuda, "_load", load)
    monkeypatch.setattr(cuda, "_begin_backward", lambda *_: None)
    monkeypatch.setattr(cuda, "_shared_stepper", stepper)
    monkeypatch.setattr(runs, "run", lambda stepper, fields, count: stepper.run(fields, count))
    yield
    forget()
