"""Backend ``cuda_fused``: one persistent kernel forward and one backward, R kept on chip.

The kernel is that of the plan with the fewest estimated cycles (:mod:`flashrnn.kernels.registry`).
Where there are so many sequences that a launch for each step is estimated to be faster, a direction
is computed so (:mod:`flashrnn.backends.steps`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flashrnn.backends import Run, Runs, autograd, copies, few_rows, padding, steps, tables
from flashrnn.backends.fused import compiled, plans, repeats, scans
from flashrnn.backends.fused.stepper import Steps
from flashrnn.backends.gradients import Gradients, of_no_steps, recurrent_gradient
from flashrnn.backends.protocols import Factors, Results
from flashrnn.backends.requirements import unavailable_cuda
from flashrnn.kernels import registry, source
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.sizes import tiles_of
from flashrnn.problem import Problem, as_compiled
from flashrnn.sequences import Sequences, zeros_like_starts

# See `protocols.PaddingBackend`.
multiplies, copy, resizing = few_rows.multiplies, copies.enqueue, padding.resizing
repeated, repeated_gradients = repeats.repeated, repeats.repeated_gradients

programs = compiled.programs


def unavailable(device: torch.device) -> str | None:
    """Why its kernels do not run on a device."""
    return unavailable_cuda(device)


def unsupported(problem: Problem) -> str | None:
    """Why it cannot do this problem."""
    return plans.refused(problem, plans.gpu_of(problem))


def padded_units(problem: Problem, features: int) -> int:
    """See :class:`flashrnn.backends.protocols.PaddingBackend`."""
    if registry.is_small(problem.D):
        return problem.D
    return _padded_units(problem, features, source.precision_of(problem), plans.gpu_of(problem))


@lru_cache(maxsize=1024)
def _padded_units(problem: Problem, features: int, precision: str, gpu: GPU) -> int:
    steps = most_steps = problem.steps
    if problem.packed and problem.longest is None:
        # Lengths that only the GPU knows: assume the mean.
        steps = tiles_of(problem.T, max(1, problem.B))
    # A clip contains an infinite gradient, and 0 times that would be NaN before it is clipped.
    clips = problem.gradient_recurrent_clipval is not None
    if clips or padding.too_large(problem, features):
        return problem.D
    planned = plans.planned(problem, problem.B)
    return registry.padded_units(planned, steps, most_steps, precision, gpu, features)


def most_units(problem: Problem) -> int:
    """With how many units heads may be computed, whatever the steps and a layer's features are."""
    if problem.gradient_recurrent_clipval is not None:
        return problem.D
    return registry.wide_units(problem, steps=2)


