"""``sLSTM``: the layer of xLSTM's sLSTM blocks."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import conv1d, dropout, group_norm, pad, silu

from flashrnn import backends
from flashrnn.cells.library import slstm
from flashrnn.config import FlashRNNConfig
from flashrnn.functional import flashrnn
from flashrnn.nn.stepping import can_be_kept, stepper_of
from flashrnn.problem import autocast_enabled

_EPSILON = 1e-5


class SLSTMState(NamedTuple):
    """The state of an :class:`sLSTM` between calls.

    Attributes:
        window: ``[B, K - 1, H]``, the last inputs, which the convolution needs again.
        cells: ``[4, B, N, D]``, the states h, c, n and m; float32 if the layer has 16 bits.
    """

    window: Tensor
    cells: Tensor


class sLSTM(torch.nn.Module):
    """The sLSTM layer of xLSTM (Beck et al., 2024, arXiv:2405.04517; appendix on sLSTM blocks).

    A causal depthwise convolution with SiLU feeds the gates i and f, the input itself z and o, each
    by projections within its head and without bias. The cell is ``"slstm"``, with N heads. Its h is
    normalized head by head. The rest of a block (the norm before the layer, the residual and the
    feed-forward network) is not part of it.

    Args:
        hidden_size: H, features of the input and the output, in all heads together.
        heads: N heads of D = H / N units.
        conv_size: K, the steps that the convolution sees, the present one among them; 0: there is
            none.
        dropout: the probability with which, in training, an element of h is dropped before it is
            normalized.
        block: the index of the layer's block in a network of blocks, from 0 ...
        blocks: ... and their number. The first biases of f are those of the paper's code, a power
            law over the units of a head, ``5 - 12 * (d / (D - 1)) ** (0.3 + 1.3 * block / (blocks
            - 1))``: units of a head forget slowly to fast, in later blocks more of them slowly.
        device: of the weights.
        dtype: of the weights.
        backend: as in :func:`flashrnn.flashrnn`.
        config: further options of the cell, such as clips; see :class:`flashrnn.FlashRNNConfig`.

    Attributes:
        conv_weight: ``[H, 1, K]``, the latest step last; ``None`` without convolution.
        conv_bias: ``[H]``; the same.
        weight: ``[4, N, D, D]``, the projections of i, f, z and o: ``[g, n, d]`` is what unit d of
            head n gets from the features of head n.
        recurrent_weight: ``[4, N, D, D]``, R.
        bias: ``[4, N, D]``.
        norm_weight: ``[H]``, what the normalized h is multiplied by.

    Raises:
        TypeError: a size that is no integer.
        ValueError: sizes, or a probability, that are not accepted.

    Example:
        >>> layer = sLSTM(64, heads=4)
        >>> y, state = layer(torch.randn(8, 32, 64))
        >>> y, state = layer.step(torch.randn(8, 64), state)
        >>> y.shape
        torch.Size([8, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int = 4,
        conv_size: int = 4,
        dropout: float = 0.0,
        block: int = 0,
        blocks: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        config: FlashRNNConfig | None = None,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "heads": heads, "conv_size": conv_size}
        for name, size in (sizes | {"block": block, "blocks": blocks}).items():
            if not isinstance(size, numbers.Integral):
                raise TypeError(f"{name}={size!r} is {type(size).__name__}; accepted is an integer")
        if hidden_size < 1 or heads < 1 or hidden_size % heads:
            raise ValueError(
                f"{hidden_size} units in {heads} heads; accepted is a multiple of heads"
            )
        if conv_size < 0:
            raise ValueError(f"conv_size={conv_size}; accepted are 0, no convolution, and more")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout}; accepted is a probability, from 0 to 1")
        if not 0 <= block < blocks:
            raise ValueError(f"block={block} of blocks={blocks}; accepted are 0 to blocks - 1")
        self.hidden_size, self.heads, self.conv_size = hidden_size, heads, conv_size
        self.dropout, self.block, self.blocks = dropout, block, blocks
        self.backend, self.config = backends.checked(backend), config
        N, D = heads, hidden_size // heads

        def parameter(*shape: int) -> Parameter:
            return Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.conv_weight = parameter(hidden_size, 1, conv_size) if conv_size else None
        self.conv_bias = parameter(hidden_size) if conv_size else None
        self.weight = parameter(4, N, D, D)
        self.recurrent_weight = parameter(4, N, D, D)
        self.bias = parameter(4, N, D)
        self.norm_weight = parameter(hidden_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """First values: those of the paper's code, and of ``torch.nn.Conv1d``."""
        if self.conv_weight is not None and self.conv_bias is not None:
            bound = self.conv_size**-0.5
            self.conv_weight.uniform_(-bound, bound)
            self.conv_bias.uniform_(-bound, bound)
        self.weight.normal_(std=(2 / (5 * self.hidden_size)) ** 0.5)
        self.recurrent_weight.zero_()
        self.norm_weight.fill_(1)
        self.bias.zero_()
        D = self.bias.shape[2]
        exponent = 0.3 + 1.3 * self.block / max(self.blocks - 1, 1)
        unit = torch.arange(D, device=self.bias.device)
        self.bias[1] = 5 - 12 * (unit / max(D - 1, 1)) ** exponent

    @classmethod
    def from_xlstm(cls, layer: Any, *, backend: str = "auto") -> sLSTM:
        """The same layer as an ``sLSTMLayer`` of the package ``xlstm`` (2.0.6), weights copied.

        Its ``fgate`` feeds the slot of i and its ``igate`` that of f, as there; its norm multiplies
        by ``1 + weight``, and by 1 where it has no weight. It computes in the dtype of the input.

        Raises:
            ValueError: its cell is no sLSTM.
        """
        settings, theirs = layer.config, layer.slstm_cell
        if settings.function != "slstm":
            raise ValueError(f"the layer's cell is {settings.function!r}; accepted is 'slstm'")
        projections = (layer.fgate, layer.igate, layer.zgate, layer.ogate)
        weight = torch.stack([gate.weight.detach() for gate in projections])
        mine = cls(
            settings.embedding_dim,
            settings.num_heads,
            settings.conv1d_kernel_size,
            settings.dropout,
            settings._block_idx,
            settings._num_blocks,
            weight.device,
            weight.dtype,
            backend=backend,
            config=FlashRNNConfig(
                gradient_recurrent_cut=settings.gradient_recurrent_cut,
                gradient_recurrent_clipval=settings.gradient_recurrent_clipval,
                forward_clipval=settings.forward_clipval,
            ),
        )
        with torch.no_grad():
            if mine.conv_weight is not None and mine.conv_bias is not None:
                mine.conv_weight.copy_(layer.conv1d.conv.weight)
                mine.conv_bias.copy_(layer.conv1d.conv.bias)
            mine.weight.copy_(weight)
            # To its common layouts: head, input unit, gate, unit; and head, gate, unit.
            R = theirs._recurrent_kernel_int2ext(theirs._recurrent_kernel_)
            mine.recurrent_weight.copy_(R.permute(2, 0, 3, 1))
            mine.bias.copy_(theirs._bias_int2ext(theirs._bias_).transpose(0, 1))
            if layer.group_norm.weight is not None:
                mine.norm_weight.copy_(layer.group_norm.weight_proxy)
        return mine.train(layer.training)

    def extra_repr(self) -> str:
        """The sizes, and what is not as by default."""
        text = f"{self.hidden_size}, heads={self.heads}, conv_size={self.conv_size}"
        if self.dropout:
            text += f", dropout={self.dropout}"
        if self.blocks > 1:
            text += f", block={self.block}, blocks={self.blocks}"
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"

    def forward(self, x: Tensor, state: SLSTMState | None = None) -> tuple[Tensor, SLSTMState]:
        """Run the layer over a batch of sequences.

        Args:
            x: ``[B, T, H]``, T ≥ 1.
            state: what an earlier call returned, to go on from; ``None``: zeros.

        Returns:
            ``[B, T, H]``, and the state after the last step.

        Raises:
            TypeError: another dtype than the weights', or another kind of state.
            ValueError: another shape.
        """
        if x.ndim != 3 or x.shape[2] != self.hidden_size or not x.shape[1]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; accepted is [B, T, {self.hidden_size}], T ≥ 1"
            )
        self._check(x, state)
        Wx, window = self._gates(x, None if state is None else state.window)
        every_state, last = flashrnn(
            Wx,
            self.recurrent_weight,
            self.bias,
            None if state is None else state.cells.unsqueeze(2),
            slstm,
            self.backend,
            config=self.config,
            return_states="h",
        )
        return self._normalized(every_state.squeeze(0)), SLSTMState(window, last.squeeze(2))

    def step(self, x: Tensor, state: SLSTMState | None = None) -> tuple[Tensor, SLSTMState]:
        """Run the layer one step further: :meth:`forward` over one step, at less cost.

        Args:
            x: ``[B, H]``.
            state: what the last call returned; ``None``: zeros.

        Returns:
            ``[B, H]``, and the state after the step.

        Raises:
            TypeError: as :meth:`forward`.
            ValueError: another shape.
        """
        if x.ndim != 2 or x.shape[1] != self.hidden_size:
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted is [B, {self.hidden_size}]")
        self._check(x, state)
        if self._forward_pre_hooks:
            # They may make the weights, as those of torch.nn.utils.prune do.
            y, state = self(x.unsqueeze(1), state)
            return y.squeeze(1), state
        stepper = None
        R, b = self.recurrent_weight, self.bias
        weights = [self.conv_weight, self.conv_bias, self.weight, R, b, self.norm_weight]
        if can_be_kept(x, [weight for weight in weights if weight is not None], state or ()):
            stepper = stepper_of(self, 0, R, R, b, slstm, self.backend, self.config)
        if stepper is None:
            y, state = self.forward(x.unsqueeze(1), state)
            return y.squeeze(1), state
        Wx, window = self._gates(x.unsqueeze(1), None if state is None else state.window)
        cells = stepper(Wx.squeeze(1), None if state is None else state.cells)
        return self._normalized(cells[0].to(x.dtype)), SLSTMState(window, cells)

    def _check(self, x: Tensor, state: SLSTMState | None) -> None:
        """Raise an error unless x is of the weights' dtype and the state fits x and the layer."""
        if not (x.dtype == self.weight.dtype or autocast_enabled(x.device.type)):
            raise TypeError(
                f"x is of {x.dtype}, the weights are of {self.weight.dtype}; convert one of them"
            )
        if state is None:
            return
        if not isinstance(state, SLSTMState):
            raise TypeError(
                f"state is {type(state).__name__}; accepted is what an earlier call returned, "
                "or None"
            )
        B, N, D = x.shape[0], *self.bias.shape[1:]
        expected = (B, max(self.conv_size - 1, 0), self.hidden_size), (4, B, N, D)
        if tuple(part.shape for part in state) != expected:
            given = ", ".join(str(tuple(part.shape)) for part in state)
            raise ValueError(
                f"state has the shapes {given}; with this input they must be "
                f"{expected[0]}, [B, K - 1, H], and {expected[1]}, [4, B, N, D]"
            )

    def _gates(self, x: Tensor, window: Tensor | None) -> tuple[Tensor, Tensor]:
        """``Wx`` ``[B, T, 4, N, D]`` of x, and the inputs that the next steps' windows see."""
        convolved, before = x, max(self.conv_size - 1, 0)
        seen = pad(x, (0, 0, before, 0)) if window is None else torch.cat([window, x], 1)
        if self.conv_weight is not None:
            found = conv1d(
                seen.transpose(1, 2), self.conv_weight, self.conv_bias, groups=self.hidden_size
            )
            convolved = silu(found).transpose(1, 2)
        heads = self.heads, -1
        gates = [
            torch.einsum("btni,gndi->btgnd", part.unflatten(2, heads), weight)
            for part, weight in ((convolved, self.weight[:2]), (x, self.weight[2:]))
        ]
        # A copy: a view would keep all of the sequence.
        return torch.cat(gates, 2), seen[:, seen.shape[1] - before :].clone()

    def _normalized(self, h: Tensor) -> Tensor:
        """``[..., H]``: h ``[..., N, D]``, each head's to mean 0 and variance 1, times a weight."""
        rows = dropout(h, self.dropout, self.training).reshape(-1, self.hidden_size)
        found = group_norm(rows, self.heads, self.norm_weight, eps=_EPSILON)
        return found.view(*h.shape[:-2], self.hidden_size)
