"""Backend ``cuda``: a launch for each step, product and cell in one, for any head dimension.

Its kernels are compiled when a problem first needs them. Their launches are replayed from
recordings (:mod:`flashrnn.kernels.per_step.runs`).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from flashrnn.backends import autograd
from flashrnn.backends.gradients import Gradients, before_steps, complete
from flashrnn.backends.requirements import (
    refusal,
    too_large,
    too_many_numbered_rows,
    too_many_rows,
    unavailable_cuda,
)
from flashrnn.cells.traced import TracedCell, clipped
from flashrnn.jit import launch, nvrtc
from flashrnn.kernels import call, source
from flashrnn.kernels.per_step import plan as per_step
from flashrnn.kernels.per_step import runs
from flashrnn.problem import Problem
from flashrnn.sequences import Sequences, operands, zeros_like_starts


def unavailable(device: torch.device) -> str | None:
    """Why its kernels do not run on a device."""
    return unavailable_cuda(device)


def unsupported(problem: Problem) -> str | None:
    """Why it cannot do this problem."""
    return (
        refusal(problem)
        or too_many_numbered_rows(problem)
        or too_large(problem)
        or too_many_rows(problem)
    )


def forward(
    problem: Problem,
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`flashrnn.backends.autograd.FusedBackend`."""
    # A step reads h where the step before has stored it, whether it is returned or not.
    stored = 1 if problem.returned == 0 and not problem.needs_gradient else None
    every_state, last_states, gates = autograd.new_outputs(problem, Wx, stored)
    if problem.B == 0 or problem.steps == 0:
        last_states = states.clone(memory_format=torch.contiguous_format)
        return autograd.kept(problem, every_state.zero_()), last_states, gates
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
    options = source.forward_options(problem.needs_gradient)
    record = call.FORWARD
    if sequences is not None:
        tensors |= operands(problem, sequences)
        if problem.is_sequenced:
            before = before_steps(problem, sequences, states[0], Wx.dtype)
            tensors |= {"before_rows": before.rows, "h_starts": _aligned(before.starts)}
        options = (*options, *source.sequence_options(problem), ("STORED", every_state.shape[0]))
        if problem.ragged:
            # A sequence of no step ends where it starts; rows of no step are 0.
            last_states.copy_(states)
            every_state.zero_()
    if problem.is_sequenced:
        record = record.complete
    fields = _fields(record, problem, tensors)
    runs.run(_stepper(*_key(problem), False, options), fields, problem.steps)
    return autograd.kept(problem, every_state), last_states, gates


def backward(
    problem: Problem,
    R: Tensor,
    states_initial: Tensor,
    states: Tensor,
    gates: Tensor,
    d_states: Tensor,
    d_last_states: Tensor,
    sequences: Sequences | None = None,
) -> Gradients:
    """See :class:`flashrnn.backends.autograd.FusedBackend`."""
    d_gates = torch.empty_like(gates)
    cut, d_resets = problem.gradient_recurrent_cut, zeros_like_starts(sequences)
    if problem.B == 0 or problem.steps == 0:
        d_initial = d_last_states.clone(memory_format=torch.contiguous_format)
        d_gates.zero_()
        return complete(problem, d_gates, d_initial, states_initial, states, sequences)._replace(
            reset_states=d_resets
        )
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
    clips = problem.gradient_recurrent_clipval is not None
    options = source.backward_options(cut, clips)
    record = call.BACKWARD
    if sequences is not None:
        tensors |= operands(problem, sequences)
        options = (*options, *source.sequence_options(problem), ("GIVEN", d_states.shape[0]))
        if d_resets is not None:
            tensors["d_reset_states"] = d_resets.expand(-1, problem.B, problem.T, -1, -1)
    if problem.is_sequenced:
        record = record.complete
        d_initial.copy_(d_last_states)
        if problem.ragged:
            d_gates.zero_()
    fields = _fields(record, problem, tensors)
    # The last launch adds what reaches the initial h through R, and what is due to resets.
    count = problem.steps if cut and not problem.resets else problem.steps + 1
    runs.run(_stepper(*_key(problem), True, options), fields, count)
    found = complete(problem, d_gates, d_initial, states_initial, states, sequences)
    return found._replace(reset_states=d_resets)


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and beginning at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _fields(record: call.Record, problem: Problem, tensors: dict[str, Tensor]) -> list[int]:
    """The record's, but for the last one, ``done``."""
    clips = source.clips(problem.gradient_recurrent_clipval, problem.forward_clipval)
    sizes = {"T": problem.steps, "B": problem.B, "N": problem.N}
    rows = math.prod(problem.rows)
    return record.pack(tensors, **sizes, rows_of_all=rows, clips=clips)[:-1]


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
    sequenced = source.is_sequenced(options)
    plan = per_step.plan_step(cell, B, N, D, precision, backward, sequenced)
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
