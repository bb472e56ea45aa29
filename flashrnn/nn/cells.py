"""``LSTMCell``, ``GRUCell`` and ``RNNCell``: one step of one layer, with torch.nn's contract."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashrnn import backends
from flashrnn.nn.modes import MODES
from flashrnn.nn.scan import scan
from flashrnn.nn.stepping import can_be_kept, step
from flashrnn.nn.torch_kernels import compute_cell
from flashrnn.nn.weights import Weights
from flashrnn.problem import autocast_enabled


class _Cell(torch.nn.RNNCellBase):
    """What the cells have beyond torch.nn's."""

    backend: str = "auto"
    heads: int = 1

    def _begin(self, heads: int, backend: str, device: Any) -> None:
        """Take the further arguments. The weights are on the device, or, of several heads, on the
        meta device, as torch.nn has them: the recurrent matrix becomes one of blocks."""
        self.backend, self.heads = backends.checked(backend), heads
        if heads == 1:
            return
        D = self.hidden_size // heads
        for name, weight in list(self.named_parameters()):
            shape = (len(weight), D) if name == "weight_hh" else weight.shape
            made = torch.empty(shape, dtype=weight.dtype, device=device)
            setattr(self, name, torch.nn.Parameter(made))
        self.reset_parameters()

    def _kernel(self, step: Callable[..., Any], input: Tensor, states: Any) -> Any:
        """A batch's step by PyTorch's kernel.

        As torch.nn's forward ends, for calls that need nothing of what comes before there: on a CPU
        that takes as long as to choose who computes. All others, wrong ones too, go through it.
        """
        return step(input, states, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What ``torch.jit.script`` compiles in place of it: torch.nn's cell, weights shared."""
        kind = type(self).__name__
        if type(self) not in (LSTMCell, GRUCell, RNNCell):
            raise ValueError(f"{kind} cannot be torch.nn's: its class may compute something else")
        if self.heads != 1:
            raise ValueError(
                f"torch.jit.script compiles torch.nn's {kind} in place of this one, which has no "
                f"heads: this one has {self.heads}"
            )
        twin = copy.copy(self)
        for name in ("heads", "backend"):
            twin.__dict__.pop(name, None)
        twin.__class__ = getattr(torch.nn, kind)
        return twin

    def extra_repr(self) -> str:
        """Torch.nn's, and behind it what torch.nn does not have."""
        text = super().extra_repr()
        if self.heads != 1:
            text += f", heads={self.heads}"
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"


def _made_on(heads: int, hidden_size: int, device: Any) -> Any:
    """Where torch.nn makes the weights, once the heads are found to be such."""
    if not isinstance(heads, int):
        raise TypeError(f"heads should be of type int, got: {type(heads).__name__}")
    if heads < 1 or hidden_size % heads:
        raise ValueError(f"{hidden_size} units in {heads} heads; accepted is a multiple of heads")
    return device if heads == 1 else "meta"


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """``torch.nn.LSTMCell``, by this package's backends.

    Every argument up to ``dtype`` is torch.nn's, as are weights, results and the types of errors.
    ``heads`` and ``backend`` are :class:`flashrnn.nn.Recurrent`'s: with N heads ``weight_hh`` is
    ``[4 * hidden_size, hidden_size // N]``, as that of a layer; with ``"auto"``, PyTorch's own
    kernel computes the step of one head on devices without a fused backend, such as the CPU.

    Example:
        >>> cell = LSTMCell(16, 32)
        >>> h, c = cell(torch.randn(4, 16))
        >>> h, c = cell(torch.randn(4, 16), (h, c))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
        backend: str = "auto",
    ) -> None:
        made_on = _made_on(heads, hidden_size, device)
        super().__init__(input_size, hidden_size, bias, made_on, dtype)
        self._begin(heads, backend, device)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The states after one step.

        Args:
            input: ``[B, input_size]`` or ``[input_size]``.
            hx: ``(h, c)`` before the step, each ``[B, hidden_size]`` or ``[hidden_size]``;
                ``None``: zeros.

        Returns:
            ``(h, c)`` after the step, of the shapes of ``hx``.

        Raises:
            ValueError: a tensor has neither one nor two dimensions.
            RuntimeError: sizes or dtypes do not fit.
        """
        if compute_cell("LSTM", self.heads, self.backend, input.device):
            if input.dim() == 2:
                if hx is None:
                    zeros = input.new_zeros(input.shape[0], self.hidden_size)
                    return self._kernel(torch.lstm_cell, input, (zeros, zeros))
                if len(hx) == 2 and hx[0].dim() == 2 == hx[1].dim():
                    return self._kernel(torch.lstm_cell, input, hx)
            return super().forward(input, hx)
        h, c = _step(self, "LSTM", input, hx)
        return h, c


class GRUCell(_Cell, torch.nn.GRUCell):
    """``torch.nn.GRUCell``, by this package's backends; see :class:`LSTMCell`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
        backend: str = "auto",
    ) -> None:
        made_on = _made_on(heads, hidden_size, device)
        super().__init__(input_size, hidden_size, bias, made_on, dtype)
        self._begin(heads, backend, device)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h after one step: as :meth:`LSTMCell.forward`, with h in place of ``(h, c)``."""
        if compute_cell("GRU", self.heads, self.backend, input.device):
            if input.dim() == 2 and (hx is None or hx.dim() == 2):
                h = input.new_zeros(input.shape[0], self.hidden_size) if hx is None else hx
                return self._kernel(torch.gru_cell, input, h)
            return super().forward(input, hx)
        (h,) = _step(self, "GRU", input, None if hx is None else (hx,))
        return h


class RNNCell(_Cell, torch.nn.RNNCell):
    """``torch.nn.RNNCell``, by this package's backends; see :class:`LSTMCell`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
        backend: str = "auto",
    ) -> None:
        made_on = _made_on(heads, hidden_size, device)
        super().__init__(input_size, hidden_size, bias, nonlinearity, made_on, dtype)
        self._begin(heads, backend, device)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h after one step: as :meth:`LSTMCell.forward`, with h in place of ``(h, c)``."""
        mode = f"RNN_{self.nonlinearity.upper()}"
        # For an unknown nonlinearity PyTorch's method raises the error.
        if mode not in MODES:
            return super().forward(input, hx)
        if compute_cell(mode, self.heads, self.backend, input.device):
            if input.dim() == 2 and (hx is None or hx.dim() == 2):
                h = input.new_zeros(input.shape[0], self.hidden_size) if hx is None else hx
                return self._kernel(MODES[mode].step, input, h)
            return super().forward(input, hx)
        (h,) = _step(self, mode, input, None if hx is None else (hx,))
        return h


def _step(
    layer: LSTMCell | GRUCell | RNNCell, mode: str, input: Tensor, states: tuple[Tensor, ...] | None
) -> list[Tensor]:
    """The states after one step, by a backend of this package."""
    cell, H = MODES[mode].cell, layer.hidden_size
    kind = type(layer).__name__
    given = () if states is None else tuple(states)
    if states is not None and len(given) != len(cell.states):
        raise RuntimeError(
            f"{kind}: hx has {len(given)} tensors; accepted are {len(cell.states)}, "
            f"{', '.join(cell.states)}"
        )
    names = ("input", *cell.states)[: 1 + len(given)]
    for name, tensor in zip(names, (input, *given), strict=True):
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
        rows = [state if batched else state.unsqueeze(0) for state in given]
        if any(row.shape != (x.shape[0], H) for row in rows):
            raise RuntimeError(
                f"{kind}: hx has shapes {[tuple(state.shape) for state in given]}; accepted is, "
                f"for each of {', '.join(cell.states)}, {(x.shape[0], H) if batched else (H,)}"
            )
        start = torch.stack(rows).unflatten(-1, (1, layer.heads, -1))
    _check_dtypes(kind, input, layer.weight_hh)
    # Each in memory of its own: callers change states in place, and detach them.
    last = [state.clone() for state in _last(layer, mode, x, start).flatten(2).unbind(0)]
    return last if batched else [state.squeeze(0) for state in last]


def _last(
    layer: LSTMCell | GRUCell | RNNCell, mode: str, x: Tensor, start: Tensor | None
) -> Tensor:
    """The states after one step of ``x`` ``[B, I]``, in the dtype of h."""
    cell, biases = MODES[mode].cell, [layer.bias_ih, layer.bias_hh] if layer.bias else []
    parameters = [layer.weight_ih, layer.weight_hh, *biases]
    weights = Weights.of(mode, cell, layer.heads, layer.weight_ih, layer.weight_hh, biases)
    if can_be_kept(x, parameters, () if start is None else (start,)):
        before = None if start is None else start.squeeze(2)
        after = step(layer, 0, x, weights, before, cell, layer.backend)
        if after is not None:
            return after.to(x.dtype)
    W, R, b, *_ = weights
    h, last = scan(x.unsqueeze(0), W, R, b, start, cell, layer.backend)
    return last.squeeze(2).to(h.dtype)


def _check_dtypes(kind: str, input: Tensor, weight: Tensor) -> None:
    if input.dtype != weight.dtype and not autocast_enabled(input.device.type):
        raise RuntimeError(
            f"{kind}: input is {input.dtype}, the weights are {weight.dtype}; accepted is one dtype"
        )
