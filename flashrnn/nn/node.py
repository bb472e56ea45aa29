"""A layer with torch.nn's weights as one node of autograd.

A training step of a short sequence takes as long as its nodes and the host's operations. So the
product, the scan, and what lies between torch.nn's forms and theirs, such as views of weights, are
one node here, as product and scan are in :class:`flashrnn.layer.Layer`. Fused backends compute
plain layers of one direction so; the others are left to :mod:`flashrnn.nn.scan`, whose results are
the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashrnn import backends, calls, padded
from flashrnn.backends import autograd, kept_calls, protocols
from flashrnn.config import DEFAULT
from flashrnn.initial import initial_states
from flashrnn.nn.parameters import (
    RecurrentParameters,
    cell_of,
    drops_after,
    has_masks,
    parameters_named,
    weights_of,
)
from flashrnn.nn.precision import config_on
from flashrnn.nn.weights import (
    Copies,
    of_input,
    recurrence,
    recurrence_gradients,
    recurrent_matrix,
)
from flashrnn.problem import Problem, autocast_dtype, without_autocast
from flashrnn.products import forward_of_layer, gradients_of_layer
from flashrnn.rows import FEWEST, contiguous
from flashrnn.sequences import Given


def run(
    layers: RecurrentParameters, x: Tensor, states: list[Tensor] | None
) -> tuple[Tensor, list[Tensor]] | None:
    """All layers, over a batch as it is given, a node for each.

    Args:
        layers: the layers.
        x: ``[T, B, I]``, with ``layers.batch_first`` ``[B, T, I]``.
        states: for each state ``[L, B, ·]``, what sequences start from; ``None``: zeros.

    Returns:
        h of the last layer in the form of x, and for each state ``[L, B, ·]``; ``None`` where one
        node cannot be.
    """
    if torch.compiler.is_compiling() or layers.bidirectional or layers.proj_size:
        return None
    if has_masks(layers) or drops_after(layers, 0) or 0 in x.shape[:-1]:
        return None
    weights = [parameters_named(layers, names) for names in layers._all_weights]
    if not backends.is_direct(x, *itertools.chain(*weights), *(states or ())):
        return None
    kind = x.device.type
    dtype = autocast_dtype(kind)
    if dtype is None:
        return _all_layers(layers, x, states, weights, None)
    with without_autocast(kind):
        return _all_layers(layers, x, states, weights, dtype)


def _all_layers(
    layers: RecurrentParameters,
    x: Tensor,
    states: list[Tensor] | None,
    weights: list[list[Tensor]],
    dtype: torch.dtype | None,
) -> tuple[Tensor, list[Tensor]] | None:
    """See :func:`run`; ``dtype`` is that of autocast, which is off within."""
    last, starts = [], None
    if states is not None:
        starts = torch.stack(states, 1).unflatten(-1, (1, layers.heads, -1)).unbind(0)
    for row, of_row in enumerate(weights):
        found = _layer(layers, row, x, of_row, None if starts is None else starts[row], dtype)
        if found is None:
            return None
        x, *ended = found
        last.append(ended)
    if len(last) == 1:
        return x, last[0]
    # No views of one another, as those of a layer.
    of_states = itertools.chain.from_iterable(zip(*last, strict=True))
    return x, [*torch.cat([*of_states]).unsafe_split(len(last))]


class Form(NamedTuple):
    """How a layer has its weights, its input and its output.

    Attributes:
        mode: torch.nn's name of the cell, or the cell's own.
        x_by_time: whether the input is ``[T, B, I]`` in place of ``[B, T, I]``.
        h_by_time: whether h is to be ``[T, B, N * D]``.
    """

    mode: str
    x_by_time: bool
    h_by_time: bool


def _layer(
    layers: RecurrentParameters,
    row: int,
    x: Tensor,
    weights: list[Tensor],
    start: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, ...] | None:
    """One layer: h, and each last state ``[1, B, N * D]``; ``None`` where one node cannot be."""
    by_time, cell = not layers.batch_first, cell_of(layers)
    form = Form(layers.mode, by_time and row == 0, by_time and row == layers.num_layers - 1)
    # The setting is of float32. To ask for it takes as long as to launch a kernel.
    config = DEFAULT
    if (dtype or x.dtype) == torch.float32:
        config = config_on(x.device) or DEFAULT
    given = (x, *weights) if start is None else (x, *weights, start)
    requires_grad = torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, given))
    # What the problem follows from: what `calls.accepted` checks.
    key = (
        *(form.mode, cell.traced, layers.heads, form.x_by_time, start is None),
        *(requires_grad, dtype, config.allow_tf32),
        *map(_KIND, given),
    )
    problem = calls.problems.get(key)
    if problem is None:
        W, R, b, *_ = weights_of(layers, row)
        rows = x.transpose(0, 1) if form.x_by_time else x
        tensors = {"x": rows, "W": W.view(-1, *b.shape[1:], W.shape[1]), "R": R, "b": b}
        problem = calls.accepted(cell, tensors, start, config, dtype, _H_ALONE)
        calls.remember(key, problem)
    of_backend = layers.backend, form.h_by_time, *key
    again = calls.again(of_backend, problem, [x, *weights], start)
    if again is not None and again.kept is not None:
        kept = again.kept
        return _computed(x, again.states, kept.backend, kept.problem, kept, form, *weights)
    chosen = backends.choose(layers.backend, problem, direct=True)
    if not protocols.is_fused(chosen):
        return None
    chosen = padded.backend_for(chosen, problem, features=x.shape[-1])
    if start is None:
        start = initial_states(problem, DEFAULT, direct=True)
    outputs = _computed(x, start, chosen, problem, None, form, *weights)
    if again is not None and protocols.keeps(chosen) and again.key not in calls.kept:
        of_layer = kept_calls.without_memory([x, *weights])
        tensors = _operands(chosen, problem, None, form, None, *of_layer)
        calls.keep(again, chosen, problem, tensors, form.h_by_time)
    return outputs


def _computed(x: Tensor, start: Tensor, *further: Any) -> tuple[Tensor, ...]:
    """h and each last state; the arguments are those of :func:`_forward`."""
    _, problem, *_ = further
    if problem.needs_gradient:
        found: tuple[Tensor, ...] = autograd.apply(_Node, x, start, *further)
        return found
    return _forward(x, start, *further)[0]


_KIND, _REQUIRES_GRAD = attrgetter("shape", "dtype", "device"), attrgetter("requires_grad")
_H_ALONE = Given(None, None, None, None, False, "h")


def _forward(
    x: Tensor,
    start: Tensor,
    backend: protocols.FusedBackend,
    problem: Problem,
    kept: kept_calls.Kept | None,
    form: Form,
    *weights: Tensor,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """h and each last state in torch.nn's forms, and what backward needs."""
    dtype, (weight_ih, weight_hh, *biases) = problem.dtype, weights
    x, weight_ih = calls.cast_to(x, dtype), calls.cast_to(weight_ih, dtype)
    weight_hh = calls.cast_to(weight_hh, dtype)
    copy, of_layer = _copy(backend), (x, weight_ih, weight_hh, *biases)
    operands = _operands(backend, problem, kept, form, copy, *of_layer)
    made = None if kept is None else kept.forward.run([*operands.values(), start])
    if made is not None:
        states, last_states, gates = made["states"], made["last_states"], made.get("gates")
        results = protocols.Results(made.get("h_by_time"), made.get("last_rounded"))
    else:
        start, N, D = calls.cast_to(start, problem.carry_dtype), problem.N, problem.D
        rows, weight_ih, R, b = (operands[name] for name in ("x", "W", "R", "b"))
        of_scan = R.view(-1, N, D, D), b.view(-1, N, D), start
        bias, results = operands.get("bias"), None
        if protocols.copies(backend):
            results = backend.results(problem, x, form.h_by_time)
        states, last_states, gates = forward_of_layer(
            backend, problem, rows, weight_ih, *of_scan, bias=bias, results=results
        )
    outputs = _in_forms(problem, form, states, last_states, results)
    # The weights themselves: views of them would not be found changed where these are. And h, which
    # the node returns: by it a graph of the gradient finds the node.
    return outputs, (x, weight_ih, weight_hh, start, states, gates, outputs[0])


