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


# Cycles of 1.98 GHz, forward and backward. Of the host: for a call, and beyond that for padding.
_HOST, _HOST_OF_PADDING = (240_000, 1_160_000), (400_000, 200_000)
# Of the GPU, besides steps and products: starts, sums, and the time between launches.
_START = 80_000, 160_000
# What a slow host takes for a step that is launched by itself.
_HOST_OF_A_STEP = 100_000
# What a library's product of rows that begin anywhere reaches of the rate of tensor cores.
_REACHED_ANYWHERE = 0.15
# Bytes of such rows which a multiprocessor copies in a cycle.
_COPY_RATE = 6


def wide_units(problem: Problem, steps: int) -> int:
    """With how many units heads of so many steps can be computed: D, or a multiple of 16 bytes.

    One step is never padded, so that it has the bits of a Stepper's.
    """
    D, size, cell = problem.D, problem.dtype.itemsize, problem.cell
    wide = tiles_of(D * size, 16) * 16 // size
    if wide == D or steps < 2 or not problem.B or is_small(D):
        return D
    # R has zeros for the additional units' h, and 0 times what is infinite or NaN is NaN.
    is_finite = stays_finite(cell, power_of_two(steps), torch.finfo(problem.dtype).max)
    return wide if is_finite else D


@lru_cache(maxsize=1024)
def padded_units(
    problem: Problem, steps: int, most_steps: int, precision: str, gpu: GPU, features: int
) -> int:
    """With how many units heads are best computed: D, or a multiple of 16 bytes.

    Args:
        problem: as for :func:`best_plan`.
        steps: how many steps there are, about.
        most_steps: how many a sequence has at most.
        precision: how products are computed.
        gpu: on which GPU.
        features: of a layer's input, whose product with weights Wx is, to which the units are
            added; 0: Wx is copied.
    """
    D, wide = problem.D, wide_units(problem, most_steps)
    if wide == D or steps < 2:
        return D
    directions = (False, True) if problem.needs_gradient else (False,)
    own, more = (
        sum(
            _cycles_of_call(problem, units, steps, precision, gpu, features, backward)
            for backward in directions
        )
        for units in (D, wide)
    )
    host, of_padding = (sum(each[: len(directions)]) for each in (_HOST, _HOST_OF_PADDING))
    return wide if max(more, host + of_padding) < max(own, host) else D


def _cycles_of_call(
    problem: Problem,
    units: int,
    steps: int,
    precision: str,
    gpu: GPU,
    features: int,
    backward: bool,
) -> float:
    """What a direction of a call is estimated to take the GPU, with so many units a head.

    See :func:`padded_units` for the other arguments.
    """
    cell, B, N, D = problem.cell, problem.B, problem.N, problem.D
    size, I = problem.dtype.itemsize, features  # noqa: E741
    of_input, of_R = len(cell.fed_by("Wx")) * N, len(cell.fed_by("R")) * N
    copied = copied_once = 0.0
    if units > D:
        # The input, if its rows are longer then, or Wx; the returned states, or their gradients.
        states = N * D * (len(cell.states) if problem.returned is None else 1)
        inputs = I if I else of_input * D
        if I and I * size % 16 == 0:
            inputs = 0
        copied = 2 * size * B * (inputs + states)
        # Weights; backward their gradients, too.
        weights = (of_input * I + of_R * D) * D
        copied_once = 2 * size * weights * (2 if backward else 1)
    # Products over all steps: of the input, and for the gradients of both factors and of R.
    product = 2 * B * of_input * D * I * (2 if backward else 1)
    of_a_step = product / _reached(size * I, size * of_input * D, padded=units > D)
    if backward:
        of_a_step += 2 * B * of_R * D * D / _reached(size * D, padded=units > D)
    of_a_step /= cell_plan.matrix_rate(precision, gpu) * gpu.multiprocessors
    of_a_step += _estimated_cycles(problem._replace(D=units), precision, gpu, backward)
    copy_rate = _COPY_RATE * gpu.multiprocessors
    return steps * (of_a_step + copied / copy_rate) + copied_once / copy_rate + _START[backward]


def _reached(*rows: int, padded: bool = False) -> float:
    """What a library's product reaches of the rate of tensor cores, by the bytes of its factors'
    rows, which are whole pieces of 16 bytes if they are ``padded``."""
    aligned = padded or all(row % 16 == 0 for row in rows)
    return cell_plan.REACHED if aligned else _REACHED_ANYWHERE


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
