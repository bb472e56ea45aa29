"""A small network on top of ``flashrnn()``: embedding, recurrent layers, output layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashrnn import flashrnn
from flashrnn.cells import resolve

FORGET_BIAS = 3.0


class RecurrentLayer(nn.Module):
    """A linear projection of the input to the gates, and the recurrence of N heads.

    Works for every cell: what it has to know, it reads from the cell's gates.

    Args:
        function: a name out of :func:`flashrnn.available_functions`.
        N: number of heads.
        D: head dimension; input and output have N·D features.
        backend: as in :func:`flashrnn.flashrnn`.
        dtype: of the recurrence; ``None``: that of the parameters.
    """

    def __init__(
        self, function: str, N: int, D: int, backend: str = "auto", dtype: str | None = None
    ) -> None:
        super().__init__()
        cell = resolve(function)
        self.function, self.N, self.D = function, N, D
        self.backend, self.dtype = backend, dtype
        self.norm = nn.LayerNorm(N * D)
        self.projection = nn.Linear(N * D, len(cell.fed_by("Wx")) * N * D, bias=False)
        self.R = nn.Parameter(torch.randn(len(cell.fed_by("R")), N, D, D) / D**0.5)
        self.b = nn.Parameter(torch.zeros(len(cell.fed_by("b")), N, D))
        if "f" in cell.gate_names("b"):
            # A forget gate that starts open lets gradients reach far back.
            nn.init.constant_(self.b[cell.gate_names("b").index("f")], FORGET_BIAS)

    def forward(self, x: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """One layer over a sequence.

        Args:
            x: ``[B, T, N·D]``.
            states: ``[S, B, 1, N, D]`` or ``None``.

        Returns:
            ``[B, T, N·D]`` and the last states, ``[S, B, 1, N, D]``.
        """
        Wx = self.projection(self.norm(x)).unflatten(-1, (-1, self.N, self.D))
        every_state, last_states = flashrnn(
            Wx,
            self.R,
            self.b,
            states,
            self.function,
            self.backend,
            dtype=self.dtype,
            return_states="h",
        )
        return x + every_state.squeeze(0).flatten(-2).to(x.dtype), last_states


class RecurrentNetwork(nn.Module):
    """Embedding, recurrent layers, output layer.

    Args:
        tokens: number of tokens.
        outputs: number of classes.
        layers: number of recurrent layers.
        function: as the rest, see :class:`RecurrentLayer`.
        N: ...
        D: ...
        backend: ...
        dtype: ...
    """

    def __init__(
        self,
        tokens: int,
        outputs: int,
        layers: int,
        function: str,
        N: int,
        D: int,
        backend: str = "auto",
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, N * D)
        self.layers = nn.ModuleList(
            RecurrentLayer(function, N, D, backend, dtype) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(N * D)
        self.output = nn.Linear(N * D, outputs)

    def forward(self, tokens: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits at every position.

        Args:
            tokens: ``[B, T]``, int64.
            states: ``[layers, S, B, 1, N, D]``, as returned by the call before; ``None`` at
                the beginning of a sequence.

        Returns:
            logits ``[B, T, outputs]``, and the states after the last token.
        """
        x = self.embedding(tokens)
        last_states = []
        for k, layer in enumerate(self.layers):
            x, last = layer(x, None if states is None else states[k])
            last_states.append(last)
        return self.output(self.norm(x)), torch.stack(last_states)
