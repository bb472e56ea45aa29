"""All layers of a call, one after another, by what computes them best.

A layer is computed by PyTorch's own kernels (:mod:`flashrnn.nn.torch_kernels`), in one call for all
of it (:mod:`flashrnn.nn.at_once`), as one node of autograd (:mod:`flashrnn.nn.node`), or one
direction at a time (:mod:`flashrnn.nn.scan`). A single step has a stepper that is kept
(:mod:`flashrnn.nn.stepping`), where there can be one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout

from flashrnn import backends
from flashrnn.nn import at_once, node, stepping, torch_kernels
from flashrnn.nn.arguments import check_bounds
from flashrnn.nn.packing import Packing, Segments, between_resets, moved, one_after_another
from flashrnn.nn.parameters import (
    RecurrentParameters,
    cell_of,
    drops_after,
    has_masks,
    masks_of,
    parameters_of,
    rows_of,
    weights_of,
)
from flashrnn.nn.scan import direction
from flashrnn.rows import contiguous


def run(
    layers: RecurrentParameters,
    x: Tensor,
    states: list[Tensor] | None,
    batch_sizes: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """All layers, over a batch as it is given, with ``batch_sizes`` over packed rows, or with
    ``cu_seqlens`` over rows of sequences one after another.

    Args:
        layers: the layers.
        x: ``[T, B, I]``, with ``layers.batch_first`` ``[B, T, I]``; or ``[rows, I]``.
        states: for each state ``[L, B, ·]``, what sequences start from; ``None``: zeros.
        batch_sizes: see :class:`torch.nn.utils.rnn.PackedSequence`.
        reset: of bool, of the first two dimensions of x: before which steps states start anew.
        cu_seqlens: ``[B + 1]`` of int64.

    Returns:
        h of the last layer in the form of x, and for each state ``[L, B, ·]``.
    """
    if reset is None and cu_seqlens is None and torch_kernels.compute(layers, x.device):
        return torch_kernels.run(layers, x, states, batch_sizes)
    if batch_sizes is not None and backends.jit_traced():
        raise NotImplementedError(
            "torch.jit.trace would take this PackedSequence's lengths for those of all others; "
            "accepted are cu_seqlens, or a layer of torch.nn's (flashrnn.nn.restore)"
        )
    if batch_sizes is not None and _are_equal(batch_sizes):
        return _of_equal_lengths(layers, x, states, len(batch_sizes))
    found = _at_once(layers, x, states, batch_sizes, reset, cu_seqlens)
    if found is not None:
        return found
    if reset is not None:
        return _between_resets(layers, x, states, reset)
    if cu_seqlens is not None:
        bounds = cu_seqlens.cpu()
        check_bounds(bounds, len(x))
        segments = Segments.of(bounds[:-1], bounds.diff(), 1)
        return _segments(layers, x, states, segments, len(bounds) - 1)
    if batch_sizes is not None:
        return _in_turn(layers, x, states, Packing.of(batch_sizes, x.device))
    as_nodes = node.run(layers, x, states)
    if as_nodes is not None:
        return as_nodes
    if layers.batch_first:
        output, last = _in_turn(layers, x.transpose(0, 1), states, None)
        return output.transpose(0, 1), last
    output, last = _in_turn(layers, x, states, None)
    return contiguous(output), last


def _are_equal(batch_sizes: Tensor) -> bool:
    """Whether each step has all sequences. Where operations are recorded nobody knows."""
    return not backends.recorded() and bool(batch_sizes[0] == batch_sizes[-1])


def _of_equal_lengths(
    layers: RecurrentParameters, x: Tensor, states: list[Tensor] | None, T: int
) -> tuple[Tensor, Sequence[Tensor]]:
    """:func:`run` over packed rows of sequences of T steps each, which are ``[T, B, I]``."""
    x = x.unflatten(0, (T, -1))
    output, last = run(layers, x.transpose(0, 1) if layers.batch_first else x, states)
    return (output.transpose(0, 1) if layers.batch_first else output).flatten(0, 1), last


def _at_once(
    layers: RecurrentParameters,
    x: Tensor,
    states: list[Tensor] | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, list[Tensor]] | None:
    """The same, a layer being one call; ``None`` where it is better not to be."""
    plain = batch_sizes is None and cu_seqlens is None and reset is None
    random = has_masks(layers)
    if (plain and not layers.bidirectional and not random) or 0 in x.shape[:-1]:
        return None
    # Where operations are recorded there are no values yet that the host could read.
    unread = (reset is not None or cu_seqlens is not None) and backends.recorded()
    if not (unread or random) and torch_kernels.compute(layers, x.device):
        return None
    by_time = batch_sizes is None and cu_seqlens is None and not layers.batch_first
    there = back = None
    if batch_sizes is not None:
        cu_seqlens, there, back = one_after_another(batch_sizes, x.device)
    elif reset is not None:
        reset = (reset.t() if by_time else reset).to(x.device)
    batch = at_once.Batch(reset, cu_seqlens)
    rows = x.unsqueeze(0) if cu_seqlens is not None else x.transpose(0, 1) if by_time else x
    if not (unread or random) and not at_once.can_be(
        rows,
        [*parameters_of(layers), *(states or ())],
        cell_of(layers),
        layers.backend,
        layers.heads,
        layers.hidden_size // layers.heads,
        layers.bidirectional,
        batch,
    ):
        return None
    if there is not None:
        rows = moved(x, there).unsqueeze(0)
    last, cell, directions = [], cell_of(layers), 1 + layers.bidirectional
    for layer in range(layers.num_layers):
        first, end = layer * directions, (layer + 1) * directions
        rows, ended = at_once.layer(
            rows,
            [weights_of(layers, row) for row in range(first, end)],
            None if states is None else [state[first:end] for state in states],
            cell,
            layers.backend,
            batch,
            masks_of(layers),
        )
        last.append(ended)
        if drops_after(layers, layer):
            if layers.variational:
                ones = rows.new_ones(batch.count(rows), rows.shape[2])
                rows = rows * batch.of_sequence(dropout(ones, layers.dropout), rows)
            else:
                rows = dropout(rows, layers.dropout)
    if back is not None:
        output = moved(rows.squeeze(0), back)
    elif cu_seqlens is not None:
        output = rows.squeeze(0)
    else:
        output = contiguous(rows.transpose(0, 1)) if by_time else rows
    return output, [_after_all(found, output.dtype) for found in zip(*last, strict=True)]


def _in_turn(
    layers: RecurrentParameters,
    x: Tensor,
    states: list[Tensor] | None,
    packing: Packing | None,
) -> tuple[Tensor, list[Tensor]]:
    """The same over ``[T, B, ·]`` or packed rows, one direction of a layer at a time."""
    last: list[list[Tensor]] = []
    cell, directions = cell_of(layers), 1 + layers.bidirectional
    for layer in range(layers.num_layers):
        outputs = []
        for row in range(directions * layer, directions * (layer + 1)):
            output, ended = direction(
                x,
                weights_of(layers, row),
                None if states is None else [state[row] for state in states],
                cell,
                layers.backend,
                reverse=row % directions == 1,
                packing=packing,
            )
            outputs.append(output)
            last.append([state.unsqueeze(0) for state in ended])
        x = torch.cat(outputs, -1) if layers.bidirectional else outputs[0]
        if drops_after(layers, layer):
            # Contiguous: then the numbers drawn are those of torch.nn.
            x = dropout(x.contiguous(), layers.dropout)
    return x, [_after_all(rows, x.dtype) for rows in zip(*last, strict=True)]


def _after_all(states: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """One state after all layers, ``[L, B, ·]``, out of parts of it, in memory of its own.

    Callers change it in place, which a view of all states of a call would not allow.
    """
    if len(states) == 1 and states[0].dtype != dtype:
        return states[0].to(dtype)
    return torch.cat(states).to(dtype)


def _between_resets(
    layers: RecurrentParameters, x: Tensor, states: list[Tensor] | None, reset: Tensor
) -> tuple[Tensor, Sequence[Tensor]]:
    """The same over ``[T, B, ·]``, or ``[B, T, ·]``: each part between resets by itself."""
    by_time = x.transpose(0, 1) if layers.batch_first else x
    T, B = by_time.shape[:2]
    if B == 0:
        return run(layers, x, states)
    reset = (reset.t() if layers.batch_first else reset).cpu()
    segments, first, last = between_resets(reset)
    n = len(segments.order)
    if states is not None:
        kept = (first >= 0).nonzero().squeeze(1)
        begun, kept = first[kept].to(x.device), kept.to(x.device)
        states = [
            state.new_zeros(len(state), n, state.shape[2]).index_copy(1, begun, state[:, kept])
            for state in states
        ]
    output, ended = _segments(layers, by_time.flatten(0, 1), states, segments, n)
    output, last = output.unflatten(0, (T, B)), last.to(x.device)
    ended = [state.index_select(1, last) for state in ended]
    return (output.transpose(0, 1) if layers.batch_first else output), ended


def _segments(
    layers: RecurrentParameters,
    x: Tensor,
    states: list[Tensor] | None,
    segments: Segments,
    n: int,
) -> tuple[Tensor, list[Tensor]]:
    """The same over n sequences in the rows of x; results in the order of both."""
    rows, order = segments.rows.to(x.device), segments.order.to(x.device)
    given = None if states is None else [state.index_select(1, order) for state in states]
    packed, ended = run(layers, x.index_select(0, rows), given, segments.batch_sizes)
    output = torch.empty_like(packed).index_copy(0, rows, packed)
    # A sequence of no steps ends as it begins.
    before = states or [state.new_zeros(len(state), n, state.shape[2]) for state in ended]
    return output, [
        start.to(end.dtype).index_copy(1, order, end)
        for start, end in zip(before, ended, strict=True)
    ]


def step(
    layers: RecurrentParameters, x: Tensor, states: list[Tensor] | None
) -> tuple[Tensor, Sequence[Tensor]]:
    """One step of all layers, ``[B, ·]``, by what does it fastest."""
    if not layers.proj_size:
        if torch_kernels.compute(layers, x.device):
            return torch_kernels.step(layers, x, states)
        found = _step_kept(layers, x, states)
        if found is not None:
            return found
    time = 1 if layers.batch_first else 0
    output, last = run(layers, x.unsqueeze(time), states)
    return output.squeeze(time), last


def _step_kept(
    layers: RecurrentParameters, x: Tensor, states: list[Tensor] | None
) -> tuple[Tensor, list[Tensor]] | None:
    """The same by steppers that are kept; ``None`` where there can be none."""
    if (
        (layers.dropout and layers.training)
        or has_masks(layers)
        or not stepping.can_be_kept(x, parameters_of(layers), states or ())
    ):
        return None
    last, sizes = [], (layers.heads, layers.hidden_size // layers.heads)
    for row in range(rows_of(layers)):
        before = None
        if states is not None:
            before = torch.stack([state[row] for state in states]).unflatten(-1, sizes)
        after = stepping.step(
            layers, row, x, weights_of(layers, row), before, cell_of(layers), layers.backend
        )
        if after is None:
            return None
        last.append(after.flatten(2).to(x.dtype))
        x = last[-1][0]
    # In memory of their own, as above.
    return x.clone(), [state.clone() for state in torch.stack(last, 1).unbind(0)]
