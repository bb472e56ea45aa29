"""The regimes of ``cuda_fused``, and the choice of the plan with the fewest estimated cycles.

Calls of many sequences may be computed step by step instead.

To add a regime, write its folder and name its planning function here. That function takes a
problem, a GPU and the direction, and returns a plan or the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import inf

import torch

from flashrnn.cells.bounds import stays_finite
from flashrnn.kernels import cluster, grid, single_cta, streamed
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.per_step import cell_plan
from flashrnn.kernels.plan import TAKEN, TAKEN_WITH_TF32, Plan
from flashrnn.kernels.sizes import power_of_two, tiles_of
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


# Of fewer sequences a step has too little to gain from additional units.
_FEWEST = 64
# Kernels of rows that begin anywhere take so many times their estimate (docs/cost-model.md).
_ROWS_ANYWHERE = 1.4
# Cycles of 1.98 GHz that the slowest host took: for what padding adds to a direction, and for a
# step that is launched by itself.
_HOST_OF_PADDING, _HOST_OF_A_STEP = 1_200_000, 100_000
# Bytes of rows that begin anywhere which a multiprocessor copies in a cycle.
_COPY_RATE = 6


def may_be_padded(problem: Problem, steps: int) -> bool:
    """A cheap check made before :func:`padded_units`.

    One step is never padded, so that it has the bits of a Stepper's.
    """
    return steps > 1 and problem.B >= _FEWEST and not is_small(problem.D)


@lru_cache(maxsize=1024)
def padded_units(
    problem: Problem, steps: int, most_steps: int, precision: str, gpu: GPU, of_layer: bool
) -> int:
    """With how many units heads are best computed: D, or a multiple of 16 bytes.

    Args:
        problem: as for :func:`best_plan`.
        steps: how many steps there are, about.
        most_steps: how many a sequence has at most.
        precision: how products are computed.
        gpu: on which GPU.
        of_layer: whether Wx is a product with weights, to which the units are added.
    """
    D, size, cell = problem.D, problem.dtype.itemsize, problem.cell
    wide = tiles_of(D * size, 16) * 16 // size
    if wide == D or not may_be_padded(problem, steps):
        return D
    # R has zeros for the additional units' h, and 0 times what is infinite or NaN is NaN.
    if not stays_finite(cell, power_of_two(most_steps), torch.finfo(problem.dtype).max):
        return D
    # Copied are Wx and the returned states, or their gradients.
    numbers = 0 if of_layer else len(cell.fed_by("Wx"))
    numbers += len(cell.states) if problem.returned is None else 1
    copied = 2 * size * problem.B * problem.N * D * numbers
    gain = 0.0
    for backward in (False, True) if problem.needs_gradient else (False,):
        now, then = (
            _estimated_cycles(problem._replace(D=units), precision, gpu, backward)
            for units in (D, wide)
        )
        then += copied / (_COPY_RATE * gpu.multiprocessors)
        gain += steps * (_ROWS_ANYWHERE * now - then) - _HOST_OF_PADDING
    return wide if gain > 0 else D


def _estimated_cycles(problem: Problem, precision: str, gpu: GPU, backward: bool) -> float:
    """What a step of all sequences is estimated to take; infinite where there is no plan."""
    best = best_plan(problem, gpu, backward)
    if isinstance(best, str):
        return inf
    if plan_steps(problem, precision, gpu, backward):
        cycles = cell_plan.estimated_cycles(problem, precision, gpu, backward)
        return max(cycles, _HOST_OF_A_STEP)
    return best.estimated_cycles * (TAKEN_WITH_TF32 if precision == "tf32" else TAKEN)


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
