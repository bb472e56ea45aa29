"""The CUDA kernels as plain C++ on the CPU, thread by thread (emulation.h).

What is compiled is the very program that NVRTC gets, but for ptx.cuh.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from flashrnn.backends import cuda, cuda_fused
from flashrnn.jit import nvrtc, runs
from flashrnn.tiling import GPU

HEADER = Path(__file__).with_name("emulation.h")
COMMAND = ("g++", "-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC")

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++, to compile the kernels for the CPU"
)


class Library:
    """A program compiled by g++, removed with its folder."""

    def __init__(self, source: str, folder: Path) -> None:
        text, library = folder / "program.cpp", folder / "program.so"
        text.write_text(source, encoding="utf-8")
        subprocess.run(
            [*COMMAND, "-o", str(library), str(text)],
            check=True,
        )
        self.functions = ctypes.CDLL(str(library))


def emulated(parts: dict[str, str]) -> str:
    """The program's text, with ptx.cuh and CUDA itself emulated."""
    header = HEADER.read_text(encoding="utf-8")
    return header + nvrtc.join({**parts, "ptx.cuh": ""})


class EmulatedStepper:
    """Stands in for runs.Stepper: a step is computed as soon as it is enqueued."""

    def __init__(self, library: Library, fields: int, grid: int, threads: int, sizes: tuple):
        self.block = (ctypes.c_int64 * fields)()
        self.library, self.grid, self.threads, self.sizes = library, grid, threads, sizes

    def run(self, fields: tuple[int, ...], count: int) -> None:
        done = 0
        for length in runs.lengths(count):
            self.block[:] = (*fields, done)
            for ahead in range(length):
                self.library.functions.emulate(
                    self.block, ahead, *self.sizes, self.grid, self.threads
                )
            done += length


class EmulatedKernel:
    """Stands in for the kernels of ``cuda_fused``."""

    def __init__(self, library: Library, threads: int, shared_memory: int):
        self.emulate = library.functions.emulate
        self.emulate.restype = ctypes.c_bool
        self.threads, self.shared_memory = threads, shared_memory

    def launch(self, grid, tensors, numbers) -> None:
        arguments = (*(x.data_ptr() for x in tensors), *numbers)
        block = (ctypes.c_int64 * len(arguments))(*arguments)
        fits = self.emulate(block, grid, self.threads, self.shared_memory)
        assert fits, "a kernel wrote more shared memory than its plan has"


H200 = GPU(multiprocessors=132, shared_memory=232448, shifts_registers=True)


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
            f'extern "C" bool emulate(long long* a, int grid, int threads, int shared) {{\n'
            f"    return run_kernel(grid, threads, [=] {{ {name}({passed}); }}, shared);\n}}\n"
        )
        return Library(source + entry, tmp_path_factory.mktemp("emulation"))

    def kernel(name, parts, device, threads, shared_memory):
        return EmulatedKernel(library(name, emulated(parts)), threads, shared_memory)

    def forget() -> None:
        for cached in ("_forward_kernel", "_backward_kernel", "_gradient_kernel"):
            getattr(cuda_fused, cached).cache_clear()

    forget()
    monkeypatch.setattr(cuda_fused, "unavailable", lambda: None)
    monkeypatch.setattr(cuda_fused, "unsupported", lambda problem: None)
    monkeypatch.setattr(cuda_fused, "_gpu", lambda device: H200)
    monkeypatch.setattr(cuda_fused, "_kernel", kernel)
    yield
    forget()


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Backend ``cuda`` runs on the CPU."""

    @cache
    def library(name: str, source: str) -> Library:
        entry = (
            f'extern "C" void emulate(Call* call, int ahead, int B, int N, int D, int grid,\n'
            f"                         int threads) {{\n"
            f"    run_kernel(grid, threads, [=] {{ {name}(call, ahead, B, N, D); }});\n}}\n"
        )
        return Library(source + entry, tmp_path_factory.mktemp("emulation"))

    def stepper(name, parts, fields, plan, sizes, device):
        compiled = library(name, emulated(parts))
        return EmulatedStepper(compiled, len(fields), plan.grid(*sizes), plan.threads, sizes)

    cuda._forward_stepper.cache_clear()
    cuda._backward_stepper.cache_clear()
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "unsupported", lambda problem: None)
    monkeypatch.setattr(cuda, "_stepper", stepper)
    monkeypatch.setattr(runs, "run", lambda stepper, fields, count: stepper.run(fields, count))
    yield
    cuda._forward_stepper.cache_clear()
    cuda._backward_stepper.cache_clear()
