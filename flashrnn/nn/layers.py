"""``LSTM``, ``GRU`` and ``RNN``: :class:`Recurrent` with the arguments and types of torch.nn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flashrnn.cells.spec import Cell
from flashrnn.nn.modes import elman_relu
from flashrnn.nn.recurrent import Recurrent


class LSTM(Recurrent, torch.nn.LSTM):
    """``torch.nn.LSTM``, by this package's backends; see :class:`Recurrent`.

    Every argument up to ``dtype`` is torch.nn's, in its order; those that follow are
    :class:`Recurrent`'s, as is what is raised.

    Example:
        >>> layer = LSTM(16, 32, num_layers=2, bidirectional=True)
        >>> output, (h, c) = layer(torch.randn(10, 4, 16))
        >>> output.shape, h.shape
        (torch.Size([10, 4, 64]), torch.Size([4, 4, 32]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
        backend: str = "auto",
        forget_bias: float | None = None,
        variational: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
    ) -> None:
        Recurrent.__init__(
            self,
            "lstm",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            heads=heads,
            backend=backend,
            forget_bias=forget_bias,
            variational=variational,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
        )


class GRU(Recurrent, torch.nn.GRU):
    """``torch.nn.GRU``, by this package's backends; see :class:`Recurrent`.

    Every argument up to ``dtype`` is torch.nn's, in its order; those that follow are
    :class:`Recurrent`'s, as is what is raised. ``proj_size`` is refused, as there.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
        backend: str = "auto",
        variational: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
    ) -> None:
        _refuse_projection(proj_size)
        Recurrent.__init__(
            self,
            "gru",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            heads=heads,
            backend=backend,
            variational=variational,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
        )


class RNN(Recurrent, torch.nn.RNN):
    """``torch.nn.RNN``, by this package's backends; see :class:`Recurrent`.

    Every argument up to ``dtype`` is torch.nn's, in its order; those that follow are
    :class:`Recurrent`'s, as is what is raised. ``proj_size`` is refused, as there.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
        backend: str = "auto",
        variational: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
    ) -> None:
        _refuse_projection(proj_size)
        cells: dict[str, str | Cell] = {"tanh": "elman", "relu": elman_relu}
        if nonlinearity not in cells:
            raise ValueError(f"nonlinearity={nonlinearity!r}; accepted are 'tanh' and 'relu'")
        Recurrent.__init__(
            self,
            cells[nonlinearity],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            heads=heads,
            backend=backend,
            variational=variational,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
        )
        self.nonlinearity = nonlinearity


def _refuse_projection(proj_size: object) -> None:
    # 0, which asks for none, stands before `device` where that is given by position.
    if proj_size is not None and proj_size != 0:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
