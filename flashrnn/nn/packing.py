"""Which row is which where sequences of several lengths share the rows of a tensor.

A packed batch is one as :class:`torch.nn.utils.rnn.PackedSequence` has it: its sequences are sorted
by falling length, and the rows of step t follow those of step t − 1. Its ``batch_sizes``, on the
CPU, are for every t the number of sequences that have a step t.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Packing(NamedTuple):
    """Which row is which in a packed batch.

    Attributes:
        batch_sizes: the number of sequences that have a step t, for every t.
        reversal: ``[rows]``; the row that takes each row's place when every sequence is reversed.
    """

    batch_sizes: tuple[int, ...]
    reversal: Tensor

    @classmethod
    def of(cls, batch_sizes: Tensor, device: torch.device) -> Packing:
        """The packing with these batch sizes (int64, on the CPU) and the rows' device."""
        first, _, sequence, step = _rows(batch_sizes)
        reversal = first[_lengths(batch_sizes)[sequence] - 1 - step] + sequence
        return cls(tuple(batch_sizes.tolist()), reversal.to(device))


class Segments(NamedTuple):
    """Sequences in the rows ``[rows, ·]`` of a tensor, as a packed batch. All int64, on the CPU.

    Attributes:
        rows: which row of the tensor each row of the packed batch is.
        batch_sizes: those of the packed batch.
        order: the sequences, the longest first. Those of no steps are not among them.
    """

    rows: Tensor
    batch_sizes: Tensor
    order: Tensor

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor, stride: int) -> Segments:
        """Sequences by their first rows, ``[n]``, the distance between their steps, and lengths."""
        order = lengths.argsort(descending=True, stable=True)[: int((lengths > 0).sum())]
        # How many sequences are longer than t steps.
        batch_sizes = len(lengths) - lengths.bincount().cumsum(0)[:-1]
        _, _, sequence, step = _rows(batch_sizes)
        return cls(starts[order][sequence] + stride * step, batch_sizes, order)


def between_resets(reset: Tensor) -> tuple[Segments, Tensor, Tensor]:
    """What resets ``[T, B]`` (bool, on the CPU) cut a batch ``[T, B, ·]`` into.

    Returns:
        The segments; for each sequence its first one, or −1 if it begins with a reset, ``[B]``;
        and its last one, ``[B]``.
    """
    T, B = reset.shape
    cut = reset.clone()
    cut[0] = True
    sequence, start = cut.t().nonzero().unbind(1)
    end = torch.cat([start[1:], start.new_tensor([T])])
    end = torch.where(end == 0, T, end)
    count = cut.sum(0)
    last = count.cumsum(0) - 1
    first = torch.where(reset[0], -1, last - count + 1)
    return Segments.of(start * B + sequence, end - start, B), first, last


def one_after_another(batch_sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """How the rows of a packed batch become sequences one after another, and back.

    Args:
        batch_sizes: those of the packed batch.
        device: that of the rows.

    Returns:
        ``cu_seqlens`` ``[B + 1]``, on the CPU, whose values are then known; where each packed row
        goes; and where it comes back to; both ``[rows]``, for :func:`moved`.
    """
    cu_seqlens = pad(_lengths(batch_sizes).cumsum(0), (1, 0))
    _, row, sequence, step = _rows(sent(batch_sizes, device), int(cu_seqlens[-1]))
    there = sent(cu_seqlens, device)[sequence] + step
    return cu_seqlens, there, moved(row, there)


def moved(x: Tensor, to: Tensor) -> Tensor:
    """Each row of x at its new place. The gradient's rows are read there, and none is added to."""
    return torch.empty_like(x).index_copy_(0, to, x)


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """On a device, whose work nobody waits for."""
    return numbers.to(device, non_blocking=True)


def _rows(batch_sizes: Tensor, count: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a packed batch the first row of each step; all rows, their sequences and their steps.

    ``count`` is the number of rows, without which a GPU that has ``batch_sizes`` is waited for.
    """
    device = batch_sizes.device
    steps = torch.arange(len(batch_sizes), device=device)
    step = steps.repeat_interleave(batch_sizes, output_size=count)
    first, row = batch_sizes.cumsum(0) - batch_sizes, torch.arange(len(step), device=device)
    return first, row, row - first[step], step


def _lengths(batch_sizes: Tensor) -> Tensor:
    """``[B]``, the longest first."""
    sequence = torch.arange(int(batch_sizes[0]), device=batch_sizes.device)
    return (batch_sizes[:, None] > sequence).sum(0)
