"""How R's gradient is tiled, for heads that a thread block owns."""

from __future__ import annotations

from dataclasses import dataclass

from flashrnn.tiling.gpu import GPU


@dataclass(frozen=True)
class GradientPlan:
    """Tiles of ``kernels/recurrent_gradient.cu``.

    Attributes:
        gates: gates whose products a block computes.
        groups: groups of as many gates.
        parts: parts into which the sum over all steps is cut.
        rows: rows of a part.
        stages: chunks that are on their way at once, or being read.
        shared_memory: a block's dynamic shared memory in bytes.
    """

    gates: int
    groups: int
    parts: int
    rows: int
    stages: int
    shared_memory: int


# Rows of a part: each product that the tensor core adds to a sum cuts up to a unit off the sum's
# last place, which over millions of rows that add up shows in the first digits.
_MOST_ROWS = 2**14
# Registers of a block's sums: 64 of each of 256 threads.
_SUMS = 64 * 256


def plan_gradient(
    recurrent: int, rows: int, N: int, D: int, itemsize: int, gpu: GPU
) -> GradientPlan:
    """The tiles of R's gradient for heads of at most ``LARGEST_HEAD_OF_A_BLOCK`` units.

    Args:
        recurrent: gates that R feeds.
        rows: B · T, what the sum runs over.
        N: number of heads.
        D: head dimension.
        itemsize: bytes of an element of the tensors.
        gpu: the device.
    """
    DD = 16 * -(-D // 16)
    stages, chunk = 3, 64 // itemsize
    # A row of a chunk has a place for each unit of each gate and for each of h, and 16 more.
    places = gpu.shared_memory // (stages * chunk * itemsize)
    gates = max(1, min(recurrent, _SUMS // (DD * DD), (places - DD - 16) // DD))
    groups = -(-recurrent // gates)
    # Two blocks share a multiprocessor; a part is long enough that its sums' way out is not felt.
    parts = max(1, min(2 * gpu.multiprocessors // (N * groups), -(-rows // (8 * chunk))))
    parts = max(parts, -(-rows // _MOST_ROWS))
    rows_a_part = chunk * -(-rows // (parts * chunk))
    shared_memory = stages * chunk * (gates * DD + DD + 16) * itemsize
    return GradientPlan(gates, groups, -(-rows // rows_a_part), rows_a_part, stages, shared_memory)
