"""Weights as torch.nn's layers have them, as ``recurrent_layer()`` takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashrnn import backends
from flashrnn.cells.signature import Signature
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
        D = whole.shape[1]
        R, b = R.view(-1, heads, D, D), b.view(-1, heads, D)
        return cls(weight_ih, R, b, weight_hh, weight_hr)


Copies = Callable[[tuple[int, ...], Sequence[int], torch.dtype, torch.device], None]
"""Several copies in one launch, as :func:`flashrnn.backends.copies.enqueue` has them."""


def recurrence(
    mode: str,
    cell: Signature,
    heads: int,
    weight_hh: Tensor,
    biases: Sequence[Tensor],
    copy: Copies | None = None,
) -> tuple[Tensor, Tensor]:
    """R and b of a layer that is not projected, by :meth:`Weights.of`'s arguments.

    They may have fewer dimensions than :func:`flashrnn.flashrnn` takes: who reads their memory
    needs no view. ``copy`` takes the place of several operations of PyTorch's, where it can; with
    it, :func:`flashrnn.backends.is_direct` holds for the tensors.
    """
    if mode == "GRU" and biases and copy is not None and _copied_so(weight_hh, *biases):
        return _gru(weight_hh, biases, copy)
    R = recurrent_matrix(mode, weight_hh)
    if biases:
        return R, bias(mode, biases)
    return R, R.new_zeros(len(cell.fed_by("b")), heads, weight_hh.shape[1])


# Of more elements PyTorch's copies take less time.
_MOST_COPIED = 2**20


def _copied(*tensors: Tensor) -> bool:
    """Whether several copies of tensors in one launch are possible, and faster.

    Nothing must record them or ask for a derivative, as a graph of the gradient does.
    """
    return backends.is_direct(*tensors) and _copied_so(*tensors)


def _copied_so(*tensors: Tensor) -> bool:
    """The same of tensors for which :func:`flashrnn.backends.is_direct` is known to hold."""
    dtype, differentiates = tensors[0].dtype, torch.is_grad_enabled()
    return (
        tensors[0].numel() <= _MOST_COPIED
        and all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in tensors)
        and not (differentiates and any(tensor.requires_grad for tensor in tensors))
    )


def _gru(weight_hh: Tensor, biases: Sequence[Tensor], copy: Copies) -> tuple[Tensor, Tensor]:
    """The same of torch.nn's GRU by one launch."""
    H, size = len(weight_hh) // 3, weight_hh.itemsize
    R, b = weight_hh.new_empty(weight_hh.shape), weight_hh.new_empty(4 * H)
    ih, hh = (bias.data_ptr() for bias in biases)
    of_b, (counts, addresses) = b.data_ptr(), _turned(weight_hh, R, 1)
    g, z = H * size, 2 * H * size  # Bytes of a gate, and of two.
    # (g, r, z, n): R feeds g, and Wx feeds n.
    counts += H, 2 * H, H
    addresses += hh + z, 0, of_b, ih, hh, of_b + g, ih + z, 0, of_b + g + z
    copy(counts, addresses, R.dtype, R.device)
    return R, b


def _turned(of: Tensor, to: Tensor, by: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The copies of three gates' equal parts, turned as ``roll`` turns them: by 1 from (r, z, g) to
    (g, r, z), by 2 back."""
    part, first, there = of.numel() // 3, of.data_ptr(), to.data_ptr()
    begin, rest = by * part * of.itemsize, (3 - by) * part * of.itemsize
    return ((3 - by) * part, by * part), (first, 0, there + begin, first + rest, 0, there)


def of_input(mode: str, biases: Sequence[Tensor]) -> tuple[Tensor | None, Sequence[Tensor]]:
    """The bias that may as well be added to the input product, if there is one, and the others, of
    which :func:`recurrence` then makes b.

    Of torch.nn's GRU each part of a bias of b's is a sum or a copy.
    """
    if mode in MODES and mode != "GRU" and biases:
        bias_ih, bias_hh = biases
        return bias_ih, (bias_hh,)
    return None, biases


def recurrent_matrix(mode: str, weight_hh: Tensor, copy: Copies | None = None) -> Tensor:
    """R out of ``weight_hh`` ``[Gr * N * D, D]``, as :func:`recurrence` gives it."""
    if mode != "GRU":
        return weight_hh
    if copy is not None and _copied(weight_hh):
        turned = weight_hh.new_empty(weight_hh.shape)
        copy(*_turned(weight_hh, turned, 1), turned.dtype, turned.device)
        return turned
    # torch.nn has (r, z, g) there, the cell gru (g, r, z). roll() takes 2 to 4 times as long.
    of_rz = weight_hh.shape[0] // 3 * 2
    return torch.cat([weight_hh[of_rz:], weight_hh[:of_rz]])


def bias(mode: str, biases: Sequence[Tensor]) -> Tensor:
    """``b`` ``[Gb * N * D]`` out of torch.nn's two biases, or out of one that is b."""
    if len(biases) == 1:
        return biases[0]
    b_ih, b_hh = biases
    if mode == "GRU":
        rz = len(b_ih) // 3 * 2
        # (g, r, z, n): R feeds g, and Wx feeds n.
        return torch.cat([b_hh[rz:], b_ih[:rz] + b_hh[:rz], b_ih[rz:]])
    # Added before any view: else both gradients would share memory, and what changes gradients
    # in place, as clipping does, would change each of them twice.
    return b_ih + b_hh


def recurrence_gradients(
    mode: str,
    d_R: Tensor | None,
    d_b: Tensor | None,
    shape: torch.Size,
    count: int,
    copy: Copies | None = None,
) -> list[Tensor | None]:
    """Those of ``weight_hh`` and the biases, out of those of R and b.

    Args:
        mode: as above.
        d_R: ``None``, as below: it is not asked for.
        d_b: ...
        shape: that of ``weight_hh``.
        count: how many biases there are.
        copy: ...
    """
    if (
        (mode == "GRU" and count and copy is not None)
        and (d_R is not None and d_b is not None)
        and _copied(d_R, d_b)
    ):
        return [*_gru_gradients(d_R, d_b, shape, copy)]
    if d_R is not None:
        d_R = (torch.cat([d_R[1:], d_R[:1]]) if mode == "GRU" else d_R).view(shape)
    if d_b is None or not count:
        return [d_R, *[None] * count]
    d_b = d_b.reshape(-1)  # Not by flatten(), which gradients of a batch do not have.
    if mode not in MODES:
        return [d_R, d_b]
    if mode == "GRU":
        H = len(d_b) // 4
        # (g, r, z, n): of (r, z, n) nothing else has the memory.
        return [d_R, d_b[H:], torch.cat([d_b[H : 3 * H], d_b[:H]])]
    # In memory of its own each, as above.
    return [d_R, d_b, d_b.clone()]


def _gru_gradients(
    d_R: Tensor, d_b: Tensor, shape: torch.Size, copy: Copies
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of ``weight_hh``, ``bias_ih`` and ``bias_hh`` of torch.nn's GRU by one launch."""
    d_b = d_b.flatten()
    H = len(d_b) // 4
    d_hh, d_bias_hh, d_bias_ih = d_R.new_empty(shape), d_b.new_empty(3 * H), d_b[H:]
    counts, addresses = _turned(d_R, d_hh, 2)
    of, to, two = d_b.data_ptr(), d_bias_hh.data_ptr(), 2 * H * d_b.itemsize
    counts += 2 * H, H
    addresses += of + two // 2, 0, to, of, 0, to + two
    copy(counts, addresses, d_R.dtype, d_R.device)
    return d_hh, d_bias_ih, d_bias_hh