def _operands(
    backend: protocols.FusedBackend,
    problem: Problem,
    kept: kept_calls.Kept | None,
    form: Form,
    copy: Copies | None,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    *biases: Tensor,
) -> dict[str, Tensor]:
    """Input and weights by the names of a scan with its input's product, in their order.

    ``bias`` is among them where the backend adds it to the product. ``x`` and the matrices keep the
    dtypes that they have: by these :func:`flashrnn.calls.keep` knows whether a call casts.
    """
    rows, bias = x.transpose(0, 1) if form.x_by_time else x, None
    of_scan: Sequence[Tensor] = biases
    if kept is None:
        adds = protocols.multiplies(backend, problem, rows, weight_ih)
    else:
        adds = "bias" in kept.names
    if adds:
        bias, of_scan = of_input(form.mode, biases)
    R, b = recurrence(form.mode, problem.cell, problem.N, weight_hh, of_scan, copy)
    found = {"x": rows, "W": weight_ih, "R": R, "b": calls.cast_to(b, problem.dtype)}
    if bias is not None:
        found["bias"] = calls.cast_to(bias, problem.dtype).contiguous()
    return found


def _in_forms(
    problem: Problem,
    form: Form,
    states: Tensor,
    last_states: Tensor,
    results: protocols.Results | None,
) -> tuple[Tensor, ...]:
    """h and each last state in torch.nn's forms, out of a scan's results."""
    (B, T), S, N, D = problem.rows, len(problem.cell.states), problem.N, problem.D
    h, last = results or protocols.Results()
    if h is None:
        h = autograd.own_units(problem, states[0] if len(states) > 1 else states)
        h = h.reshape(B, T, N * D)
        h = contiguous(h.transpose(0, 1) if form.h_by_time else h)
    if last is None:
        last = calls.cast_to(last_states, problem.dtype).view(S, B, N * D)
    # No views of one another: callers change them in place, each by itself.
    return h, *last.unsafe_split(1)


