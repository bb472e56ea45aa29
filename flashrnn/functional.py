"""``flashrnn()``: checks, the choice of a backend, one call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NoReturn, cast

import torch
from torch import Tensor

from flashrnn import backends, sequences
from flashrnn.backends import autograd
from flashrnn.cells.spec import Cell, resolve
from flashrnn.cells.traced import TracedCell
from flashrnn.config import SUPPORTED_DTYPES, FlashRNNConfig, parse_dtype
from flashrnn.problem import Problem, as_dtype_has_it, carry_dtype


def flashrnn(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None = None,
    function: str | Cell = "lstm",
    backend: str = "auto",
    *,
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
        b: ``[Gb, N, D]``, the bias.
        states: ``[S, B, 1, N, D]``, the initial states, ``h`` first, or ``[S, 1, 1, N, D]``, one
            start for all sequences; ``None``: zeros, or ``config.initial_val``. Of the inputs'
            dtype, or float32 where that has 16 bits.
        function: ``"lstm"``, ``"gru"``, ``"elman"``, ``"slstm"``, another name out of
            :func:`flashrnn.available_functions`, or a cell made by :func:`flashrnn.cell`.
        backend: ``"auto"``, the fastest that supports the call; or a backend's name, which is
            then used or an error says why it cannot be.
        config: further options; see :class:`flashrnn.FlashRNNConfig`.
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
        computation has 16 bits), so that ``states=last_states`` continues the sequence exactly.
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
    if config is None:
        config = _DEFAULT
    elif not isinstance(config, FlashRNNConfig):
        raise TypeError(f"config is {type(config).__name__}; accepted is a FlashRNNConfig")
    if not isinstance(backend, str):
        raise TypeError(f"backend is {type(backend).__name__}; accepted is a name, or 'auto'")
    cell = resolve(function)
    options, count = None, None
    is_unpadded = cu_seqlens is not None and isinstance(Wx, Tensor) and Wx.ndim == 4
    if (
        reset is not None
        or reset_states is not None
        or lengths is not None
        or cu_seqlens is not None
        or reverse is not False
        or return_states != "all"
    ):
        Wx, count, options, fields = sequences.accept(
            cell,
            Wx,
            reset=reset,
            reset_states=reset_states,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
            return_states=return_states,
            check_values=not backends.recorded(),
        )
    tensors = {"Wx": Wx, "R": R, "b": b}
    if states is not None:
        tensors["states"] = states
    if reset_states is not None:
        tensors["reset_states"] = reset_states
    needs_gradient = False
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; accepted is a torch.Tensor")
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise TypeError(
                f"{name} is a tensor of layout {kind}; accepted are dense tensors: "
                "torch.nested.to_padded_tensor() and .to_dense() make such"
            )
        needs_gradient = needs_gradient or tensor.requires_grad
    B, T, N, D = _sizes(cell, Wx, R, b, states, count)
    device = _device(tensors)
    autocast = _autocast_enabled(device.type)
    computed_in = _dtype(tensors, config, dtype, autocast)

    problem = Problem(
        # A graph of torch.compile needs the names alone, and finds the rest by the handle.
        cast(TracedCell, cell) if torch.compiler.is_compiling() else cell.traced,
        B,
        T,
        N,
        D,
        computed_in,
        device,
        needs_gradient and torch.is_grad_enabled(),
        config.gradient_recurrent_cut,
        config.gradient_recurrent_clipval,
        config.forward_clipval,
        cell.step,
    )
    if options is not None:
        problem = problem._replace(**fields)
        if problem.resets:
            starts = options.reset_states
            if starts is None and any(config.initial_values(cell.states)):
                starts = _initial_states(problem, config)
            if starts is not None:
                options = options._replace(reset_states=_cast(starts, carry_dtype(computed_in)))
    chosen = backends.choose(backend, problem)
    if states is None:
        states = _initial_states(problem, config)
    elif states.shape[1] != B:
        states = states.expand(-1, B, -1, -1, -1)
    arguments = (
        _cast(Wx, computed_in),
        _cast(R, computed_in),
        _cast(b, computed_in),
        # Dynamo of PyTorch 2.9 and 2.10 does not follow `problem.carry_dtype`.
        _cast(states, carry_dtype(computed_in)),
    )
    if options is not None:
        with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            found, last_states = autograd.run(chosen, problem, *arguments, options)
        return (found.squeeze(1) if is_unpadded else found), last_states
    if not autocast:
        return autograd.run(chosen, problem, *arguments)
    with torch.autocast(device.type, enabled=False):
        return autograd.run(chosen, problem, *arguments)


_DEFAULT = FlashRNNConfig()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _initial_states(problem: Problem, config: FlashRNNConfig) -> Tensor:
    """``config.initial_val`` as states ``[S, B, 1, N, D]``, a view of one number a state."""
    dtype, device = carry_dtype(problem.dtype), problem.device
    values = config.initial_values(problem.cell.states)
    if values == (0.0,) * len(values):
        return _zero(dtype, device).expand(len(values), problem.B, 1, problem.N, problem.D)
    values = tuple(as_dtype_has_it(value, dtype) for value in values)
    if len(set(values)) == 1:
        # Filled where it is needed: no copy from the host, none to wait for.
        start = torch.full((), values[0], dtype=dtype, device=device)
    else:
        start = torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1, 1, 1)
    return start.expand(len(values), problem.B, 1, problem.N, problem.D)


# A number for each dtype on each device.
_zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zero, the same one for as long as it may be shared."""
    if backends.recorded():
        return torch.zeros((), dtype=dtype, device=device)
    if (dtype, device) not in _zeros:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.zeros((), dtype=dtype, device=device)  # The graph's own.
        with torch.inference_mode(False):
            # Copied from the host, which waits for it: every stream then sees it.
            _zeros[dtype, device] = torch.tensor(0.0, dtype=dtype, device=device)
    return _zeros[dtype, device]


