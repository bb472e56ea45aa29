"""The regimes of ``cuda_fused``, and the choice of the plan with the fewest estimated cycles.

Calls of many sequences may be computed step by step instead.

To add a regime, write its folder and name its planning function here. That function takes a
problem, a GPU and the direction, and returns a plan or the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from flashrnn.kernels import cluster, grid, single_cta, streamed
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.per_step import cell_plan
from flashrnn.kernels.plan import TAKEN, TAKEN_WITH_TF32, Plan
from flashrnn.problem import Problem

Regime = Callable[[Problem, GPU, bool], Plan | str]

# A regime that lacks an option of a problem has no plan for it, so that the others are compared. If
# none has a plan, a user is told the reason of the first, which takes the most problems.
SMALL_HEADS: tuple[Regime, ...] = (single_cta.plan_scan,)
LARGE_HEADS: tuple[Regime, ...] = (
    grid.plan_scan,
    grid.plan_wgmma_forward,
    cluster.plan_mma_forward,
    cluster.plan_wgmma_forward,
    cluster.plan_backward,
    cluster.plan_wgmma_backward,
    streamed.plan_forward,
)


def is_small(D: int) -> bool:
    """Whether one CTA computes a head of so many units, so that no CTA waits for another."""
    return D <= single_cta.LARGEST_HEAD


@lru_cache(maxsize=1024)
def best_plan(problem: Problem, gpu: GPU, backward: bool) -> Plan | str:
    """The plan with the fewest estimated cycles, or the reason why there is none."""
    regimes = SMALL_HEADS if is_small(problem.D) else LARGE_HEADS
    plans = [regime(problem, gpu, backward) for regime in regimes]
    possible = [plan for plan in plans if isinstance(plan, Plan)]
    # Whether there is a plan must not depend on the number of sequences. Where R fits nowhere,
    # backend `cuda` is faster for few of them.
    if not any(plan.KEEPS_R for plan in possible):
        return next((plan for plan in plans if isinstance(plan, str)), plans[0])
    return min(possible, key=lambda plan: plan.estimated_cycles)


@lru_cache(maxsize=1024)
def plan_steps(
    problem: Problem, precision: str, gpu: GPU, backward: bool
) -> cell_plan.CellPlan | None:
    """The plan of a launch for each step, where that is estimated to be faster than the best plan.

    Args:
        problem: as for :func:`best_plan`.
        precision: how products are computed.
        gpu: on which GPU.
        backward: the direction.
    """
    if is_small(problem.D):
        return None
    # With and without gradients a call is computed in the same way, so as if it needed them.
    best = best_plan(problem._replace(needs_gradient=True), gpu, backward)
    if isinstance(best, str):
        return None
    cycles = best.estimated_cycles * (TAKEN_WITH_TF32 if precision == "tf32" else TAKEN)
    return cell_plan.plan_steps(problem, precision, gpu, backward, cycles)
