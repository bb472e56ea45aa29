"""Backend ``cuda_fused``: one persistent kernel forward and one backward, R kept on chip.

The kernel is that of the plan with the fewest estimated cycles (:mod:`flashrnn.kernels.registry`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashrnn.backends import autograd
from flashrnn.backends.gradients import (
    Before,
    Gradients,
    before_steps,
    complete,
    recurrent_gradient,
    select,
)
from flashrnn.backends.requirements import (
    refusal,
    too_large,
    too_many_numbered_rows,
    unavailable_cuda,
)
from flashrnn.cells.traced import TracedCell, clipped
from flashrnn.jit import context, launch, nvrtc
from flashrnn.kernels import call, registry, single_cta, source
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.plan import Plan
from flashrnn.problem import Problem
from flashrnn.sequences import Sequences, operands, runs_backwards, zeros_like_starts


def unavailable(device: torch.device) -> str | None:
    """Why its kernels do not run on a device."""
    return unavailable_cuda(device)


def unsupported(problem: Problem) -> str | None:
    """Why it cannot do this problem."""
    # Whether there is a plan does not depend on B.
    return (
        refusal(problem)
        or _without_options(problem)
        or too_many_numbered_rows(problem)
        or too_large(problem)
        or _without_plan(_planned(problem, B=1), _gpu(problem))
    )


def _without_options(problem: Problem) -> str | None:
    """Which options of sequences its regimes of large heads lack."""
    if registry.is_small(problem.D) or not problem.is_sequenced:
        return None
    asked = {
        "reset": problem.resets,
        "cu_seqlens": problem.packed,
        "lengths": problem.ragged and not problem.packed,
        "reverse": problem.reverse is not False,
    }
    names = ", ".join(name for name, is_asked in asked.items() if is_asked)
    return f"for heads of more than 128 units it has no {names}; docs/sequences.md says which do"


@lru_cache(maxsize=1024)
def _without_plan(problem: Problem, gpu: GPU) -> str | None:
    directions = (False, True) if problem.needs_gradient else (False,)
    plans = [registry.best_plan(problem, gpu, backward) for backward in directions]
    return next((plan for plan in plans if isinstance(plan, str)), None)


def forward(
    problem: Problem,
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`flashrnn.backends.autograd.FusedBackend`."""
    every_state, last_states, gates = autograd.new_outputs(problem, Wx, _stored(problem))
    if problem.B == 0 or problem.T == 0:
        return every_state, states.clone(memory_format=torch.contiguous_format), gates
    gpu = _gpu(problem)
    plan = _plan(problem, False, gpu)
    Wx, R = (_rows_aligned(x, plan.ROW_ALIGNMENT) for x in (Wx, R.contiguous()))
    tensors = {
        "Wx": Wx,
        "R": R,
        "b": b.contiguous(),
        "initial": states,
        "states": every_state,
        "last_states": last_states,
        "gates": gates,
    }
    options = source.forward_options(problem.needs_gradient)
    if sequences is not None:
        tensors |= operands(problem, sequences)
        count = ("STORED", every_state.shape[0])
        options = (*options, *source.sequence_options(problem), count)
    _scan(
        problem,
        gpu,
        plan,
        call.FORWARD,
        tensors,
        options,
        _aligned(problem.D, Wx, every_state, gates),
    )
    return autograd.kept(problem, every_state), last_states, gates


