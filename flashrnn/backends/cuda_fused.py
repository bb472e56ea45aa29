"""Backend ``cuda_fused``: one persistent kernel forward and one backward, R kept on chip.

A thread block computes a whole head for a few sequences, all steps of them, and waits for no other.
A larger head is a team's of thread blocks, which exchange h, or backward the gates' gradients, at
each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from flashrnn.backends import autograd
from flashrnn.backends.gradients import Gradients, complete, recurrent_gradient, select
from flashrnn.backends.requirements import refusal, too_large, unavailable_cuda
from flashrnn.cells.traced import TracedCell, clipped
from flashrnn.jit import context, launch, nvrtc
from flashrnn.kernels import cluster, head, program, team, wide, wide_cluster
from flashrnn.problem import Problem
from flashrnn.tiling import (
    GPU,
    LARGEST_HEAD_OF_A_BLOCK,
    ClusterPlan,
    GradientPlan,
    HeadPlan,
    TeamPlan,
    WideClusterPlan,
    WidePlan,
    plan_cluster,
    plan_gradient,
    plan_head,
    plan_team,
    plan_wide,
    plan_wide_cluster,
)

Plan = HeadPlan | ClusterPlan | TeamPlan | WidePlan | WideClusterPlan


def unavailable(device: torch.device) -> str | None:
    """Why its kernels do not run on a device."""
    return unavailable_cuda(device)


def unsupported(problem: Problem) -> str | None:
    """Why it cannot do this problem."""
    # Nor does the batch decide whether there is a plan.
    return (
        refusal(problem)
        or too_large(problem)
        or _without_plan(_planned(problem, B=1), _gpu(problem))
    )


@lru_cache(maxsize=1024)
def _without_plan(problem: Problem, gpu: GPU) -> str | None:
    directions = (False, True) if problem.needs_gradient else (False,)
    plans = [_best_plan(problem, gpu, backward) for backward in directions]
    return next((plan for plan in plans if isinstance(plan, str)), None)


def run(
    problem: Problem, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """See :class:`flashrnn.backends.Backend`."""
    return autograd.run("cuda_fused", problem, Wx, R, b, states)


def forward(
    problem: Problem, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`flashrnn.backends.autograd.FusedBackend`."""
    every_state, last_states, gates = autograd.new_outputs(problem, Wx)
    if problem.B == 0 or problem.T == 0:
        return every_state, states.clone(memory_format=torch.contiguous_format), gates
    gpu = _gpu(problem)
    plan = _plan(problem, False, gpu)
    R = R.contiguous()
    if isinstance(plan, WidePlan):
        Wx, R = (x if _in_pairs(x) else _copy(x) for x in (Wx, R))
    if isinstance(plan, ClusterPlan | WideClusterPlan) and not _aligned(Wx):
        Wx = _copy(Wx)
    tensors = (Wx, R, b.contiguous(), states, every_state, last_states, gates)
    strides = (*Wx.stride(), *autograd.state_strides(states))
    aligned = _aligned(Wx, every_state, gates)
    _scan(problem, gpu, plan, False, tensors, strides, aligned)
    return every_state, last_states, gates


