"""What ``cuda_fused`` keeps of a call, for others like it.

A short call takes the host longer than the GPU. So all that follows from the tensors' sizes,
strides and dtypes is kept for each direction: what to allocate, and launches that lack addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from flashrnn.backends import autograd, copies, few_rows, steps
from flashrnn.backends.fused import plans, scans
from flashrnn.backends.gradients import recurrent_gradient, select
from flashrnn.backends.library import factors_gradients, input_product
from flashrnn.backends.protocols import Factors, Repeatable
from flashrnn.kernels import registry, source
from flashrnn.kernels.per_step.cell_plan import CellPlan
from flashrnn.problem import Problem, matmul_tf32_allowed, without_autocast


class New(NamedTuple):
    """A tensor that a call allocates.

    Attributes:
        sizes: ...
        strides: ``None``: it is contiguous.
        dtype: ...
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: torch.dtype


class Repeated(NamedTuple):
    """What is kept of a direction that a persistent kernel computes.

    Attributes:
        new: what it allocates, by the names that its launches have for it.
        prepared: its launches; their tensors are the given ones, then the new ones.
        asked: whether what it rests on is as it was; ``None``: it rests on nothing else.
        begin: what PyTorch computes before: the tensors that the launches are given, out of the
            call's; ``None`` where all has to be worked out anew.
        finish: what PyTorch computes behind, of the call's tensors and those written.
    """

    new: tuple[tuple[str, New], ...]
    prepared: scans.Prepared
    asked: Callable[[], bool] | None
    begin: Callable[[Sequence[Tensor]], Sequence[Tensor] | None] | None = None
    finish: Callable[[Sequence[Tensor], dict[str, Tensor]], None] | None = None

    def is_current(self) -> bool:
        """See :class:`flashrnn.backends.protocols.Repeatable`."""
        return self.asked is None or self.asked()

    def run(self, given: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """What it allocates, written; ``None`` where all has to be worked out anew."""
        of_call = given
        if self.begin is not None:
            begun = self.begin(given)
            if begun is None:
                return None
            given = begun
        addresses = [tensor.data_ptr() for tensor in given]
        if reduce(or_, addresses) % 16:
            return None
        like, made = given[0], {}
        for name, (sizes, strides, dtype) in self.new:
            if strides is None:
                one = like.new_empty(sizes, dtype=dtype)
            else:
                one = like.new_empty_strided(sizes, strides, dtype=dtype)
            made[name] = one
            addresses.append(one.data_ptr())
        self.prepared.enqueue(addresses, like)
        if self.finish is not None:
            self.finish(of_call, made)
        return made


def repeated(
    problem: Problem, given: dict[str, Tensor], by_time: bool | None = None
) -> Repeatable | None:
    """See :class:`flashrnn.backends.protocols.RepeatingBackend`."""
    if not (problem.B and problem.T):
        return None
    if plan := _steps_of(problem, backward=False):
        return _Steps(problem, plan, (*given,), _rests_on(problem))
    tensors, product, begin, Wx = dict(given), None, None, given.get("Wx")
    if Wx is None and few_rows.multiplies(problem, given["x"], given["W"]):
        Wx, product = few_rows.begun(problem, given["x"])
    elif Wx is None:
        begin = partial(_multiplied, problem, (*given,))
        begun = begin([*given.values()])
        assert begun is not None, "tensors without memory begin nowhere"
        tensors = dict(zip(_names_multiplied((*given,)), begun, strict=True))
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
) -> Sequence[Tensor] | None:
    """Of a layer's tensors, in the order of their names, ``Wx`` by the library, and the others.

    ``None`` where launches cannot be given one of those, so that nothing is multiplied twice.
    """
    tensors = dict(zip(names, given, strict=True))
    others = [x for name, x in tensors.items() if name not in _FACTORS]
    if reduce(or_, map(Tensor.data_ptr, others)) % 16:
        return None
    return [_by_library(problem, tensors), *others]


def _steps_of(problem: Problem, backward: bool) -> CellPlan | None:
    """The plan of a direction that is computed step by step; ``None``: a persistent kernel is."""
    if registry.is_small(problem.D):
        return None
    return plans.steps_of(problem, plans.gpu_of(problem), backward)


def repeated_gradients(
    problem: Problem, given: dict[str, Tensor], needs_x: bool, needs_W: bool
) -> Repeatable | None:
    """See :class:`flashrnn.backends.protocols.RepeatingBackend`."""
    if not (problem.B and problem.T):
        return None
    contiguous = given["R"], given["states"], given["gates"]
    if not all(x.is_contiguous() for x in contiguous):
        return None
    if plan := _steps_of(problem, backward=True):
        return _Steps(problem, plan, (*given,), _rests_on(problem), needs_x, needs_W)
    factors = Factors(given["x"], given["W"], needs_x, needs_W) if "x" in given else None
    if factors is not None and not few_rows.multiplies(problem, factors.x, factors.W):
        factors = None
    asked = few_rows.asked(problem, factors)
    new = scans.new_gradients(problem, given["initial"], given["gates"], asked, factors)
    by_library = "x" in given and not (asked is not None and asked.I)
    tensors = {n: x for n, x in given.items() if not (by_library and n in _FACTORS)}
    names, begin, finish = (*given,), None, None
    copies_start = scans.reads_contiguous_start(problem, asked)
    if by_library or copies_start:
        places = tuple(map(names.index, tensors))
        start = names.index("initial") if copies_start else None
        begin = partial(_of_launches, places, start)
        if copies_start:
            tensors["h_initial"] = given["initial"][0].contiguous()
    options = scans.backward_options(problem, given)
    found = _repeated(problem, True, tensors | new, new, options, asked=asked)
    if found is None:
        return None
    if by_library or "before" in new:
        finish = partial(_finished, problem, names, needs_x, needs_W, by_library)
    return found._replace(begin=begin, finish=finish)


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
    cell, d_gates = problem.cell, made["d_gates"]
    # What is not needed any more makes room.
    made.pop("d_bias", None)
    if "before" in made:
        made["d_R"] = recurrent_gradient(cell, d_gates, made.pop("before"))
    if by_library:
        _finish_factors(problem, dict(zip(names, given, strict=True)), needs_x, needs_W, made)


