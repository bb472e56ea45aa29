"""Sequences within rows of a larger tensor, as a packed batch that is longest first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Sequences that lie in the rows ``[rows, ·]`` of a tensor. All are int64, on the CPU.

    Attributes:
        rows: which row of the tensor each row of the packed batch is.
        batch_sizes: as :class:`torch.nn.utils.rnn.PackedSequence` has them.
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
        step, sequence = rows_of(batch_sizes)
        return cls(starts[order][sequence] + stride * step, batch_sizes, order)


def rows_of(batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The step and the sequence, the longest being the first, of each row of a packed batch."""
    where = batch_sizes.device
    offsets = batch_sizes.cumsum(0) - batch_sizes
    step = torch.repeat_interleave(torch.arange(len(batch_sizes), device=where), batch_sizes)
    return step, torch.arange(len(step), device=where) - offsets[step]


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
