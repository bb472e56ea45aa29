"""One direction of a layer: the input product and the recurrence, by this package's backends.

So layers are computed where :mod:`flashrnn.nn.at_once` is not chosen: by ``vanilla``, which is
slower with the options of sequences, and by a fused backend where it lacks them. No call here has
any. Two layouts come in: ``[T, B, I]``, sequences of one length; and rows ``[rows, I]`` of
sequences of several lengths, in the order of :class:`torch.nn.utils.rnn.PackedSequence`, with a
:class:`Packing` that says which row is which.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashrnn.cells.spec import Cell
from flashrnn.config import FlashRNNConfig
from flashrnn.functional import flashrnn
from flashrnn.layer import recurrent_layer
from flashrnn.nn.segments import rows_of
from flashrnn.problem import rnn_tf32_allowed


class Packing(NamedTuple):
    """Which row is which in a packed batch, its sequences sorted by falling length.

    Attributes:
        batch_sizes: the number of sequences that have a step t, for every t. Their rows at step t
            follow each other, and come after those of step t − 1.
        reversal: ``[rows]``; the row that takes each row's place when every sequence is reversed.
    """

    batch_sizes: tuple[int, ...]
    reversal: Tensor

    @classmethod
    def of(cls, batch_sizes: Tensor, device: torch.device) -> Packing:
        """The packing with these batch sizes (int64, on the CPU) and the rows' device."""
        step, sequence = rows_of(batch_sizes)
        offsets = batch_sizes.cumsum(0) - batch_sizes
        each = torch.arange(int(batch_sizes[0]), device=batch_sizes.device)
        lengths = (batch_sizes[:, None] > each).sum(0)
        reversal = offsets[lengths[sequence] - 1 - step] + sequence
        return cls(tuple(batch_sizes.tolist()), reversal.to(device))


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
    W = W.unflatten(0, (-1, N, D))
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
        x.transpose(0, 1), W, R, b, states, cell, backend, config=config
    )
    return every_state[0].flatten(2).transpose(0, 1), last_states


def config_on(device: torch.device) -> FlashRNNConfig | None:
    """On a GPU float32 follows the setting that torch.nn's layers follow there."""
    if device.type != "cuda":
        return None
    if torch.compiler.is_compiling():
        from flashrnn.backends import constants

        return _WITH_TF32 if constants.rnn_tf32_allowed() else _WITHOUT_TF32
    return _WITH_TF32 if rnn_tf32_allowed() else _WITHOUT_TF32


_WITH_TF32, _WITHOUT_TF32 = FlashRNNConfig(allow_tf32=True), FlashRNNConfig(allow_tf32=False)


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
        every_state, states = flashrnn(piece, R, b, states, cell, backend, config=config)
        rows.append(every_state[0].transpose(0, 1).flatten(0, 1).flatten(1))
        first += T * B
    assert states is not None, "a packed batch has a step"
    return torch.cat(rows), torch.cat([states, *ended], 1)