def backward(
    problem: Problem,
    R: Tensor,
    states_initial: Tensor,
    states: Tensor,
    gates: Tensor,
    d_states: Tensor,
    d_last_states: Tensor,
) -> Gradients:
    """See :class:`flashrnn.backends.autograd.FusedBackend`."""
    cell, (B, T, N, D) = problem.cell, (problem.B, problem.T, problem.N, problem.D)
    d_gates = torch.empty_like(gates)
    if B == 0 or T == 0:
        d_initial = d_last_states.clone(memory_format=torch.contiguous_format)
        return complete(problem, d_gates, d_initial, states_initial, states)
    d_initial = torch.empty_like(states_initial, memory_format=torch.contiguous_format)
    d_bias = states_initial.new_empty(B, len(cell.gates), N, D)
    given = (R.contiguous(), states_initial, states, gates, d_states, d_last_states)
    strides = (
        *autograd.state_strides(states_initial),
        *d_states.stride(),
        *autograd.state_strides(d_last_states),
    )
    aligned = _aligned(states, gates, d_states, d_gates)
    tensors = (*given, d_gates, d_initial, d_bias)
    gpu = _gpu(problem)
    _scan(problem, gpu, _plan(problem, True, gpu), True, tensors, strides, aligned)
    h_initial, h = states_initial[0], states[0]
    if D <= LARGEST_HEAD_OF_A_BLOCK:
        d_R = _recurrent_gradient(problem, gpu, d_gates, h_initial, h)
    else:
        d_R = recurrent_gradient(cell, d_gates, h_initial, h)
    d_b = select(d_bias.sum(0), 0, cell.fed_by("b")).to(R.dtype)
    return Gradients(d_gates, d_initial, d_R, d_b)


def _scan(
    problem: Problem,
    gpu: GPU,
    plan: Plan | str,
    backward: bool,
    tensors: Sequence[Tensor],
    strides: Sequence[int],
    aligned: bool,
) -> None:
    """Launch a direction's kernel.

    Args:
        problem: what is computed.
        gpu: where.
        plan: its plan for this direction; a reason why there is none was refused before, unless
            the call was chosen for another context than it runs in.
        backward: which of the two.
        tensors: what all regimes' kernels take and write, in their arguments' order.
        strides: likewise.
        aligned: whether the tensors are, as :func:`_aligned` says.
    """
    B, T, N, D = problem.B, problem.T, problem.N, problem.D
    cell = problem.cell if problem.forward_clipval is None else clipped(problem.cell)
    precision = _precision(problem)
    clipval = problem.gradient_recurrent_clipval
    options = (
        (problem.gradient_recurrent_cut, clipval is not None)
        if backward
        else (problem.needs_gradient,)
    )
    numbers = (*strides, T, B, N, program.clips(clipval, problem.forward_clipval))
    if isinstance(plan, HeadPlan):
        kernel = _head_kernel(cell, precision, D, plan, aligned, problem.device, backward, *options)
        kernel.launch(plan.grid(B, N), tensors, numbers)
        return
    if isinstance(plan, str):
        raise RuntimeError(
            f"backend 'cuda_fused' cannot do this call in the context that is current: {plan}"
        )
    if isinstance(plan, ClusterPlan | WideClusterPlan):
        cluster_kernel = _cluster_kernel(cell, precision, D, plan, problem.device, *options)
        grid = plan.clusters(B, N) * plan.size
        cluster_kernel.launch(grid, tensors, numbers)
        return
    words = partial(tensors[0].new_empty, dtype=torch.int32)
    teams = plan.teams(B, N, gpu)
    # No exchange has the number 0.
    exchange = words(teams * plan.parcels, 4).zero_()
    if isinstance(plan, WidePlan):
        wide_kernel = _wide_kernel(cell, precision, D, plan, problem.device, *options)
        wide_kernel.launch(teams * plan.size, (*tensors, exchange), (*numbers, teams))
        return
    team_kernel = _team_kernel(cell, precision, D, plan, problem.device, backward, *options)
    streamed = words(teams * plan.size * plan.warps() * plan.streamed, 128)
    team_kernel.launch(teams * plan.size, (*tensors, exchange, streamed), (*numbers, teams))