def _copy(backend: protocols.FusedBackend) -> Copies | None:
    """A backend's several copies in one launch, if it has that."""
    return backend.copy if protocols.copies(backend) else None


class _Node(torch.autograd.Function):
    """A layer's product and its scan, of tensors in torch.nn's forms."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        start: Tensor,
        backend: protocols.FusedBackend,
        problem: Problem,
        kept: kept_calls.Kept | None,
        form: Form,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs, residuals = _forward(x, start, backend, problem, kept, form, *weights)
        ctx.save_for_backward(*residuals)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.problem, ctx.kept, ctx.form = backend, problem, kept, form
        return outputs

    @staticmethod
    def backward(ctx: Any, d_h: Tensor | None, *d_ended: Tensor | None) -> tuple[Any, ...]:
        form, d_states, d_last = ctx.form, None, None
        x, weight_ih, weight_hh, start, *residuals = ctx.saved_tensors
        S, B, _, N, D = start.shape
        if d_h is not None:
            d_h = d_h.transpose(0, 1) if form.h_by_time else d_h
            d_states = d_h.view(1, *d_h.shape[:2], N, D)
        given = [d_state for d_state in d_ended if d_state is not None]
        if given:
            zeros = torch.zeros_like(given[0])
            d_last = torch.stack([zeros if d_state is None else d_state for d_state in d_ended])
            d_last = d_last.to(start.dtype).view(S, B, 1, N, D)
        needs_x, needs_start, _, _, _, _, needs_W, needs_R, *needs_b = ctx.needs_input_grad
        copy = _copy(ctx.backend)
        R = recurrent_matrix(form.mode, weight_hh, copy).view(-1, N, D, D)
        rows = x.transpose(0, 1) if form.x_by_time else x
        factors = protocols.Factors(rows, weight_ih, needs_x, needs_W)
        with without_autocast(x.device.type):
            arguments = ctx.backend, ctx.problem, factors, (R, start, *residuals), 0
            found = gradients_of_layer(*arguments, d_states, d_last, ctx.kept)
        d_x = found.x
        d_R = found.R if needs_R else None
        d_b = found.b if any(needs_b) else None
        d_start = found.states if needs_start else None
        if d_x is not None and form.x_by_time:
            d_x = d_x.transpose(0, 1)
            if d_x.numel() >= FEWEST and x.is_contiguous():
                # Whoever gets it would copy it into x's layout, and take longer.
                d_x = contiguous(d_x)
        of_recurrence = recurrence_gradients(
            form.mode, d_R, d_b, weight_hh.shape, len(needs_b), copy
        )
        return d_x, d_start, None, None, None, None, found.W, *of_recurrence
