"""Backend ``cuda_fused``: one persistent kernel forward and one backward, R kept on chip.

The kernel is that of the plan with the fewest estimated cycles (:mod:`flashrnn.kernels.registry`).
Where there are so many sequences that a launch for each step is estimated to be faster, a direction
is computed so (:mod:`flashrnn.backends.steps`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache, partial
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from flashrnn.backends import Run, Runs, autograd, copies, few_rows, padding, steps, tables
from flashrnn.backends.autograd import Factors, Results
from flashrnn.backends.gradients import (
    Gradients,
    number_of,
    of_no_steps,
    recurrent_gradient,
    select,
)
from flashrnn.backends.launches import LaunchTemplate
from flashrnn.backends.library import factors_gradients, input_product
from flashrnn.backends.repeated import New, Repeated, scratch_memory
from flashrnn.backends.requirements import (
    refusal,
    too_large,
    too_many_numbered_rows,
    unavailable_cuda,
)
from flashrnn.cells.traced import TracedCell, clipped
from flashrnn.jit import context, launch
from flashrnn.jit.background import compile_soon
from flashrnn.jit.kernel import Kernel, index_of, launch_in_turn
from flashrnn.jit.kernel import load as _kernel
from flashrnn.kernels import call, gradient_sums, registry, single_cta, source
from flashrnn.kernels.gpu import GPU, whole
from flashrnn.kernels.per_step.cell_plan import CellPlan
from flashrnn.kernels.plan import Plan
from flashrnn.kernels.sizes import tiles_of
from flashrnn.problem import (
    Problem,
    as_compiled,
    matmul_tf32_allowed,
    tf32_allowed,
    without_autocast,
)
from flashrnn.sequences import Sequences, zeros_like_starts

# See `autograd.PaddingBackend`.
multiplies, copy, resize = few_rows.multiplies, copies.enqueue, padding.resized


def unavailable(device: torch.device) -> str | None:
    """Why its kernels do not run on a device."""
    return unavailable_cuda(device)


def padded_units(problem: Problem, features: int) -> int:
    """See :class:`flashrnn.backends.autograd.PaddingBackend`."""
    if registry.is_small(problem.D):
        return problem.D
    return _padded_units(problem, features, source.precision_of(problem), _gpu(problem))


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
    planned = _planned(problem, problem.B)
    return registry.padded_units(planned, steps, most_steps, precision, gpu, features)


def most_units(problem: Problem) -> int:
    """With how many units heads may be computed, whatever the steps and a layer's features are."""
    if problem.gradient_recurrent_clipval is not None:
        return problem.D
    return registry.wide_units(problem, steps=2)


def unsupported(problem: Problem) -> str | None:
    """Why it cannot do this problem."""
    return _refused(problem, _gpu(problem))


@lru_cache(maxsize=1024)
def _refused(problem: Problem, gpu: GPU) -> str | None:
    # Whether there is a plan does not depend on B.
    return (
        refusal(problem)
        or too_many_numbered_rows(problem)
        or too_large(problem)
        # PyTorch's setting of TF32 may change.
        or _without_plan(_planned(problem, B=1)._replace(allow_tf32=False), gpu)
    )


@lru_cache(maxsize=1024)
def _without_plan(problem: Problem, gpu: GPU) -> str | None:
    directions = (False, True) if problem.needs_gradient else (False,)
    plans = [registry.best_plan(problem, gpu, backward) for backward in directions]
    return next((plan for plan in plans if isinstance(plan, str)), None)


