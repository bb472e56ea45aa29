"""Scans of many sequences, step by step: PyTorch's library multiplies by R, then a launch computes
the cell.

Backends ``cuda`` and ``cuda_fused`` compute calls so for which that is estimated to be faster than
their own kernels (:mod:`flashrnn.kernels.per_step.cell_plan`). The product goes from the library to
the cell in float32. Its factors are h and the gates' gradients, rounded as they are returned.

Nothing is recorded: a step of so many sequences takes longer than its two launches take the host.
In a CUDA graph of the user's, both are launches like others.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flashrnn.backends import autograd, tables
from flashrnn.backends.gradients import Gradients, complete, number_of
from flashrnn.cells.traced import TracedCell, clipped
from flashrnn.jit import launch
from flashrnn.jit.kernel import Kernel
from flashrnn.jit.kernel import load as _kernel
from flashrnn.kernels import call, source
from flashrnn.kernels.per_step.cell_plan import FEWEST, CellPlan, factors_are_apart
from flashrnn.problem import Problem, as_dtype_has_it, tf32_allowed


def may_be_faster(problem: Problem) -> bool:
    """Whether a call is one for which plans are to be compared: a quick question."""
    return problem.B >= FEWEST and _library_multiplies_as_asked(problem)


def _library_multiplies_as_asked(problem: Problem) -> bool:
    """Whether PyTorch is set to multiply as the call wants it."""
    if problem.dtype == torch.float32:
        return tf32_allowed(problem) == tf32_allowed(problem._replace(allow_tf32=None))
    return problem.dtype != torch.float16 or not _sums_in_float16()


def _sums_in_float16() -> bool:
    return bool(torch.backends.cuda.matmul.allow_fp16_accumulation)


def programs(problem: Problem, plan: CellPlan, precision: str) -> list[dict[str, str]]:
    """The programs of a plan, if rows are aligned."""
    backward = plan.backward
    options = source.options_of(problem, backward, _stored(problem))
    options = (*options, *_further(problem, backward))
    found = [plan.source(_cell(problem), precision, options, True)]
    return [*found, tables.program_of_h(problem)] if backward else found


def forward(
    problem: Problem,
    plan: CellPlan,
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :class:`flashrnn.backends.protocols.FusedBackend`; no size is 0."""
    every_state, last_states, gates = autograd.new_outputs(problem, Wx, _stored(problem))
    B, N, D, recurrent = problem.B, problem.N, problem.D, len(problem.cell.fed_by("R"))
    product = Wx.new_empty(N, B, recurrent * D, dtype=torch.float32)
    tensors = {
        "Wx": Wx,
        "b": b.contiguous(),
        "initial": states,
        "states": every_state,
        "last_states": last_states,
        "product": product,
    }
    if gates is not None:
        tensors["gates"] = gates
    options = source.forward_options(problem.needs_gradient)
    options = (*options, ("STORED", len(every_state)), *_further(problem, False))
    launches = _prepared(problem, plan, options, tensors)
    # h before each step, [N, B, D].
    first = states[0].squeeze(1).transpose(0, 1).to(Wx.dtype)
    before = [first, *every_state[0].permute(1, 2, 0, 3).unbind(0)[:-1]]
    factors = _matrix(R).transpose(1, 2)
    for t, h in enumerate(before):
        multiply(h, factors, product)
        launches.enqueue(t, first=t == 0)
    return autograd.returned_of(problem, every_state), last_states, gates


def backward(
    problem: Problem,
    plan: CellPlan,
    R: Tensor,
    states_initial: Tensor,
    states: Tensor,
    gates: Tensor,
    d_states: Tensor | None,
    d_last_states: Tensor | None,
) -> Gradients:
    """See :class:`flashrnn.backends.protocols.FusedBackend`; no size is 0."""
    (B, T, G, N, D), fed = gates.shape, problem.cell.fed_by("R")
    cut, clipval = problem.gradient_recurrent_cut, problem.gradient_recurrent_clipval
    d_gates = torch.empty_like(gates)
    d_initial = torch.empty_like(states_initial, memory_format=torch.contiguous_format)
    tensors = {
        "initial": states_initial,
        "states": states,
        "gates": gates,
        "d_gates": d_gates,
        "d_initial": d_initial,
    }
    if not cut:
        tensors["product"] = product = R.new_empty(N, B, D, dtype=torch.float32)
    if d_states is not None:
        tensors["d_states"] = d_states
    if d_last_states is not None:
        tensors["d_last"] = d_last_states
    # What each step's product reads of the gates' gradients, [N, B, Gr * D].
    if factors_are_apart(problem):
        tensors["factors"] = factors = gates.new_empty(N, B, len(fed) * D)
        of_steps = (factors,) * T
    else:
        sizes, strides = (T, N, B, len(fed) * D), (G * N * D, D, T * G * N * D, 1)
        of_steps = d_gates.as_strided(sizes, strides, fed[0] * N * D).unbind(0)
    given = number_of(d_states), d_last_states is not None
    options = source.backward_options(cut, clipval is not None, *given)
    launches = _prepared(problem, plan, (*options, *_further(problem, True)), tensors)
    matrix = _matrix(R)
    for t in reversed(range(T)):
        launches.enqueue(t, first=t == T - 1)
        if not cut:
            multiply(of_steps[t], matrix, product)
    if not cut:
        d_h = product.transpose(0, 1)
        if clipval is not None:
            limit = as_dtype_has_it(clipval, torch.float32)
            d_h = d_h.clamp(-limit, limit)
        d_initial[0].squeeze(1).add_(d_h)
    before = tables.h_before(problem, None, states_initial, states)
    return complete(problem, d_gates, d_initial, states_initial, states, before)