def _recurrent_gradient(
    problem: Problem, gpu: GPU, d_gates: Tensor, h_initial: Tensor, h: Tensor
) -> Tensor:
    """See :func:`flashrnn.backends.gradients.recurrent_gradient`, of which this is a kernel."""
    cell, (B, T, N, D) = problem.cell, (problem.B, problem.T, problem.N, problem.D)
    recurrent = len(cell.fed_by("R"))
    # What the product saw.
    h_initial = h_initial.to(h.dtype).contiguous()
    plan = plan_gradient(recurrent, B * T, N, D, h.element_size(), gpu)
    aligned = _aligned(d_gates, h_initial, h)
    precision = _precision(problem)
    # In a cache, what is not compiled in would only be in the way.
    compiled = replace(plan, parts=1, rows=0)
    kernel = _gradient_kernel(cell, precision, D, compiled, aligned, problem.device)
    parts = d_gates.new_empty((plan.parts, recurrent, N, D, D), dtype=torch.float32)
    grid = N * plan.groups * plan.parts
    kernel.launch(grid, (d_gates, h_initial, h, parts), (plan.rows, T, B, N))
    return parts.sum(0).to(h.dtype)


@dataclass(frozen=True)
class _Kernel:
    """A program's only kernel, and what its launches have in common."""

    program: launch.Program
    threads: int
    shared_memory: int
    together: bool
    cluster: int

    def launch(self, grid: int, tensors: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """Enqueue it on PyTorch's current stream of its device."""
        arguments = (*(x.data_ptr() for x in tensors), *numbers)
        device, (kernel,) = self.program.device, self.program.kernels
        with context.on_device(device):
            config = launch.configure(
                grid, self.threads, self.shared_memory, together=self.together, cluster=self.cluster
            )
            if torch.cuda.is_current_stream_capturing():
                self.program.keep_for_graphs()
            stream = context.current_stream(device)
            launch.enqueue([launch.Launch(kernel, config, arguments)], stream, device)


def _aligned(*tensors: Tensor) -> bool:
    """Whether every row of D elements lies together, from a multiple of 16 bytes on."""
    share = 16 // tensors[0].element_size()
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(-1) == 1
        and not any(stride % share for stride in (x.shape[-1], *x.stride()[:-1]))
        for x in tensors
        if x.numel()
    )


def _copy(x: Tensor) -> Tensor:
    """Also of what is contiguous, but from an odd address on."""
    return x.clone(memory_format=torch.contiguous_format)


def _in_pairs(x: Tensor) -> bool:
    """Whether units lie together, each even one at a multiple of two elements."""
    return (
        x.data_ptr() % (2 * x.element_size()) == 0
        and x.stride(-1) == 1
        and not any(stride % 2 for stride in x.stride()[:-1])
    )


def _plan(problem: Problem, backward: bool, gpu: GPU) -> Plan | str:
    return _best_plan(_planned(problem, problem.B), gpu, backward)


def _planned(problem: Problem, B: int) -> Problem:
    """A problem without what no plan depends on, which in a cache would only be in the way."""
    return problem._replace(
        B=B, T=1, gradient_recurrent_clipval=None, forward_clipval=None, step=None
    )


@lru_cache(maxsize=1024)
def _best_plan(problem: Problem, gpu: GPU, backward: bool) -> Plan | str:
    if problem.D <= LARGEST_HEAD_OF_A_BLOCK:
        return plan_head(problem, gpu, backward)
    plan = plan_team(problem, gpu, backward)
    # The batch does not decide whether there is a plan.
    if backward or isinstance(plan, str):
        return plan
    others = (plan_cluster(problem, gpu), plan_wide(problem, gpu), plan_wide_cluster(problem, gpu))
    possible: list[Plan] = [plan, *(other for other in others if other is not None)]
    return min(possible, key=attrgetter("cycles"))


def _precision(problem: Problem) -> str:
    return program.precision_of(problem.dtype)


def _gpu(problem: Problem) -> GPU:
    """What there is for a problem's plans."""
    if problem.D <= LARGEST_HEAD_OF_A_BLOCK:
        return _whole_gpu(problem.device)
    # Thread blocks that wait for each other must run at once, wherever the launch goes.
    index = _index(problem.device)
    with context.on_device(index):
        stream = context.current_stream(index)
        return _gpu_of_context(problem.device, context.number(stream))


