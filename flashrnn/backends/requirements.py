"""What every backend whose kernels run on a GPU asks of the machine and of a problem."""

from __future__ import annotations

import torch

from flashrnn.problem import Problem


def missing_gpu() -> str | None:
    """Why this machine's GPU will not do; ``None`` where it will."""
    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU, and PyTorch sees none"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


def refusal(problem: Problem, device: str = "cuda") -> str | None:
    """Why no such kernel computes a problem, whatever its sizes; ``None`` where one may.

    Args:
        problem: the problem.
        device: the type of device that its tensors must be on.
    """
    if problem.device.type != device:
        return f"the tensors are on {problem.device}, and its kernels run on a GPU"
    if problem.dtype == torch.float64:
        return "dtype float64; it computes in float16, bfloat16 and float32"
    return None
