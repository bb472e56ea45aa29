"""Backend ``cuda``: a launch for each step, product and cell in one, for any head dimension.

Its kernels are compiled when a problem first needs them. Their launches are replayed from
recordings (:mod:`flashrnn.kernels.per_step.runs`). Where there are so many sequences that PyTorch's
library multiplies faster, it computes the product, and the cell has a launch of its own
(:mod:`flashrnn.backends.steps`).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from flashrnn.backends import autograd, steps, tables
from flashrnn.backends.gradients import (
    Gradients,
    complete,
    number_of,
    of_no_steps,
)
from flashrnn.backends.requirements import (
    refusal,
    too_large,
    too_many_numbered_rows,
    too_many_rows,
    unavailable_cuda,
)
from flashrnn.cells.traced import TracedCell, clipped
from flashrnn.jit import launch, nvrtc
from flashrnn.jit.background import compile_soon
from flashrnn.kernels import call, source
from flashrnn.kernels.gpu import GPU, whole
from flashrnn.kernels.per_step import cell_plan, runs
from flashrnn.kernels.per_step import plan as per_step
from flashrnn.problem import Problem, as_compiled
from flashrnn.sequences import Sequences, zeros_like_starts


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


def programs(
    problem: Problem, gpu: GPU | None, precision: str, backward: bool
) -> list[dict[str, str]]:
    """See :func:`flashrnn.backends.cuda_fused.programs`."""
    if reason := unsupported(problem):
        raise ValueError(f"backend 'cuda' cannot do this call: {reason}")
    if of_cell := _planned_steps(problem, precision, gpu or _gpu(problem), backward):
        return steps.programs(problem, of_cell, precision)
    cell = problem.cell if problem.forward_clipval is None else clipped(problem.cell)
    plan = per_step.plan_step(
        cell, problem.B, problem.N, problem.D, precision, backward, problem.is_sequenced
    )
    return [
        *tables.programs(problem, with_before=True),
        plan.source(cell, precision, options_of(problem, backward)),
        *([tables.program_of_h(problem)] if backward else []),
    ]


def options_of(problem: Problem, backward: bool) -> source.Options:
    """The usual constants of a problem's kernel."""
    options = source.options_of(problem, backward, _stored(problem))
    if backward and problem.is_sequenced:
        return tuple((name, False if name == "GIVEN_LAST" else x) for name, x in options)
    return options


