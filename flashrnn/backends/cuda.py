"""Backend ``cuda``: a launch for each step, product and cell in one, for any head dimension.

Its kernels are compiled when a problem first needs them, and their launches replayed from
recordings (:mod:`flashrnn.jit`).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from flashrnn.backends import autograd
from flashrnn.backends.gradients import Gradients, complete
from flashrnn.backends.requirements import missing_gpu, refusal
from flashrnn.cells.traced import TracedCell, clipped
from flashrnn.jit import launch, nvrtc, runs
from flashrnn.kernels import program, step
from flashrnn.problem import Problem


@cache
def unavailable() -> str | None:
    """Why its kernels do not run here."""
    return missing_gpu() or nvrtc.unavailable()


def unsupported(problem: Problem) -> str | None:
    """Why it cannot do this problem."""
    return refusal(problem)


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
    R, b, h = _aligned(R), b.contiguous(), states[0].to(Wx.dtype).contiguous()
    tensors = (Wx, R, b, states, h, every_state, gates, last_states)
    fields = (
        *(x.data_ptr() for x in tensors),
        *Wx.stride(),
        *autograd.state_strides(states),
        T,
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
    transposed = R.permute(1, 3, 0, 2).contiguous()
    tensors = (transposed, states_initial, states, gates, d_states, d_last_states)
    fields = (
        *(x.data_ptr() for x in (*tensors, d_gates, d_initial)),
        *autograd.state_strides(states_initial),
        *d_states.stride(),
        *autograd.state_strides(d_last_states),
        T,
    )
    # The last launch adds what reaches the initial h through R.
    count = T if cut else T + 1
    clipval = problem.gradient_recurrent_clipval
    runs.run(_backward_stepper(*_key(problem), cut, clipval), fields, count)
    return complete(problem, d_gates, d_initial, states_initial, states)


def _aligned(R: Tensor) -> Tensor:
    """Contiguous, and from a multiple of 16 bytes on."""
    R = R.contiguous()
    return R if R.data_ptr() % 16 == 0 else R.clone()


def _key(problem: Problem) -> tuple[TracedCell, int, int, int, str, torch.device]:
    """What of a problem both directions' kernels and their launches depend on."""
    cell = problem.cell if problem.forward_clipval is None else clipped(problem.cell)
    precision = program.precision_of(problem.dtype)
    return cell, problem.B, problem.N, problem.D, precision, problem.device


# Never forgotten: a graph of the user's may hold its launches.
@cache
def _forward_stepper(
    cell: TracedCell, B: int, N: int, D: int, precision: str, device: torch.device, save_gates: bool
) -> runs.Stepper:
    plan = step.plan_step(cell, B, N, D, precision, backward=False)
    parts = step.forward_source(cell, precision, plan, save_gates)
    return _stepper("step_forward", parts, step.FORWARD_CALL, plan, (B, N, D), device)


@cache
def _backward_stepper(
    cell: TracedCell,
    B: int,
    N: int,
    D: int,
    precision: str,
    device: torch.device,
    cut: bool,
    clipval: float | None,
) -> runs.Stepper:
    plan = step.plan_step(cell, B, N, D, precision, backward=True)
    parts = step.backward_source(cell, precision, plan, cut, clipval)
    return _stepper("step_backward", parts, step.BACKWARD_CALL, plan, (B, N, D), device)


def _stepper(
    name: str,
    parts: dict[str, str],
    fields: tuple[str, ...],
    plan: step.StepPlan,
    sizes: tuple[int, int, int],
    device: torch.device,
) -> runs.Stepper:
    index = torch.cuda.current_device() if device.index is None else device.index
    cubin = nvrtc.compile_program(parts, launch.architecture(device))
    set_call, kernel = launch.load_kernels(cubin, ("set_call", name), index)
    return runs.Stepper(
        device=index,
        set_call=set_call,
        step=kernel,
        fields=len(fields),
        grid=plan.grid(*sizes),
        threads=plan.threads,
        sizes=sizes,
        overlaps=torch.cuda.get_device_capability(device) >= (9, 0),
    )