@cache
def _whole_gpu(device: torch.device) -> GPU:
    properties: Any = torch.cuda.get_device_properties(device)
    return GPU(
        multiprocessors=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,
        shifts_registers=properties.major == 9,
        multiplies_by_groups=properties.major == 9,
    )


@lru_cache(maxsize=64)
def _gpu_of_context(device: torch.device, _: int) -> GPU:
    """What the context of the current stream has of a device; `_` is the context's number."""
    index, gpu = _index(device), _whole_gpu(device)
    stream = context.current_stream(index)
    clusters: tuple[int, ...] = ()
    if torch.cuda.get_device_capability(device)[0] in (9, 10):
        clusters = launch.clusters_at_once(index, stream, gpu.shared_memory)
    count = context.multiprocessors(stream, index)
    return gpu._replace(multiprocessors=count, clusters=clusters)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


# A kernel that is forgotten is unloaded, unless a CUDA graph of the user's may hold its launches.


@lru_cache(maxsize=256)
def _head_kernel(
    cell: TracedCell,
    precision: str,
    D: int,
    plan: HeadPlan,
    aligned: bool,
    device: torch.device,
    backward: bool,
    *options: Any,
) -> _Kernel:
    source = head.backward_source if backward else head.forward_source
    parts = source(cell, precision, D, plan, aligned, *options)
    name = "head_backward" if backward else "head_forward"
    return _kernel(name, parts, device, plan.threads(D), plan.shared_memory)


@lru_cache(maxsize=256)
def _team_kernel(
    cell: TracedCell,
    precision: str,
    D: int,
    plan: TeamPlan,
    device: torch.device,
    backward: bool,
    *options: Any,
) -> _Kernel:
    source = team.backward_source if backward else team.forward_source
    parts = source(cell, precision, D, plan, *options)
    name = team.backward_name(plan) if backward else "team_forward"
    # Clusters wait for no other, and so may wait for room.
    together, cluster = not plan.cluster, plan.size if plan.cluster else 0
    threads = 32 * plan.warps()
    return _kernel(name, parts, device, threads, plan.shared_memory, together, cluster)


@lru_cache(maxsize=256)
def _cluster_kernel(
    cell: TracedCell,
    precision: str,
    D: int,
    plan: ClusterPlan | WideClusterPlan,
    device: torch.device,
    save_gates: bool,
) -> _Kernel:
    if isinstance(plan, ClusterPlan):
        name = "cluster_forward"
        parts = cluster.forward_source(cell, precision, D, plan, save_gates)
    else:
        name = "wide_cluster_forward"
        parts = wide_cluster.forward_source(cell, precision, D, plan, save_gates)
    return _kernel(name, parts, device, plan.threads(), plan.shared_memory, False, plan.size)


@lru_cache(maxsize=256)
def _wide_kernel(
    cell: TracedCell,
    precision: str,
    D: int,
    plan: WidePlan,
    device: torch.device,
    save_gates: bool,
) -> _Kernel:
    parts = wide.forward_source(cell, precision, D, plan, save_gates)
    return _kernel("wide_forward", parts, device, plan.THREADS, plan.shared_memory, True)


@lru_cache(maxsize=256)
def _gradient_kernel(
    cell: TracedCell,
    precision: str,
    D: int,
    plan: GradientPlan,
    aligned: bool,
    device: torch.device,
) -> _Kernel:
    parts = head.gradient_source(cell, precision, D, plan, aligned)
    threads = head.GRADIENT_THREADS
    return _kernel("recurrent_gradient", parts, device, threads, plan.shared_memory)


def _kernel(
    name: str,
    parts: dict[str, str],
    device: torch.device,
    threads: int,
    shared_memory: int,
    together: bool = False,
    cluster: int = 0,
) -> _Kernel:
    cubin = nvrtc.compile_program(parts, launch.architecture(device))
    loaded = launch.Program(cubin, (name,), _index(device), shared_memory)
    return _Kernel(loaded, threads, shared_memory, together, cluster)
