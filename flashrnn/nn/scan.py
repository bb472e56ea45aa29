"""One direction of a layer: the input product and the recurrence, by this package's backends.

So layers are computed where :mod:`flashrnn.nn.at_once` is not chosen: by ``vanilla``, which is
slower with the options of sequences, and by a fused backend where it lacks them. No call here has
any, but that it returns h alone: to choose one of several states makes the backward pass fill zeros
for all of them, and copy.

Two layouts come in: ``[T, B, I]``, sequences of one length; and rows ``[rows, I]`` of sequences of
several lengths, in the order of :class:`torch.nn.utils.rnn.PackedSequence`, with a
:class:`flashrnn.nn.packing.Packing` that says which row is which.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashrnn.cells.spec import Cell
from flashrnn.functional import flashrnn
from flashrnn.layer import recurrent_layer
from flashrnn.nn.packing import Packing
from flashrnn.nn.precision import config_on
from flashrnn.nn.weights import Weights


def direction(
    x: Tensor,
    weights: Weights,
    states: list[Tensor] | None,
    cell: Cell,
    backend: str,
    *,
    reverse: bool,
    packing: Packing | None,
) -> tuple[Tensor, list[Tensor]]:
    """One direction of a layer, whose h may be projected.

    Args:
        x: as :func:`scan` takes it, like all that is not told here.
        weights: those of the direction.
        states: for each state ``[B, N * D]`` (h, if projected, ``[B, P]``); ``None``: zeros.
        cell: ...
        backend: ...
        reverse: ...
        packing: ...

    Returns:
        h of every step, and each last state, with ``N * D`` or P features.
    """
    (W, R, b, weight_hh, weight_hr), (_, N, D) = weights, weights.b.shape
    if states is not None and weight_hr is not None:
        # As in `at_once.layer`.
        x = _with_first(x, states[0], reverse, packing)
        W = torch.cat([W, weight_hh], 1)
        states = [torch.zeros_like(states[1]), states[1]]
    start = None if states is None else torch.stack(states).unflatten(-1, (1, N, D))
    h, last_states = scan(x, W, R, b, start, cell, backend, reverse=reverse, packing=packing)
    ended = list(last_states.flatten(2).unbind(0))
    if weight_hr is not None:
        h = linear(h, weight_hr)
        ended[0] = linear(ended[0].to(weight_hr.dtype), weight_hr)
    return h, ended


def _with_first(x: Tensor, h: Tensor, reverse: bool, packing: Packing | None) -> Tensor:
    """``x``, and beside it h ``[B, ·]`` where each sequence starts, zeros elsewhere."""
    B = len(h)
    rows = x.flatten(0, -2)
    if not reverse:
        first = torch.arange(B, device=x.device)
    elif packing is not None:
        first = packing.reversal[:B]
    else:
        first = torch.arange(len(rows) - B, len(rows), device=x.device)
    beside = h.new_zeros(len(rows), h.shape[1]).index_copy(0, first, h)
    return torch.cat([rows, beside.to(x.dtype)], 1).unflatten(0, x.shape[:-1])


def scan(
    x: Tensor,
    W: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None,
    cell: Cell,
    backend: str,
    *,
    reverse: bool = False,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """One direction of a layer.

    A reverse direction begins at each sequence's last step. What lies beyond the end of a shorter
    sequence is not computed at all, so that nothing of it can reach a result or a gradient.

    Args:
        x: ``[T, B, I]``, or ``[rows, I]`` with ``packing``.
        W: ``[Gw * N * D, I]``, the input matrix.
        R: ``[Gr, N, D, D]``; see :func:`flashrnn.flashrnn`, as for ``b`` and ``cell``.
        b: ``[Gb, N, D]``.
        states: ``[S, B, 1, N, D]``, what each sequence starts from; ``None``: zeros.
        cell: the cell.
        backend: a backend's name, or ``"auto"``.
        reverse: from the last step to the first.
        packing: which row is which, for sequences of several lengths.

    Returns:
        h of every step, ``[T, B, N * D]`` or ``[rows, N * D]``, and the states after each
        sequence's last step (with ``reverse``: its first), ``[S, B, 1, N, D]``.
    """
    _, N, D, _ = R.shape
    W = W.view(-1, N, D, W.shape[1])
    if packing is None:
        h, last_states = _steps(x.flip(0) if reverse else x, W, R, b, states, cell, backend)
        return (h.flip(0) if reverse else h), last_states
    x = x[packing.reversal] if reverse else x
    h, last_states = _packed(x, W, R, b, states, cell, backend, packing.batch_sizes)
    return (h[packing.reversal] if reverse else h), last_states


def _steps(
    x: Tensor, W: Tensor, R: Tensor, b: Tensor, states: Tensor | None, cell: Cell, backend: str
) -> tuple[Tensor, Tensor]:
    """h ``[T, B, N * D]`` and the last states, out of ``x`` ``[T, B, I]``."""
    config = config_on(x.device)
    every_state, last_states = recurrent_layer(
        x.transpose(0, 1), W, R, b, states, cell, backend, config=config, return_states="h"
    )
    return every_state.squeeze(0).flatten(2).transpose(0, 1), last_states


def _packed(
    x: Tensor,
    W: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None,
    cell: Cell,
    backend: str,
    batch_sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The same of rows ``[rows, I]``.

    One input product for all, and a call of the scan for all steps that the same sequences have.
    """
    stretches = [(B, len(list(steps))) for B, steps in groupby(batch_sizes)]
    if len(stretches) == 1:
        h, last_states = _steps(x.unflatten(0, stretches[0][::-1]), W, R, b, states, cell, backend)
        return h.flatten(0, 1), last_states
    config = config_on(x.device)
    Wx = linear(x, W.flatten(0, 2)).unflatten(-1, W.shape[:3])
    rows: list[Tensor] = []
    ended: list[Tensor] = []
    first = 0
    for B, T in stretches:
        if rows and states is not None:
            ended.insert(0, states[:, B:])
            states = states[:, :B]
        piece = Wx[first : first + T * B].unflatten(0, (T, B)).transpose(0, 1)
        every_state, states = flashrnn(
            piece, R, b, states, cell, backend, config=config, return_states="h"
        )
        rows.append(every_state.squeeze(0).transpose(0, 1).flatten(0, 1).flatten(1))
        first += T * B
    assert states is not None, "a packed batch has a step"
    return torch.cat(rows), torch.cat([states, *ended], 1)
