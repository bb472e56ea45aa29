"""Every way in which CTAs divide a head runs to its end, and is right, as C++ on the CPU.

What a warp or a thread does once may be too little where there are more CTAs, tiles or slices than
it has in mind: then a CTA waits for ever. The sizes of regimes.py have few CTAs each.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from flashrnn.cells import resolve
from flashrnn.kernels import grid, source
from flashrnn.kernels.cluster import mma_plan, wgmma_backward_plan, wgmma_plan
from flashrnn.kernels.grid import wgmma_plan as grid_wgmma_plan
from flashrnn.kernels.plan import Counts, Plan
from flashrnn.kernels.streamed import StreamedPlan
from flashrnn.kernels.streamed import plan as streamed_plan
from tests.emulation import emulation, fused_emulation, needs_compiler  # noqa: F401
from tests.fused import hold_to_vanilla
from tests.gpus import SMALL
from tests.kernels.regimes import Regime, take  # noqa: F401
from tests.machine_code import needs_nvrtc, registers

pytestmark = pytest.mark.slow

KIND, BF16 = "elman", torch.bfloat16
# Clusters of up to 16 CTAs, and groups of as many as the widest head here needs.
GPU = SMALL._replace(
    multiprocessors=36, clusters=(0, 0, 18, 12, 9, 7, 6, 5, 4, 4, 3, 3, 3, 2, 2, 2, 2)
)
COUNTS, VALUES = Counts.of(resolve(KIND)), wgmma_backward_plan.Values.of(resolve(KIND))


def smallest(possible: Callable[[int], Iterable[Any]], key: Callable[[Any], tuple]) -> list[Any]:
    """For each shape of plan the one for the smallest head."""
    found: dict[tuple, Any] = {}
    for D in range(136, 1025, 8):
        for plan in possible(D):
            found.setdefault(key(plan), plan)
    return list(found.values())


BACKWARD = smallest(
    lambda D: wgmma_backward_plan.possible_plans(VALUES, D, GPU),
    lambda plan: (plan.rows, plan.columns, plan.warpgroups),
)
GRID = smallest(
    lambda D: grid_wgmma_plan.possible_plans(COUNTS, D, GPU),
    lambda plan: (plan.size, plan.warpgroups, plan.batch_tiles),
)
# There are many: their sizes, and with each some other numbers.
WGMMA = smallest(
    lambda D: wgmma_plan.possible_plans(COUNTS, D, GPU),
    lambda plan: (plan.size, plan.warpgroups, plan.parts, plan.buffers),
)[::4]
MMA = smallest(
    lambda D: mma_plan.possible_plans(COUNTS, D, GPU),
    lambda plan: (plan.size, plan.warps, plan.n_tiles),
)[::4]
STREAMED = smallest(
    lambda D: streamed_plan.possible_plans(COUNTS, D, 2, GPU),
    lambda plan: (plan.units, plan.stages),
)


def test_there_are_many_shapes():
    assert {plan.rows for plan in BACKWARD} == {2, 3, 4, 5, 6, 7, 8}
    assert {plan.size for plan in GRID} == {2, 4, 8}
    assert max(plan.size for plan in WGMMA) >= 13 and len(WGMMA) >= 12
    assert {plan.size for plan in MMA} == {2, 4, 8, 16}
    assert {plan.units for plan in STREAMED} == {16, 32, 48, 64}


def forced(plan: Plan, backward: bool) -> Regime:
    def other(problem, gpu, of_backward):
        return grid.plan_scan(problem, gpu, of_backward)

    def this(problem, gpu, of_backward):
        return plan

    forward, back = (other, this) if backward else (this, other)
    return Regime("forced", forward=forward, backward=back, gpu=GPU)


def named(plan: Plan) -> str:
    names = ("rows", "columns", "size", "warpgroups", "warps", "batch_tiles", "parts", "buffers")
    names += ("units",) if isinstance(plan, StreamedPlan) else ()
    return "-".join(f"{name}{getattr(plan, name)}" for name in names if hasattr(plan, name))


@needs_compiler
@pytest.mark.parametrize("plan", [*GRID, *WGMMA, *MMA, *STREAMED], ids=named)
def test_forward(take, plan):  # noqa: F811
    hold_to_vanilla(take(forced(plan, False)).backend, KIND, 3, 3, 1, plan.D, BF16)


@needs_compiler
@pytest.mark.parametrize("plan", BACKWARD, ids=named)
def test_backward(take, plan):  # noqa: F811
    hold_to_vanilla(take(forced(plan, True)).backend, KIND, 3, 3, 1, plan.D, BF16)


@needs_nvrtc
@pytest.mark.parametrize(
    "plan", [*(plan for plan in (*GRID, *WGMMA) if plan.warpgroups > 1), *STREAMED], ids=named
)
def test_warps_take_no_more_registers_than_the_cta_has(plan):
    """Else they wait for ever: a CTA has as many as all of its threads got at the launch."""
    parts = plan.source(resolve(KIND), "bfloat16", source.forward_options(True), piece_bytes=16)
    has = plan.threads * registers(parts, "sm_90a")
    computing = plan.threads - plan.PRODUCERS
    needed = computing * plan.registers + plan.PRODUCERS * plan.PRODUCER_REGISTERS
    assert needed <= has
