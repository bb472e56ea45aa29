"""Backend ``cuda_fused``: one persistent kernel forward and one backward, R kept on chip.

A thread block computes a whole head for a few sequences, all steps of them, and waits for no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flashrnn.backends import autograd
from flashrnn.backends.gradients import Gradients, complete, select
from flashrnn.backends.requirements import missing_gpu, refusal
from flashrnn.cells.spec import Cell, clipped
from flashrnn.jit import launch, nvrtc
from flashrnn.kernels import head, program
from flashrnn.problem import Problem
from flashrnn.tiling import GPU, GradientPlan, HeadPlan, plan_gradient, plan_head


@cache
def unavailable() -> str | None:
    """Why its kernels do not run here."""
    return missing_gpu() or nvrtc.unavailable()


def unsupported(problem: Problem) -> str | None:
    """Why it cannot do this problem."""
    reason = refusal(problem)
    if reason:
        return reason
    gpu = _gpu(problem.device)
    directions = (False, True) if problem.needs_gradient else (False,)
    plans = [plan_head(problem, gpu, backward) for backward in directions]
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
    cell, (B, T, N, D) = problem.cell, (problem.B, problem.T, problem.N, problem.D)
    every_state, last_states, gates = autograd.new_outputs(problem, Wx)
    if B == 0 or T == 0:
        return every_state, states.clone(memory_format=torch.contiguous_format), gates
    R, b = R.contiguous(), b.contiguous()
    aligned = _aligned(Wx, every_state, gates)
    plan = _plan(problem, backward=False)
    kernel = _forward_kernel(
        clipped(cell, problem.forward_clipval),
        program.precision_of(problem.dtype),
        D,
        plan,
        aligned,
        problem.needs_gradient,
        problem.device,
    )
    tensors = (Wx, R, b, states, every_state, last_states, gates)
    kernel.launch(
        plan.grid(B, N), tensors, (*Wx.stride(), *autograd.state_strides(states), T, B, N)
    )
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
    R = R.contiguous()
    aligned = _aligned(states, gates, d_states, d_gates)
    cut, clipval = problem.gradient_recurrent_cut, problem.gradient_recurrent_clipval
    plan = _plan(problem, backward=True)
    kernel = _backward_kernel(
        clipped(cell, problem.forward_clipval),
        program.precision_of(problem.dtype),
        D,
        plan,
        aligned,
        cut,
        clipval,
        problem.device,
    )
    outputs = (d_gates, d_initial, d_bias)
    tensors = (R, states_initial, states, gates, d_states, d_last_states, *outputs)
    strides = (
        *autograd.state_strides(states_initial),
        *d_states.stride(),
        *autograd.state_strides(d_last_states),
    )
    kernel.launch(plan.grid(B, N), tensors, (*strides, T, B, N))
    d_R = _recurrent_gradient(problem, d_gates, states_initial[0], states[0])
    d_b = select(d_bias.sum(0), 0, cell.fed_by("b")).to(R.dtype)
    return Gradients(d_gates, d_initial, d_R, d_b)


def _recurrent_gradient(problem: Problem, d_gates: Tensor, h_initial: Tensor, h: Tensor) -> Tensor:
    """See :func:`flashrnn.backends.gradients.recurrent_gradient`, of which this is a kernel."""
    cell, (B, T, N, D) = problem.cell, (problem.B, problem.T, problem.N, problem.D)
    recurrent = len(cell.fed_by("R"))
    # What the product saw.
    h_initial = h_initial.to(h.dtype).contiguous()
    gpu = _gpu(problem.device)
    plan = plan_gradient(recurrent, B * T, N, D, h.element_size(), gpu)
    aligned = _aligned(d_gates, h_initial, h)
    precision = program.precision_of(problem.dtype)
    # In a cache, what is not compiled in would only be in the way.
    compiled = replace(plan, parts=1, rows=0)
    kernel = _gradient_kernel(cell, precision, D, compiled, aligned, problem.device)
    parts = d_gates.new_empty((plan.parts, recurrent, N, D, D), dtype=torch.float32)
    grid = N * plan.groups * plan.parts
    kernel.launch(grid, (d_gates, h_initial, h, parts), (plan.rows, T, B, N))
    return parts.sum(0).to(h.dtype)


@dataclass(frozen=True)
class _Kernel:
    """A kernel on a device, and what its launches have in common."""

    device: int
    kernel: Any
    threads: int
    shared_memory: int

    def launch(self, grid: int, tensors: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """Enqueue it on PyTorch's current stream of its device."""
        config = launch.configure(grid, self.threads, self.shared_memory)
        arguments = (*(x.data_ptr() for x in tensors), *numbers)
        with launch.on_device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            launch.enqueue([launch.Launch(self.kernel, config, arguments)], stream)


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


def _plan(problem: Problem, backward: bool) -> HeadPlan:
    plan = plan_head(problem, _gpu(problem.device), backward)
    assert isinstance(plan, HeadPlan), "flashrnn() asks unsupported() first"
    return plan


@cache
def _gpu(device: torch.device) -> GPU:
    properties: Any = torch.cuda.get_device_properties(device)
    return GPU(
        multiprocessors=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,
        shifts_registers=properties.major == 9,
    )


# Kernels are never forgotten: forgotten ones would be unloaded, and a CUDA graph of the user's may
# hold their launches.


@cache
def _forward_kernel(
    cell: Cell,
    precision: str,
    D: int,
    plan: HeadPlan,
    aligned: bool,
    save_gates: bool,
    device: torch.device,
) -> _Kernel:
    parts = head.forward_source(cell, precision, D, plan, aligned, save_gates)
    threads = plan.threads(D)
    return _kernel("head_forward", parts, device, threads, plan.shared_memory)


@cache
def _backward_kernel(
    cell: Cell,
    precision: str,
    D: int,
    plan: HeadPlan,
    aligned: bool,
    cut: bool,
    clipval: float | None,
    device: torch.device,
) -> _Kernel:
    parts = head.backward_source(cell, precision, D, plan, aligned, cut, clipval)
    threads = plan.threads(D)
    return _kernel("head_backward", parts, device, threads, plan.shared_memory)


@cache
def _gradient_kernel(
    cell: Cell,
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
) -> _Kernel:
    index = torch.cuda.current_device() if device.index is None else device.index
    cubin = nvrtc.compile_program(parts, launch.architecture(device))
    (kernel,) = launch.load_kernels(cubin, (name,), index, shared_memory)
    return _Kernel(index, kernel, threads, shared_memory)
