"""Backend ``cuda``: a launch for each step, product and cell in one, for any head dimension.

Its kernels are compiled when a problem first needs them. Their launches are replayed from
recordings (:mod:`flashrnn.kernels.per_step.runs`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flashrnn.backends import autograd
from flashrnn.backends.gradients import Gradients, complete
from flashrnn.backends.requirements import (
    options_refusal,
    refusal,
    too_large,
    too_many_rows,
    unavailable_cuda,
)
from flashrnn.cells.traced import TracedCell, clipped
from flashrnn.jit import launch, nvrtc
from flashrnn.kernels import call, source
from flashrnn.kernels.per_step import plan as per_step
from flashrnn.kernels.per_step import runs
from flashrnn.problem import Problem


def unavailable(device: torch.device) -> str | None:
    """Why its kernels do not run on a device."""
    return unavailable_cuda(device)


def unsupported(problem: Problem) -> str | None:
    """Why it cannot do this problem."""
    return (
        refusal(problem) or options_refusal(problem) or too_large(problem) or too_many_rows(problem)
    )


def forward(
    problem: Problem, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
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
        "gates": gates,
    }
    fields = _fields(call.FORWARD, problem, tensors)
    options = source.forward_options(problem.needs_gradient)
    runs.run(_stepper(*_key(problem), False, options), fields, T)
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
    # The step's product sums over the units that forward's product computes: [N, D, Gr, D].
    transposed = _aligned(R.permute(1, 3, 0, 2))
    tensors = {
        "R": transposed,
        "initial": states_initial,
        "states": states,
        "gates": gates,
        "d_states": d_states,
        "d_last": d_last_states,
        "d_gates": d_gates,
        "d_initial": d_initial,
    }
    fields = _fields(call.BACKWARD, problem, tensors)
    # The last launch adds what reaches the initial h through R.
    count = T if cut else T + 1
    clips = problem.gradient_recurrent_clipval is not None
    options = source.backward_options(cut, clips)
    runs.run(_stepper(*_key(problem), True, options), fields, count)
    return complete(problem, d_gates, d_initial, states_initial, states)


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and beginning at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _fields(record: call.Record, problem: Problem, tensors: dict[str, Tensor]) -> list[int]:
    """The record's, but for the last one, ``done``."""
    clips = source.clips(problem.gradient_recurrent_clipval, problem.forward_clipval)
    return record.pack(tensors, T=problem.T, B=problem.B, N=problem.N, clips=clips)[:-1]


def _key(problem: Problem) -> tuple[TracedCell, int, int, int, str, torch.device]:
    """What both directions' kernels and launches depend on."""
    cell = problem.cell if problem.forward_clipval is None else clipped(problem.cell)
    precision = source.precision_of(problem.dtype)
    return cell, problem.B, problem.N, problem.D, precision, problem.device


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
