"""What of a GPU plans depend on."""

from __future__ import annotations

from typing import NamedTuple


class GPU(NamedTuple):
    """The limits of a GPU, or of the part of one that a context has.

    Attributes:
        multiprocessors: how many.
        shared_memory: bytes of it that a thread block may have.
        shifts_registers: whether warps can hand registers to others.
        multiplies_by_groups: whether it has products of four warps (PTX: wgmma).
        clusters: under each number of thread blocks, how many clusters of so many run at once, if
            no two blocks share a multiprocessor; ends with the largest clusters that there are.
    """

    multiprocessors: int
    shared_memory: int
    shifts_registers: bool
    multiplies_by_groups: bool
    clusters: tuple[int, ...] = ()


def clusters_at_once(size: int, gpu: GPU) -> int:
    """How many clusters of so many thread blocks run at once."""
    return gpu.clusters[size] if size < len(gpu.clusters) else 0
