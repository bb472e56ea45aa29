"""The properties of a GPU that plans depend on."""

from __future__ import annotations

from typing import NamedTuple


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