def programs(
    problem: Problem,
    gpu: GPU | None,
    precision: str,
    backward: bool,
    of_few_rows: bool | None = None,
) -> list[dict[str, str]]:
    """The programs that a direction of a problem runs, if rows are as aligned as D allows.

    Args:
        problem: what is computed; T does not matter.
        gpu: for which GPU; ``None``: the problem's device.
        precision: out of ``source.PRECISIONS``.
        backward: the direction.
        of_few_rows: whether R's gradient is computed as for few rows; ``None``: T and whether the
            call is a layer's are not known, so all programs that may run are wanted.

    Raises:
        ValueError: it cannot do this problem; says why.
    """
    gpu = gpu or _gpu(problem)
    if reason := _refused(problem, gpu):
        raise ValueError(f"backend 'cuda_fused' cannot do this call: {reason}")
    problem = problem._replace(allow_tf32=precision == "tf32")
    D, plan = problem.D, _plan(problem, backward, gpu)
    piece_bytes = max(problem.dtype.itemsize, gcd(16, D * problem.dtype.itemsize))
    of_layers = []
    if of_few_rows is None and not backward:
        # The input product, and what brings torch.nn's weights into a call's form.
        of_layers.append(few_rows.program(problem, precision, piece_bytes, gpu, backward))
        of_layers.append(copies.program(problem.dtype))
    if by_steps := _planned_steps(problem, precision, gpu, backward):
        return [*steps.programs(problem, by_steps, precision), *of_layers]
    cell = problem.cell if problem.forward_clipval is None else clipped(problem.cell)
    options = source.options_of(problem, backward, autograd.stored(problem))
    plans = [plan]
    if _may_be_one_step(problem, backward):
        plans.append(plan.of_one_step(problem.B, problem.N))
    found = tables.programs(problem, backward)
    # Where no other plan is better for one step, both are the same.
    found += [each.source(cell, precision, options, piece_bytes) for each in dict.fromkeys(plans)]
    found += of_layers
    if backward and of_few_rows is not False:
        beside = precision if of_few_rows is None else few_rows.precision_beside(precision)
        found.append(few_rows.program(problem, beside, piece_bytes, gpu, backward))
        if of_few_rows:
            return found
    if backward and registry.is_small(D):
        recurrent = len(problem.cell.fed_by("R"))
        tiles = single_cta.plan_gradient(
            recurrent, problem.B, problem.N, D, problem.dtype.itemsize, gpu
        )
        options = source.gradient_options(problem)
        found.append(tiles.compiled.source(problem.cell, precision, piece_bytes, options))
    if backward:
        found.append(gradient_sums.program(problem.cell, precision))
        if not registry.is_small(D):
            found.append(tables.program_of_h(problem))
    return found


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
    """See :class:`flashrnn.backends.autograd.MultiplyingBackend`.

    ``factors``, for which ``multiplies`` holds, are given in the place of ``Wx``.
    """
    gpu = _gpu(problem)
    features = 0 if factors is None else factors.x.shape[2]
    ahead = problem.needs_gradient and few_rows.gives_R(problem, features)
    if problem.T and (plan := _steps(problem, gpu, backward=False)):
        if factors is not None:
            Wx, R = few_rows.multiply(problem, factors), R.view(-1, problem.N, problem.D, problem.D)
        assert Wx is not None
        if problem.needs_gradient:
            _begin_backward(as_compiled(problem), gpu, source.precision_of(problem), ahead)
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
    _launch(problem, gpu, False, tensors, options, product, ahead=ahead)
    return autograd.returned_of(problem, every_state), last_states, gates


def repeated(
    problem: Problem, given: dict[str, Tensor], by_time: bool | None = None
) -> Repeated | None:
    """See :class:`flashrnn.backends.autograd.RepeatingBackend`."""
    if not _is_by_scan(problem, backward=False):
        return None
    tensors, product, begin, Wx = dict(given), None, None, given.get("Wx")
    if Wx is None and multiplies(problem, given["x"], given["W"]):
        Wx, product = few_rows.begun(problem, given["x"])
    elif Wx is None:
        begin = partial(_multiplied, problem, (*given,))
        tensors = dict(zip(_names_multiplied((*given,)), begin([*given.values()]), strict=True))
        Wx = tensors["Wx"]
    every_state, last_states, gates = autograd.new_outputs(problem, Wx)
    new = {"states": every_state, "last_states": last_states}
    if gates is not None:
        new["gates"] = gates
    if product is not None:
        new["Wx"] = Wx
    if by_time is not None:
        new |= copies.operands(copies.results(problem, Wx, by_time))
    tensors |= new
    read_as_they_lie = [tensors[name] for name in ("R", "b", "bias") if name in tensors]
    if not all(tensor.is_contiguous() for tensor in read_as_they_lie):
        return None
    options = source.forward_options(problem.needs_gradient)
    if problem.returned is not None:
        options += source.options_of_storing(problem, every_state.shape[0])
    features = given["x"].shape[2] if product else 0
    ahead = problem.needs_gradient and few_rows.gives_R(problem, features)
    found = _repeated(problem, False, tensors, new, options, product, ahead=ahead)
    return None if found is None else found._replace(begin=begin)


_FACTORS = "x", "W", "bias"


def _names_multiplied(names: tuple[str, ...]) -> tuple[str, ...]:
    """Of the tensors that :func:`_multiplied` gives."""
    return "Wx", *(name for name in names if name not in _FACTORS)


