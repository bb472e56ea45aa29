"""The host side of head_forward.cu, head_backward.cu and recurrent_gradient.cu.

What sizes their registers and shared memory is compiled in, D among it, and follows from a plan
(:mod:`flashrnn.tiling`); B, T, N, addresses and strides are arguments of the launch.
"""

from __future__ import annotations

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import program
from flashrnn.tiling import GradientPlan, HeadPlan

GRADIENT_THREADS = 256


def forward_source(
    cell: TracedCell, precision: str, D: int, plan: HeadPlan, aligned: bool, save_gates: bool
) -> dict[str, str]:
    """The parts of head_forward.cu's program, each under the name that an error gives it.

    Args:
        cell: the cell.
        precision: out of ``program.PRECISIONS``.
        D: head dimension.
        plan: the tiles.
        aligned: whether every row of every tensor begins at a multiple of 16 bytes.
        save_gates: whether pre-activations are saved for the backward scan.
    """
    options = {"SAVE_GATES": save_gates, "H_IS_NEAR": program.h_is_near(cell)}
    return _program("head_forward.cu", cell, precision, D, plan, aligned, **options)


def backward_source(
    cell: TracedCell,
    precision: str,
    D: int,
    plan: HeadPlan,
    aligned: bool,
    cut: bool,
    clip: bool,
) -> dict[str, str]:
    """The parts of head_backward.cu's program; see :func:`forward_source`.

    Args:
        cell: as there, and so for the next four.
        precision: ...
        D: ...
        plan: ...
        aligned: ...
        cut: whether no gradient flows through R.
        clip: whether that gradient is clipped at each step.
    """
    return _program(
        "head_backward.cu",
        cell,
        precision,
        D,
        plan,
        aligned,
        **program.gradient_options(cut, clip),
    )


def gradient_source(
    cell: TracedCell, precision: str, D: int, plan: GradientPlan, aligned: bool
) -> dict[str, str]:
    """The parts of recurrent_gradient.cu's program; see :func:`forward_source`."""
    constants = {"D": D, "GATES": plan.gates, "STAGES": plan.stages, "ALIGNED": aligned}
    return program.with_files(cell, precision, constants, ["recurrent_gradient.cu"])


def _program(
    kernel: str,
    cell: TracedCell,
    precision: str,
    D: int,
    plan: HeadPlan,
    aligned: bool,
    **options: bool,
) -> dict[str, str]:
    constants = {
        "D": D,
        "SEQUENCES": plan.sequences,
        "HELD": plan.held,
        "TRAFFIC": plan.traffic,
        "STAGES": plan.stages,
        "AT_ONCE": plan.at_once,
        "ALIGNED": aligned,
        **options,
    }
    if kernel == "head_forward.cu":
        files = ["head.cuh", "fragments.cuh", "traffic.cuh", "traffic_forward.cuh", kernel]
    else:
        files = ["clipped.cuh", "head.cuh", "fragments.cuh", "traffic.cuh", kernel]
    return program.with_files(cell, precision, constants, files)
