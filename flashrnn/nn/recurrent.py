"""``Recurrent``: layers of any cell, with the contract of ``torch.nn.LSTM``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from flashrnn import backends
from flashrnn.nn import arguments, stack
from flashrnn.nn.parameters import RecurrentParameters


class Recurrent(RecurrentParameters):
    """Layers of a recurrent cell, with the arguments, weights and results of ``torch.nn.LSTM``.

    :class:`LSTM`, :class:`GRU` and :class:`RNN` are names of it that are subclasses of torch.nn's
    classes, too. This one is a subclass of ``torch.nn.RNNBase`` alone, which ``torch.compile``
    traces with ``fullgraph=True``, as it does not a ``torch.nn.LSTM``.

    Args:
        cell: ``"lstm"``, ``"gru"``, ``"elman"``, ``"slstm"``, another name out of
            :func:`flashrnn.available_functions`, or a cell made by :func:`flashrnn.cell`.
        input_size: features of the input.
        hidden_size: units of a layer, in all heads together.
        num_layers: layers, each but the first reading the output of the one before.
        bias: whether there are biases.
        batch_first: whether input and output are ``[B, T, ·]`` in place of ``[T, B, ·]``.
        dropout: the probability with which, in training, an element of the output of every layer
            but the last is dropped.
        bidirectional: whether each layer has a second direction, from the last step to the first,
            whose output follows that of the first.
        proj_size: of ``"lstm"``: h is projected to this size; 0: it is not.
        device: of the weights.
        dtype: of the weights.
        forget_bias: what the biases of the gate f begin with, 1 for example, so that a new layer
            remembers (Gers et al., 2000; Jozefowicz et al., 2015); of two biases their sum.
            ``None``: what torch.nn begins with.
        heads: N blocks of the recurrent matrix, each of ``hidden_size // heads`` units; in torch.nn
            one, and the matrix dense.
        variational: whether ``dropout`` drops the same elements at all steps of a sequence (Gal &
            Ghahramani, 2016), in place of others at each.
        recurrent_dropout: the probability with which, in training, the recurrent matrix reads 0 for
            a unit of h, the same units at all steps of a sequence (ibid.). What is read is scaled
            by ``1 / (1 - recurrent_dropout)``. Less than 1.
        zoneout: the probability with which, in training, a unit of a state stays as it was before
            the step (Krueger et al., 2017): one for all states, or a tuple with one for each, such
            as ``(0.05, 0.5)`` of ``(h, c)``. In evaluation a state is the mean of both, so
            weighted. A new state is computed from the others' new values before any of them stays.
        backend: ``"auto"``, or one of :func:`flashrnn.flashrnn`'s, which then computes every call
            or an error says why it cannot. With ``"auto"``, what torch.nn computes, too, is
            computed by PyTorch's own kernels on devices without a fused backend, as the CPU.

    Attributes:
        weight_ih_l0: ``[Gw * N * D, input_size]``, the input matrix of layer 0. ``_l1`` and so on
            are those of further layers, ``_reverse`` after that those of the reverse direction.
            The gates are those of ``cell.gate_names("Wx")``, one after the other, in torch.nn's
            order for torch.nn's cells.
        weight_hh_l0: ``[Gr * N * D, D]``, the recurrent matrix: row ``(g * N + n) * D + d`` is that
            of unit d of head n in gate g, the columns are the units of head n.
        bias_ih_l0: ``[Gw * N * D]``, for the cells that torch.nn has, which add it to ...
        bias_hh_l0: ``[Gr * N * D]``.
        bias_l0: ``[Gb * N * D]``, for all other cells in place of these two.
        weight_hr_l0: ``[proj_size, hidden_size]``, with ``proj_size``.

    Raises:
        TypeError: an argument of another type.
        ValueError: a value that is not accepted.

    Example:
        >>> layer = Recurrent("slstm", 16, 64, num_layers=2, heads=4, batch_first=True)
        >>> output, (h, c, n, m) = layer(torch.randn(8, 32, 16))
        >>> output.shape, c.shape
        (torch.Size([8, 32, 64]), torch.Size([2, 8, 64]))
    """

    def extra_repr(self) -> str:
        """Torch.nn's, and before and behind it what torch.nn does not have."""
        text = super().extra_repr()
        if type(self) is Recurrent:
            text = f"{self.cell.name!r}, {text}"
        if self.heads != 1:
            text += f", heads={self.heads}"
        if self.backend != "auto":
            text += f", backend={self.backend!r}"
        if self.forget_bias is not None:
            text += f", forget_bias={self.forget_bias}"
        if self.variational:
            text += ", variational=True"
        if self.recurrent_dropout:
            text += f", recurrent_dropout={self.recurrent_dropout}"
        if self.zoneout:
            text += f", zoneout={self.zoneout}"
        return text

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        """Run all layers over a batch of sequences.

        Args:
            input: ``[T, B, input_size]``, with ``batch_first`` ``[B, T, input_size]``; one sequence
                ``[T, input_size]``; or a :class:`torch.nn.utils.rnn.PackedSequence`.
            hx: what the states start from, zeros when absent: for each state of the cell ``[L, B,
                hidden_size]``, or without B for one sequence. L is ``num_layers``, or twice that
                with two directions, those of a layer following each other. With
                ``proj_size``, h has that size. A cell of several states takes a tuple,
                ``(h, c)`` for LSTM, a cell of one state the tensor.
            reset: bool or numbers, of the input's shape but its last dimension: where it is not 0,
                the states start anew from zeros before that step, in both directions as if a
                sequence ended there and another began. ``hx`` is what the first part starts from,
                and the last states are those of the last part.
            cu_seqlens: integers ``[B + 1]``, from 0 to the number of rows: ``input`` is then
                ``[rows, input_size]``, B sequences one after the other, and sequence b has the rows
                from ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``, or none. ``hx`` and the last states
                are those of a batch of B. On the CPU they are checked; on a GPU nobody waits for
                their values, and what is out of range is moved into it.

        Returns:
            h of the last layer at every step, in the form of ``input``, with ``hidden_size``
            features (or ``proj_size``), twice that with two directions; and the last states, in the
            form of ``hx``.

        Raises:
            ValueError: an input of other than two or three dimensions, or of another dtype than the
                weights.
            RuntimeError: another shape that does not fit, or no steps.
            TypeError: ``hx`` is no tensor, or no tuple of them; ``reset`` is no tensor;
                ``cu_seqlens`` is no tensor of integers.
        """
        if cu_seqlens is not None:
            if reset is not None or isinstance(input, PackedSequence):
                raise ValueError("cu_seqlens goes with a tensor as input, and without reset")
            return self._forward_rows(input, hx, cu_seqlens)
        if isinstance(input, PackedSequence):
            if reset is not None:
                raise ValueError("reset goes with a tensor as input; cut a PackedSequence yourself")
            return self._forward_packed(input, hx)
        dim = input.dim()
        if dim not in (2, 3):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {dim}D: "
                "accepted are one sequence, [T, input_size], or a batch of them"
            )
        states = arguments.states_in(self, hx, dim)
        batched = dim == 3
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
            states = None if states is None else [state.unsqueeze(1) for state in states]
        arguments.check_input(self, input, 3)
        T, B = (input.size(1), input.size(0)) if self.batch_first else input.shape[:2]
        if T == 0:
            raise RuntimeError(
                f"Expected sequence length to be larger than 0 in RNN, got {tuple(input.shape)}"
            )
        arguments.check_states(self, states, input, B)
        if reset is not None:
            reset = arguments.flags_in(self, reset, input, batched)
        output, last = stack.run(self, input, states, reset=reset)
        if not batched:
            output = output.squeeze(0 if self.batch_first else 1)
            last = [state.squeeze(1) for state in last]
        return output, arguments.returned(last)

    def _forward_packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        arguments.check_input(self, data, 2)
        states = arguments.states_in(self, hx, 3)
        arguments.check_states(self, states, data, int(batch_sizes[0]))
        if states is not None and sorted_indices is not None:
            states = [state.index_select(1, sorted_indices) for state in states]
        output, last = stack.run(self, data, states, batch_sizes)
        if unsorted_indices is not None:
            last = [state.index_select(1, unsorted_indices) for state in last]
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, arguments.returned(last)

    def _forward_rows(self, input: Tensor, hx: Any, cu_seqlens: Tensor) -> tuple[Tensor, Any]:
        if input.dim() != 2:
            raise RuntimeError(
                "with cu_seqlens input must have 2 dimensions, [rows, input_size], got "
                f"{input.dim()}"
            )
        arguments.check_input(self, input, 2)
        arguments.check_bounds_are_integers(cu_seqlens)
        cu_seqlens = cu_seqlens.long()
        if cu_seqlens.device.type == "cpu" and not backends.recorded():
            arguments.check_bounds(cu_seqlens, input.shape[0])
        if input.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN, got no rows")
        states = arguments.states_in(self, hx, 3)
        arguments.check_states(self, states, input, cu_seqlens.shape[0] - 1)
        output, last = stack.run(self, input, states, cu_seqlens=cu_seqlens)
        return output, arguments.returned(last)

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Run all layers one step further, as a decoder or an agent does.

        The same as :meth:`forward` over a sequence of one step, at less cost; where the module has
        hooks that run before it, it is that call.

        Args:
            x: the input of the step, ``[B, input_size]`` or ``[input_size]``.
            state: what the last call returned, :meth:`forward`'s ``hx``; ``None``: zeros.

        Returns:
            h of the last layer, ``[B, hidden_size]`` (or ``proj_size``) or without B, and the
            states after the step.

        Raises:
            ValueError: a layer with two directions, of which one begins at the end, or in training
                with dropout that has one mask for all steps; an input of other than one or two
                dimensions, or of another dtype than the weights.
            RuntimeError: another shape that does not fit.
            TypeError: ``state`` is no tensor, or no tuple of them.

        Example:
            >>> layer = Recurrent("lstm", 16, 32, num_layers=2)
            >>> x, state = torch.randn(10, 4, 16), None
            >>> for t in range(10):
            ...     y, state = layer.step(x[t], state)
        """
        if self.bidirectional:
            raise ValueError("bidirectional=True; accepted is one direction: a step has no end")
        if self.training and (self.recurrent_dropout or (self.variational and self.dropout)):
            raise ValueError(
                "recurrent or variational dropout in training; accepted is a call with the whole "
                "sequence, of which each step has one mask, or a layer in evaluation: layer.eval()"
            )
        if x.dim() not in (1, 2):
            raise ValueError(
                f"{type(self).__name__}.step: Expected x to be 1D or 2D, got {x.dim()}D: accepted "
                "are one row of features, [input_size], or a batch of rows"
            )
        batched = x.dim() == 2
        if self._forward_pre_hooks:
            # They may make the weights, as those of torch.nn.utils.prune and weight_norm do.
            time = 1 if batched and self.batch_first else 0
            y, state = self(x.unsqueeze(time), state)
            return y.squeeze(time), state
        states = arguments.states_in(self, state, x.dim() + 1)
        if not batched:
            x = x.unsqueeze(0)
            states = None if states is None else [state.unsqueeze(1) for state in states]
        arguments.check_input(self, x, 2)
        arguments.check_states(self, states, x, x.shape[0])
        y, last = stack.step(self, x, states)
        if not batched:
            y, last = y.squeeze(0), [state.squeeze(1) for state in last]
        return y, arguments.returned(last)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What ``torch.jit.script`` compiles in place of it: torch.nn's layer, weights shared."""
        from flashrnn.nn.replacing import torchs

        return torchs(self)
