"""The GPUs that plans are made for on a machine without one, and who shares a real one."""

from __future__ import annotations

import os

import pytest
import torch

from flashrnn import Cell
from flashrnn.cells import resolve
from flashrnn.kernels.gpu import GPU, MODELS, clusters_of
from flashrnn.problem import Problem


def _gpu(multiprocessors: int, shared_memory: int, hopper: bool, clusters: int = 0) -> GPU:
    return GPU(
        multiprocessors=multiprocessors,
        shared_memory=shared_memory,
        shifts_registers=hopper,
        multiplies_by_groups=hopper,
        clusters=clusters_of(multiprocessors, clusters) if clusters else (),
    )


A100, RTX_4090, H200, B200 = (MODELS[name].limits for name in ("A100", "RTX4090", "H200", "B200"))
GPUS = {
    "sm_80": A100,
    "sm_86": RTX_4090,
    "sm_89": RTX_4090,
    "sm_90a": H200,
    "sm_100": B200,
    "sm_120": RTX_4090,
}
"""One of each architecture that kernels are compiled for."""

SMALL = _gpu(6, 232448, hopper=True, clusters=4)
"""Few multiprocessors: the emulation of CTAs that run at once takes time."""
LARGER = _gpu(20, 232448, hopper=True, clusters=16)
"""One with clusters of every size."""


def planned(
    kind: str | Cell, B: int, N: int, D: int, dtype: torch.dtype, needs_gradient: bool = True
) -> Problem:
    """A problem on a GPU, as plans are asked for."""
    device = torch.device("cuda")
    return Problem(resolve(kind), B, 64, N, D, dtype, device, needs_gradient=needs_gradient)


alone = pytest.mark.skipif(
    os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1",
    reason="measures time or free memory, which other workers take: run it without -n",
)
"""Of tests that are wrong beside others."""
