"""What backends with GPU kernels require of the machine and of a problem.

The tensors' device is checked first. For tensors on another device CUDA is not called at all: that
would make a context on a GPU, and would fail in a process forked from one that has used CUDA.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from flashrnn.jit import context, nvrtc
from flashrnn.kernels.sizes import tiles_of
from flashrnn.problem import Problem


@lru_cache(maxsize=64)
def missing_gpu(device: torch.device) -> str | None:
    """Why a device is not a GPU that kernels run on; ``None`` if it is."""
    if device.type != "cuda":
        return f"the tensors are on {device}, and its kernels run on a GPU"
    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU, and PyTorch sees none"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        return (
            "it needs an NVIDIA GPU of compute capability 8.0 or later; "
            f"{device}, {name}, has {major}.{minor}"
        )
    return None


def unavailable_cuda(device: torch.device) -> str | None:
    """Why kernels that NVRTC compiles do not run on a device; ``None`` where they do."""
    return missing_gpu(device) or _unavailable_compiler()


@cache
def _unavailable_compiler() -> str | None:
    return nvrtc.unavailable() or _old_driver()


def _old_driver() -> str | None:
    """Why the driver does not load what NVRTC compiles; ``None`` where it does."""
    driver, compiler = context.driver_version() // 1000, nvrtc.version()
    if driver >= compiler[0]:
        return None
    made = f"NVRTC {compiler[0]}.{compiler[1]} compiles for drivers of CUDA {compiler[0]}"
    known = f"{driver}.{context.driver_version() % 1000 // 10}"
    packages = f"'cuda-bindings=={driver}.*' nvidia-cuda-nvrtc-cu{driver}"
    return (
        f"{made} and later, and this machine's is of CUDA {known}: update the driver, or "
        f"pip uninstall nvidia-cuda-nvrtc && pip install {packages}"
    )


def refusal(problem: Problem) -> str | None:
    """Why no such kernel computes a problem, whatever its sizes; ``None`` where one may."""
    if problem.dtype == torch.float64:
        return "dtype float64; it computes in float16, bfloat16 and float32"
    return None


def too_many_numbered_rows(problem: Problem) -> str | None:
    """Why a problem's options cannot be told to kernels, which number rows by 32 bits."""
    rows = problem.rows[0] * problem.T
    # What sequences start with and go back to is numbered behind the rows (gradients.Before).
    numbered = rows + problem.B if problem.resets else rows
    if not problem.is_sequenced or numbered < 2**31:
        return None
    return (
        f"B · T is {rows}; with options of sequences its kernels count to 2³¹ − 1 rows, and with "
        "resets to B fewer"
    )


def too_many_rows(problem: Problem) -> str | None:
    """Why PyTorch cannot compute the product for R's gradient; ``None`` if it can."""
    rows = problem.B * problem.T
    if rows < 2**31 or not problem.needs_gradient:
        return None
    return (
        f"B · T is {rows}; R's gradient is a product of PyTorch's, which sums up to 2³¹ − 1. "
        "Without gradients there may be more"
    )


_LARGEST = 2**31 - 1


def too_large(problem: Problem) -> str | None:
    """Why a problem's sizes are more than CUDA kernels count to; ``None`` where they are not."""
    B, T, N, D = problem.B, problem.T, problem.N, problem.D
    if B * T * N * D <= _LARGEST:
        return None
    for name, size in (("B", B), ("T", T), ("N · D", N * D)):
        if size > _LARGEST:
            return f"{name} is {size}; its kernels count to 2³¹ − 1 = {_LARGEST}"
    # Up to half of the largest grid: a launch's grid may be rounded up.
    if 2 * N * tiles_of(D, 8) * tiles_of(B, 8) > _LARGEST:
        return f"B = {B}, N = {N} and D = {D} need more thread blocks than a launch has"
    return None
