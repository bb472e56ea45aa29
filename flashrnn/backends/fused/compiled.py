"""The programs that calls of ``cuda_fused`` run: what is compiled ahead of them."""

from __future__ import annotations

from functools import lru_cache
from math import gcd

from flashrnn.backends import autograd, copies, few_rows, steps, tables
from flashrnn.backends.fused import plans
from flashrnn.cells.traced import clipped
from flashrnn.jit import launch
from flashrnn.jit.background import compile_soon
from flashrnn.kernels import gradient_sums, registry, single_cta, source
from flashrnn.kernels.gpu import GPU
from flashrnn.problem import Problem


def programs(
    problem: Problem,
    gpu: GPU | None,
    precision: str,
    backward: bool,
    of_few_rows: bool | None = None,
) -> list[dict[str, str]]:
    """The programs that a direction of a problem runs, if rows are as aligned as D allows.

    Args:
        problem: what is computed; T does not matter.
        gpu: for which GPU; ``None``: the problem's device.
        precision: out of ``source.PRECISIONS``.
        backward: the direction.
        of_few_rows: whether R's gradient is computed as for few rows; ``None``: T and whether the
            call is a layer's are not known, so all programs that may run are wanted.

    Raises:
        ValueError: it cannot do this problem; says why.
    """
    gpu = gpu or plans.gpu_of(problem)
    if reason := plans.refused(problem, gpu):
        raise ValueError(f"backend 'cuda_fused' cannot do this call: {reason}")
    problem = problem._replace(allow_tf32=precision == "tf32")
    D, plan = problem.D, plans.plan_of(problem, backward, gpu)
    piece_bytes = max(problem.dtype.itemsize, gcd(16, D * problem.dtype.itemsize))
    of_layers = []
    if of_few_rows is None and not backward:
        # The input product, and what brings torch.nn's weights into a call's form.
        of_layers.append(few_rows.program(problem, precision, piece_bytes, gpu, backward))
        of_layers.append(copies.program(problem.dtype))
    if by_steps := plans.planned_steps(problem, precision, gpu, backward):
        return [*steps.programs(problem, by_steps, precision), *of_layers]
    cell = problem.cell if problem.forward_clipval is None else clipped(problem.cell)
    options = source.options_of(problem, backward, autograd.stored(problem))
    taken = [plan]
    if plans.may_be_one_step(problem, backward):
        taken.append(plan.of_one_step(problem.B, problem.N))
    found = tables.programs(problem, backward)
    # Where no other plan is better for one step, both are the same.
    found += [each.source(cell, precision, options, piece_bytes) for each in dict.fromkeys(taken)]
    found += of_layers
    if backward and of_few_rows is not False:
        beside = precision if of_few_rows is None else few_rows.precision_beside(precision)
        found.append(few_rows.program(problem, beside, piece_bytes, gpu, backward))
        if of_few_rows:
            return found
    if backward and registry.is_small(D):
        recurrent = len(problem.cell.fed_by("R"))
        tiles = single_cta.plan_gradient(
            recurrent, problem.B, problem.N, D, problem.dtype.itemsize, gpu
        )
        options = source.gradient_options(problem)
        found.append(tiles.compiled.source(problem.cell, precision, piece_bytes, options))
    if backward:
        found.append(gradient_sums.program(problem.cell, precision))
        if not registry.is_small(D):
            found.append(tables.program_of_h(problem))
    return found


@lru_cache(maxsize=1024)
def begin_backward(problem: Problem, gpu: GPU, precision: str, of_few_rows: bool) -> None:
    """Begin to compile what backward will need, while forward is compiled and runs; once."""
    found = programs(problem, gpu, precision, True, of_few_rows)
    compile_soon(found, launch.architecture(problem.device))
