"""The host side of cluster_forward.cu.

What sizes its registers and shared memory is compiled in, D among it, and follows from a plan
(:mod:`flashrnn.tiling`); B, T, N, addresses and strides are arguments of the launch.
"""

from __future__ import annotations

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import program
from flashrnn.tiling import ClusterPlan


def forward_source(
    cell: TracedCell, precision: str, D: int, plan: ClusterPlan, save_gates: bool
) -> dict[str, str]:
    """The parts of cluster_forward.cu's program, each under the name that an error gives it.

    Args:
        cell: the cell.
        precision: out of ``program.PRECISIONS``, one of 16 bits.
        D: head dimension, a multiple of 8; rows of tensors are to begin at multiples of 16 bytes.
        plan: the tiles.
        save_gates: whether pre-activations are saved for the backward scan.
    """
    constants = {
        "D": D,
        "UNITS": plan.units,
        "WARPS": plan.warps,
        "BLOCKS": plan.blocks,
        "HELD": plan.held,
        "SPARED": plan.spared,
        "STREAMED": 0,
        "TRAFFIC": plan.TRAFFIC,
        "STAGES": plan.STAGES,
        "ALIGNED": True,
        "SAVE_GATES": save_gates,
    }
    files = [
        *("matrix.cuh", "rows.cuh", "cluster.cuh", "cluster_exchange.cuh"),
        *("traffic.cuh", "traffic_forward.cuh", "cluster_forward.cu"),
    ]
    return program.with_files(cell, precision, constants, files)
