"""All of a layer in one call: both directions as heads, and sequences by the options of the call.

That is how fused backends compute layers; see docs/sequences.md for the options. Where this cannot
be, or costs more, :mod:`flashrnn.nn.scan` computes one direction at a time, without options.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashrnn import backends
from flashrnn.backends.protocols import is_fused
from flashrnn.cells.spec import Cell
from flashrnn.cells.traced import TracedCell
from flashrnn.functional import flashrnn
from flashrnn.layer import recurrent_layer
from flashrnn.nn.masks import Masks, bernoulli, drawn
from flashrnn.nn.packing import sent
from flashrnn.nn.precision import config_on
from flashrnn.nn.weights import Weights
from flashrnn.problem import Problem, autocast_enabled


class Batch(NamedTuple):
    """Where the sequences of a batch lie.

    Attributes:
        reset: ``[B, T]`` of bool, for rows ``[B, T]``; ``None``: no resets.
        cu_seqlens: ``[B + 1]``: they lie one after another in rows ``[1, rows]``; ``None``: each
            in T of the rows ``[B, T]``.
    """

    reset: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def of_sequence(self, x: Tensor, like: Tensor) -> Tensor:
        """What each sequence has in x ``[B, ...]``, for its rows: ``[B, 1, ...]``, or in a row one
        after another ``[1, rows, ...]``, as many as ``like`` has."""
        if self.cu_seqlens is None:
            return x.unsqueeze(1)
        row = torch.arange(like.shape[1], device=like.device)
        ends = sent(self.cu_seqlens, like.device)[1:]
        sequence = torch.searchsorted(ends, row, right=True).clamp_max(len(ends) - 1)
        return x[sequence].unsqueeze(0)

    def count(self, x: Tensor) -> int:
        """The number of sequences in x ``[B, T, ·]``, or ``[1, rows, ·]``."""
        return x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


def can_be(
    x: Tensor,
    others: Sequence[Tensor],
    cell: Cell,
    backend: str,
    N: int,
    D: int,
    bidirectional: bool,
    batch: Batch,
) -> bool:
    """Whether the fused backend that computes one direction of plain sequences has all in one call.

    Args:
        x: ``[B, T, I]``, or ``[1, rows, I]`` with ``batch.cu_seqlens``.
        others: the weights of all layers, and the states, if given.
        cell: the cell.
        backend: a backend's name, or ``"auto"``.
        N: the heads of a direction.
        D: their units.
        bidirectional: whether there are two directions.
        batch: where the sequences lie.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and (backends.transformed() or backends.jit_traced()):
        return False
    kind, config, packed = x.device.type, config_on(x.device), batch.cu_seqlens is not None
    of_direction = Problem(
        # As of any call: a graph of torch.compile needs the cell's names alone.
        cast(TracedCell, cell) if compiling else cell.traced,
        batch.count(x),
        x.shape[1],
        N,
        D,
        torch.get_autocast_dtype(kind) if autocast_enabled(kind) else x.dtype,
        x.device,
        torch.is_grad_enabled()
        and (x.requires_grad or any(other.requires_grad for other in others)),
        allow_tf32=None if config is None else config.allow_tf32,
    )
    options: dict[str, Any] = {
        "N": N * (1 + bidirectional),
        "resets": batch.reset is not None,
        "ragged": packed,
        "packed": packed,
        "reverse": _directions(N, 1 + bidirectional),
        "returned": _returned(cell, bidirectional, batch),
    }
    if compiling:
        chosen = backends.choose(backend, of_direction)
        return (
            is_fused(chosen) and backends.choose("auto", of_direction._replace(**options)) is chosen
        )
    return _does(backend, backends.without_symbols(of_direction), tuple(options.items()))


@lru_cache(maxsize=1024)
def _does(backend: str, of_direction: Problem, options: tuple[tuple[str, Any], ...]) -> bool:
    """Whether the backend of a problem is fused and does it with options, too."""
    chosen = backends.choose(backend, of_direction)
    return is_fused(chosen) and not chosen.unsupported(of_direction._replace(**dict(options)))


def _directions(N: int, directions: int) -> bool | tuple[bool, ...]:
    return (False,) * N + (True,) * N if directions == 2 else False


def _returned(cell: Cell, bidirectional: bool, batch: Batch) -> int:
    """How many states are needed of every step: with resets, all that a direction ends with."""
    return len(cell.states) if bidirectional and batch.reset is not None else 1


