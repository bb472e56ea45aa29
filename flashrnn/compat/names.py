"""What upstream's modules offer besides ``flashrnn()``, in its layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from flashrnn import functional
from flashrnn.cells import library
from flashrnn.cells.spec import Cell, resolve
from flashrnn.compat.call import permute_to
from flashrnn.config import LAYOUTS, FlashRNNConfig
from flashrnn.problem import autocast_enabled

__all__ = [
    "DTYPES",
    "DTYPE_DICT",
    "DTYPE_DICT_REV",
    "flashrnn_forward",
    "flashrnn_pointwise_function_registry",
    "get_config",
    "permute_to",
    "rnn_function_registry",
    "zero_state",
]

DTYPES = Literal["bfloat16", "float16", "float32"]
DTYPE_DICT = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
DTYPE_DICT_REV = {dtype: name for name, dtype in DTYPE_DICT.items()}

_CELLS = (library.slstm, library.lstm, library.gru, library.elman)


def _entry(cell: Cell) -> dict[str, Any]:
    numbers = tuple(len(cell.fed_by(source)) for source in ("R", "Wx"))
    gates, biases = len(cell.gates), len(cell.fed_by("b"))
    return {
        "gates_states": (*numbers, gates, biases, len(cell.states)),
        "constants": {},
        "simple_agg": numbers == (gates, gates) and biases == gates,
    }


# Of each function the gates that R and Wx hold, those of the cell and those that b holds, and the
# states. Cells of your own are made by flashrnn.cell and need no entry.
rnn_function_registry = {cell.name: _entry(cell) for cell in _CELLS}


def get_config(
    Wx: Tensor, R: Tensor, b: Tensor, function: str, backend: str, dtype: str | None
) -> FlashRNNConfig:
    """The config of a call without one: ``Wx`` ``[B, T, Gw, N, D]``; dtype ``None``: bfloat16."""
    return FlashRNNConfig(
        head_dim=Wx.shape[4],
        num_heads=Wx.shape[3],
        batch_size=Wx.shape[0],
        function=function,
        backend=backend,
        dtype="bfloat16" if dtype is None else dtype,
    )


def zero_state(config: FlashRNNConfig, Wx: Tensor) -> Tensor:
    """``initial_val`` as initial states in the config's ``output_shape``, T being 1.

    Args:
        config: with ``num_heads`` and ``head_dim``.
        Wx: in the config's ``input_shape``; the states have its dtype and device.

    Raises:
        ValueError: sizes that the config leaves open.
    """
    B = Wx.shape[config.input_shape.index("B")]
    N, D = config.num_heads, config.head_dim
    if N is None or D is None:
        raise ValueError("a config without num_heads or head_dim; accepted is one that has both")
    cell = resolve("lstm" if config.function is None else config.function)
    start = Wx.new_tensor(config.initial_values(cell.states)).view(-1, 1, 1, 1, 1)
    states = start.repeat(1, B, 1, N, D)
    order = permute_to(LAYOUTS["output_shape"], config.output_shape)
    return states if order is None else states.permute(order)


Pointwise = Callable[..., tuple[Tensor, Tensor]]


def _pointwise(cell: Cell) -> Pointwise:
    def pointwise(
        Wx: Tensor, Ry: Tensor, b: Tensor, states: Tensor, constants: Mapping[str, float]
    ) -> tuple[Tensor, Tensor]:
        """A step: ``Wx`` ``[B, Gw, N, D]``, ``Ry`` ``[B, Gr, N, D]``, ``b`` ``[Gb, N, D]``,
        ``states`` ``[B, S, N, D]``; returns the new states and the gates ``[B, G, N, D]``.
        """
        fed = {"Wx": Wx.unbind(1), "R": Ry.unbind(1), "b": b.expand(len(Wx), *b.shape).unbind(1)}
        parts: list[list[Tensor]] = [[] for _ in cell.gates]
        for source, tensors in fed.items():
            for k, tensor in zip(cell.fed_by(source), tensors, strict=True):
                parts[k].append(tensor)
        gates = tuple(torch.stack(part).sum(0) for part in parts)
        return torch.stack(tuple(cell.step(states.unbind(1), gates)), 1), torch.stack(gates, 1)

    return pointwise


flashrnn_pointwise_function_registry = {cell.name: _pointwise(cell) for cell in _CELLS}


def flashrnn_forward(
    Wx: Tensor,
    states: Tensor,
    R: Tensor,
    b: Tensor,
    pointwise_forward: Pointwise,
    constants: Mapping[str, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """A time loop around any pointwise function.

    Args:
        Wx: ``[T, B, Gw, N, D]``.
        states: ``[1, B, S, N, D]``.
        R: ``[N, P, Gr, D]``, P being summed over.
        b: ``[Gb, N, D]``.
        pointwise_forward: ``(Wx, Ry, b, states, constants=...) -> (states, gates)``, as those of
            ``flashrnn_pointwise_function_registry``.
        constants: handed to it.

    Returns:
        The states after every step, ``[T, B, S, N, D]``, and after the last one,
        ``[1, B, S, N, D]``.
    """
    current, every = states[0], []
    for Wx_t in Wx:
        Ry = torch.einsum("bhp,hpgd->bghd", current[:, 0], R)
        current, _ = pointwise_forward(Wx_t, Ry, b, current, constants=constants or {})
        every.append(current)
    return torch.stack(every), current[None]


def fwbw(function: str, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scan of one function by one backend, as upstream's ``fwbw`` modules have it."""

    def scan(
        states_initial: Tensor,
        Wx: Tensor,
        R: Tensor,
        b: Tensor,
        backward_recurrent_clip_val: float | None = None,
        autocast_kernel_dtype: str = "float32",
    ) -> tuple[Tensor, Tensor]:
        """``states_initial`` ``[1, S, B, N, D]``, ``Wx`` ``[B, T, G, N, D]``, ``R``
        ``[G, N, D, D]``, ``b`` ``[G, N, D]``; returns ``[T, S, B, N, D]`` and ``[1, S, B, N, D]``.
        Under autocast it computes in ``autocast_kernel_dtype``, else in the inputs' dtype.
        """
        config = FlashRNNConfig(
            gradient_recurrent_clipval=backward_recurrent_clip_val, output_shape="TSBHD"
        )
        dtype = None
        if autocast_enabled(Wx.device.type):
            dtype = autocast_kernel_dtype
        return functional.flashrnn(
            Wx, R, b, states_initial, function, config=config, backend=backend, dtype=dtype
        )

    return scan
