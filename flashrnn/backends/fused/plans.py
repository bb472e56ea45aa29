"""By which plan, and on which part of the GPU, ``cuda_fused`` computes a call."""

from __future__ import annotations

from functools import lru_cache

import torch

from flashrnn.backends import steps
from flashrnn.backends.requirements import refusal, too_large, too_many_numbered_rows
from flashrnn.jit import context, launch
from flashrnn.jit.kernel import index_of
from flashrnn.kernels import registry, source
from flashrnn.kernels.gpu import GPU, whole
from flashrnn.kernels.per_step.cell_plan import CellPlan
from flashrnn.kernels.plan import Plan
from flashrnn.problem import Problem, tf32_allowed


def gpu_of(problem: Problem) -> GPU:
    """The GPU, or the part of it that the current context has."""
    if registry.is_small(problem.D):
        return whole(problem.device)
    # CTAs that wait for each other must run at once in the context of the launch.
    index = index_of(problem.device)
    with context.on_device(index):
        stream = context.current_stream(index)
        return _gpu_of_context(problem.device, context.number(stream))


@lru_cache(maxsize=64)
def _gpu_of_context(device: torch.device, _: int) -> GPU:
    """The part of a device that the current stream's context has; `_` is the context's number."""
    index, gpu = index_of(device), whole(device)
    stream = context.current_stream(index)
    clusters: tuple[int, ...] = ()
    if torch.cuda.get_device_capability(device)[0] in (9, 10):
        clusters = launch.clusters_at_once(index, stream, gpu.shared_memory)
    count = context.multiprocessors(stream, index)
    return gpu._replace(multiprocessors=count, clusters=clusters)


def stream_of(problem: Problem) -> tuple[int, int] | None:
    """The current stream and, if the plan depends on it, the number of its context.

    ``None`` while the stream is captured.
    """
    index = index_of(problem.device)
    with context.on_device(index):
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = context.current_stream(index)
        return stream, 0 if registry.is_small(problem.D) else context.number(stream)


def planned(problem: Problem, B: int) -> Problem:
    """A problem without the fields that no plan depends on, as a key of caches of plans."""
    problem = problem._replace(
        B=B,
        T=1,
        gradient_recurrent_clipval=None,
        forward_clipval=None,
        allow_tf32=problem.dtype == torch.float32 and tf32_allowed(problem),
        step=None,
    )
    if problem.returned is None:
        return problem
    # Whether heads run backwards, and what is returned, is in the kernel's options.
    return problem._replace(reverse=problem.reverse is not False, returned=0, longest=None)


def plan_of(problem: Problem, backward: bool, gpu: GPU) -> Plan:
    """The plan of a direction's persistent kernel."""
    plan = registry.best_plan(planned(problem, problem.B), gpu, backward)
    if isinstance(plan, str):
        # Only if the backend was chosen in another context than the call runs in.
        raise RuntimeError(
            f"backend 'cuda_fused' cannot do this call in the context that is current: {plan}"
        )
    return plan


def steps_of(problem: Problem, gpu: GPU, backward: bool) -> CellPlan | None:
    """The plan of a launch for each step, where that is faster than a persistent kernel."""
    if not steps.may_be_faster(problem):
        return None
    return planned_steps(problem, source.precision_of(problem), gpu, backward)


def planned_steps(problem: Problem, precision: str, gpu: GPU, backward: bool) -> CellPlan | None:
    """The same for products of a precision, whatever PyTorch is set to."""
    return registry.plan_steps(planned(problem, problem.B), precision, gpu, backward)


def may_be_one_step(problem: Problem, backward: bool) -> bool:
    """Whether a call of it with T = 1 takes the plan of one step.

    Training and options of sequences take that of all T, which spares them a further program.
    """
    return not (backward or problem.needs_gradient or problem.is_sequenced)


@lru_cache(maxsize=1024)
def refused(problem: Problem, gpu: GPU) -> str | None:
    """Why a problem cannot be computed on a GPU."""
    # Whether there is a plan does not depend on B.
    return (
        refusal(problem)
        or too_many_numbered_rows(problem)
        or too_large(problem)
        # PyTorch's setting of TF32 may change.
        or without_plan(planned(problem, B=1)._replace(allow_tf32=False), gpu)
    )


@lru_cache(maxsize=1024)
def without_plan(problem: Problem, gpu: GPU) -> str | None:
    """Why a direction of a problem has no plan; the problem is one out of :func:`planned`."""
    directions = (False, True) if problem.needs_gradient else (False,)
    plans = [registry.best_plan(problem, gpu, backward) for backward in directions]
    return next((plan for plan in plans if isinstance(plan, str)), None)
