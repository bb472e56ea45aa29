"""``flashrnn()``: one call, from its arguments to its results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashrnn import backends, calls, checks, padded, sequences
from flashrnn.backends import autograd, protocols
from flashrnn.cells.spec import Cell, resolve
from flashrnn.compat.order import by_position
from flashrnn.config import FlashRNNConfig
from flashrnn.problem import without_autocast
from flashrnn.sequences import Given


def flashrnn(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None = None,
    function: str | Cell = "lstm",
    *further: FlashRNNConfig | torch.dtype | str | None,
    backend: str = "auto",
    config: FlashRNNConfig | None = None,
    dtype: torch.dtype | str | None = None,
    reset: Tensor | None = None,
    reset_states: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    return_states: str = "all",
) -> tuple[Tensor, Tensor]:
    """Run a recurrent network with block-diagonal (multi-head) recurrence over a sequence.

    At step t and in head n the pre-activation of gate g is ``R[g, n] @ h + Wx[:, t, g, n] +
    b[g, n]``, and the cell turns states and gates into the next states (FlashRNN, Pöppel et
    al., 2024, equations 1 and 2). T is the sequence length, B the batch size, N the number of
    heads, D the head dimension, S the number of states. Which gates ``Wx``, ``R`` and ``b``
    hold, and in which order, is ``cell.gate_names("Wx")`` and so on; for LSTM and sLSTM all
    hold (i, f, z, o), for GRU ``Wx`` holds (r, z, n), ``R`` (g, r, z) and ``b`` (g, r, z, n).

    Args:
        Wx: ``[B, T, Gw, N, D]``, input pre-activations, computed outside by a linear layer.
        R: ``[Gr, N, D, D]``, the recurrent matrix: the last dimension is the one that is
            summed over.
        b: ``[Gb, N, D]``, the bias; of float32 beside 16 bits, it is cast to those. Gates that
            ``Wx`` does not feed (the GRU's g) may be left out: their bias is 0 then.
        states: ``[S, B, 1, N, D]``, the initial states, ``h`` first, or ``[S, 1, 1, N, D]``, one
            start for all sequences; ``None``: zeros, or ``config.initial_val``. Of the inputs'
            dtype, or float32 where that has 16 bits.
        function: ``"lstm"``, ``"gru"``, ``"elman"``, ``"slstm"``, another name out of
            :func:`flashrnn.available_functions`, or a cell made by :func:`flashrnn.cell`.
        further: ``backend`` by position; or ``config``, ``backend`` and ``dtype``, in the order
            of the upstream package.
        backend: ``"auto"``, the fastest that supports the call; or a backend's name, which is
            then used or an error says why it cannot be.
        config: further options; see :class:`flashrnn.FlashRNNConfig`. With one that sets fields
            of upstream's, layouts among them, the call is :func:`flashrnn.compat.call.call`.
        dtype: the dtype that ``Wx``, ``R`` and ``b`` are cast to; takes the place of
            ``config.dtype``. ``None``: the inputs' dtype, which must then be one.
        reset: ``[B, T]`` of bool. ``True`` cuts a sequence between step t and step t − 1: the step
            that is computed after the cut starts from ``reset_states``, and no gradient passes.
        reset_states: ``[S, B, 1, N, D]``, or ``[S, B, T, N, D]``, of which the step that is
            computed after the cut takes its own; dtypes as of ``states``. ``None``: zeros, or
            ``config.initial_val``.
        lengths: ``[B]`` of int32 or int64, on the CPU or the device of ``Wx``: how many steps each
            sequence has. Later ones are not computed: states and gradients are 0 there.
        cu_seqlens: ``[B + 1]`` of int32 or int64, rising from 0 to ``total``: ``Wx`` is packed,
            ``[1, total, Gw, N, D]`` or ``[total, Gw, N, D]``, and sequence i has the rows from
            ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``. B stands for the number of sequences in
            ``states``, ``last_states`` and ``reset_states``, and ``[1, total]`` for ``[B, T]`` in
            ``reset``, ``reset_states`` and the returned states.
        reverse: whether time runs backwards, from each sequence's own end; or a list with one bool
            for each head. ``last_states`` are then those after step 0.
        return_states: which states are returned of every step: ``"all"``, ``"h"`` or, none of
            them, ``"last"``.

    Returns:
        ``states`` ``[S, B, T, N, D]``, the states after every step, ``states[0]`` being ``h``,
        contiguous, in the dtype of the computation; and ``last_states`` ``[S, B, 1, N, D]``,
        those after the last step as they are carried from step to step (float32 where the
        computation has 16 bits), so that ``states=last_states`` continues the sequence unrounded.
        Gradients flow from both to ``Wx``, ``R``, ``b``, ``states`` and ``reset_states``. With
        ``return_states`` the first has S = 1 or 0; of a packed batch it is ``[S, 1, total, N, D]``,
        or ``[S, total, N, D]`` where ``Wx`` has four dimensions.

    Raises:
        TypeError: something that is no tensor, no config or no name, a dtype other than float16,
            bfloat16, float32, float64, or several dtypes at once.
        ValueError: a shape that does not fit, several devices, an unknown function or backend,
            or a named backend that cannot do this call.

    Example:
        >>> B, T, N, D = 8, 32, 3, 16
        >>> Wx, R, b = torch.randn(B, T, 4, N, D), torch.randn(4, N, D, D), torch.randn(4, N, D)
        >>> states, last_states = flashrnn(Wx, R, b, function="lstm")
        >>> states.shape, last_states.shape
        (torch.Size([2, 8, 32, 3, 16]), torch.Size([2, 8, 1, 3, 16]))
    """
    if further:
        config, backend, dtype = by_position(further, config, backend, dtype)
    options = Given.of(reset, reset_states, lengths, cu_seqlens, reverse, return_states)
    if config is not None and getattr(config, "of_upstream", True):
        from flashrnn.compat.call import call

        return call(Wx, R, b, states, function, backend, config, dtype, *(options or ()))
    config, cell = checks.checked_options(config, backend), resolve(function)
    given: tuple[Tensor, ...] = (Wx, R, b) if states is None else (Wx, R, b, states)
    if options is not None:
        given += sequences.tensors_given(options)
    key = None
    if backends.is_direct(*given):
        key = calls.key_of(cell, Wx, R, b, states, config, dtype, options)
    problem, of_Wx = None if key is None else calls.problems.get(key), Wx
    of_backend = None if key is None else (backend, *key)
    again, repeated = calls.repeat(of_backend, problem, autograd.Scan, (Wx, R, b), states, config)
    if repeated is not None:
        return repeated
    if options is not None:
        Wx = sequences.in_rows("Wx", Wx, "Gw, N, D", options)
    if problem is None:
        whole = _whole_bias(cell, b)
        if whole is not b:
            return flashrnn(
                *(of_Wx, R, whole, states, cell),
                backend=backend,
                config=config,
                dtype=dtype,
                reset=reset,
                reset_states=reset_states,
                lengths=lengths,
                cu_seqlens=cu_seqlens,
                reverse=reverse,
                return_states=return_states,
            )
        tensors = {"Wx": Wx, "R": R, "b": b}
        problem = calls.accepted(cell, tensors, states, config, dtype, options)
        if key is not None:
            calls.remember(key, problem)
    direct = key is not None
    chosen, problem, states, of_options = calls.prepared(
        problem, cell, backend, states, config, options, direct
    )
    if direct:
        chosen = padded.backend_for(chosen, problem)
    tensors = {"Wx": Wx, "R": R, "b": b}
    arguments = calls.as_computed(problem, Wx, R, b, states)
    if direct and of_options is None and protocols.is_fused(chosen):
        # None of its operations depends on autocast.
        found, last_states = autograd.run_directly(chosen, problem, *arguments)
        if again is not None:
            calls.keep(again, chosen, problem, tensors)
        return found, last_states
    with without_autocast(problem.device.type):
        found, last_states = autograd.run(chosen, problem, *arguments, of_options, direct)
    return (found if Wx.ndim == of_Wx.ndim else found.squeeze(1)), last_states


def _whole_bias(cell: Cell, b: Tensor) -> Tensor:
    """A bias with zeros for gates that ``Wx`` does not feed, where those were left out."""
    present, wanted = cell.fed_by("Wx"), cell.fed_by("b")
    if not isinstance(b, Tensor) or b.ndim != 3 or b.shape[0] != len(present):
        return b
    if not set(present) < set(wanted):
        return b
    given = dict(zip(present, b.unbind(0), strict=True))
    return torch.stack([given.get(k, torch.zeros_like(b[0])) for k in wanted])