def _stored(problem: Problem) -> int | None:
    """How many states are stored; ``None``: as many as are asked for."""
    if problem.returned is None or registry.is_small(problem.D):
        return None
    return len(problem.cell.states)


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
    cell, (B, T, N, D) = problem.cell, (problem.B, problem.T, problem.N, problem.D)
    d_gates = torch.empty_like(gates)
    if B == 0 or T == 0:
        d_initial = d_last_states.clone(memory_format=torch.contiguous_format)
        found = complete(problem, d_gates, d_initial, states_initial, states, sequences)
        return found._replace(reset_states=zeros_like_starts(sequences))
    d_initial = torch.empty_like(states_initial, memory_format=torch.contiguous_format)
    d_bias = states_initial.new_empty(B, len(cell.gates), N, D)
    tensors = {
        "R": R.contiguous(),
        "initial": states_initial,
        "states": states,
        "gates": gates,
        "d_states": d_states,
        "d_last": d_last_states,
        "d_gates": d_gates,
        "d_initial": d_initial,
        "d_bias": d_bias,
    }
    clips = problem.gradient_recurrent_clipval is not None
    options = source.backward_options(problem.gradient_recurrent_cut, clips)
    before, d_resets = None, None
    if sequences is not None:
        tensors |= operands(problem, sequences)
        if problem.is_sequenced:
            before = before_steps(problem, sequences, states_initial[0], states.dtype)
        if not registry.is_small(D):
            # Kernels of large heads read gradients of all states.
            missing = len(cell.states) - d_states.shape[0]
            tensors["d_states"] = d_states = pad(d_states, (0,) * 9 + (missing,))
        given = ("GIVEN", d_states.shape[0])
        options = (*options, *source.sequence_options(problem), given)
        d_resets = zeros_like_starts(sequences)
        if d_resets is not None:
            tensors["d_reset_states"] = d_resets.expand(-1, B, T, -1, -1)
    aligned = _aligned(D, states, gates, d_states, d_gates)
    gpu = _gpu(problem)
    _scan(problem, gpu, _plan(problem, True, gpu), call.BACKWARD, tensors, options, aligned)
    h_initial, h = states_initial[0], states[0]
    if registry.is_small(D):
        d_R = _recurrent_gradient(problem, gpu, d_gates, h_initial, h, before)
    else:
        d_R = recurrent_gradient(cell, d_gates, h_initial, h)
    d_b = select(d_bias.sum(0), 0, cell.fed_by("b")).to(R.dtype)
    return Gradients(d_gates, d_initial, d_R, d_b, d_resets)


def _scan(
    problem: Problem,
    gpu: GPU,
    plan: Plan,
    record: call.Record,
    tensors: dict[str, Tensor],
    options: source.Options,
    aligned: bool,
) -> None:
    """Launch a direction's kernel.

    Args:
        problem: what is computed.
        gpu: the GPU, or the part of it, that the plan is for.
        plan: how it is computed.
        record: the direction's record.
        tensors: those of the record.
        options: constants out of :mod:`flashrnn.kernels.source`.
        aligned: whether the tensors are, as :func:`_aligned` says.
    """
    B, T, N = problem.B, problem.T, problem.N
    cell = problem.cell if problem.forward_clipval is None else clipped(problem.cell)
    precision = source.precision_of(problem.dtype)
    kernel = _scan_kernel(cell, precision, plan, options, aligned, problem.device)
    scratch = plan.scratch(B, N, gpu)
    memory = next(iter(tensors.values())).new_empty
    if scratch.packets:
        # Flags count from 1: a zero is no packet's.
        tensors["packets"] = memory(scratch.packets, 4, dtype=torch.int32).zero_()
    if scratch.R_in_memory:
        tensors["R_in_memory"] = memory(scratch.R_in_memory, 4, dtype=torch.int32)
    clips = source.clips(problem.gradient_recurrent_clipval, problem.forward_clipval)
    if source.is_sequenced(options):
        record = record.complete
    fields = record.pack(tensors, T=T, B=B, N=N, clips=clips, groups=plan.groups(B, N, gpu))
    kernel.launch(plan.grid(B, N, gpu), fields)


def _recurrent_gradient(
    problem: Problem,
    gpu: GPU,
    d_gates: Tensor,
    h_initial: Tensor,
    h: Tensor,
    before: Before | None,
) -> Tensor:
    """:func:`flashrnn.backends.gradients.recurrent_gradient` by a kernel of this package."""
    cell, (B, T), (N, D) = problem.cell, problem.rows, (problem.N, problem.D)
    recurrent = len(cell.fed_by("R"))
    tensors, record = {"d_gates": d_gates, "h": h}, call.RECURRENT_GRADIENT
    if before is None:
        # Rounded, as the forward scan's product had it.
        tensors["h_initial"] = starts = h_initial.to(h.dtype).contiguous()
    else:
        tensors |= {"before_rows": before.rows, "h_starts": before.starts}
        starts, record = before.starts, record.complete
        if problem.reverse is not False:
            tensors["runs_backwards"] = runs_backwards(problem)
    plan = single_cta.plan_gradient(recurrent, B * T, N, D, h.element_size(), gpu)
    aligned = _aligned(D, d_gates, starts, h)
    precision = source.precision_of(problem.dtype)
    kernel = _gradient_kernel(
        cell, precision, plan.compiled, aligned, before is not None, problem.device
    )
    parts = d_gates.new_empty((plan.parts, recurrent, N, D, D), dtype=torch.float32)
    tensors["parts"] = parts
    fields = record.pack(tensors, rows_a_part=plan.rows, T=T, B=B, N=N)
    kernel.launch(plan.grid(N), fields)
    return parts.sum(0).to(h.dtype)


