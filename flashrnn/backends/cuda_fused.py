"""Backend ``cuda_fused``: one persistent kernel forward and one backward, R kept on chip.

The kernel is that of the plan with the fewest estimated cycles (:mod:`flashrnn.kernels.registry`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashrnn.backends import autograd
from flashrnn.backends.gradients import Gradients, complete, recurrent_gradient, select
from flashrnn.backends.requirements import refusal, too_large, unavailable_cuda
from flashrnn.cells.traced import TracedCell, clipped
from flashrnn.jit import context, launch, nvrtc
from flashrnn.kernels import call, registry, single_cta, source
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.plan import Plan, Scratch
from flashrnn.problem import Problem


def unavailable(device: torch.device) -> str | None:
    """Why its kernels do not run on a device."""
    return unavailable_cuda(device)


def unsupported(problem: Problem) -> str | None:
    """Why it cannot do this problem."""
    return _refused(problem, _gpu(problem))


@lru_cache(maxsize=1024)
def _refused(problem: Problem, gpu: GPU) -> str | None:
    # Whether there is a plan does not depend on B.
    return refusal(problem) or too_large(problem) or _without_plan(_planned(problem, B=1), gpu)


@lru_cache(maxsize=1024)
def _without_plan(problem: Problem, gpu: GPU) -> str | None:
    directions = (False, True) if problem.needs_gradient else (False,)
    plans = [registry.best_plan(problem, gpu, backward) for backward in directions]
    return next((plan for plan in plans if isinstance(plan, str)), None)


def forward(
    problem: Problem, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :class:`flashrnn.backends.autograd.FusedBackend`."""
    every_state, last_states, gates = autograd.new_outputs(problem, Wx)
    if problem.B == 0 or problem.T == 0:
        return every_state, states.clone(memory_format=torch.contiguous_format), gates
    tensors = {
        "Wx": Wx,
        "R": R.contiguous(),
        "b": b.contiguous(),
        "initial": states,
        "states": every_state,
        "last_states": last_states,
    }
    if gates is not None:
        tensors["gates"] = gates
    options = source.forward_options(problem.needs_gradient)
    _scan(problem, _gpu(problem), False, tensors, options)
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
    gpu = _gpu(problem)
    _scan(problem, gpu, True, tensors, options)
    h_initial, h = states_initial[0], states[0]
    if registry.is_small(D):
        d_R = _recurrent_gradient(problem, gpu, d_gates, h_initial, h)
    else:
        d_R = recurrent_gradient(cell, d_gates, h_initial, h)
    d_b = select(d_bias.sum(0), 0, cell.fed_by("b")).to(R.dtype)
    return Gradients(d_gates, d_initial, d_R, d_b)


def _scan(
    problem: Problem,
    gpu: GPU,
    backward: bool,
    tensors: dict[str, Tensor],
    options: source.Options,
) -> None:
    """Launch a direction's kernel.

    Args:
        problem: what is computed.
        gpu: the GPU, or the part of it, that it is computed on.
        backward: the direction.
        tensors: those of the direction's record, but for scratch memory.
        options: constants out of :mod:`flashrnn.kernels.source`.
    """
    record = call.BACKWARD if backward else call.FORWARD
    precision = source.precision_of(problem.dtype)
    addresses, layout = record.read(tensors)
    prepared = _prepared_scan(problem, gpu, backward, precision, options, layout)
    if prepared.copied:
        for name in prepared.copied:
            # A copy also of a contiguous tensor that begins at an unaligned address.
            tensors[name] = tensors[name].clone(memory_format=torch.contiguous_format)
        addresses, layout = record.read(tensors)
        prepared = _prepared_scan(problem, gpu, backward, precision, options, layout)
    scratch, R = prepared.scratch, tensors["R"]
    if scratch.packets:
        # Flags count from 1: a zero is no packet's.
        packets = R.new_zeros(scratch.packets, 4, dtype=torch.int32)
        addresses.append(packets.data_ptr())
    if scratch.R_in_memory:
        R_in_memory = R.new_empty(scratch.R_in_memory, 4, dtype=torch.int32)
        addresses.append(R_in_memory.data_ptr())
    prepared.launch(addresses)


def _recurrent_gradient(
    problem: Problem, gpu: GPU, d_gates: Tensor, h_initial: Tensor, h: Tensor
) -> Tensor:
    """:func:`flashrnn.backends.gradients.recurrent_gradient` by a kernel of this package."""
    # Rounded, as the forward scan's product had it.
    h_initial = h_initial.to(h.dtype).contiguous()
    record = call.RECURRENT_GRADIENT
    addresses, layout = record.read({"d_gates": d_gates, "h_initial": h_initial, "h": h})
    precision = source.precision_of(problem.dtype)
    prepared, shape = _prepared_gradient(problem, gpu, precision, layout)
    parts = d_gates.new_empty(shape, dtype=torch.float32)
    prepared.launch([*addresses, parts.data_ptr()])
    return parts.sum(0).to(h.dtype)


