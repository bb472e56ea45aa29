"""Copies of rows that lie apart, by wide elements.

PyTorch copies what is not contiguous element by element: 16 bits at a time take 2.4 times as long
as 16 bytes at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashrnn import backends

FEWEST = 2**20
"""Elements from which on :func:`contiguous` asks whether wide ones can be copied. For fewer, that
takes the host longer than it saves."""

# complex128 stands for 16 bytes: PyTorch has no other type of that size.
_WIDE = torch.complex128, torch.int64


def contiguous(x: Tensor) -> Tensor:
    """``x.contiguous()``, with the same bits."""
    # Where operations are recorded sizes may be symbols, of which nothing is to be asked.
    if backends.recorded() or x.numel() < FEWEST or x.is_contiguous():
        return x.contiguous()
    if (torch.is_grad_enabled() and x.requires_grad) or not backends.is_direct(x):
        return x.contiguous()
    if x.device.type not in ("cuda", "cpu"):  # Others may lack the types.
        return x.contiguous()
    (wide,) = widened(x)
    return wide.contiguous().view(x.dtype)


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with their rows' bytes as the widest elements, of 16 bytes or 8, of which all
    those rows consist; as they are, where they do not."""
    for dtype in _WIDE:
        if all(_consists_of(dtype.itemsize, tensor) for tensor in tensors):
            return tuple(tensor.view(dtype) for tensor in tensors)
    return tensors


def _consists_of(multiple: int, x: Tensor) -> bool:
    """Whether rows are contiguous, and begin and end at multiples of so many bytes."""
    size = x.element_size()
    places = x.shape[-1], x.storage_offset(), *x.stride()[:-1]
    aligned = x.stride(-1) == 1 and x.data_ptr() % multiple == 0
    return aligned and all(place * size % multiple == 0 for place in places)
