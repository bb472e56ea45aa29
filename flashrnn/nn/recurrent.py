"""``Recurrent``: layers of any cell, with the contract of ``torch.nn.LSTM``."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import PackedSequence

from flashrnn import backends
from flashrnn.cells.spec import Cell, resolve
from flashrnn.nn import at_once
from flashrnn.nn.modes import MODES, bias, mode_of, recurrent_matrix, torchs_compute
from flashrnn.nn.scan import Packing, scan
from flashrnn.nn.segments import Segments, between_resets
from flashrnn.nn.stepping import can_be_kept, step


class Recurrent(torch.nn.RNNBase):
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

    # What an instance of a torch.nn class has once `replace` made it one of these.
    heads: int = 1
    backend: str = "auto"
    forget_bias: float | None = None
    variational: bool = False
    _masks: at_once.Masks | None = None

    def __init__(
        self,
        cell: str | Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
        backend: str = "auto",
        forget_bias: float | None = None,
        variational: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
    ) -> None:
        # Not RNNBase's, which knows the cells of torch.nn alone.
        torch.nn.Module.__init__(self)
        _check_types(
            input_size=(input_size, int),
            hidden_size=(hidden_size, int),
            num_layers=(num_layers, int),
            bias=(bias, bool),
            batch_first=(batch_first, bool),
            proj_size=(proj_size, int),
            heads=(heads, int),
            backend=(backend, str),
            variational=(variational, bool),
        )
        _check_values(input_size, hidden_size, num_layers, dropout, proj_size, heads)
        cell = resolve(cell)
        self.mode = mode_of(cell)
        if self.mode not in MODES:
            self._cell = cell
        if proj_size and (self.mode != "LSTM" or heads != 1):
            raise ValueError(
                f"proj_size={proj_size} with cell {cell.name!r} and {heads} heads; accepted is a "
                "projection of cell 'lstm' with one head"
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bidirectional, proj_size
        self.heads, self.backend = heads, backends.checked(backend)

        if forget_bias is not None and not (bias and "f" in self.cell.gate_names("b")):
            gates = ", ".join(self.cell.gate_names("b")) if bias else "none"
            raise ValueError(
                f"forget_bias={forget_bias} for biases of the gates {gates}; accepted is None, or "
                "a cell with a bias of a gate f"
            )
        self.forget_bias, self.variational = forget_bias, variational
        self._set_masks(recurrent_dropout, zoneout)

        # RNNBase keeps both, and out of them `all_weights` and `_flat_weights`.
        self._all_weights: list[list[str]] = []
        self._flat_weights_names: list[str] = []
        for layer in range(num_layers):
            for suffix in ("", "_reverse")[: 1 + bidirectional]:
                names = []
                for name, shape in self._shapes(layer).items():
                    names.append(f"{name}_l{layer}{suffix}")
                    weight = torch.empty(shape, device=device, dtype=dtype)
                    self.register_parameter(names[-1], torch.nn.Parameter(weight))
                self._all_weights.append(names)
                self._flat_weights_names.extend(names)
        self._init_flat_weights()
        self.reset_parameters()

    @property
    def recurrent_dropout(self) -> float:
        """The probability, 0 without; as ``dropout``, it may be set at any time."""
        return 0.0 if self._masks is None else self._masks.dropout

    @recurrent_dropout.setter
    def recurrent_dropout(self, probability: float) -> None:
        self._set_masks(probability, self.zoneout or 0.0)

    @property
    def zoneout(self) -> tuple[float, ...]:
        """The probability for each state, ``()`` without; it may be set as it is given at first."""
        return self._masks.zoneout if self._masks is not None and any(self._masks.zoneout) else ()

    @zoneout.setter
    def zoneout(self, probabilities: float | Sequence[float]) -> None:
        self._set_masks(self.recurrent_dropout, probabilities)

    def _set_masks(self, recurrent_dropout: float, zoneout: float | Sequence[float]) -> None:
        names = self.cell.states
        each = tuple(zoneout) if isinstance(zoneout, Sequence) else (zoneout,) * len(names)
        if len(each) != len(names) or not all(_is_number(p) and 0 <= p <= 1 for p in each):
            raise ValueError(
                f"zoneout={zoneout!r}; accepted is a probability, from 0 to 1, or a tuple with one "
                f"for each of {', '.join(names)}"
            )
        if not _is_number(recurrent_dropout) or not 0 <= recurrent_dropout < 1:
            raise ValueError(
                f"recurrent_dropout={recurrent_dropout!r}; accepted is a probability less than 1"
            )
        if not (recurrent_dropout or any(each)):
            self._masks = None
            return
        if self.proj_size:
            raise ValueError(
                f"proj_size={self.proj_size} with recurrent_dropout or zoneout; accepted is a "
                "layer without a projection: h is what they are of"
            )
        self._masks = at_once.Masks.of(self.cell, float(recurrent_dropout), tuple(map(float, each)))

    def _shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The weights of one direction of a layer, in torch.nn's order."""
        cell, H = self.cell, self.hidden_size
        outputs = self.proj_size or H
        inputs = outputs * (1 + self.bidirectional) if layer else self.input_size
        Gw, Gr, Gb = (len(cell.fed_by(source)) for source in ("Wx", "R", "b"))
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (Gw * H, inputs),
            "weight_hh": (Gr * H, self.proj_size or H // self.heads),
        }
        if self.bias:
            if self.mode in MODES:
                shapes |= {"bias_ih": (Gw * H,), "bias_hh": (Gr * H,)}
            elif Gb:
                shapes["bias"] = (Gb * H,)
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, H)
        return shapes

    def reset_parameters(self) -> None:
        """First values: torch.nn's, but ``forget_bias``."""
        super().reset_parameters()
        if self.forget_bias is None:
            return
        f, H = self.cell.gate_names("b").index("f"), self.hidden_size
        with torch.no_grad():
            for names in self._all_weights:
                first, *others = (name for name in names if name.startswith("bias_"))
                for name in (first, *others):
                    of_f = getattr(self, name)[f * H : (f + 1) * H]
                    of_f.fill_(self.forget_bias if name == first else 0)

    @property
    def cell(self) -> Cell:
        """The cell."""
        return MODES[self.mode].cell if self.mode in MODES else self._cell

    def flatten_parameters(self) -> None:
        """Do nothing: kernels read the weights where they are.

        torch.nn's layers move theirs into one piece of memory for cuDNN, which has one head only.
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
            data, batch_sizes, sorted_indices, unsorted_indices = input
            self._check_input(data, 2)
            states = self._given(hx, 3)
            self._check_states(states, data, int(batch_sizes[0]))
            if states is not None and sorted_indices is not None:
                states = [state.index_select(1, sorted_indices) for state in states]
            output, last = self._run(data, states, batch_sizes)
            if unsorted_indices is not None:
                last = [state.index_select(1, unsorted_indices) for state in last]
            packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return packed, self._returned(last)

        if input.dim() not in (2, 3):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D: "
                "accepted are one sequence, [T, input_size], or a batch of them"
            )
        states = self._given(hx, input.dim())
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
            states = None if states is None else [state.unsqueeze(1) for state in states]
        self._check_input(input, 3)
        T, B = (input.size(1), input.size(0)) if self.batch_first else input.shape[:2]
        if T == 0:
            raise RuntimeError(
                f"Expected sequence length to be larger than 0 in RNN, got {tuple(input.shape)}"
            )
        self._check_states(states, input, B)
        if reset is not None:
            if not isinstance(reset, Tensor):
                raise TypeError(f"reset is {type(reset).__name__}; accepted is a torch.Tensor")
            if not batched:
                reset = reset.unsqueeze(0 if self.batch_first else 1)
            if reset.shape != input.shape[:2]:
                raise RuntimeError(
                    f"reset has shape {tuple(reset.shape)}; accepted is {tuple(input.shape[:2])}, "
                    "the input's without its features"
                )
            reset = reset.ne(0)
        output, last = self._run(input, states, reset=reset)
        if not batched:
            output = output.squeeze(0 if self.batch_first else 1)
            last = [state.squeeze(1) for state in last]
        return output, self._returned(last)

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
        states = self._given(state, x.dim() + 1)
        if not batched:
            x = x.unsqueeze(0)
            states = None if states is None else [state.unsqueeze(1) for state in states]
        self._check_input(x, 2)
        self._check_states(states, x, len(x))
        y, last = self._step(x, states)
        if not batched:
            y, last = y.squeeze(0), [state.squeeze(1) for state in last]
        return y, self._returned(last)

    def _given(self, hx: Any, dim: int) -> list[Tensor] | None:
        """The states in ``hx``, once they are found to have ``dim`` dimensions."""
        if hx is None:
            return None
        names = self.cell.states
        several = len(names) > 1
        states = list(hx) if several and isinstance(hx, (tuple, list)) else [hx]
        if len(states) != len(names) or not all(isinstance(state, Tensor) for state in states):
            given = [type(state).__name__ for state in states]
            raise TypeError(
                f"hx is {', '.join(given)}; accepted is "
                + (f"a tuple of tensors, ({', '.join(names)})" if several else "one tensor, h")
            )
        for state in states:
            if state.dim() != dim:
                raise RuntimeError(
                    f"hx has {state.dim()} dimensions, {tuple(state.shape)}; accepted are as many "
                    f"as those of the input: {dim}"
                )
        return states

    def _check_input(self, input: Tensor, dim: int) -> None:
        dtype = getattr(self, self._flat_weights_names[0]).dtype
        if input.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(
                f"RNN input dtype {input.dtype} does not match weight dtype {dtype}. Convert one: "
                f"input.to({dtype}), or model.to({input.dtype})"
            )
        if input.dim() != dim:
            raise RuntimeError(f"input must have {dim} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got "
                f"{input.size(-1)}"
            )

    def _check_states(self, states: list[Tensor] | None, input: Tensor, B: int) -> None:
        rows = len(self._all_weights)
        for k, state in enumerate(states or ()):
            size = self.proj_size if self.proj_size and k == 0 else self.hidden_size
            if state.shape != (rows, B, size):
                raise RuntimeError(
                    f"Expected hidden[{k}] size {(rows, B, size)}, got {tuple(state.shape)}"
                )
            if state.device != input.device:
                raise RuntimeError(f"input is on {input.device}, hx on {state.device}: move one")

    def _zeros(self, x: Tensor, B: int) -> list[Tensor]:
        """States of a cell that torch.nn has."""
        rows = len(self._all_weights)
        h = x.new_zeros(rows, B, self.proj_size or self.hidden_size)
        return [h, x.new_zeros(rows, B, self.hidden_size)] if self.mode == "LSTM" else [h]

    def _returned(self, states: Sequence[Tensor]) -> Any:
        """States as torch.nn hands them over: a tuple of several, or the one."""
        return tuple(states) if len(states) > 1 else states[0]

    def _run(
        self,
        x: Tensor,
        states: list[Tensor] | None,
        batch_sizes: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers, over a batch as it is given, with ``batch_sizes`` over packed rows, or with
        ``cu_seqlens`` over rows of sequences one after another."""
        if reset is None and cu_seqlens is None and self._is_torchs(x.device):
            return self._run_torchs(x, states, batch_sizes)
        if batch_sizes is not None and backends.jit_traced():
            raise NotImplementedError(
                "torch.jit.trace would take this PackedSequence's lengths for those of all others; "
                "accepted are cu_seqlens, or a layer of torch.nn's (flashrnn.nn.restore)"
            )
        found = self._run_at_once(x, states, batch_sizes, reset, cu_seqlens)
        if found is not None:
            return found
        if reset is not None:
            return self._run_reset(x, states, reset)
        if cu_seqlens is not None:
            bounds = cu_seqlens.cpu()
            _check_bounds(bounds, len(x))
            segments = Segments.of(bounds[:-1], bounds.diff(), 1)
            return self._run_segments(x, states, segments, len(bounds) - 1)
        if batch_sizes is not None:
            return self._run_ours(x, states, Packing.of(batch_sizes, x.device))
        if self.batch_first:
            output, last = self._run_ours(x.transpose(0, 1), states, None)
            return output.transpose(0, 1), last
        output, last = self._run_ours(x, states, None)
        return output.contiguous(), last

    def _run_at_once(
        self,
        x: Tensor,
        states: list[Tensor] | None,
        batch_sizes: Tensor | None,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]] | None:
        """The same, a layer being one call; ``None`` where it is better not to be."""
        plain = batch_sizes is None and cu_seqlens is None and reset is None
        has_masks = self._has_masks()
        if (plain and not self.bidirectional and not has_masks) or 0 in x.shape[:-1]:
            return None
        # Where operations are recorded there are no values yet that the host could read.
        unread = (reset is not None or cu_seqlens is not None) and backends.recorded()
        if not (unread or has_masks) and self._is_torchs(x.device):
            return None
        by_time = batch_sizes is None and cu_seqlens is None and not self.batch_first
        there = back = None
        if batch_sizes is not None:
            cu_seqlens, there, back = at_once.packed_rows(batch_sizes, x.device)
        elif reset is not None:
            reset = (reset.t() if by_time else reset).to(x.device)
        batch = at_once.Batch(reset, cu_seqlens)
        sizes = self.heads, self.hidden_size // self.heads
        others = [getattr(self, name) for name in self._flat_weights_names]
        others += states or ()
        rows = x.unsqueeze(0) if cu_seqlens is not None else x.transpose(0, 1) if by_time else x
        if not (unread or has_masks) and not at_once.can_be(
            rows, others, self._computed(), self.backend, *sizes, self.bidirectional, batch
        ):
            return None
        if there is not None:
            rows = at_once.moved(x, there).unsqueeze(0)
        last, directions = [], 1 + self.bidirectional
        for layer in range(self.num_layers):
            first, end = layer * directions, (layer + 1) * directions
            rows, ended = at_once.layer(
                rows,
                [self._weights(row) for row in range(first, end)],
                None if states is None else [state[first:end] for state in states],
                self._computed(),
                self.backend,
                batch,
                self._masks if self.training else None,
            )
            last.append(ended)
            if self.dropout and self.training and layer < self.num_layers - 1:
                if self.variational:
                    ones = rows.new_ones(batch.count(rows), rows.shape[2])
                    rows = rows * batch.of_sequence(dropout(ones, self.dropout), rows)
                else:
                    rows = dropout(rows, self.dropout)
        if back is not None:
            output = at_once.moved(rows.squeeze(0), back)
        elif cu_seqlens is not None:
            output = rows.squeeze(0)
        else:
            output = rows.transpose(0, 1).contiguous() if by_time else rows
        return output, [torch.cat(found).to(output.dtype) for found in zip(*last, strict=True)]

    def _has_masks(self) -> bool:
        """Whether a call has random masks that PyTorch's kernels have not."""
        varied = self.variational and self.dropout > 0 and self.num_layers > 1
        return self.training and (varied or self._masks is not None)

    def _computed(self) -> Cell:
        """The cell of a call without random masks."""
        return self.cell if self.training or self._masks is None else self._masks.evaluated

    def _is_torchs(self, device: torch.device) -> bool:
        """Whether PyTorch's kernels compute a call: they fail in a graph of training."""
        # The layer comes first: one that breaks the graph, as an LSTM does, then keeps this method
        # out of the compiler, where is_dynamo_compiling() would hold for a call that runs eagerly.
        if not torchs_compute(self.mode, self.heads, self.backend, device):
            return False
        if self._has_masks() or self._computed() is not self.cell:
            return False
        # Of an export the compiler takes nothing apart; is_exporting() holds within Dynamo of
        # PyTorch 2.9 whatever it traces for.
        return not (torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled())

    def _run_reset(
        self, x: Tensor, states: list[Tensor] | None, reset: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers over ``[T, B, ·]``, or ``[B, T, ·]``: each part between resets by itself."""
        by_time = x.transpose(0, 1) if self.batch_first else x
        T, B = by_time.shape[:2]
        if B == 0:
            return self._run(x, states)
        reset = (reset.t() if self.batch_first else reset).cpu()
        segments, first, last = between_resets(reset)
        n = len(segments.order)
        if states is not None:
            kept = (first >= 0).nonzero().squeeze(1)
            begun, kept = first[kept].to(x.device), kept.to(x.device)
            states = [
                state.new_zeros(len(state), n, state.shape[2]).index_copy(1, begun, state[:, kept])
                for state in states
            ]
        output, ended = self._run_segments(by_time.flatten(0, 1), states, segments, n)
        output, last = output.unflatten(0, (T, B)), last.to(x.device)
        ended = [state.index_select(1, last) for state in ended]
        return (output.transpose(0, 1) if self.batch_first else output), ended

    def _forward_rows(self, input: Tensor, hx: Any, cu_seqlens: Tensor) -> tuple[Tensor, Any]:
        self._check_input(input, 2)
        _check_bounds_are_integers(cu_seqlens)
        cu_seqlens = cu_seqlens.long()
        if cu_seqlens.device.type == "cpu" and not backends.recorded():
            _check_bounds(cu_seqlens, len(input))
        if len(input) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN, got no rows")
        states = self._given(hx, 3)
        self._check_states(states, input, len(cu_seqlens) - 1)
        output, last = self._run(input, states, cu_seqlens=cu_seqlens)
        return output, self._returned(last)

    def _run_segments(
        self, x: Tensor, states: list[Tensor] | None, segments: Segments, n: int
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers over n sequences in the rows of x; results in the order of both."""
        rows, order = segments.rows.to(x.device), segments.order.to(x.device)
        given = None if states is None else [state.index_select(1, order) for state in states]
        packed, ended = self._run(x.index_select(0, rows), given, segments.batch_sizes)
        output = torch.empty_like(packed).index_copy(0, rows, packed)
        # A sequence of no steps ends as it begins.
        before = states or [state.new_zeros(len(state), n, state.shape[2]) for state in ended]
        return output, [
            start.to(end.dtype).index_copy(1, order, end)
            for start, end in zip(before, ended, strict=True)
        ]

    def _run_torchs(
        self, x: Tensor, states: list[Tensor] | None, batch_sizes: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        if states is None:
            batch = x.size(0 if self.batch_first else 1) if batch_sizes is None else batch_sizes[0]
            states = self._zeros(x, int(batch))
        arguments = (
            self._returned(states),
            [getattr(self, name) for name in self._flat_weights_names],
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
        )
        layers = MODES[self.mode].layers
        if batch_sizes is None:
            output, *last = layers(x, *arguments, self.batch_first)
        else:
            output, *last = layers(x, batch_sizes, *arguments)
        return output, last

    def _step(self, x: Tensor, states: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """One step of all layers, ``[B, ·]``, by what does it fastest."""
        if not self.proj_size:
            if self._is_torchs(x.device):
                return self._step_torchs(x, states or self._zeros(x, len(x)))
            found = self._step_kept(x, states)
            if found is not None:
                return found
        time = 1 if self.batch_first else 0
        output, last = self._run(x.unsqueeze(time), states)
        return output.squeeze(time), last

    def _step_kept(
        self, x: Tensor, states: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]] | None:
        """The same by steppers that are kept; ``None`` where there can be none."""
        weights = [getattr(self, name) for name in self._flat_weights_names]
        if (
            (self.dropout and self.training)
            or self._has_masks()
            or not can_be_kept(x, weights, states or ())
        ):
            return None
        last, sizes = [], (self.heads, self.hidden_size // self.heads)
        for layer, names in enumerate(self._all_weights):
            before = None
            if states is not None:
                before = torch.stack([state[layer] for state in states]).unflatten(-1, sizes)
            weights = [getattr(self, name) for name in names]
            after = step(
                self,
                layer,
                x,
                weights,
                before,
                self.mode,
                self._computed(),
                self.heads,
                self.backend,
            )
            if after is None:
                return None
            last.append(after.flatten(2).to(x.dtype))
            x = last[-1][0]
        return x, list(torch.stack(last, 1).unbind(0))

    def _step_torchs(self, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One step: PyTorch has a kernel that does without what a sequence needs."""
        step, last = MODES[self.mode].step, []
        for layer, names in enumerate(self._all_weights):
            before = self._returned([state[layer] for state in states])
            after = step(x, before, *(getattr(self, name) for name in names))
            last.append(after if isinstance(after, tuple) else (after,))
            x = last[-1][0]
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = dropout(x, self.dropout)
        return x, [torch.stack(rows) for rows in zip(*last, strict=True)]

    def _run_ours(
        self, x: Tensor, states: list[Tensor] | None, packing: Packing | None
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers over ``[T, B, ·]`` or packed rows."""
        last: list[list[Tensor]] = []
        directions = 1 + self.bidirectional
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                row = directions * layer + direction
                given = None if states is None else [state[row] for state in states]
                output, ended = self._direction(row, x, given, direction == 1, packing)
                outputs.append(output)
                last.append(ended)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.dropout and self.training and layer < self.num_layers - 1:
                # Contiguous: then the numbers drawn are those of torch.nn.
                x = dropout(x.contiguous(), self.dropout)
        return x, [torch.stack(rows).to(x.dtype) for rows in zip(*last, strict=True)]

    def _direction(
        self,
        row: int,
        x: Tensor,
        states: list[Tensor] | None,
        reverse: bool,
        packing: Packing | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """One direction of a layer: h of every step, and each last state, ``[B, hidden_size]``."""
        W, R, b, weight_hh, weight_hr = self._weights(row)
        cell, (_, N, D) = self._computed(), b.shape
        if states is not None and weight_hr is not None:
            # As in `at_once.layer`.
            x = _with_first(x, states[0], reverse, packing)
            W = torch.cat([W, weight_hh], 1)
            states = [torch.zeros_like(states[1]), states[1]]
        start = None if states is None else torch.stack(states).unflatten(-1, (1, N, D))
        h, last_states = scan(
            x, W, R, b, start, cell, self.backend, reverse=reverse, packing=packing
        )
        ended = list(last_states.flatten(2).unbind(0))
        if weight_hr is not None:
            h = linear(h, weight_hr)
            ended[0] = linear(ended[0].to(weight_hr.dtype), weight_hr)
        return h, ended

    def _weights(self, row: int) -> at_once.Weights:
        """Those of one direction of a layer, as ``recurrent_layer()`` takes them."""
        W, weight_hh, *others = (getattr(self, name) for name in self._all_weights[row])
        weight_hr = others.pop() if self.proj_size else None
        N, D = self.heads, self.hidden_size // self.heads
        R = recurrent_matrix(
            self.mode, weight_hh if weight_hr is None else weight_hh @ weight_hr, N, D
        )
        if others:
            b = bias(self.mode, others, N, D)
        else:
            b = W.new_zeros(len(self.cell.fed_by("b")), N, D)
        return at_once.Weights(W, R, b, weight_hh, weight_hr)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What ``torch.jit.script`` compiles in place of it: torch.nn's layer, weights shared."""
        from flashrnn.nn.replacing import torchs

        return torchs(self)


def _with_first(x: Tensor, h: Tensor, reverse: bool, packing: Packing | None) -> Tensor:
    """``x``, and beside it h ``[B, ·]`` where each sequence starts, zeros elsewhere."""
    B = len(h)
    rows = x.flatten(0, -2)
    if not reverse:
        first = torch.arange(B, device=x.device)
    elif packing is not None:
        first = packing.reversal[:B]
    else:
        first = torch.arange(len(rows) - B, len(rows), device=x.device)
    beside = h.new_zeros(len(rows), h.shape[1]).index_copy(0, first, h)
    return torch.cat([rows, beside.to(x.dtype)], 1).unflatten(0, x.shape[:-1])


def _check_bounds_are_integers(bounds: Any) -> None:
    if not isinstance(bounds, Tensor):
        raise TypeError(f"cu_seqlens is {type(bounds).__name__}; accepted is a torch.Tensor")
    if bounds.is_floating_point() or bounds.is_complex() or bounds.dtype == torch.bool:
        raise TypeError(f"cu_seqlens is of {bounds.dtype}; accepted are integers")
    if bounds.dim() != 1 or len(bounds) < 2:
        raise RuntimeError(
            f"cu_seqlens has shape {tuple(bounds.shape)}; accepted is [B + 1], B of 1 or more: 0, "
            "and where each sequence ends"
        )


def _check_bounds(bounds: Tensor, rows: int) -> None:
    if bounds[0] != 0 or bounds[-1] != rows or (bounds.diff() < 0).any():
        raise RuntimeError(
            f"cu_seqlens is {bounds.tolist()} for {rows} rows; accepted are numbers that do not "
            "fall, from 0 to the number of rows"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_types(**given: tuple[object, type]) -> None:
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise TypeError(
                f"{name} should be of type {kind.__name__}, got: {type(value).__name__}"
            )


def _check_values(
    input_size: int, hidden_size: int, num_layers: int, dropout: float, proj_size: int, heads: int
) -> None:
    if (
        not isinstance(dropout, numbers.Number)
        or isinstance(dropout, bool)
        or not 0 <= dropout <= 1
    ):
        raise ValueError(f"dropout={dropout!r}; accepted is a probability, a number from 0 to 1")
    for name, size in (
        ("input_size", input_size),
        ("hidden_size", hidden_size),
        ("num_layers", num_layers),
        ("heads", heads),
    ):
        if size <= 0:
            raise ValueError(f"{name}={size}; accepted are numbers greater than zero")
    if hidden_size % heads:
        raise ValueError(f"{hidden_size} units in {heads} heads; accepted is a multiple of heads")
    if not 0 <= proj_size < hidden_size:
        raise ValueError(
            f"proj_size={proj_size}; accepted are numbers smaller than hidden_size={hidden_size}, "
            "or 0: no projection"
        )
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            f"dropout={dropout} with num_layers=1: the output of every layer but the last is "
            "dropped, here of none",
            stacklevel=4,
        )
