"""The CUDA kernels as plain C++ on the CPU, thread by thread (emulation.h).

What is compiled is the very program that NVRTC gets, but for ptx.cuh.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from flashrnn.backends import cuda, cuda_fused
from flashrnn.jit import nvrtc, runs
from flashrnn.problem import Problem
from flashrnn.tiling import GPU

HEADER = Path(__file__).with_name("emulation.h")
COMPILE = (
    *("g++", "-std=c++17", "-O1", "-ffp-contract=off", "-w", "-fPIC", "-c"),
    # What some compilers define by themselves forbids longjmp to another stack.
    "-U_FORTIFY_SOURCE",
    # Every access asks whether its address is a multiple of what its type is aligned to.
    "-fsanitize=alignment",
)
# Without the compiler's library for what such questions find: emulation.h has its own answer.
LINK = ("g++", "-shared")

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++, to compile the kernels for the CPU"
)


class Library:
    """A program compiled by g++, removed with its folder."""

    def __init__(self, source: str, folder: Path) -> None:
        text, compiled, library = (folder / f"program.{end}" for end in ("cpp", "o", "so"))
        text.write_text(source, encoding="utf-8")
        subprocess.run([*COMPILE, "-o", compiled, text], check=True)
        subprocess.run([*LINK, "-o", library, compiled], check=True)
        self.functions = ctypes.CDLL(str(library))

    def emulate(self, *arguments) -> None:
        """Run a kernel; the program has an entry ``emulate`` for it."""
        run = self.functions.emulate
        run.restype = ctypes.c_char_p
        complaint = run(*arguments)
        assert complaint is None, complaint.decode()


def emulated(parts: dict[str, str]) -> str:
    """The program's text, with ptx.cuh, group.py's instruction and CUDA itself emulated."""
    header = HEADER.read_text(encoding="utf-8")
    assembly = dict.fromkeys(parts.keys() & {"ptx.cuh", "group"}, "")
    return header + nvrtc.join({**parts, **assembly})


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

    Its blocks run one after another, or those that wait for each other at once: all of a launch
    (``together``), or a cluster's.
    """

    def __init__(
        self,
        library: Library,
        threads: int,
        shared_memory: int,
        together: bool = False,
        cluster: int = 0,
    ):
        self.library, self.threads, self.shared_memory = library, threads, shared_memory
        self.together, self.cluster = together, cluster

    def launch(self, grid, tensors, numbers) -> None:
        arguments = (*(x.data_ptr() for x in tensors), *numbers)
        block = (ctypes.c_int64 * len(arguments))(*arguments)
        at_once = grid if self.together else self.cluster or 1
        self.library.emulate(block, grid, self.threads, self.shared_memory, at_once)


def clusters_of(multiprocessors: int, largest: int = 16) -> tuple[int, ...]:
    """How many clusters of each size run at once, as a driver says it of an H200.

    A cluster lies in one group of multiprocessors: most have 16 or a few more, one has fewer.
    """
    groups = multiprocessors * 7 // 8 // 16
    of_the_last = min(14, multiprocessors - 16 * groups)
    sizes = range(2, largest + 1)
    return (0, 0, *(groups * (16 // size) + of_the_last // size for size in sizes))


H200 = GPU(
    multiprocessors=132,
    shared_memory=232448,
    shifts_registers=True,
    multiplies_by_groups=True,
    clusters=clusters_of(132),
)


def plan_taken(problem: Problem, backward: bool) -> cuda_fused.Plan | str:
    """What ``cuda_fused`` computes a problem by."""
    return cuda_fused._plan(problem, backward, cuda_fused._gpu(problem))


@pytest.fixture
def fused_emulation(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Backend ``cuda_fused`` runs on the CPU, by the plans of an H200."""

    @cache
    def library(name: str, source: str) -> Library:
        (parameters,) = re.findall(rf"{name}\((.*?)\)", source, re.DOTALL)
        passed = ", ".join(f"Argument{{a[{i}]}}" for i in range(parameters.count(",") + 1))
        entry = (
            f'extern "C" const char* emulate(long long* a, int grid, int threads, int shared,\n'
            f"                               int at_once) {{\n"
            f"    const auto kernel = [=] {{ {name}({passed}); }};\n"
            f"    return run_kernel(grid, threads, kernel, shared, at_once);\n}}\n"
        )
        return Library(source + entry, tmp_path_factory.mktemp("emulation"))

    def kernel(name, parts, device, *plan):
        return EmulatedKernel(library(name, emulated(parts)), *plan)

    def forget() -> None:
        cuda_fused._best_plan.cache_clear()
        for regime in ("head", "cluster", "team", "wide", "gradient"):
            getattr(cuda_fused, f"_{regime}_kernel").cache_clear()

    forget()
    monkeypatch.setattr(cuda_fused, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda_fused, "unsupported", lambda problem: None)
    monkeypatch.setattr(cuda_fused, "_gpu", lambda problem: H200)
    monkeypatch.setattr(cuda_fused, "_kernel", kernel)
    yield
    forget()


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Backend ``cuda`` runs on the CPU."""

    @cache
    def library(name: str, source: str) -> Library:
        entry = (
            f'extern "C" const char* emulate(Call* call, int ahead, int N, int D,\n'
            f"                               int grid, int threads) {{\n"
            f"    return run_kernel(grid, threads, [=] {{ {name}(call, ahead, N, D); }});\n}}\n"
        )
        return Library(source + entry, tmp_path_factory.mktemp("emulation"))

    def load(name, parts, device):
        return library(name, emulated(parts))

    def stepper(loaded, fields, plan, grid, *sizes):
        return EmulatedStepper(loaded, fields, grid, plan.threads, sizes)

    def forget() -> None:
        for direction, kept in itertools.product(("forward", "backward"), ("stepper", "program")):
            getattr(cuda, f"_{direction}_{kept}").cache_clear()

    forget()
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "unsupported", lambda problem: None)
    monkeypatch.setattr(cuda, "_load", load)
    monkeypatch.setattr(cuda, "_stepper", stepper)
    monkeypatch.setattr(runs, "run", lambda stepper, fields, count: stepper.run(fields, count))
    yield
    forget()