def forward(
    problem: Problem,
    Wx: Tensor | None,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    sequences: Sequences | None = None,
    factors: Factors | None = None,
    results: Results | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :class:`flashrnn.backends.protocols.MultiplyingBackend`.

    ``factors``, for which ``multiplies`` holds, are given in the place of ``Wx``.
    """
    gpu = plans.gpu_of(problem)
    features = 0 if factors is None else factors.x.shape[2]
    ahead = problem.needs_gradient and few_rows.gives_R(problem, features)
    if problem.T and (plan := plans.steps_of(problem, gpu, backward=False)):
        if factors is not None:
            Wx, R = few_rows.multiply(problem, factors), R.view(-1, problem.N, problem.D, problem.D)
        assert Wx is not None
        if problem.needs_gradient:
            compiled.begin_backward(as_compiled(problem), gpu, source.precision_of(problem), ahead)
        return steps.forward(problem, plan, Wx, R, b, states)
    tensors, product = {}, None
    if factors is not None:
        Wx, product = few_rows.begun(problem, factors.x)
        tensors = few_rows.operands(factors)
    assert Wx is not None
    every_state, last_states, gates = autograd.new_outputs(problem, Wx)
    if problem.B == 0 or problem.T == 0:
        last_states = states.clone(memory_format=torch.contiguous_format)
        return autograd.returned_of(problem, every_state), last_states, gates
    tensors |= {
        "Wx": Wx,
        "R": R.contiguous(),
        "b": b.contiguous(),
        "initial": states,
        "states": every_state,
        "last_states": last_states,
    }
    if gates is not None:
        tensors["gates"] = gates
    if results is not None:
        tensors |= copies.operands(results)
    options = source.forward_options(problem.needs_gradient)
    if sequences is not None:
        idle = _idle(problem, every_state, problem.N * problem.D)
        problem = _as_planned(problem, sequences)
        tensors |= tables.made(problem, sequences, idle=idle).of_scan
    if problem.returned is not None:
        options += source.options_of_storing(problem, every_state.shape[0])
    scans.enqueue(problem, gpu, False, tensors, options, product, ahead=ahead)
    return autograd.returned_of(problem, every_state), last_states, gates


def stepper(problem: Problem, R: Tensor, b: Tensor) -> Runs:
    """Steps one at a time; see :mod:`flashrnn.backends`."""
    R = R.contiguous()
    if R.data_ptr() % 16:
        R = R.clone()
    b = b.contiguous()
    scans = autograd.by_scans(forward, problem, R, b)

    def of_batch(B: int) -> Run:
        batch = problem._replace(B=B)
        by_steps = plans.steps_of(batch, plans.gpu_of(batch), backward=False)
        return scans(B) if by_steps else Steps(batch, R, b)

    return of_batch


def results(problem: Problem, like: Tensor, by_time: bool) -> Results:
    """See :class:`flashrnn.backends.protocols.MultiplyingBackend`."""
    # The first question spares the second what it asks of the GPU.
    if steps.may_be_faster(problem) and plans.steps_of(
        problem, plans.gpu_of(problem), backward=False
    ):
        return Results()
    return copies.results(problem, like, by_time)


def _idle(problem: Problem, tensor: Tensor, width: int) -> tables.Idle | None:
    """What tables set to 0 in rows of no sequence. Scans do that for the rows of [B, T]."""
    return tables.Idle(tensor, width) if problem.packed and problem.has_idle_rows else None


def _as_planned(problem: Problem, sequences: Sequences) -> Problem:
    """The problem with what kernels are compiled for of the options' tensors, and no length."""
    return problem._replace(longest=None, starts=sequences.reset_states is not None)


def backward(
    problem: Problem,
    R: Tensor,
    states_initial: Tensor,
    states: Tensor,
    gates: Tensor,
    d_states: Tensor | None,
    d_last_states: Tensor | None,
    sequences: Sequences | None = None,
    factors: Factors | None = None,
) -> Gradients:
    """See :class:`flashrnn.backends.protocols.FusedBackend`.

    The gradients of ``factors``, for which ``multiplies`` holds, are among those that it gives,
    unless it computes step by step.
    """
    cell, (B, T, N, D) = problem.cell, (problem.B, problem.T, problem.N, problem.D)
    gpu = plans.gpu_of(problem)
    if T and (plan := plans.steps_of(problem, gpu, backward=True)):
        residuals = states_initial, states, gates
        return steps.backward(problem, plan, R, *residuals, d_states, d_last_states)
    if B == 0 or T == 0:
        found = of_no_steps(problem, torch.empty_like(gates), d_last_states, states_initial)
        return found._replace(reset_states=zeros_like_starts(sequences))
    tensors = {"R": R.contiguous(), "initial": states_initial, "states": states, "gates": gates}
    if d_states is not None:
        tensors["d_states"] = d_states
    if d_last_states is not None:
        tensors["d_last"] = d_last_states
    options = scans.backward_options(problem, tensors)
    asked = few_rows.asked(problem, factors)
    new = scans.new_gradients(problem, states_initial, gates, asked, factors)
    tensors |= new
    d_resets, of_options = None, tables.Tables({})
    if sequences is not None:
        idle = _idle(problem, new["d_gates"], len(cell.gates) * N * D)
        problem = _as_planned(problem, sequences)
        looked_up = not registry.is_small(D) or dict(source.gradient_options(problem))["GATHERED"]
        of_options = tables.made(problem, sequences, states_initial if looked_up else None, idle)
        tensors |= of_options.of_scan
        options = (*options, *source.sequence_options(problem))
        d_resets = zeros_like_starts(sequences)
        if d_resets is not None:
            tensors["d_reset_states"] = d_resets.expand(-1, B, T, -1, -1)
    if of_options.before is not None:
        tensors |= {"before_rows": of_options.before.rows, "h_starts": of_options.before.starts}
    if of_options.lengths is not None:
        tensors["lengths"] = of_options.lengths
    if asked is not None and factors is not None and asked.I:
        tensors |= {"x": factors.x, "W": factors.W}
    if scans.reads_contiguous_start(problem, asked):
        tensors["h_initial"] = states_initial[0].contiguous()
    scans.enqueue(problem, gpu, True, tensors, options, asked=asked)
    d_R = new.get("d_R")
    if d_R is None:
        d_R = recurrent_gradient(cell, new["d_gates"], new["before"])
    of_call = new["d_gates"], new["d_initial"], d_R, new["d_b"], d_resets
    return Gradients(*of_call, new.get("d_x"), new.get("d_W"))


KERNELS = (
    *scans.KERNELS,
    *few_rows.KERNELS,
    *copies.KERNELS,
    *padding.KERNELS,
)
"""The caches that hold kernels."""
