"""The host side of wide_forward.cu.

What sizes its registers and shared memory is compiled in, D among it, and follows from a plan
(:mod:`flashrnn.tiling`); B, T, N, addresses and strides are arguments of the launch.
"""

from __future__ import annotations

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import group, program
from flashrnn.tiling import WidePlan


def forward_source(
    cell: TracedCell, precision: str, D: int, plan: WidePlan, save_gates: bool
) -> dict[str, str]:
    """The parts of wide_forward.cu's program, each under the name that an error gives it.

    Args:
        cell: the cell.
        precision: out of ``program.PRECISIONS``, one of 16 bits.
        D: head dimension, even.
        plan: the tiles.
        save_gates: whether pre-activations are saved for the backward scan.
    """
    constants = {
        "D": D,
        "TILES": plan.tiles,
        "SLICES_AT_ONCE": plan.at_once,
        "SAVE_GATES": save_gates,
    }
    columns = plan.UNITS * len(cell.fed_by("R"))
    files = [
        *("wide.cuh", "parcels.cuh", "wide_exchange.cuh", "wide_product.cuh"),
        "wide_forward.cu",
    ]
    return {
        **program.prelude(cell, precision, constants),
        "group": group.instruction(columns, precision),
        **{name: program.read(name) for name in files},
    }