def _finish_factors(
    problem: Problem,
    given: dict[str, Tensor],
    needs_x: bool,
    needs_W: bool,
    made: dict[str, Tensor],
) -> None:
    """The gradients of x and W, of those that are needed, by the library."""
    x, W = given["x"], given["W"]
    d_Wx = select(made["d_gates"], 2, problem.cell.fed_by("Wx"))
    d_x, d_W = factors_gradients(d_Wx, x, W.flatten(0, -2), needs_x, needs_W)
    if d_x is not None:
        made["d_x"] = d_x
    if d_W is not None:
        made["d_W"] = d_W.view(W.shape)


class _Steps(NamedTuple):
    """What is kept of a direction that is computed step by step: its plan.

    Its launches are looked up at each call (:mod:`flashrnn.backends.steps`).

    Attributes:
        problem: ...
        plan: ...
        names: those of the tensors that it is given.
        asked: whether what the plan rests on is as it was.
        needs_x: whether the gradient of x is asked for.
        needs_W: whether that of W is.
    """

    problem: Problem
    plan: CellPlan
    names: tuple[str, ...]
    asked: Callable[[], bool]
    needs_x: bool = False
    needs_W: bool = False

    def is_current(self) -> bool:
        """See :class:`flashrnn.backends.protocols.Repeatable`."""
        return self.asked()

    def run(self, given: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """See :class:`flashrnn.backends.protocols.Repeatable`."""
        named, problem = dict(zip(self.names, given, strict=True)), self.problem
        if self.plan.backward:
            R, initial, states, gates = map(named.__getitem__, _RESIDUALS)
            upstream = named.get("d_states"), named.get("d_last")
            found = steps.backward(problem, self.plan, R, initial, states, gates, *upstream)
            gradients = {"d_gates": found.gates, "d_initial": found.states}
            gradients |= {"d_R": found.R, "d_b": found.b}
            if "x" in named:
                _finish_factors(problem, named, self.needs_x, self.needs_W, gradients)
            return gradients
        Wx = named["Wx"] if "Wx" in named else _product(problem, named)
        R = named["R"].view(-1, problem.N, problem.D, problem.D)
        outputs = steps.forward(problem, self.plan, Wx, R, named["b"], named["initial"])
        made = zip(("states", "last_states", "gates"), outputs, strict=True)
        return {name: x for name, x in made if x is not None}


_RESIDUALS = "R", "initial", "states", "gates"


def _product(problem: Problem, given: dict[str, Tensor]) -> Tensor:
    """``Wx`` of a layer's tensors, by this package's kernel where there are few rows."""
    x, W = given["x"], given["W"]
    if few_rows.multiplies(problem, x, W):
        return few_rows.multiply(problem, Factors(x, W, bias=given.get("bias")))
    return _by_library(problem, given)


def _by_library(problem: Problem, given: dict[str, Tensor]) -> Tensor:
    """The same by PyTorch's library."""
    x, W, bias = given["x"], given["W"], given.get("bias")
    with without_autocast(problem.device.type):
        return input_product(problem, x, W.flatten(0, -2), None if bias is None else bias.view(-1))


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
    gpu, is_small = plans.gpu_of(problem), registry.is_small(problem.D)
    _, layout = scans.record_of(problem, backward).read(tensors)
    # Tensors that begin elsewhere take another way.
    layout = layout._replace(offsets=())
    precision = source.precision_of(problem)
    prepared = scans.prepare(
        problem, gpu, backward, precision, options, layout, product, asked, ahead
    )
    if prepared.copied:
        return None
    rests_on_nothing = is_small and problem.dtype != torch.float32
    allocated = []
    for name, x in new.items():
        is_plain = x.stride() == torch.empty(x.shape, device="meta").stride()
        allocated.append((name, New(x.shape, None if is_plain else x.stride(), x.dtype)))
    return Repeated(tuple(allocated), prepared, None if rests_on_nothing else _rests_on(problem))


def _rests_on(problem: Problem) -> Callable[[], bool]:
    """Whether the GPU, or the part of it, and the settings that a call rests on are as now."""
    gpu, is_small = plans.gpu_of(problem), registry.is_small(problem.D)
    settings, many = _settings(problem), steps.may_be_faster(problem)

    def are_as_then() -> bool:
        if not is_small and (plans.gpu_of(problem) != gpu or steps.may_be_faster(problem) != many):
            return False
        return _settings(problem) == settings

    return are_as_then


def _settings(problem: Problem) -> tuple[str, bool] | None:
    """What products of float32 depend on."""
    if problem.dtype != torch.float32:
        return None
    return source.precision_of(problem), matmul_tf32_allowed()
