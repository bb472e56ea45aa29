"""Backend ``cuda``: a launch for each step, product and cell in one, for any head dimension.

Its kernels are compiled when a problem first needs them. Their launches are replayed from
recordings (:mod:`flashrnn.kernels.per_step.runs`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flashrnn.backends import autograd
from flashrnn.backends.gradients import Gradients, complete, number_of, of_no_steps
from flashrnn.backends.requirements import refusal, too_large, too_many_rows, unavailable_cuda
from flashrnn.cells.traced import TracedCell, clipped
from flashrnn.jit import launch, nvrtc
from flashrnn.jit.background import compile_soon
from flashrnn.kernels import call, source
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.per_step import plan as per_step
from flashrnn.kernels.per_step import runs
from flashrnn.problem import Problem, as_compiled


def unavailable(device: torch.device) -> str | None:
    """Why its kernels do not run on a device."""
    return unavailable_cuda(device)


def unsupported(problem: Problem) -> str | None:
    """Why it cannot do this problem."""
    return refusal(problem) or too_large(problem) or too_many_rows(problem)


def programs(
    problem: Problem, gpu: GPU | None, precision: str, backward: bool
) -> list[dict[str, str]]:
    """See :func:`flashrnn.backends.cuda_fused.programs`; those of every GPU are the same."""
    if reason := unsupported(problem):
        raise ValueError(f"backend 'cuda' cannot do this call: {reason}")
    cell = problem.cell if problem.forward_clipval is None else clipped(problem.cell)
    plan = per_step.plan_step(cell, problem.B, problem.N, problem.D, precision, backward)
    return [plan.source(cell, precision, source.options_of(problem, backward))]


def forward(
    problem: Problem, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :class:`flashrnn.backends.autograd.FusedBackend`."""
    B, T = problem.B, problem.T
    every_state, last_states, gates = autograd.new_outputs(problem, Wx)
    if B == 0 or T == 0:
        return every_state, states.clone(memory_format=torch.contiguous_format), gates
    # The step's product loads vectors of 16 bytes of their rows.
    R, h = _aligned(R), _aligned(states[0].to(Wx.dtype))
    b = b.contiguous()
    tensors = {
        "Wx": Wx,
        "R": R,
        "b": b,
        "initial": states,
        "h_initial": h,
        "states": every_state,
        "last_states": last_states,
    }
    if gates is not None:
        tensors["gates"] = gates
    fields = _fields(problem, False, tensors)
    if problem.needs_gradient:
        _begin_backward(as_compiled(problem), source.precision_of(problem))
    options = source.forward_options(problem.needs_gradient)
    runs.run(_stepper(*_key(problem), False, options), fields, T)
    return every_state, last_states, gates


def backward(
    problem: Problem,
    R: Tensor,
    states_initial: Tensor,
    states: Tensor,
    gates: Tensor,
    d_states: Tensor | None,
    d_last_states: Tensor | None,
) -> Gradients:
    """See :class:`flashrnn.backends.autograd.FusedBackend`."""
    d_gates = torch.empty_like(gates)
    T, cut = problem.T, problem.gradient_recurrent_cut
    if problem.B == 0 or T == 0:
        return of_no_steps(problem, d_gates, d_last_states, states_initial, states)
    d_initial = torch.empty_like(states_initial, memory_format=torch.contiguous_format)
    # The step's product sums over the units that forward's product computes: [N, D, Gr, D].
    transposed = _aligned(R.permute(1, 3, 0, 2))
    tensors = {
        "R": transposed,
        "initial": states_initial,
        "states": states,
        "gates": gates,
        "d_gates": d_gates,
        "d_initial": d_initial,
    }
    # The last launch adds what reaches the initial h through R.
    count = T if cut else T + 1
    clips = problem.gradient_recurrent_clipval is not None
    if d_states is not None:
        tensors["d_states"] = d_states
    if d_last_states is not None:
        tensors["d_last"] = d_last_states
    given = number_of(d_states), d_last_states is not None
    options = source.backward_options(cut, clips, *given)
    fields = _fields(problem, True, tensors)
    runs.run(_stepper(*_key(problem), True, options), fields, count)
    return complete(problem, d_gates, d_initial, states_initial, states)


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and beginning at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _fields(problem: Problem, backward: bool, tensors: dict[str, Tensor]) -> tuple[int, ...]:
    """The record's, but for the last one, ``done``."""
    record = call.BACKWARD if backward else call.FORWARD
    clips = source.clips(problem.gradient_recurrent_clipval, problem.forward_clipval)
    addresses, layout = record.read(tensors)
    return _packing(backward, layout, problem.T, problem.B, problem.N, clips)(addresses)[:-1]


@lru_cache(maxsize=512)
def _packing(
    backward: bool, layout: call.Layout, T: int, B: int, N: int, clips: int
) -> call.Packing:
    record = call.BACKWARD if backward else call.FORWARD
    return record.packing(layout, T=T, B=B, N=N, clips=clips)


def _key(problem: Problem) -> tuple[TracedCell, int, int, int, str, torch.device]:
    """What both directions' kernels and launches depend on."""
    cell = problem.cell if problem.forward_clipval is None else clipped(problem.cell)
    precision = source.precision_of(problem)
    return cell, problem.B, problem.N, problem.D, precision, problem.device


@lru_cache(maxsize=1024)
def _begin_backward(problem: Problem, precision: str) -> None:
    """Begin to compile what backward will need, while forward is compiled and runs; once."""
    found = programs(problem, None, precision, backward=True)
    compile_soon(found, launch.architecture(problem.device))


@lru_cache(maxsize=512)
def _stepper(
    cell: TracedCell,
    B: int,
    N: int,
    D: int,
    precision: str,
    device: torch.device,
    backward: bool,
    options: source.Options,
) -> runs.Stepper:
    plan = per_step.plan_step(cell, B, N, D, precision, backward)
    loaded = _program(cell, precision, plan, options, device)
    return _shared_stepper(loaded, plan, plan.grid(B, N, D), N, D)


@lru_cache(maxsize=256)
def _shared_stepper(
    loaded: launch.Program, plan: per_step.StepPlan, grid: int, N: int, D: int
) -> runs.Stepper:
    """One for all batches with the same grid, so that they share its recordings."""
    return runs.Stepper(
        program=loaded,
        fields=plan.record.size,
        grid=grid,
        threads=plan.threads,
        sizes=(N, D),
        overlaps=torch.cuda.get_device_capability(loaded.device) >= (9, 0),
    )


@lru_cache(maxsize=512)
def _program(
    cell: TracedCell,
    precision: str,
    plan: per_step.StepPlan,
    options: source.Options,
    device: torch.device,
) -> launch.Program:
    return _load(plan.entry, plan.source(cell, precision, options), device)


def _load(entry: str, parts: dict[str, str], device: torch.device) -> launch.Program:
    index = torch.cuda.current_device() if device.index is None else device.index
    cubin = nvrtc.compile_program(parts, launch.architecture(device))
    return launch.Program(cubin, ("set_call", entry), index)
