"""One step of one direction of a layer without gradients, by a ``Stepper`` that is kept.

A stepper reads R from a fixed address. It is made anew when the weights move, change their dtype,
or anything else changes that it depends on. Each step uses the weights' present values, however
they were written: R is read from the layer's own memory if a kernel can read it there; otherwise R,
and always the bias, is copied at every step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashrnn import backends
from flashrnn.cells.spec import Cell
from flashrnn.config import FlashRNNConfig
from flashrnn.nn.precision import config_on
from flashrnn.nn.weights import Weights
from flashrnn.problem import autocast_enabled
from flashrnn.stepper import Stepper


class _Kept(NamedTuple):
    """A stepper with what it depends on.

    Attributes:
        key: all that determines a stepper, except the weights' values.
        R: ``[Gr, N, D, D]``, in the memory that the stepper reads.
        b: ``[Gb, N, D]``, the same.
        stepper: ``None`` where ``vanilla`` computes, whose steppers keep values.
    """

    key: tuple[object, ...]
    R: Tensor
    b: Tensor
    stepper: Stepper | None


# One for each direction of each layer that exists.
_kept: WeakKeyDictionary[torch.nn.Module, dict[int, _Kept]] = WeakKeyDictionary()


def can_be_kept(x: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor]) -> bool:
    """Whether :func:`step` may compute a step; otherwise it runs as a sequence of length one."""
    tensors = (x, *weights, *states)
    return (
        backends.fused_on(x.device)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and backends.is_direct(*tensors)
        and not autocast_enabled(x.device.type)
        # A CUDA graph may outlive what is kept here.
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def stepper_of(
    layer: torch.nn.Module,
    row: int,
    weight_hh: Tensor,
    R: Tensor,
    b: Tensor,
    cell: Cell,
    backend: str,
    config: FlashRNNConfig | None,
) -> Stepper | None:
    """The stepper of a direction of a layer; ``None`` if ``vanilla`` is what computes it, or if
    the config asks for what only a sequence has: another dtype, or fields of upstream's.

    Args:
        layer: whose stepper it is; :func:`can_be_kept` holds for its weights.
        row: which direction of which of its layers.
        weight_hh: what R is made of, by a view or not.
        R: ``[Gr, N, D, D]``.
        b: ``[Gb, N, D]``.
        cell: the cell.
        backend: a backend's name, or ``"auto"``.
        config: further options.
    """
    if config is not None and (config.of_upstream or config.dtype is not None):
        return None
    # Memory that is given back goes to the stream that used it.
    stream = torch.cuda.current_stream(R.device).cuda_stream if R.is_cuda else None
    where = weight_hh.data_ptr(), R.shape, R.stride(), R.dtype, R.device
    key = *where, stream, cell, backend, config
    rows = _kept.setdefault(layer, {})
    kept = rows.get(row)
    if kept is None or kept.key != key:
        # Tensors that may be written within torch.inference_mode and outside.
        with torch.inference_mode(False), torch.no_grad():
            lies_there = R.data_ptr() == weight_hh.data_ptr()
            if not (lies_there and R.is_contiguous() and R.data_ptr() % 16 == 0):
                R = torch.empty_like(R, memory_format=torch.contiguous_format).copy_(R)
            b = torch.empty_like(b, memory_format=torch.contiguous_format).copy_(b)
            stepper = Stepper(R, b, cell, backend, config=config)
        fused = stepper if stepper.backend != "vanilla" else None
        # A config may change: what counts is how it was.
        kept = rows[row] = _Kept((*key[:-1], copy.copy(config)), R.detach(), b, fused)
    elif kept.stepper is not None:
        if kept.R.data_ptr() != R.data_ptr():
            kept.R.copy_(R)
        kept.b.copy_(b)
    return kept.stepper


def step(
    layer: torch.nn.Module,
    row: int,
    x: Tensor,
    weights: Weights,
    states: Tensor | None,
    cell: Cell,
    backend: str,
) -> Tensor | None:
    """The states after a step, ``[S, B, N, D]``; ``None`` if ``vanilla`` is what computes it.

    Args:
        layer: whose weights these are; :func:`can_be_kept` holds for them, x and states.
        row: which direction of which of its layers.
        x: ``[B, I]``.
        weights: those of the direction, which has no projection.
        states: ``[S, B, N, D]``, those before the step; ``None``: zeros.
        cell: the cell.
        backend: a backend's name, or ``"auto"``.
    """
    W, R, b, weight_hh, _ = weights
    stepper = stepper_of(layer, row, weight_hh, R, b, cell, backend, config_on(x.device))
    if stepper is None:
        return None
    return stepper(linear(x, W).unflatten(1, (-1, *b.shape[1:])), states)
