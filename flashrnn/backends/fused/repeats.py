"""What ``cuda_fused`` keeps of a call, for others like it (:mod:`flashrnn.backends.repeated`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from operator import or_

import torch
from torch import Tensor

from flashrnn.backends import autograd, copies, few_rows, steps
from flashrnn.backends.autograd import Factors
from flashrnn.backends.fused import plans, scans
from flashrnn.backends.gradients import recurrent_gradient, select
from flashrnn.backends.library import factors_gradients, input_product
from flashrnn.backends.repeated import New, Repeated
from flashrnn.kernels import registry, source
from flashrnn.problem import Problem, matmul_tf32_allowed, without_autocast


def repeated(
    problem: Problem, given: dict[str, Tensor], by_time: bool | None = None
) -> Repeated | None:
    """See :class:`flashrnn.backends.autograd.RepeatingBackend`."""
    if not _is_by_scan(problem, backward=False):
        return None
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
    x, W, bias = (tensors.pop(name, None) for name in _FACTORS)
    assert x is not None and W is not None
    if reduce(or_, map(Tensor.data_ptr, tensors.values())) % 16:
        return None
    with without_autocast(problem.device.type):
        Wx = input_product(problem, x, W.flatten(0, -2), None if bias is None else bias.view(-1))
    return [Wx, *tensors.values()]


def _is_by_scan(problem: Problem, backward: bool) -> bool:
    """Whether there is something to compute, and a persistent kernel computes it."""
    if not (problem.B and problem.T):
        return False
    return registry.is_small(problem.D) or not plans.steps_of(
        problem, plans.gpu_of(problem), backward
    )


def repeated_gradients(
    problem: Problem, given: dict[str, Tensor], needs_x: bool, needs_W: bool
) -> Repeated | None:
    """See :class:`flashrnn.backends.autograd.RepeatingBackend`."""
    if not _is_by_scan(problem, backward=True):
        return None
    factors = Factors(given["x"], given["W"], needs_x, needs_W) if "x" in given else None
    if factors is not None and not few_rows.multiplies(problem, factors.x, factors.W):
        factors = None
    asked = few_rows.asked(problem, factors)
    new = scans.new_gradients(problem, given["initial"], given["gates"], asked, factors)
    contiguous = given["R"], given["states"], given["gates"]
    if not all(x.is_contiguous() for x in contiguous):
        return None
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
    gpu, is_small = plans.gpu_of(problem), registry.is_small(problem.D)
    settings, many = _settings(problem), steps.may_be_faster(problem)
    _, layout = scans.record_of(problem, backward).read(tensors)
    # Tensors that begin elsewhere take another way.
    layout = layout._replace(offsets=())
    precision = source.precision_of(problem)
    prepared = scans.prepare(
        problem, gpu, backward, precision, options, layout, product, asked, ahead
    )
    if prepared.copied:
        return None

    def is_current() -> bool:
        if not is_small and (plans.gpu_of(problem) != gpu or steps.may_be_faster(problem) != many):
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
