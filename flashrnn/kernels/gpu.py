"""The properties of a GPU that plans depend on."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch


class GPU(NamedTuple):
    """The limits of a GPU, or of the part of one that a context has.

    Attributes:
        multiprocessors: how many.
        shared_memory: bytes of it that a CTA may have.
        shifts_registers: whether warps can give registers to others (PTX: setmaxnreg).
        multiplies_by_groups: whether it has products of a warpgroup (PTX: wgmma).
        clusters: at index k, how many clusters of k CTAs run at once, if no two CTAs share a
            multiprocessor. The last index is the size of the largest clusters that run at all.
    """

    multiprocessors: int
    shared_memory: int
    shifts_registers: bool
    multiplies_by_groups: bool
    clusters: tuple[int, ...] = ()


def clusters_at_once(size: int, gpu: GPU) -> int:
    """How many clusters of so many CTAs run at once."""
    return gpu.clusters[size] if size < len(gpu.clusters) else 0


@cache
def whole(device: torch.device) -> GPU:
    """The limits of a device, but for clusters, which depend on the context."""
    properties: Any = torch.cuda.get_device_properties(device)
    return GPU(
        multiprocessors=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,
        shifts_registers=properties.major == 9,
        multiplies_by_groups=properties.major == 9,
    )


class Model(NamedTuple):
    """A model of GPU, for plans on a machine without one.

    Attributes:
        architecture: what kernels are compiled for: ``"sm_90a"``.
        limits: those of the whole GPU.
    """

    architecture: str
    limits: GPU


def clusters_of(multiprocessors: int, largest: int = 16) -> tuple[int, ...]:
    """A guess of how many clusters of each size run at once.

    A cluster lies in one group of multiprocessors: most have 16 or a few more, one has fewer.
    """
    groups = multiprocessors * 7 // 8 // 16
    of_the_last = min(14, multiprocessors - 16 * groups)
    sizes = range(2, largest + 1)
    return (0, 0, *(groups * (16 // size) + of_the_last // size for size in sizes))


_CLUSTERS_OF_HOPPER = (0, 0, 66, 39, 30, 22, 17, 15, 15, 9, 7, 7, 7, 7, 7, 7, 7)
"""As the driver reports for an H200 (2026-11-29). Another one may have a few more or less."""


def _model(architecture: str, multiprocessors: int, shared_memory: int) -> Model:
    hopper = architecture == "sm_90a"
    clusters = {"sm_90a": _CLUSTERS_OF_HOPPER, "sm_100": clusters_of(multiprocessors)}
    limits = GPU(
        multiprocessors=multiprocessors,
        shared_memory=shared_memory * 1024,
        shifts_registers=hopper,
        multiplies_by_groups=hopper,
        clusters=clusters.get(architecture, ()),
    )
    return Model(architecture, limits)


MODELS = {
    "A100": _model("sm_80", 108, 163),
    "A10": _model("sm_86", 72, 99),
    "RTX3090": _model("sm_86", 82, 99),
    "L4": _model("sm_89", 58, 99),
    "L40S": _model("sm_89", 142, 99),
    "RTX4090": _model("sm_89", 128, 99),
    "H100": _model("sm_90a", 132, 227),
    "H200": _model("sm_90a", 132, 227),
    "B200": _model("sm_100", 148, 227),
    "RTX5090": _model("sm_120", 170, 99),
}
"""GPUs that plans can be made for on a machine without one.

The numbers of clusters are those of an H200; for B200 they are a guess.
"""