class _Prepared(NamedTuple):
    """A launch that lacks only its tensors' addresses.

    Attributes:
        kernel: the kernel.
        shape: the launch's.
        packing: of the record's fields.
        scratch: global memory that it needs for itself.
        copied: the tensors that are to be copied first, since the kernel cannot read their rows.
    """

    kernel: _Kernel
    shape: launch.Shape
    packing: call.Packing
    scratch: Scratch = Scratch(0, 0)
    copied: tuple[str, ...] = ()

    def launch(self, addresses: list[int]) -> None:
        """Enqueue it on PyTorch's current stream."""
        self.kernel.launch(self.shape, self.packing(addresses))


# Whose rows kernels copy in pieces of 16 bytes, where these are so aligned.
_IN_PIECES = ("Wx", "states", "gates", "d_states", "d_gates", "h_initial", "h")


# What a launch depends on is all here, but for addresses, stream and context.
@lru_cache(maxsize=512)
def _prepared_scan(
    problem: Problem,
    gpu: GPU,
    backward: bool,
    precision: str,
    options: source.Options,
    layout: call.Layout,
) -> _Prepared:
    B, T, N = problem.B, problem.T, problem.N
    record = call.BACKWARD if backward else call.FORWARD
    plan = _plan(problem, backward, gpu)
    cell = problem.cell if problem.forward_clipval is None else clipped(problem.cell)
    D, size = problem.D, problem.dtype.itemsize
    aligned = record.rows_begin_at(16, _IN_PIECES, layout, D, size)
    clips = source.clips(problem.gradient_recurrent_clipval, problem.forward_clipval)
    kernel = _scan_kernel(cell, precision, plan, options, aligned, problem.device)
    scratch = plan.scratch(B, N, gpu)
    others = [name for name, size in scratch._asdict().items() if size]
    groups = plan.groups(B, N, gpu)
    return _Prepared(
        kernel,
        kernel.shape._replace(grid=plan.grid(B, N, gpu)),
        record.packing(layout, *others, T=T, B=B, N=N, clips=clips, groups=groups),
        scratch,
        tuple(
            name
            for name in ("Wx", "R")
            if plan.ROW_ALIGNMENT > 1
            and not record.rows_begin_at(plan.ROW_ALIGNMENT, (name,), layout, D, size)
        ),
    )


@lru_cache(maxsize=256)
def _prepared_gradient(
    problem: Problem, gpu: GPU, precision: str, layout: call.Layout
) -> tuple[_Prepared, tuple[int, ...]]:
    """The launch, and the shape of the parts of the sum that it gives."""
    cell, (B, T, N, D) = problem.cell, (problem.B, problem.T, problem.N, problem.D)
    recurrent, record = len(cell.fed_by("R")), call.RECURRENT_GRADIENT
    size = problem.dtype.itemsize
    plan = single_cta.plan_gradient(recurrent, B * T, N, D, size, gpu)
    aligned = record.rows_begin_at(16, _IN_PIECES, layout, D, size)
    kernel = _gradient_kernel(cell, precision, plan.compiled, aligned, problem.device)
    prepared = _Prepared(
        kernel,
        kernel.shape._replace(grid=plan.grid(N)),
        record.packing(layout, "parts", rows_a_part=plan.rows, T=T, B=B, N=N),
    )
    return prepared, (plan.parts, recurrent, N, D, D)


@dataclass(frozen=True)
class _Kernel:
    """A program of one kernel, and the shape of its launches but for their grid."""

    program: launch.Program
    shape: launch.Shape

    def launch(self, shape: launch.Shape, fields: Sequence[int]) -> None:
        """Enqueue a launch on PyTorch's current stream of the program's device."""
        device, (kernel,) = self.program.device, self.program.kernels
        with context.on_device(device):
            if torch.cuda.is_current_stream_capturing():
                self.program.keep_for_graphs()
            stream = context.current_stream(device)
            launch.enqueue([launch.Launch(kernel, shape, fields)], stream, device)


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
    return problem._replace(
        B=B, T=1, gradient_recurrent_clipval=None, forward_clipval=None, step=None
    )


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
    device: torch.device,
) -> _Kernel:
    shape = launch.Shape(grid=0, threads=plan.THREADS, shared_memory=plan.shared_memory)
    return _kernel(plan.ENTRY, plan.source(cell, precision, aligned), shape, device)


def _kernel(
    entry: str, parts: dict[str, str], shape: launch.Shape, device: torch.device
) -> _Kernel:
    cubin = nvrtc.compile_program(parts, launch.architecture(device))
    return _Kernel(launch.Program(cubin, (entry,), _index(device), shape.shared_memory), shape)


KERNELS = (_prepared_scan, _prepared_gradient, _scan_kernel, _gradient_kernel)
"""The caches that hold kernels."""