def forward(
    problem: Problem,
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :class:`flashrnn.backends.protocols.FusedBackend`."""
    if problem.steps and (plan := _steps(problem, backward=False)):
        if problem.needs_gradient:
            _begin_backward(as_compiled(problem), source.precision_of(problem))
        return steps.forward(problem, plan, Wx, R, b, states)
    every_state, last_states, gates = autograd.new_outputs(problem, Wx, _stored(problem))
    if problem.B == 0 or problem.steps == 0:
        last_states = states.clone(memory_format=torch.contiguous_format)
        return autograd.returned_of(problem, every_state.zero_()), last_states, gates
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
    options = source.forward_options(problem.needs_gradient)
    options += source.options_of_storing(problem, len(every_state))
    if sequences is not None:
        made = tables.made(problem, sequences, states)
        tensors |= made.of_scan
        if made.before is not None:
            tensors |= {"before_rows": made.before.rows, "h_starts": made.before.starts}
        if problem.ragged:
            # A sequence of no step ends where it starts; rows of no step are 0.
            last_states.copy_(states)
            every_state.zero_()
    fields = _fields(problem, False, tensors)
    if problem.needs_gradient:
        _begin_backward(as_compiled(problem), source.precision_of(problem))
    runs.run(_stepper(*_key(problem), False, options), fields, problem.steps)
    return autograd.returned_of(problem, every_state), last_states, gates


def backward(
    problem: Problem,
    R: Tensor,
    states_initial: Tensor,
    states: Tensor,
    gates: Tensor,
    d_states: Tensor | None,
    d_last_states: Tensor | None,
    sequences: Sequences | None = None,
) -> Gradients:
    """See :class:`flashrnn.backends.protocols.FusedBackend`."""
    if problem.steps and (plan := _steps(problem, backward=True)):
        residuals = states_initial, states, gates
        return steps.backward(problem, plan, R, *residuals, d_states, d_last_states)
    d_gates = torch.empty_like(gates)
    cut, d_resets = problem.gradient_recurrent_cut, zeros_like_starts(sequences)
    if problem.B == 0 or problem.steps == 0:
        found = of_no_steps(problem, d_gates, d_last_states, states_initial)
        return found._replace(reset_states=d_resets)
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
    if d_states is not None:
        tensors["d_states"] = d_states
    given_last = d_last_states is not None and not problem.is_sequenced
    clips = problem.gradient_recurrent_clipval is not None
    options = source.backward_options(cut, clips, number_of(d_states), given_last)
    before = None
    if sequences is not None:
        made = tables.made(problem, sequences, states_initial)
        tensors, before = tensors | made.of_scan, made.before
        options = (*options, *source.sequence_options(problem))
        if d_resets is not None:
            tensors["d_reset_states"] = d_resets.expand(-1, problem.B, problem.T, -1, -1)
    if problem.is_sequenced:
        # Sequences end at different times: each one's gradients wait where it carries them.
        if d_last_states is None:
            d_initial.zero_()
        else:
            d_initial.copy_(d_last_states)
        if problem.ragged:
            d_gates.zero_()
    elif d_last_states is not None:
        tensors["d_last"] = d_last_states
    fields = _fields(problem, True, tensors)
    # The last launch adds what reaches the initial h through R, and what is due to resets.
    count = problem.steps if cut and not problem.resets else problem.steps + 1
    runs.run(_stepper(*_key(problem), True, options), fields, count)
    every_h = tables.h_before(problem, before, states_initial, states)
    found = complete(problem, d_gates, d_initial, states_initial, states, every_h)
    return found._replace(reset_states=d_resets)


def _gpu(problem: Problem) -> GPU:
    return whole(problem.device)


def _steps(problem: Problem, backward: bool) -> cell_plan.CellPlan | None:
    """The plan by which a library computes the product, where that is faster."""
    if not steps.may_be_faster(problem):
        return None
    precision = source.precision_of(problem)
    return _planned_steps(as_compiled(problem), precision, _gpu(problem), backward)


@lru_cache(maxsize=1024)
def _planned_steps(
    problem: Problem, precision: str, gpu: GPU, backward: bool
) -> cell_plan.CellPlan | None:
    B, N, D, itemsize = problem.B, problem.N, problem.D, problem.dtype.itemsize
    own = per_step.plan_step(problem.cell, B, N, D, precision, backward)
    cycles = own.estimated_cycles(B, N, D, itemsize, gpu)
    return cell_plan.plan_steps(problem, precision, gpu, backward, cycles)


def _stored(problem: Problem) -> int:
    """How many states are stored of every step."""
    # A step reads h where the step before has stored it, whether it is returned or not.
    return max(1, autograd.stored(problem))


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and beginning at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _fields(problem: Problem, backward: bool, tensors: dict[str, Tensor]) -> tuple[int, ...]:
    """The record's, but for the last one, ``done``."""
    clips = source.clips(problem.gradient_recurrent_clipval, problem.forward_clipval)
    record = _record(problem.is_sequenced, backward)
    addresses, layout = record.read(tensors)
    sizes = problem.steps, problem.B, problem.N, math.prod(problem.rows)
    return _packing(problem.is_sequenced, backward, layout, sizes, clips)(addresses)[:-1]


def _record(sequenced: bool, backward: bool) -> call.Record:
    record = call.BACKWARD if backward else call.FORWARD
    return record.complete if sequenced else record


@lru_cache(maxsize=512)
def _packing(
    sequenced: bool,
    backward: bool,
    layout: call.Layout,
    sizes: tuple[int, int, int, int],
    clips: int,
) -> call.Packing:
    T, B, N, rows = sizes
    record = _record(sequenced, backward)
    return record.packing(layout, T=T, B=B, N=N, rows_of_all=rows, clips=clips)


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