def multiply(left: Tensor, right: Tensor, product: Tensor) -> None:
    """The products of two batches of matrices, in float32: ``[N, B, K]`` and ``[N, K, L]``."""
    if left.dtype == torch.float32:
        torch.bmm(left, right, out=product)
    else:
        torch.bmm(left, right, out_dtype=torch.float32, out=product)


def _matrix(R: Tensor) -> Tensor:
    """R as ``[N, Gr * D, D]``, contiguous; a copy if there are several heads."""
    Gr, N, D, _ = R.shape
    matrix = R.transpose(0, 1).reshape(N, Gr * D, D).contiguous()
    # The library is slower where rows begin anywhere.
    return matrix.clone() if matrix.data_ptr() % 16 else matrix


def _stored(problem: Problem) -> int:
    """How many states are stored of every step: h, which the product reads, in any case."""
    return max(1, autograd.stored(problem))


def _further(problem: Problem, backward: bool) -> source.Options:
    """Constants that these kernels alone have."""
    return (("STAGED", factors_are_apart(problem)),) if backward else ()


def _cell(problem: Problem) -> TracedCell:
    return problem.cell if problem.forward_clipval is None else clipped(problem.cell)


class _Launches(NamedTuple):
    """The launches of the steps of a call.

    Attributes:
        kernel: what has to be there for as long as they may come.
        first: the launch of the first step. It does not overlap with what comes before it in the
            stream, which may write what a step loads before its wait.
        later: the launch of any other.
    """

    kernel: Kernel
    first: launch.Kept
    later: launch.Kept

    def enqueue(self, step: int, first: bool) -> None:
        """Launch a step."""
        kept = self.first if first else self.later
        # The last field of the record, ``done``.
        kept.arguments[-1] = step
        kept.enqueue()


def _prepared(
    problem: Problem,
    plan: CellPlan,
    options: source.Options,
    tensors: dict[str, Tensor],
) -> _Launches:
    addresses, layout = plan.record.read(tensors)
    precision = source.precision_of(problem)
    kernel, shape, packing = _looked_up(problem, plan, precision, options, layout)
    fields = packing(addresses)
    first = kernel.kept(shape._replace(overlaps=False), fields)
    return _Launches(kernel, first, kernel.kept(shape, fields))


# Of tensors that are given: the others' rows are aligned.
_GIVEN = ("Wx", "b", "states", "gates", "d_states")


@lru_cache(maxsize=512)
def _looked_up(
    problem: Problem,
    plan: CellPlan,
    precision: str,
    options: source.Options,
    layout: call.Layout,
) -> tuple[Kernel, launch.Shape, call.Packing]:
    B, T, N, D = problem.B, problem.T, problem.N, problem.D
    record, size = plan.record, problem.dtype.itemsize
    aligned = record.rows_begin_at(16, _GIVEN, layout, D, size)
    clips = source.clips(problem.gradient_recurrent_clipval, problem.forward_clipval)
    cell = _cell(problem)
    kernel = _cell_kernel(cell, precision, plan, options, aligned, problem.device)
    packing = record.packing(layout, T=T, B=B, N=N, clips=clips)
    return kernel, kernel.shape._replace(grid=plan.grid(cell, B, N)), packing


@lru_cache(maxsize=256)
def _cell_kernel(
    cell: TracedCell,
    precision: str,
    plan: CellPlan,
    options: source.Options,
    aligned: bool,
    device: torch.device,
) -> Kernel:
    shape = launch.Shape(grid=0, threads=plan.threads, overlaps=True)
    return _kernel(plan.entry, plan.source(cell, precision, options, aligned), shape, device)


KERNELS = (_looked_up, _cell_kernel)
"""The caches that hold kernels."""