def layer(
    x: Tensor,
    weights: Sequence[Weights],
    states: Sequence[Tensor] | None,
    cell: Cell,
    backend: str,
    batch: Batch,
    masks: Masks | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """A layer, in all of its directions, the second of which is the reverse one.

    Args:
        x: ``[B, T, I]``, or ``[1, rows, I]`` with ``batch.cu_seqlens``.
        weights: those of each direction.
        states: for each state ``[directions, B, N * D]`` (h, if projected, ``[directions, B, P]``),
            what the first part of each sequence starts from; ``None``: zeros.
        cell: the cell.
        backend: a backend's name, or ``"auto"``.
        batch: where the sequences lie.
        masks: what is random; ``None``: nothing.

    Returns:
        h of every step, ``[B, T, directions * N * D]``, or with P in place of ``N * D``; and for
        each state ``[directions, B, N * D]`` or P, what the last part of each sequence ends with.
    """
    directions, (_, N, D) = len(weights), weights[0].b.shape
    Ws, hr = [each.W.unflatten(0, (-1, N, D)) for each in weights], weights[0].weight_hr
    given_h = None
    if states is not None and hr is not None:
        # The state h within is not projected, and the one given is. It enters the first step's
        # gates as further features of the input, absent at all other steps.
        given_h = states[0]
        states = [torch.zeros_like(states[1]), states[1]]
        x, Ws = _with_first(x, Ws, weights, given_h, batch)
    start, reset_states = None, None
    if states is not None:
        # [S, directions, B, ·]
        start = torch.stack(list(states)).transpose(1, 2).unflatten(-1, (N, D))
        start = start.flatten(2, 3).unsqueeze(2)
        if batch.reset is not None and directions == 2:
            start, reset_states = _starts_of_parts(start, batch.reset, N)
    W, R, b = (_beside(parts) for parts in (Ws, [w.R for w in weights], [w.b for w in weights]))
    options: dict[str, Any] = {
        "config": config_on(x.device),
        "reset": batch.reset,
        "reset_states": reset_states,
        "cu_seqlens": batch.cu_seqlens,
        "reverse": _directions(N, directions),
        "return_states": "all" if _returned(cell, directions == 2, batch) > 1 else "h",
    }
    if masks is None:
        every_state, last_states = recurrent_layer(x, W, R, b, start, cell, backend, **options)
    else:
        every_state, last_states = _with_masks(
            x, W, R, b, start, cell, backend, masks, batch, options
        )
    # [S, directions, B, N * D]
    ended = last_states.squeeze(2).unflatten(2, (directions, N)).flatten(3).transpose(1, 2)
    if batch.reset is not None and directions == 2:
        ended = torch.stack([ended[:, 0], _ends_of_parts(every_state, batch.reset, N).to(ended)], 1)
    # Where h is the only state, a view of it: the gradient of a choice takes zeros and a copy.
    h = every_state.squeeze(0) if len(every_state) == 1 else every_state[0]
    h, last = h.flatten(2), list(ended.unbind(0))
    if hr is not None:
        h, last[0] = _projected(h, last[0], weights, given_h, batch)
    return h, last


def _with_masks(
    x: Tensor,
    W: Tensor,
    R: Tensor,
    b: Tensor,
    start: Tensor | None,
    cell: Cell,
    backend: str,
    masks: Masks,
    batch: Batch,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """``recurrent_layer()``'s results, of a cell with masks, which follow the input product."""
    _, N, D = b.shape
    Wx = linear(x, W.flatten(0, 2)).unflatten(-1, W.shape[:3])
    dropped = None
    if masks.dropout:
        # One mask for each sequence.
        dropped = bernoulli((batch.count(x), N, D), masks.dropout, x.device)
        if start is not None:
            start = _with_read(start, dropped, masks)
        if options["reset_states"] is not None:
            options["reset_states"] = _with_read(options["reset_states"], dropped, masks)
        dropped = batch.of_sequence(dropped, x)
        options["return_states"] = "all"
    gates = torch.cat([Wx, drawn(Wx, dropped, masks.zoneout, N, D)], 2)
    every_state, last_states = flashrnn(
        gates, R, b, start, masks.trained, backend=backend, **options
    )
    return (every_state[1:], last_states[1:]) if masks.dropout else (every_state, last_states)


def _with_read(states: Tensor, dropped: Tensor, masks: Masks) -> Tensor:
    """States ``[S, B, T, N, D]``, and before them h as the recurrent matrix reads it."""
    read = torch.where(dropped[:, None], 0, states[:1] / (1 - masks.dropout))
    return torch.cat([read, states])


def _beside(parts: Sequence[Tensor]) -> Tensor:
    """The heads of both directions, ``[G, 2 * N, ...]``, out of ``[G, N, ...]`` of each."""
    if len(parts) == 1:
        return parts[0]
    if len(parts[0]) == 1:
        # Of one gate the gradients would be two halves of the same memory, and programs take it
        # that no two weights' gradients share any. A product's gradient is a product.
        parts = [part * 1 for part in parts]
    return torch.cat(list(parts), 1)


def _with_first(
    x: Tensor, Ws: Sequence[Tensor], weights: Sequence[Weights], h: Tensor, batch: Batch
) -> tuple[Tensor, list[Tensor]]:
    """x and, as further features, h ``[directions, B, P]`` where each direction begins; and W."""
    rows, T = x.shape[0] * x.shape[1], x.shape[1]
    if batch.cu_seqlens is not None:
        cuts = sent(batch.cu_seqlens, x.device)
        first, last, enters = cuts[:-1], cuts[1:] - 1, cuts.diff() > 0
    else:
        first = T * torch.arange(x.shape[0], device=x.device)
        last, enters = first + T - 1, None
        if batch.reset is not None:
            last, enters = first + _end_of_first_part(batch.reset), ~batch.reset[:, 0]
    if enters is not None:
        h = torch.where(enters[:, None], h, 0)
    found = [x]
    for begin, each in zip((first, last), h, strict=False):
        there = begin.clamp(0, rows - 1)
        beside = each.new_zeros(rows, each.shape[1]).index_add(0, there, each)
        found.append(beside.to(x.dtype).view(*x.shape[:2], -1))
    extended = []
    for k, (W, of_direction) in enumerate(zip(Ws, weights, strict=True)):
        of_h = of_direction.weight_hh.unflatten(0, W.shape[:3])
        absent = torch.zeros_like(of_h)
        extended.append(torch.cat([W, *(of_h if k == d else absent for d in range(len(h)))], -1))
    return torch.cat(found, -1), extended


def _projected(
    h: Tensor, last: Tensor, weights: Sequence[Weights], given: Tensor | None, batch: Batch
) -> tuple[Tensor, Tensor]:
    """h of every step and h at the end, of all directions, projected.

    Args:
        h: ``[B, T, directions * D]``.
        last: ``[directions, B, D]``.
        weights: those of each direction.
        given: ``[directions, B, P]``, what sequences start from; ``None``: zeros.
        batch: where the sequences lie.
    """
    matrices = [each.weight_hr for each in weights if each.weight_hr is not None]
    parts = h.unflatten(2, (len(matrices), -1)).unbind(2)
    projected = [linear(part, hr) for part, hr in zip(parts, matrices, strict=True)]
    h = torch.cat(projected, -1) if len(projected) == 2 else projected[0]
    last = torch.stack([linear(x.to(hr.dtype), hr) for x, hr in zip(last, matrices, strict=True)])
    if given is not None and batch.cu_seqlens is not None:
        # A sequence of no steps ends as it begins.
        is_empty = sent(batch.cu_seqlens, h.device).diff().eq(0)
        last = torch.where(is_empty[:, None], given.to(last), last)
    return h, last


# With resets, what is given is of the first part of a sequence, and what is returned of the last
# one, in both directions. A call's reverse heads begin with the last part and end with the first.


def _end_of_first_part(reset: Tensor) -> Tensor:
    """``[B]``: its last step."""
    T = reset.shape[1]
    steps = torch.arange(T, device=reset.device)
    return torch.where(reset & (steps > 0), steps, T).amin(1) - 1


def _starts_of_parts(start: Tensor, reset: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """What a call starts from and what resets go back to, out of the start of the first part.

    ``[S, B, 1, 2 * N, D]``, and of every step ``[S, B, T, 2 * N, D]``: zeros but in a reverse
    direction at the first part's end, if there is a reset behind.
    """
    T = reset.shape[1]
    is_reverse = (torch.arange(2 * N, device=reset.device) >= N)[:, None]
    # [B, T]: where the first part ends, unless it begins with a reset and so from zeros.
    ends = torch.arange(T, device=reset.device) == _end_of_first_part(reset)[:, None]
    ends = (ends & ~reset[:, :1])[..., None, None]
    to = torch.where(ends & is_reverse, start, 0)
    return torch.where(ends[:, -1:] | ~is_reverse, start, 0), to


def _ends_of_parts(every_state: Tensor, reset: Tensor, N: int) -> Tensor:
    """``[S, B, N * D]``: the states of the reverse direction at the last part's first step."""
    B, T = reset.shape
    first = torch.where(reset, torch.arange(T, device=reset.device), 0).amax(1)
    return every_state[:, torch.arange(B, device=reset.device), first, N:].flatten(2)