def _multiplied(
    problem: Problem, names: tuple[str, ...], given: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Of a layer's tensors, in the order of their names, ``Wx`` by the library, and the others."""
    tensors = dict(zip(names, given, strict=True))
    x, W, bias = (tensors.pop(name, None) for name in _FACTORS)
    assert x is not None and W is not None
    with without_autocast(problem.device.type):
        Wx = input_product(problem, x, W.flatten(0, -2), None if bias is None else bias.view(-1))
    return [Wx, *tensors.values()]


def _is_by_scan(problem: Problem, backward: bool) -> bool:
    """Whether there is something to compute, and a persistent kernel computes it."""
    if not (problem.B and problem.T):
        return False
    return registry.is_small(problem.D) or not _steps(problem, _gpu(problem), backward)


def repeated_gradients(
    problem: Problem, given: dict[str, Tensor], needs_x: bool, needs_W: bool
) -> Repeated | None:
    """See :class:`flashrnn.backends.autograd.RepeatingBackend`."""
    if not _is_by_scan(problem, backward=True):
        return None
    factors = Factors(given["x"], given["W"], needs_x, needs_W) if "x" in given else None
    if factors is not None and not multiplies(problem, factors.x, factors.W):
        factors = None
    asked = few_rows.asked(problem, factors)
    new = _new_gradients(problem, given["initial"], given["gates"], asked, factors)
    contiguous = given["R"], given["states"], given["gates"]
    if not all(x.is_contiguous() for x in contiguous):
        return None
    by_library = "x" in given and not (asked is not None and asked.I)
    tensors = {n: x for n, x in given.items() if not (by_library and n in _FACTORS)}
    names, begin, finish = (*given,), None, None
    copies_start = _reads_contiguous_start(problem, asked)
    if by_library or copies_start:
        places = tuple(map(names.index, tensors))
        start = names.index("initial") if copies_start else None
        begin = partial(_of_launches, places, start)
        if copies_start:
            tensors["h_initial"] = given["initial"][0].contiguous()
    options = _backward_options(problem, given)
    found = _repeated(problem, True, tensors | new, new, options, asked=asked)
    if found is None:
        return None
    if by_library or "before" in new:
        finish = partial(_finished, problem, names, needs_x, needs_W, by_library)
    return found._replace(begin=begin, finish=finish)


def _reads_contiguous_start(problem: Problem, asked: few_rows.Asked | None) -> bool:
    """Whether R's gradient of small heads is computed of float32, and by a kernel of its own."""
    by_kernel = registry.is_small(problem.D) and not (asked is not None and asked.of_R)
    return by_kernel and problem.dtype == torch.float32


def _of_launches(
    places: tuple[int, ...], start: int | None, given: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The tensors at some places, and the first of the initial states, contiguous, if it is told
    where those are."""
    found = [given[place] for place in places]
    return found if start is None else [*found, given[start][0].contiguous()]


def _finished(
    problem: Problem,
    names: tuple[str, ...],
    needs_x: bool,
    needs_W: bool,
    by_library: bool,
    given: Sequence[Tensor],
    made: dict[str, Tensor],
) -> None:
    """The gradients that are products of the library's, beside those that launches have written."""
    cell, d_gates, before = problem.cell, made["d_gates"], made.pop("before", None)
    if before is not None:
        made["d_R"] = recurrent_gradient(cell, d_gates, before)
    if not by_library:
        return
    x, W = (given[names.index(name)] for name in ("x", "W"))
    d_Wx = select(d_gates, 2, cell.fed_by("Wx"))
    d_x, d_W = factors_gradients(d_Wx, x, W.flatten(0, -2), needs_x, needs_W)
    if d_x is not None:
        made["d_x"] = d_x
    if d_W is not None:
        made["d_W"] = d_W.view(W.shape)


def _repeated(
    problem: Problem,
    backward: bool,
    tensors: dict[str, Tensor],
    new: dict[str, Tensor],
    options: source.Options,
    product: few_rows.Product | None = None,
    asked: few_rows.Asked | None = None,
    ahead: bool = False,
) -> Repeated | None:
    """What is kept of a direction; ``None`` if it copies tensors first."""
    gpu, is_small = _gpu(problem), registry.is_small(problem.D)
    settings, many = _settings(problem), steps.may_be_faster(problem)
    _, layout = _record(problem, backward).read(tensors)
    # Tensors that begin elsewhere take another way.
    layout = layout._replace(offsets=())
    precision = source.precision_of(problem)
    prepared = _prepared(problem, gpu, backward, precision, options, layout, product, asked, ahead)
    if prepared.copied:
        return None

    def is_current() -> bool:
        if not is_small and (_gpu(problem) != gpu or steps.may_be_faster(problem) != many):
            return False
        return _settings(problem) == settings

    rests_on_nothing = is_small and settings is None
    allocated = []
    for name, x in new.items():
        is_plain = x.stride() == torch.empty(x.shape, device="meta").stride()
        allocated.append((name, New(x.shape, None if is_plain else x.stride(), x.dtype)))
    launches, scratch = prepared.launches, prepared.scratch
    return Repeated(tuple(allocated), launches, scratch, None if rests_on_nothing else is_current)


def _settings(problem: Problem) -> tuple[str, bool] | None:
    """What products of float32 depend on."""
    if problem.dtype != torch.float32:
        return None
    return source.precision_of(problem), matmul_tf32_allowed()


def results(problem: Problem, like: Tensor, by_time: bool) -> Results:
    """See :class:`flashrnn.backends.autograd.MultiplyingBackend`."""
    # The first question spares the second what it asks of the GPU.
    if steps.may_be_faster(problem) and _steps(problem, _gpu(problem), backward=False):
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
    """See :class:`flashrnn.backends.autograd.FusedBackend`.

    The gradients of ``factors``, for which ``multiplies`` holds, are among those that it gives,
    unless it computes step by step.
    """
    cell, (B, T, N, D) = problem.cell, (problem.B, problem.T, problem.N, problem.D)
    gpu = _gpu(problem)
    if T and (plan := _steps(problem, gpu, backward=True)):
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
    options = _backward_options(problem, tensors)
    asked = few_rows.asked(problem, factors)
    new = _new_gradients(problem, states_initial, gates, asked, factors)
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
    if _reads_contiguous_start(problem, asked):
        tensors["h_initial"] = states_initial[0].contiguous()
    _launch(problem, gpu, True, tensors, options, asked=asked)
    d_R = new.get("d_R")
    if d_R is None:
        d_R = recurrent_gradient(cell, new["d_gates"], new["before"])
    of_call = new["d_gates"], new["d_initial"], d_R, new["d_b"], d_resets
    return Gradients(*of_call, new.get("d_x"), new.get("d_W"))


def _backward_options(problem: Problem, given: dict[str, Tensor]) -> source.Options:
    """The usual constants of a backward scan."""
    clips, d_states = problem.gradient_recurrent_clipval is not None, given.get("d_states")
    upstream = number_of(d_states), "d_last" in given
    return source.backward_options(problem.gradient_recurrent_cut, clips, *upstream)


def _new_gradients(
    problem: Problem,
    states_initial: Tensor,
    gates: Tensor,
    asked: few_rows.Asked | None,
    factors: Factors | None,
) -> dict[str, Tensor]:
    """Memory for the gradients that launches give, by the operands' names."""
    cell, (N, D) = problem.cell, (problem.N, problem.D)
    found = {
        "d_gates": torch.empty_like(gates),
        "d_initial": torch.empty_like(states_initial, memory_format=torch.contiguous_format),
        "d_bias": states_initial.new_empty(problem.B, len(cell.gates), N, D),
    }
    if asked is not None and factors is not None:
        if asked.of_x:
            found["d_x"] = torch.empty_like(factors.x, memory_format=torch.contiguous_format)
        if asked.of_W:
            found["d_W"] = torch.empty_like(factors.W)
    if registry.is_small(D) or (asked is not None and asked.of_R):
        found["d_R"] = gates.new_empty(len(cell.fed_by("R")), N, D, D)
    else:
        found["before"] = tables.new_h_before(problem, gates)
    found["d_b"] = gates.new_empty(len(cell.fed_by("b")), N, D)
    return found


def _launch(
    problem: Problem,
    gpu: GPU,
    backward: bool,
    tensors: dict[str, Tensor],
    options: source.Options,
    product: few_rows.Product | None = None,
    asked: few_rows.Asked | None = None,
    ahead: bool = False,
) -> None:
    """Launch a direction's kernels.

    Args:
        problem: what is computed.
        gpu: the GPU, or the part of it, that it is computed on.
        backward: the direction.
        tensors: those of the direction's records, but for scratch memory.
        options: constants out of :mod:`flashrnn.kernels.source`.
        product: a layer's input product, if it is over few rows.
        asked: the gradients that are products over few rows.
        ahead: whether backward will compute R's gradient as for few rows.
    """
    record = _record(problem, backward)
    precision = source.precision_of(problem)
    given = problem, gpu, backward, precision, options
    addresses, layout = record.read(tensors)
    prepared = _prepared(*given, layout, product, asked, ahead)
    if prepared.copied:
        for name in prepared.copied:
            # A copy also of a contiguous tensor that begins at an unaligned address.
            tensors[name] = tensors[name].clone(memory_format=torch.contiguous_format)
        addresses, layout = record.read(tensors)
        prepared = _prepared(*given, layout, product, asked, ahead)
    zeros = None
    if any(prepared.scratch):
        # Held until all is enqueued.
        _held, of_scratch, zeros = scratch_memory(prepared.scratch, tensors["R"])
        addresses += of_scratch
    launches = [(kernel, shape, pack(addresses)) for kernel, shape, pack in prepared.launches]
    launch_in_turn(launches, zeros)


def _may_be_one_step(problem: Problem, backward: bool) -> bool:
    """Whether a call of it with T = 1 takes the plan of one step.

    Training and options of sequences take that of all T, which spares them a further program.
    """
    return not (backward or problem.needs_gradient or problem.is_sequenced)


def _record(problem: Problem, backward: bool) -> call.Record:
    record = call.BACKWARD if backward else call.FORWARD
    return record.complete if problem.is_sequenced else record


def stepper(problem: Problem, R: Tensor, b: Tensor) -> Runs:
    """Steps one at a time; see :mod:`flashrnn.backends`."""
    R = R.contiguous()
    if R.data_ptr() % 16:
        R = R.clone()
    b = b.contiguous()
    scans = autograd.by_scans(forward, problem, R, b)

    def of_batch(B: int) -> Run:
        batch = problem._replace(B=B)
        by_steps = _steps(batch, _gpu(batch), backward=False)
        return scans(B) if by_steps else _Steps(batch, R, b)

    return of_batch


class _Steps:
    """Launches of the scan's kernel for T = 1 and tensors of one layout, each prepared once.

    The new states may take the place of those before the step: in every kernel of many steps the
    thread that writes an element of the last states is the only one that has read it for a result,
    and other threads get h of it only from this thread. A kernel of one step need not be so: it is
    taken for other memory alone.
    """

    def __init__(self, problem: Problem, R: Tensor, b: Tensor) -> None:
        self._problem, self._R, self._b = problem, R, b
        self._is_float32 = problem.dtype == torch.float32
        self._precision = source.precision_of(problem)
        self._prepared: dict[tuple[object, ...], _Step] = {}
        self._lock = threading.Lock()

    def __call__(self, wx: Tensor, states: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            out = states.new_empty(states.shape)
        elif out.data_ptr() % 16:
            # Kernels may write several states at once. What PyTorch allocates begins so.
            return out.copy_(self(wx, states, None))
        else:
            # So that autograd knows that its values change, as if an operation of PyTorch wrote it.
            torch.autograd.graph.increment_version(out)
        if not self._problem.B:
            return out
        # Of float32, as PyTorch is set at this time.
        precision = source.precision_of(self._problem) if self._is_float32 else self._precision
        where = _where(self._problem)
        in_place = out.data_ptr() == states.data_ptr()
        if where is None:
            # The scratch memory of a launch in a graph is the graph's.
            found = self._prepare(precision, wx, states, out, in_place)
        else:
            # Launches on two streams may overlap, so each stream has scratch memory of its own.
            key = wx.data_ptr() % 16, precision, where, in_place
            found = self._prepared.get(key) or self._remember(
                key, self._prepare(precision, wx, states, out, in_place)
            )
        if found.copies_wx:
            wx = wx.clone(memory_format=torch.contiguous_format)
        with self._lock:
            found.launch(wx, states, out)
        return out

    def _remember(self, key: tuple[object, ...], prepared: _Step) -> _Step:
        with self._lock:
            while len(self._prepared) >= _MOST_STEPS:
                # Its scratch memory goes back to its stream, behind the launches that use it.
                self._prepared.pop(next(iter(self._prepared)))
            self._prepared[key] = prepared
        return prepared

    def _prepare(
        self, precision: str, wx: Tensor, states: Tensor, out: Tensor, in_place: bool
    ) -> _Step:
        problem = self._problem
        every_state = wx.new_empty(len(states), problem.B, 1, problem.N, problem.D)
        tensors = {
            # What differs from step to step comes first.
            "Wx": wx.unsqueeze(1),
            "initial": states.unsqueeze(2),
            "last_states": out,
            "R": self._R,
            "b": self._b,
            "states": every_state,
        }
        options = source.forward_options(False)
        addresses, layout = call.FORWARD.read(tensors)
        gpu = _gpu(problem)
        given = problem, gpu, False, precision, options, layout
        prepared = _prepared(*given, in_place=in_place)
        if prepared.copied:
            copy = wx.clone(memory_format=torch.contiguous_format)
            return self._prepare(precision, copy, states, out, in_place)._replace(copies_wx=True)
        with torch.inference_mode(False):
            # Later steps write it too, within inference mode or not.
            memory, of_scratch, zeros = scratch_memory(prepared.scratch, wx)
        addresses += of_scratch
        ((kernel, shape, packing),) = prepared.launches
        return _Step(
            kernel.kept(shape, packing(addresses), zeros),
            packing.places(3, len(addresses)),
            (kernel, every_state, *memory),
        )


_MOST_STEPS = 16


class _Step(NamedTuple):
    """A launch that lacks the addresses of a step's tensors.

    Attributes:
        kept: the launch, on the stream that it was prepared for.
        places: which of its arguments are the addresses of wx, states and out.
        held: what must be there for as long as the launch: its kernel, and memory that is its own,
            packets and the states in the problem's dtype.
        copies_wx: whether the kernel needs a copy of wx, whose rows are aligned.
    """

    kept: launch.Kept
    places: tuple[int, ...]
    held: tuple[object, ...]
    copies_wx: bool = False

    def launch(self, wx: Tensor, states: Tensor, out: Tensor) -> None:
        """Enqueue it; one thread at a time."""
        arguments, (of_wx, of_states, of_out) = self.kept.arguments, self.places
        arguments[of_wx] = wx.data_ptr()
        arguments[of_states] = states.data_ptr()
        arguments[of_out] = out.data_ptr()
        self.kept.enqueue()


class _Prepared(NamedTuple):
    """A direction's launches.

    Attributes:
        launches: in order.
        scratch: global memory that they need for themselves.
        copied: the tensors that are to be copied first, since the kernel cannot read their rows.
    """

    launches: tuple[LaunchTemplate, ...]
    scratch: call.Scratch = call.Scratch()
    copied: tuple[str, ...] = ()


# Whose rows scans copy in pieces, and whose R's gradient.
_IN_PIECES = ("Wx", "states", "gates", "d_states", "d_gates")
_IN_PIECES_OF_R = ("d_gates", "h_initial", "h_starts", "h")


# What launches depend on is all here, but for addresses, stream and context.
@lru_cache(maxsize=512)
def _prepared(
    problem: Problem,
    gpu: GPU,
    backward: bool,
    precision: str,
    options: source.Options,
    layout: call.Layout,
    product: few_rows.Product | None = None,
    asked: few_rows.Asked | None = None,
    ahead: bool = False,
    in_place: bool = False,
) -> _Prepared:
    if problem.needs_gradient and not backward:
        _begin_backward(as_compiled(problem), gpu, precision, ahead)
    B, T, N = problem.B, problem.T, problem.N
    record = _record(problem, backward)
    plan = _plan(problem, backward, gpu)
    if T == 1 and not in_place and _may_be_one_step(problem, backward):
        plan = plan.of_one_step(B, N)
    cell = problem.cell if problem.forward_clipval is None else clipped(problem.cell)
    D, size = problem.D, problem.dtype.itemsize
    copied = tuple(
        name
        for name, multiple in _alignments(plan, backward, D * size)
        if multiple > 1 and not record.rows_begin_at(multiple, (name,), layout, D, size)
    )
    in_pieces = [name for name in _IN_PIECES if name not in copied]
    # Kernels of large heads do not ask for it.
    piece_bytes = record.piece_bytes(in_pieces, layout, D, size) if registry.is_small(D) else 16
    clips = source.clips(problem.gradient_recurrent_clipval, problem.forward_clipval)
    kernel = _scan_kernel(cell, precision, plan, options, piece_bytes, problem.device)
    of_R = None
    if backward and registry.is_small(D) and not (asked is not None and asked.of_R):
        of_R = _plan_of_R(problem, gpu)
    scratch = plan.scratch(B, N, gpu)
    if of_R is not None:
        scratch = scratch._replace(parts=_units_of_parts(problem, of_R))
    if asked is not None:
        of_gradients = few_rows.scratch(problem, asked)
        scratch = scratch._replace(counters=of_gradients.counters, sums=of_gradients.sums)
    layout = layout.with_scratch(scratch)
    groups = plan.groups(B, N, gpu)
    packing = record.packing(layout, T=T, B=B, N=N, clips=clips, groups=groups)
    launches = [LaunchTemplate(kernel, kernel.shape._replace(grid=plan.grid(B, N, gpu)), packing)]
    if product is not None:
        launches.insert(0, few_rows.product(problem, product, layout))
    if backward:
        if asked is None or not asked.of_R:
            launches += _after_scan(problem, of_R, precision, layout)
        if "before" in layout.names:
            launches.append(tables.behind_scan(problem, layout))
        if asked is not None:
            launches.append(few_rows.gradients(problem, asked, layout))
    else:
        launches += copies.behind_scan(problem, layout)
    return _Prepared((*launches,), scratch, copied)


def _alignments(plan: Plan, backward: bool, row: int) -> list[tuple[str, int]]:
    """At which multiples rows of so many bytes must begin, of the tensors that are copied else."""
    # Rows of an odd number of 16-bit elements begin anywhere.
    of_rows = gcd(plan.ROW_ALIGNMENT, row)
    # Kernels load R in the largest pieces, up to 16 bytes, of which rows have a whole number.
    of_R = gcd(16, row)
    given = ("states", "gates", "d_states") if backward else ("Wx",)
    return [*((name, of_rows) for name in given), ("R", of_R)]


def _plan_of_R(problem: Problem, gpu: GPU) -> single_cta.GradientPlan:
    """How R's gradient of small heads is computed."""
    recurrent, (B, T) = len(problem.cell.fed_by("R")), problem.rows
    size = problem.dtype.itemsize
    return single_cta.plan_gradient(recurrent, B * T, problem.N, problem.D, size, gpu)


def _units_of_parts(problem: Problem, of_R: single_cta.GradientPlan) -> int:
    """Units of 16 bytes that the parts of R's gradient take, where there are several."""
    if of_R.parts == 1:
        return 0
    elements = len(problem.cell.fed_by("R")) * problem.N * problem.D**2
    return tiles_of(of_R.parts * elements, 4)


def _after_scan(
    problem: Problem, of_R: single_cta.GradientPlan | None, precision: str, layout: call.Layout
) -> list[LaunchTemplate]:
    """The launches that give the gradients of the bias and, of small heads, of R.

    Of few rows that is one. Else R's gradient is in parts, which a second launch sums up.

    Args:
        problem: what is computed.
        of_R: the plan of R's gradient; ``None``: that is computed otherwise.
        precision: how products are computed.
        layout: that of the backward scan's tensors and scratch memory.
    """
    cell, (B, T), (N, D) = problem.cell, problem.rows, (problem.N, problem.D)
    if of_R is None:
        return _sums(problem, precision, 0, layout)
    size, record = problem.dtype.itemsize, call.RECURRENT_GRADIENT
    if problem.is_sequenced:
        record = record.complete
    of_sums, layout = layout, _as_gradient_reads(layout, N, D)
    # Of the initial h, which is float32 also beside 16 bits, single elements are read there.
    in_pieces = [x for x in _IN_PIECES_OF_R if x != "h_initial" or size == 4]
    piece_bytes = record.piece_bytes(in_pieces, layout, D, size)
    options = source.gradient_options(problem)
    kernel = _gradient_kernel(cell, precision, of_R.compiled, piece_bytes, options, problem.device)
    ctas = of_R.grid(N)
    numbers = {"rows_a_part": of_R.rows, "R_ctas": ctas, "T": T, "B": B, "N": N}
    rest = _sums(problem, precision, of_R.parts, of_sums) if of_R.parts > 1 else []
    if not rest:
        columns = len(cell.fed_by("b")) * N * D
        of_bias = gradient_sums.plan_sums(0, 0, problem.B, columns)
        ctas += of_bias.b_ctas
        numbers |= {"b_rows": problem.B, "b_columns": columns, "b_shares": of_bias.b_shares}
    shape = kernel.shape._replace(grid=ctas)
    return [LaunchTemplate(kernel, shape, record.packing(layout, **numbers)), *rest]


def _as_gradient_reads(layout: call.Layout, N: int, D: int) -> call.Layout:
    """The layout of a backward scan's tensors, by the names of R's gradient's record."""
    names = {"states": "h"}
    if "h_initial" in layout.names:
        # Contiguous, [B, 1, N, D].
        strides: tuple[int, ...] = (N * D, N * D, D, 1)
    else:
        names["initial"] = "h_initial"
        strides = layout.strides[0][1:]
    return layout._replace(
        names=tuple(names.get(name, name) for name in layout.names), strides=(strides,)
    )


def _sums(
    problem: Problem, precision: str, parts: int, layout: call.Layout
) -> list[LaunchTemplate]:
    """The launch that sums up the bias's gradient over sequences, and R's over so many parts, if
    there is anything to sum."""
    cell, (B, N, D) = problem.cell, (problem.B, problem.N, problem.D)
    R_columns = len(cell.fed_by("R")) * N * D * D if parts else 0
    b_columns = len(cell.fed_by("b")) * N * D
    plan = gradient_sums.plan_sums(parts, R_columns, B, b_columns)
    if not plan.grid:
        return []
    kernel = _sums_kernel(cell, precision, problem.device)
    packing = call.GRADIENT_SUMS.packing(
        layout._replace(strides=()),
        R_rows=parts,
        R_columns=R_columns,
        R_shares=plan.R_shares,
        R_ctas=plan.R_ctas,
        b_columns=b_columns,
        b_shares=plan.b_shares,
        B=B,
        N=N,
        D=D,
    )
    return [LaunchTemplate(kernel, kernel.shape._replace(grid=plan.grid), packing)]


@lru_cache(maxsize=1024)
def _begin_backward(problem: Problem, gpu: GPU, precision: str, of_few_rows: bool) -> None:
    """Begin to compile what backward will need, while forward is compiled and runs; once."""
    found = programs(problem, gpu, precision, True, of_few_rows)
    compile_soon(found, launch.architecture(problem.device))


def _plan(problem: Problem, backward: bool, gpu: GPU) -> Plan:
    plan = registry.best_plan(_planned(problem, problem.B), gpu, backward)
    if isinstance(plan, str):
        # Only if the backend was chosen in another context than the call runs in.
        raise RuntimeError(
            f"backend 'cuda_fused' cannot do this call in the context that is current: {plan}"
        )
    return plan


def _steps(problem: Problem, gpu: GPU, backward: bool) -> CellPlan | None:
    """The plan of a launch for each step, where that is faster than a persistent kernel."""
    if not steps.may_be_faster(problem):
        return None
    return _planned_steps(problem, source.precision_of(problem), gpu, backward)


def _planned_steps(problem: Problem, precision: str, gpu: GPU, backward: bool) -> CellPlan | None:
    return registry.plan_steps(_planned(problem, problem.B), precision, gpu, backward)


def _planned(problem: Problem, B: int) -> Problem:
    """A problem without the fields that no plan depends on, as a key of caches of plans."""
    problem = problem._replace(
        B=B,
        T=1,
        gradient_recurrent_clipval=None,
        forward_clipval=None,
        allow_tf32=problem.dtype == torch.float32 and tf32_allowed(problem),
        step=None,
    )
    if problem.returned is None:
        return problem
    # Whether heads run backwards, and what is returned, is in the kernel's options.
    return problem._replace(reverse=problem.reverse is not False, returned=0, longest=None)


def _gpu(problem: Problem) -> GPU:
    """The GPU, or the part of it that the current context has."""
    if registry.is_small(problem.D):
        return whole(problem.device)
    # CTAs that wait for each other must run at once in the context of the launch.
    index = index_of(problem.device)
    with context.on_device(index):
        stream = context.current_stream(index)
        return _gpu_of_context(problem.device, context.number(stream))


@lru_cache(maxsize=64)
def _gpu_of_context(device: torch.device, _: int) -> GPU:
    """The part of a device that the current stream's context has; `_` is the context's number."""
    index, gpu = index_of(device), whole(device)
    stream = context.current_stream(index)
    clusters: tuple[int, ...] = ()
    if torch.cuda.get_device_capability(device)[0] in (9, 10):
        clusters = launch.clusters_at_once(index, stream, gpu.shared_memory)
    count = context.multiprocessors(stream, index)
    return gpu._replace(multiprocessors=count, clusters=clusters)


def _where(problem: Problem) -> tuple[int, int] | None:
    """The current stream and, if the plan depends on it, the number of its context.

    ``None`` while the stream is captured.
    """
    index = index_of(problem.device)
    with context.on_device(index):
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = context.current_stream(index)
        return stream, 0 if registry.is_small(problem.D) else context.number(stream)


# A kernel that leaves these caches is unloaded, unless a CUDA graph of the user's may launch it or
# a call of it is kept (calls.kept).


@lru_cache(maxsize=512)
def _scan_kernel(
    cell: TracedCell,
    precision: str,
    plan: Plan,
    options: source.Options,
    piece_bytes: int,
    device: torch.device,
) -> Kernel:
    shape = launch.Shape(
        grid=0,
        threads=plan.threads,
        shared_memory=plan.shared_memory,
        cooperative=plan.cooperative,
        cluster_size=plan.cluster_size,
    )
    return _kernel(plan.entry, plan.source(cell, precision, options, piece_bytes), shape, device)


@lru_cache(maxsize=256)
def _gradient_kernel(
    cell: TracedCell,
    precision: str,
    plan: single_cta.GradientPlan,
    piece_bytes: int,
    options: source.Options,
    device: torch.device,
) -> Kernel:
    shape = launch.Shape(grid=0, threads=plan.THREADS, shared_memory=plan.shared_memory)
    return _kernel(plan.ENTRY, plan.source(cell, precision, piece_bytes, options), shape, device)


@lru_cache(maxsize=256)
def _sums_kernel(cell: TracedCell, precision: str, device: torch.device) -> Kernel:
    plan = gradient_sums.SumsPlan
    shape = launch.Shape(grid=0, threads=plan.THREADS)
    return _kernel(plan.ENTRY, gradient_sums.program(cell, precision), shape, device)


KERNELS = (
    _prepared,
    *(_scan_kernel, _gradient_kernel, _sums_kernel),
    *few_rows.KERNELS,
    *copies.KERNELS,
    *padding.KERNELS,
)
"""The caches that hold kernels."""