def _sizes(
    cell: Cell, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor | None, count: int | None = None
) -> tuple[int, int, int, int]:
    """B, T, N and D, once every shape is found to fit.

    Args:
        cell: the cell.
        Wx: see :func:`flashrnn`, as those below.
        R: ...
        b: ...
        states: ...
        count: the number of sequences, where ``Wx`` does not tell.
    """
    if Wx.ndim == 5:
        B, T, Gw, N, D = Wx.shape
        if count is not None:
            B = count
        if (
            (Gw == len(cell.fed_by("Wx")) and N > 0 and D > 0)
            and R.shape == (len(cell.fed_by("R")), N, D, D)
            and b.shape == (len(cell.fed_by("b")), N, D)
            and (
                states is None
                or states.shape == (len(cell.states), B, 1, N, D)
                or states.shape == (len(cell.states), 1, 1, N, D)
            )
        ):
            return B, T, N, D
    _refuse_sizes(cell, Wx, R, b, states, count)


def _refuse_sizes(
    cell: Cell, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor | None, count: int | None
) -> NoReturn:
    """Say which tensor does not fit: each is held to the sizes that ``Wx`` sets."""
    _check_rank("Wx", Wx, "[B, T, Gw, N, D]", 5)
    B, _, _, N, D = Wx.shape
    if count is not None:
        B = count
    if N == 0 or D == 0:
        raise ValueError(
            f"Wx has shape {tuple(Wx.shape)}, {N} heads of {D} units; accepted are N and D ≥ 1"
        )
    _check_gates(cell, "Wx", Wx.shape[2])
    _check_rank("R", R, "[Gr, N, D, D]", 4)
    _check_gates(cell, "R", R.shape[0])
    _check_shape("R", R, "[Gr, N, D, D]", (R.shape[0], N, D, D))
    _check_rank("b", b, "[Gb, N, D]", 3)
    _check_gates(cell, "b", b.shape[0])
    _check_shape("b", b, "[Gb, N, D]", (b.shape[0], N, D))
    if states is not None:
        S = len(cell.states)
        _check_rank("states", states, "[S, B, 1, N, D]", 5)
        if states.shape[0] != S:
            raise ValueError(
                f"states has shape {tuple(states.shape)}, {states.shape[0]} states; "
                f"{cell.name} has {S}: {', '.join(cell.states)}"
            )
        _check_shape("states", states, "[S, B, 1, N, D]", (S, B, 1, N, D))
    raise AssertionError("all shapes fit")


def _check_rank(name: str, tensor: Tensor, layout: str, rank: int) -> None:
    if tensor.ndim != rank:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; accepted are {rank} dimensions, {layout}"
        )


def _check_gates(cell: Cell, name: str, given: int) -> None:
    if given != len(cell.fed_by(name)):
        expected = cell.gate_names(name)
        raise ValueError(
            f"{name} holds {given} gates; {cell.name} takes {len(expected)} there: "
            f"{', '.join(expected) or 'none'}"
        )


def _check_shape(name: str, tensor: Tensor, layout: str, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; with this Wx it must be {expected}, {layout}"
        )


def _device(tensors: dict[str, Tensor]) -> torch.device:
    device = tensors["Wx"].device
    for tensor in tensors.values():
        if tensor.device != device:
            given = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
            raise ValueError(f"{given}; accepted is one device for all: move them with .to(device)")
    return device


def _autocast_enabled(device_type: str) -> bool:
    # Dynamo knows the second question only.
    has_it = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return has_it and torch.is_autocast_enabled(device_type)


def _dtype(
    tensors: dict[str, Tensor],
    config: FlashRNNConfig,
    dtype: torch.dtype | str | None,
    autocast: bool,
) -> torch.dtype:
    """The dtype of the computation, once every given dtype is found to fit."""
    for tensor in tensors.values():
        if tensor.dtype not in SUPPORTED_DTYPES:
            names = ", ".join(str(supported) for supported in SUPPORTED_DTYPES)
            raise TypeError(f"{_listed(tensors)}; accepted are {names}")

    requested = dtype if dtype is not None else config.dtype
    if autocast and config.enable_automatic_mixed_precision:
        default = torch.get_autocast_dtype(tensors["Wx"].device.type)
        return parse_dtype(default if requested is None else requested)
    if requested is not None:
        return parse_dtype(requested)

    found = tensors["Wx"].dtype
    for name, tensor in tensors.items():
        if tensor.dtype != found and not (
            name in ("states", "reset_states") and tensor.dtype == carry_dtype(found)
        ):
            raise TypeError(
                f"{_listed(tensors)}; accepted is one dtype for all (states may be float32 beside "
                "16 bits). Cast them, or let dtype=... do it"
            )
    return found


def _listed(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
