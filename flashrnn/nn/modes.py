"""The cells of torch.nn's layers, and the conversion of their weights to ``R`` and ``b``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashrnn import backends
from flashrnn.cells.library import elman, gru, lstm
from flashrnn.cells.spec import Cell, cell


@cell(states=("h",), gates=("g",))
def elman_relu(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The simple recurrent network with the rectifier of ``torch.nn.RNN``: ``h' = relu(g)``."""
    (g,) = gates
    return (torch.relu(g),)


class Mode(NamedTuple):
    """A recurrence that torch.nn has.

    Attributes:
        cell: the cell that computes the same here.
        layers: PyTorch's kernel for all layers of it.
        step: PyTorch's kernel for one step of one layer.
    """

    cell: Cell
    layers: Callable[..., Any]
    step: Callable[..., Any]


MODES = {
    "LSTM": Mode(lstm, torch.lstm, torch.lstm_cell),
    "GRU": Mode(gru, torch.gru, torch.gru_cell),
    "RNN_TANH": Mode(elman, torch.rnn_tanh, torch.rnn_tanh_cell),
    "RNN_RELU": Mode(elman_relu, torch.rnn_relu, torch.rnn_relu_cell),
}
"""By the name that torch.nn has for it in ``mode``."""


def mode_of(cell: Cell) -> str:
    """torch.nn's name of a cell; the cell's own where torch.nn has none."""
    return next((name for name, mode in MODES.items() if mode.cell is cell), cell.name)


def torchs_compute(mode: str, heads: int, backend: str, device: torch.device) -> bool:
    """Whether PyTorch's own kernels compute a call."""
    return (
        backend == "auto"
        and mode in MODES
        and heads == 1
        and not backends.fused_on(device)
        # They fail within torch.func.vmap.
        and not backends.transformed()
    )


def recurrent_matrix(mode: str, weight_hh: Tensor, N: int, D: int) -> Tensor:
    """``R`` ``[Gr, N, D, D]`` out of ``weight_hh`` ``[Gr * N * D, D]``."""
    R = weight_hh.unflatten(0, (-1, N, D))
    # torch.nn has (r, z, g) there, the cell gru (g, r, z).
    return R.roll(1, 0) if mode == "GRU" else R


def bias(mode: str, biases: list[Tensor], N: int, D: int) -> Tensor:
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
    return b.unflatten(0, (-1, N, D))
