"""The host side of wide_cluster_forward.cu.

What sizes its registers and shared memory is compiled in, D among it, and follows from a plan
(:mod:`flashrnn.tiling`); B, T, N, addresses and strides are arguments of the launch.
"""

from __future__ import annotations

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import group, program
from flashrnn.tiling import WideClusterPlan


def forward_source(
    cell: TracedCell, precision: str, D: int, plan: WideClusterPlan, save_gates: bool
) -> dict[str, str]:
    """The parts of wide_cluster_forward.cu's program, each under the name that an error gives it.

    Args:
        cell: the cell.
        precision: out of ``program.PRECISIONS``, one of 16 bits.
        D: head dimension, a multiple of 8; rows of tensors are to begin at multiples of 16 bytes.
        plan: the tiles.
        save_gates: whether pre-activations are saved for the backward scan.
    """
    constants = {
        "D": D,
        "TEAM": plan.size,
        "UNITS": plan.units,
        "GROUPS": plan.groups,
        "BLOCKS": plan.blocks,
        "BUFFERS": plan.buffers,
        "HELD": plan.held,
        # Warps that compute get registers of those that do not, unless they have all they can use.
        "SHIFT_REGISTERS": plan.groups > 1,
        "COMPUTING_REGISTERS": plan.registers,
        "TRAFFIC": plan.TRAFFIC,
        "TRAFFIC_REGISTERS": plan.TRAFFIC_REGISTERS,
        "SAVE_GATES": save_gates,
    }
    files = [
        *("rows.cuh", "wide_cluster.cuh"),
        *("wide_cluster_exchange.cuh", "wide_cluster_product.cuh", "wide_cluster_forward.cu"),
    ]
    return {
        **program.prelude(cell, precision, constants),
        "group": group.instruction(8 * plan.blocks, precision),
        **{name: program.read(name) for name in files},
    }
