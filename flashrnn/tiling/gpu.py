"""What of a GPU plans depend on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A GPU's limits.

    Attributes:
        multiprocessors: how many.
        shared_memory: bytes of it that a thread block may have.
        shifts_registers: whether warps can hand registers to others.
        multiplies_by_groups: whether it has products of four warps (PTX: wgmma).
        largest_cluster: thread blocks that a cluster may have; 0 where there are none.
    """

    multiprocessors: int
    shared_memory: int
    shifts_registers: bool
    multiplies_by_groups: bool
    largest_cluster: int


def clusters_at_once(size: int, gpu: GPU) -> int:
    """How many of so many thread blocks run at once.

    A cluster lies in one group of multiprocessors: most have 16 or a few more, one has fewer.
    """
    groups = gpu.multiprocessors * 7 // 8 // 16
    of_the_last = min(14, gpu.multiprocessors - 16 * groups)
    return groups * (16 // size) + of_the_last // size
