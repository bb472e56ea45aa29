"""Weights as torch.nn's layers have them, as ``recurrent_layer()`` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashrnn.cells.spec import Cell
from flashrnn.nn.modes import MODES


class Weights(NamedTuple):
    """The weights of one direction of a layer.

    Attributes:
        W: ``[Gw * N * D, I]``.
        R: ``[Gr, N, D, D]``.
        b: ``[Gb, N, D]``.
        weight_hh: ``[Gr * N * D, D]``, or with a projection ``[Gr * D, P]``.
        weight_hr: ``[P, D]``, the projection of h; ``None``: there is none.
    """

    W: Tensor
    R: Tensor
    b: Tensor
    weight_hh: Tensor
    weight_hr: Tensor | None = None

    @classmethod
    def of(
        cls,
        mode: str,
        cell: Cell,
        heads: int,
        weight_ih: Tensor,
        weight_hh: Tensor,
        biases: Sequence[Tensor],
        weight_hr: Tensor | None = None,
    ) -> Weights:
        """Out of a layer's parameters.

        Args:
            mode: torch.nn's name of the cell, or the cell's own.
            cell: the cell.
            heads: N.
            weight_ih: ``[Gw * N * D, I]``.
            weight_hh: see above, as ``weight_hr``.
            biases: torch.nn's two, or any other cell's one; none: zeros.
            weight_hr: ...
        """
        whole = weight_hh if weight_hr is None else weight_hh @ weight_hr
        R, b = recurrence(mode, cell, heads, whole, biases)
        return cls(weight_ih, R, b, weight_hh, weight_hr)


def recurrence(
    mode: str, cell: Cell, heads: int, weight_hh: Tensor, biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """R and b of a layer that is not projected, by :meth:`Weights.of`'s arguments."""
    D = weight_hh.shape[1]
    R = recurrent_matrix(mode, weight_hh, heads, D)
    if biases:
        return R, bias(mode, biases, heads, D)
    return R, R.new_zeros(len(cell.fed_by("b")), heads, D)


def recurrent_matrix(mode: str, weight_hh: Tensor, N: int, D: int) -> Tensor:
    """``R`` ``[Gr, N, D, D]`` out of ``weight_hh`` ``[Gr * N * D, D]``."""
    R = weight_hh.view(-1, N, D, D)
    # torch.nn has (r, z, g) there, the cell gru (g, r, z).
    return R.roll(1, 0) if mode == "GRU" else R


def bias(mode: str, biases: Sequence[Tensor], N: int, D: int) -> Tensor:
    """``b`` ``[Gb, N, D]`` out of torch.nn's two biases, or out of any other cell's one."""
    if mode not in MODES:
        (b,) = biases
    elif mode == "GRU":
        b_ih, b_hh = biases
        rz = 2 * N * D
        # (g, r, z, n): R feeds g, and Wx feeds n.
        b = torch.cat([b_hh[rz:], b_ih[:rz] + b_hh[:rz], b_ih[rz:]])
    else:
        b_ih, b_hh = biases
        # Added before any view: else both gradients would share memory, and what changes gradients
        # in place, as clipping does, would change each of them twice.
        b = b_ih + b_hh
    return b.view(-1, N, D)


def recurrence_gradients(
    mode: str, d_R: Tensor | None, d_b: Tensor | None, shape: torch.Size, count: int
) -> list[Tensor | None]:
    """Those of ``weight_hh`` and the biases, out of those of R and b.

    Args:
        mode: as above.
        d_R: ``None``, as below: it is not asked for.
        d_b: ...
        shape: that of ``weight_hh``.
        count: how many biases there are.
    """
    if d_R is not None:
        d_R = (d_R.roll(-1, 0) if mode == "GRU" else d_R).view(shape)
    if d_b is None or not count:
        return [d_R, *[None] * count]
    d_b = d_b.flatten()
    if mode not in MODES:
        return [d_R, d_b]
    if mode == "GRU":
        H = len(d_b) // 4
        g, rz, n = d_b.split([H, 2 * H, H])
        return [d_R, torch.cat([rz, n]), torch.cat([rz, g])]
    # In memory of its own each, as above.
    return [d_R, d_b, d_b.clone()]
