"""Backend ``cuda``: a launch for each step, product and cell in one, for any head dimension.

Its kernels are compiled when a problem first needs them, and their launches replayed from
recordings (:mod:`flashrnn.jit`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flashrnn.backends import autograd
from flashrnn.backends.gradients import Gradients, complete
from flashrnn.backends.requirements import refusal, too_large, too_many_rows, unavailable_cuda
from flashrnn.cells.traced import TracedCell, clipped
from flashrnn.jit import launch, nvrtc, runs
from flashrnn.kernels import program, step
from flashrnn.problem import Problem


def unavailable(device: torch.device) -> str | None:
    """Why its kernels do not run on a device."""
    return unavailable_cuda(device)


def unsupported(problem: Problem) -> str | None:
    """Why it cannot do this problem."""
    return refusal(problem) or too_large(problem) or too_many_rows(problem)


def run(
    problem: Problem, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """See :class:`flashrnn.backends.Backend`."""
    return autograd.run("cuda", problem, Wx, R, b, states)


def forward(
    problem: Problem, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`flashrnn.backends.autograd.FusedBackend`."""
    B, T = problem.B, problem.T
    every_state, last_states, gates = autograd.new_outputs(problem, Wx)
    if B == 0 or T == 0:
        return every_state, states.clone(memory_format=torch.contiguous_format), gates
    # Rows of what the step's product reads.
    R, h = _aligned(R), _aligned(states[0].to(Wx.dtype))
    b = b.contiguous()
    tensors = (Wx, R, b, states, h, every_state, gates, last_states)
    fields = (
        *(x.data_ptr() for x in tensors),
        *Wx.stride(),
        *autograd.state_strides(states),
        B,
        T,
        _clips(problem),
    )
    runs.run(_forward_stepper(*_key(problem), problem.needs_gradient), fields, T)
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
    d_gates = torch.empty_like(gates)
    T, cut = problem.T, problem.gradient_recurrent_cut
    if problem.B == 0 or T == 0:
        d_initial = d_last_states.clone(memory_format=torch.contiguous_format)
        return complete(problem, d_gates, d_initial, states_initial, states)
    d_initial = torch.empty_like(states_initial, memory_format=torch.contiguous_format)
    # Rows of what the step's product sums over: [N, D summed over by the step, Gr, D].
    transposed = _aligned(R.permute(1, 3, 0, 2))
    tensors = (transposed, states_initial, states, gates, d_states, d_last_states)
    fields = (
        *(x.data_ptr() for x in (*tensors, d_gates, d_initial)),
        *autograd.state_strides(states_initial),
        *d_states.stride(),
        *autograd.state_strides(d_last_states),
        problem.B,
        T,
        _clips(problem),
    )
    # The last launch adds what reaches the initial h through R.
    count = T if cut else T + 1
    clip = problem.gradient_recurrent_clipval is not None
    runs.run(_backward_stepper(*_key(problem), cut, clip), fields, count)
    return complete(problem, d_gates, d_initial, states_initial, states)


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and from a multiple of 16 bytes on."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _clips(problem: Problem) -> int:
    return program.clips(problem.gradient_recurrent_clipval, problem.forward_clipval)


def _key(problem: Problem) -> tuple[TracedCell, int, int, int, str, torch.device]:
    """What of a problem both directions' kernels and their launches depend on."""
    cell = problem.cell if problem.forward_clipval is None else clipped(problem.cell)
    precision = program.precision_of(problem.dtype)
    return cell, problem.B, problem.N, problem.D, precision, problem.device


@lru_cache(maxsize=256)
def _forward_stepper(
    cell: TracedCell, B: int, N: int, D: int, precision: str, device: torch.device, save_gates: bool
) -> runs.Stepper:
    plan = step.plan_step(cell, B, N, D, precision, backward=False)
    loaded = _forward_program(cell, precision, plan, save_gates, device)
    return _stepper(loaded, len(step.FORWARD_CALL), plan, plan.grid(B, N, D), N, D)


@lru_cache(maxsize=256)
def _backward_stepper(
    cell: TracedCell,
    B: int,
    N: int,
    D: int,
    precision: str,
    device: torch.device,
    cut: bool,
    clip: bool,
) -> runs.Stepper:
    plan = step.plan_step(cell, B, N, D, precision, backward=True)
    loaded = _backward_program(cell, precision, plan, cut, clip, device)
    return _stepper(loaded, len(step.BACKWARD_CALL), plan, plan.grid(B, N, D), N, D)


@lru_cache(maxsize=256)
def _stepper(
    loaded: launch.Program, fields: int, plan: step.StepPlan, grid: int, N: int, D: int
) -> runs.Stepper:
    """The same one for all batches that have its grid: recordings are a stepper's."""
    return runs.Stepper(
        program=loaded,
        fields=fields,
        grid=grid,
        threads=plan.threads,
        sizes=(N, D),
        overlaps=torch.cuda.get_device_capability(loaded.device) >= (9, 0),
    )


@lru_cache(maxsize=256)
def _forward_program(
    cell: TracedCell, precision: str, plan: step.StepPlan, save_gates: bool, device: torch.device
) -> launch.Program:
    return _load("step_forward", step.forward_source(cell, precision, plan, save_gates), device)


@lru_cache(maxsize=256)
def _backward_program(
    cell: TracedCell,
    precision: str,
    plan: step.StepPlan,
    cut: bool,
    clip: bool,
    device: torch.device,
) -> launch.Program:
    parts = step.backward_source(cell, precision, plan, cut, clip)
    return _load("step_backward", parts, device)


def _load(name: str, parts: dict[str, str], device: torch.device) -> launch.Program:
    index = torch.cuda.current_device() if device.index is None else device.index
    cubin = nvrtc.compile_program(parts, launch.architecture(device))
    return launch.Program(cubin, ("set_call", name), index)
