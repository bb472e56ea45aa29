"""``LSTMCell``, ``GRUCell`` and ``RNNCell``: one step of one layer, with torch.nn's contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashrnn import backends
from flashrnn.nn.modes import MODES, bias, recurrent_matrix, torchs_compute
from flashrnn.nn.scan import scan
from flashrnn.nn.stepping import can_be_kept, step


class LSTMCell(torch.nn.LSTMCell):
    """``torch.nn.LSTMCell``, by this package's backends.

    Every argument up to ``dtype`` is torch.nn's, as are weights, results and the types of errors.
    ``backend`` is :class:`flashrnn.nn.Recurrent`'s: with ``"auto"``, PyTorch's own kernel computes
    the step on devices without a fused backend, as the CPU.

    Example:
        >>> cell = LSTMCell(16, 32)
        >>> h, c = cell(torch.randn(4, 16))
        >>> h, c = cell(torch.randn(4, 16), (h, c))
    """

    backend: str = "auto"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.backend = backends.checked(backend)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The states after one step.

        Args:
            input: ``[B, input_size]`` or ``[input_size]``.
            hx: ``(h, c)`` before it, each ``[B, hidden_size]`` or ``[hidden_size]``; ``None``:
                zeros.

        Returns:
            ``(h, c)`` after it.

        Raises:
            ValueError: other than one or two dimensions.
            RuntimeError: another shape or dtype that does not fit.
        """
        if torchs_compute("LSTM", 1, self.backend, input.device):
            return super().forward(input, hx)
        h, c = _step(self, "LSTM", input, hx)
        return h, c


class GRUCell(torch.nn.GRUCell):
    """``torch.nn.GRUCell``, by this package's backends; see :class:`LSTMCell`."""

    backend: str = "auto"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.backend = backends.checked(backend)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h after one step: as :meth:`LSTMCell.forward`, with h in place of ``(h, c)``."""
        if torchs_compute("GRU", 1, self.backend, input.device):
            return super().forward(input, hx)
        (h,) = _step(self, "GRU", input, None if hx is None else (hx,))
        return h


class RNNCell(torch.nn.RNNCell):
    """``torch.nn.RNNCell``, by this package's backends; see :class:`LSTMCell`."""

    backend: str = "auto"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)
        self.backend = backends.checked(backend)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h after one step: as :meth:`LSTMCell.forward`, with h in place of ``(h, c)``."""
        mode = f"RNN_{self.nonlinearity.upper()}"
        # PyTorch's raises an error for a nonlinearity that is none.
        if mode not in MODES or torchs_compute(mode, 1, self.backend, input.device):
            return super().forward(input, hx)
        (h,) = _step(self, mode, input, None if hx is None else (hx,))
        return h


def _step(
    layer: LSTMCell | GRUCell | RNNCell, mode: str, input: Tensor, states: tuple[Tensor, ...] | None
) -> list[Tensor]:
    """The states after one step, by a backend of this package."""
    cell, D = MODES[mode].cell, layer.hidden_size
    kind = type(layer).__name__
    given = (input, *(states or ()))
    # Cut to one length: within Dynamo of PyTorch 2.9 zip() is strict whenever it is told which.
    for name, tensor in zip(("input", *cell.states)[: len(given)], given, strict=True):
        if tensor.dim() not in (1, 2):
            raise ValueError(
                f"{kind}: Expected {name} to be 1D or 2D, got {tensor.dim()}D: accepted are one "
                "row of features, or a batch of rows"
            )
    batched = input.dim() == 2
    x = input if batched else input.unsqueeze(0)
    if x.shape[1] != layer.input_size:
        raise RuntimeError(
            f"{kind}: input has {x.shape[1]} features; accepted are {layer.input_size}"
        )
    start = None
    if states is not None:
        rows = [state if batched else state.unsqueeze(0) for state in states]
        if len(rows) != len(cell.states) or any(row.shape != (len(x), D) for row in rows):
            raise RuntimeError(
                f"{kind}: hx has shapes {[tuple(state.shape) for state in states]}; accepted is, "
                f"for each of {', '.join(cell.states)}, {(len(x), D) if batched else (D,)}"
            )
        start = torch.stack(rows).unflatten(-1, (1, 1, D))
    _check_dtypes(kind, input, layer.weight_hh)
    last = _last(layer, mode, x, start)
    return [state if batched else state.squeeze(0) for state in last.flatten(2).unbind(0)]


def _last(
    layer: LSTMCell | GRUCell | RNNCell, mode: str, x: Tensor, start: Tensor | None
) -> Tensor:
    """The states after one step of ``x`` ``[B, I]``, in the dtype of h."""
    cell, D = MODES[mode].cell, layer.hidden_size
    biases: list[Tensor] = [layer.bias_ih, layer.bias_hh] if layer.bias else []
    weights = [layer.weight_ih, layer.weight_hh, *biases]
    if can_be_kept(x, weights, () if start is None else (start,)):
        before = None if start is None else start.squeeze(2)
        after = step(layer, 0, x, weights, before, mode, cell, 1, layer.backend)
        if after is not None:
            return after.to(x.dtype)
    R = recurrent_matrix(mode, layer.weight_hh, 1, D)
    b = bias(mode, biases, 1, D) if biases else R.new_zeros(len(cell.fed_by("b")), 1, D)
    h, last = scan(x.unsqueeze(0), layer.weight_ih, R, b, start, cell, layer.backend)
    return last.squeeze(2).to(h.dtype)


def _check_dtypes(kind: str, input: Tensor, weight: Tensor) -> None:
    if input.dtype != weight.dtype and not torch.is_autocast_enabled(input.device.type):
        raise RuntimeError(
            f"{kind}: input is {input.dtype}, the weights are {weight.dtype}; accepted is one dtype"
        )
