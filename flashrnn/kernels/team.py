"""The host side of team_forward.cu, team_backward.cu and team_backward_scatter.cu.

What sizes their registers and shared memory is compiled in, D among it, and follows from a plan
(:mod:`flashrnn.tiling`); B, T, N, addresses and strides are arguments of the launch.
"""

from __future__ import annotations

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import program
from flashrnn.tiling import TeamPlan


def forward_source(
    cell: TracedCell, precision: str, D: int, plan: TeamPlan, save_gates: bool
) -> dict[str, str]:
    """The parts of team_forward.cu's program, each under the name that an error gives it.

    Args:
        cell: the cell.
        precision: out of ``program.PRECISIONS``.
        D: head dimension.
        plan: the tiles.
        save_gates: whether pre-activations are saved for the backward scan.
    """
    options = {"FORWARD": True, "SAVE_GATES": save_gates}
    return _program("team_forward.cu", cell, precision, D, plan, options)


def backward_source(
    cell: TracedCell, precision: str, D: int, plan: TeamPlan, cut: bool, clip: bool
) -> dict[str, str]:
    """The parts of the program of :func:`backward_name`'s kernel; see :func:`forward_source`.

    Args:
        cell: as there, and so for the next three.
        precision: ...
        D: ...
        plan: ...
        cut: whether no gradient flows through R.
        clip: whether that gradient is clipped at each step.
    """
    options = {"FORWARD": False, **program.gradient_options(cut, clip)}
    return _program(f"{backward_name(plan)}.cu", cell, precision, D, plan, options)


def backward_name(plan: TeamPlan) -> str:
    """The kernel of a plan for the backward scan; its file has the same name."""
    return "team_backward_scatter" if plan.scatter else "team_backward"


def _program(
    kernel: str,
    cell: TracedCell,
    precision: str,
    D: int,
    plan: TeamPlan,
    options: dict[str, bool],
) -> dict[str, str]:
    constants = {
        "D": D,
        "UNITS": plan.units,
        "BLOCKS": plan.blocks,
        "TURNS": plan.turns,
        "SUM_PARTS": plan.sum_parts,
        "ROW_PARTS": plan.row_parts,
        # A parcel has 16 bytes; where it does not arrive in order, one word says when it has.
        "PARCEL_WORDS": 4 if plan.cluster else 3,
        "HELD": plan.held,
        "SPARED": plan.spared,
        "STREAMED": plan.streamed,
        "AHEAD": plan.ahead,
        **options,
    }
    if plan.scatter:
        exchange = ["team_scatter.cuh", "matrix.cuh", "team_scattered_product.cuh"]
    else:
        way = "team_gather_cluster.cuh" if plan.cluster else "team_gather_grid.cuh"
        exchange = ["team_gather.cuh", "parcels.cuh", way, "matrix.cuh", "team_product.cuh"]
    clip = [] if options["FORWARD"] else ["clipped.cuh"]
    files = ["team.cuh", *exchange, *clip, kernel]
    return program.with_files(cell, precision, constants, files)