@dataclass(frozen=True)
class _Kernel:
    """A program of one kernel, and the shape of its launches but for their grid."""

    program: launch.Program
    shape: launch.Shape

    def launch(self, grid: int, fields: Sequence[int]) -> None:
        """Enqueue a launch on PyTorch's current stream of the program's device."""
        device, (kernel,) = self.program.device, self.program.kernels
        with context.on_device(device):
            if torch.cuda.is_current_stream_capturing():
                self.program.keep_for_graphs()
            stream = context.current_stream(device)
            shape = launch.Shape(grid, *self.shape[1:])
            launch.enqueue([launch.Launch(kernel, shape, fields)], stream, device)


def _rows_aligned(x: Tensor, alignment: int) -> Tensor:
    """The tensor if its rows are contiguous and aligned to so many bytes; else a copy."""
    if alignment == 1 or _begins_at_multiples(x, alignment):
        return x
    # A copy also of a contiguous tensor that begins at an unaligned address.
    return x.clone(memory_format=torch.contiguous_format)


def _begins_at_multiples(x: Tensor, alignment: int) -> bool:
    *strides, unit = x.stride()
    least = alignment // x.element_size()
    return unit == 1 and x.data_ptr() % alignment == 0 and math.gcd(least, *strides) == least


def _aligned(D: int, *tensors: Tensor) -> bool:
    """Whether rows of D elements are contiguous and begin and end at multiples of 16 bytes."""
    if D * tensors[0].element_size() % 16:
        return False
    return all(_begins_at_multiples(x, 16) for x in tensors if x.numel())


def _plan(problem: Problem, backward: bool, gpu: GPU) -> Plan:
    plan = registry.best_plan(_planned(problem, problem.B), gpu, backward)
    if isinstance(plan, str):
        # Only if the backend was chosen in another context than the call runs in.
        raise RuntimeError(
            f"backend 'cuda_fused' cannot do this call in the context that is current: {plan}"
        )
    return plan


def _planned(problem: Problem, B: int) -> Problem:
    """A problem without the fields that no plan depends on, as a key of caches of plans."""
    problem = problem._replace(
        B=B, T=1, gradient_recurrent_clipval=None, forward_clipval=None, step=None
    )
    if problem.returned is None:
        return problem
    # Whether heads run backwards, and what is returned, is in the kernel's options.
    return problem._replace(reverse=problem.reverse is not False, returned=0, longest=None)


def _gpu(problem: Problem) -> GPU:
    """The GPU, or the part of it that the current context has."""
    if registry.is_small(problem.D):
        return _whole_gpu(problem.device)
    # CTAs that wait for each other must run at once in the context of the launch.
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
    """The part of a device that the current stream's context has; `_` is the context's number."""
    index, gpu = _index(device), _whole_gpu(device)
    stream = context.current_stream(index)
    clusters: tuple[int, ...] = ()
    if torch.cuda.get_device_capability(device)[0] in (9, 10):
        clusters = launch.clusters_at_once(index, stream, gpu.shared_memory)
    count = context.multiprocessors(stream, index)
    return gpu._replace(multiprocessors=count, clusters=clusters)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


# A kernel that leaves these caches is unloaded, unless a CUDA graph of the user's may launch it.


@lru_cache(maxsize=512)
def _scan_kernel(
    cell: TracedCell,
    precision: str,
    plan: Plan,
    options: source.Options,
    aligned: bool,
    device: torch.device,
) -> _Kernel:
    shape = launch.Shape(
        grid=0,
        threads=plan.threads,
        shared_memory=plan.shared_memory,
        cooperative=plan.COOPERATIVE,
        cluster_size=plan.cluster_size,
    )
    return _kernel(plan.entry, plan.source(cell, precision, options, aligned), shape, device)


@lru_cache(maxsize=256)
def _gradient_kernel(
    cell: TracedCell,
    precision: str,
    plan: single_cta.GradientPlan,
    aligned: bool,
    gathered: bool,
    device: torch.device,
) -> _Kernel:
    shape = launch.Shape(grid=0, threads=plan.THREADS, shared_memory=plan.shared_memory)
    return _kernel(plan.ENTRY, plan.source(cell, precision, aligned, gathered), shape, device)


def _kernel(
    entry: str, parts: dict[str, str], shape: launch.Shape, device: torch.device
) -> _Kernel:
    cubin = nvrtc.compile_program(parts, launch.architecture(device))
    return _Kernel(launch.Program(cubin, (entry,), _index(device), shape.shared_memory), shape)
