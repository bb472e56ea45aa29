"""``flashrnn()``: checks, the choice of a backend, one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from flashrnn import backends, sequences
from flashrnn.backends import autograd
from flashrnn.backends.autograd import FusedBackend
from flashrnn.cells.spec import Cell, resolve
from flashrnn.cells.traced import TracedCell
from flashrnn.compat.order import by_position
from flashrnn.config import SUPPORTED_DTYPES, FlashRNNConfig, parse_dtype
from flashrnn.problem import (
    Problem,
    as_dtype_has_it,
    autocast_enabled,
    carry_dtype,
    without_autocast,
)


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
    if further:
        config, backend, dtype = by_position(further, config, backend, dtype)
    options = None
    if (
        reset is not None
        or reset_states is not None
        or lengths is not None
        or cu_seqlens is not None
        or reverse is not False
        or return_states != "all"
    ):
        options = sequences.Given(reset, reset_states, lengths, cu_seqlens, reverse, return_states)
    if config is not None and getattr(config, "of_upstream", True):
        from flashrnn.compat.call import call

        of_sequences = () if options is None else options
        return call(Wx, R, b, states, function, backend, config, dtype, *of_sequences)
    config = checked_options(config, backend)
    cell = resolve(function)
    if options is not None:
        return _with_options(Wx, R, b, states, cell, backend, config, dtype, options)
    given = (Wx, R, b) if states is None else (Wx, R, b, states)
    key = key_of(cell, Wx, R, b, states, config, dtype) if backends.is_direct(*given) else None
    problem = None if key is None else problems.get(key)
    if problem is None:
        whole = _whole_bias(cell, b)
        if whole is not b:
            return flashrnn(
                Wx, R, whole, states, function, backend=backend, config=config, dtype=dtype
            )
        problem = _problem(cell, Wx, R, b, states, config, dtype)
        if states is not None and states.shape[1] != problem.B:
            states = one_for_each(states, problem)
            return flashrnn(Wx, R, b, states, function, backend=backend, config=config, dtype=dtype)
        if key is not None:
            remember(key, problem)
    chosen = backends.choose(backend, problem)
    if states is None:
        states = initial_states(problem, config)
    arguments = _as_computed(problem, Wx, R, b, states)
    if not autograd.is_fused(chosen):
        problem = problem._replace(step=cell.step)
    elif key is not None:
        # None of its operations depends on autocast.
        return autograd.run_directly(cast(FusedBackend, chosen), problem, *arguments)
    if not autocast_enabled(problem.device.type):
        return autograd.run(chosen, problem, *arguments)
    with torch.autocast(problem.device.type, enabled=False):
        return autograd.run(chosen, problem, *arguments)


def _with_options(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None,
    cell: Cell,
    backend: str,
    config: FlashRNNConfig,
    dtype: torch.dtype | str | None,
    given: sequences.Given,
) -> tuple[Tensor, Tensor]:
    """A call with options of sequences."""
    of_Wx = Wx
    tensors = (Wx, R, b) if states is None else (Wx, R, b, states)
    key = None
    if backends.is_direct(*tensors, *sequences.tensors_given(given)):
        key = key_with(given, key_of(cell, Wx, R, b, states, config, dtype))
    problem = None if key is None else problems.get(key)
    Wx = sequences.in_rows("Wx", Wx, "Gw, N, D", given)
    b = _whole_bias(cell, b)
    if problem is None:
        named = {"Wx": Wx, "R": R, "b": b}
        problem = problem_with(cell, Wx.shape, named, states, config, dtype, given)
        if key is not None:
            remember(key, problem)
    chosen = backends.choose(backend, problem)
    problem, options = with_tensors(problem, given, config)
    states = initial_states(problem, config) if states is None else one_for_each(states, problem)
    arguments = _as_computed(problem, Wx, R, b, states)
    is_fused = autograd.is_fused(chosen)
    if not is_fused:
        problem = problem._replace(step=cell.step)
    run = autograd.run_directly if is_fused and key is not None else autograd.run
    with without_autocast(problem.device.type):
        found, last_states = run(cast(Any, chosen), problem, *arguments, options)
    return (found if Wx.ndim == of_Wx.ndim else found.squeeze(1)), last_states


def key_with(given: sequences.Given, key: tuple[object, ...] | None) -> tuple[object, ...] | None:
    """What the problem of a call with options follows from, given that of the call without."""
    of_options = sequences.key_of(given)
    return None if key is None or of_options is None else (*key, of_options)


def problem_with(
    cell: Cell,
    of_Wx: Sequence[int],
    tensors: dict[str, Tensor],
    states: Tensor | None,
    config: FlashRNNConfig,
    dtype: torch.dtype | str | None,
    given: sequences.Given,
) -> Problem:
    """The problem of a call with options of sequences, once all of it but values is found to fit.

    Args:
        cell: the cell.
        of_Wx: the shape of ``Wx``, ``[1, total, Gw, N, D]`` if packed.
        tensors: the call's, but for states, by their names; the first is on the call's device.
        states: see :func:`flashrnn`.
        config: ...
        dtype: ...
        given: the options.
    """
    tensors = dict(tensors)
    if states is not None:
        tensors["states"] = states
    if given.reset_states is not None:
        tensors["reset_states"] = given.reset_states
    needs_gradient = checked_kinds(tensors)
    checked_kinds(sequences.named_tensors(given))
    device = next(iter(tensors.values())).device
    count, fields = sequences.accept(cell, of_Wx, device, given)
    sizes = fitting_sizes(cell, of_Wx, tensors["R"], tensors["b"], states, count)
    return problem_of(cell, sizes, tensors, needs_gradient, config, dtype)._replace(**fields)


def with_tensors(
    problem: Problem, given: sequences.Given, config: FlashRNNConfig
) -> tuple[Problem, sequences.Sequences]:
    """A problem with what the values of its options tell, and the options' tensors, as
    :func:`flashrnn.backends.autograd.run` has them."""
    check_values = problem.ragged and not backends.recorded()
    options, longest = sequences.tensors_of(given, problem, check_values)
    if longest is not None:
        problem = problem._replace(longest=longest)
    if not problem.resets:
        return problem, options
    starts = options.reset_states
    if (
        starts is None
        and config is not _DEFAULT
        and any(config.initial_values(problem.cell.states))
    ):
        starts = initial_states(problem, config)
    if starts is not None:
        options = options._replace(reset_states=cast_to(starts, carry_dtype(problem.dtype)))
    return problem, options


def one_for_each(states: Tensor, problem: Problem) -> Tensor:
    """Initial states ``[S, B, 1, N, D]``, also where one start was given for all sequences."""
    return states if states.shape[1] == problem.B else states.expand(-1, problem.B, -1, -1, -1)


def _as_computed(
    problem: Problem, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors in the dtypes of the computation."""
    computed_in = problem.dtype
    return (
        cast_to(Wx, computed_in),
        cast_to(R, computed_in),
        cast_to(b, computed_in),
        # Dynamo of PyTorch 2.9 and 2.10 does not follow `problem.carry_dtype`.
        cast_to(states, carry_dtype(computed_in)),
    )


_DEFAULT = FlashRNNConfig()


def checked_options(config: FlashRNNConfig | None, backend: str) -> FlashRNNConfig:
    """The config, or the default one."""
    if config is None:
        config = _DEFAULT
    elif not hasattr(config, "of_upstream"):
        raise TypeError(f"config is {type(config).__name__}; accepted is a FlashRNNConfig")
    elif config.of_upstream:
        raise ValueError(
            "config sets fields of the upstream package, layouts or sizes among them; only "
            "flashrnn() takes such ones"
        )
    if not isinstance(backend, str):
        raise TypeError(f"backend is {type(backend).__name__}; accepted is a name, or 'auto'")
    return config


# The problems of calls that have been found to fit, by all that they follow from. To check a call
# takes longer than to launch its kernel.
problems: dict[tuple[object, ...], Problem] = {}
_MOST_PROBLEMS = 1024


def key_of(
    cell: Cell,
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None,
    config: FlashRNNConfig,
    dtype: torch.dtype | str | None,
) -> tuple[object, ...] | None:
    """What the problem of a call follows from; ``None`` for a dtype that is none.

    :func:`flashrnn.backends.is_direct` holds for the tensors.
    """
    if not (dtype is None or isinstance(dtype, (torch.dtype, str))):
        return None
    kind = "cuda" if Wx.is_cuda else Wx.device.type
    requires_grad = Wx.requires_grad or R.requires_grad or b.requires_grad
    of_states, of_config = None, None
    if states is not None:
        requires_grad = requires_grad or states.requires_grad
        of_states = states.shape, states.dtype, states.device
    if config is not _DEFAULT:
        of_config = (
            config.gradient_recurrent_cut,
            config.gradient_recurrent_clipval,
            config.forward_clipval,
            config.allow_tf32,
            config.enable_automatic_mixed_precision,
            config.dtype,
        )
    return (
        cell.traced,
        torch.get_autocast_dtype(kind) if autocast_enabled(kind) else None,
        requires_grad and torch.is_grad_enabled(),
        dtype,
        *(Wx.shape, R.shape, b.shape),
        *(Wx.dtype, R.dtype, b.dtype),
        *(Wx.device, R.device, b.device),
        of_states,
        of_config,
    )


def remember(key: tuple[object, ...], problem: Problem) -> None:
    """Keep the problem of a call that has been found to fit."""
    if len(problems) >= _MOST_PROBLEMS:
        problems.clear()
    problems[key] = problem


def _problem(
    cell: Cell,
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None,
    config: FlashRNNConfig,
    dtype: torch.dtype | str | None,
) -> Problem:
    """The problem of a call, without the cell's step, once all of the call is found to fit."""
    tensors = {"Wx": Wx, "R": R, "b": b}
    if states is not None:
        tensors["states"] = states
    needs_gradient = checked_kinds(tensors)
    sizes = fitting_sizes(cell, Wx.shape, R, b, states)
    return problem_of(cell, sizes, tensors, needs_gradient, config, dtype)


def checked_kinds(tensors: dict[str, Tensor]) -> bool:
    """Whether any of the tensors requires a gradient, once all are found to be dense tensors."""
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
    return needs_gradient


def problem_of(
    cell: Cell,
    sizes: tuple[int, int, int, int],
    tensors: dict[str, Tensor],
    needs_gradient: bool,
    config: FlashRNNConfig,
    dtype: torch.dtype | str | None,
) -> Problem:
    """The problem of sizes B, T, N, D, once the tensors' devices and dtypes are found to fit."""
    device = common_device(tensors)
    return Problem(
        # A graph of torch.compile needs the names alone, and finds the rest by the handle.
        cast(TracedCell, cell) if torch.compiler.is_compiling() else cell.traced,
        *sizes,
        common_dtype(tensors, config, dtype, autocast_enabled(device.type)),
        device,
        needs_gradient and torch.is_grad_enabled(),
        config.gradient_recurrent_cut,
        config.gradient_recurrent_clipval,
        config.forward_clipval,
        config.allow_tf32,
    )


def _whole_bias(cell: Cell, b: Tensor) -> Tensor:
    """A bias with zeros for gates that ``Wx`` does not feed, where those were left out."""
    present, wanted = cell.fed_by("Wx"), cell.fed_by("b")
    if not isinstance(b, Tensor) or b.ndim != 3 or b.shape[0] != len(present):
        return b
    if not set(present) < set(wanted):
        return b
    given = dict(zip(present, b.unbind(0), strict=True))
    return torch.stack([given.get(k, torch.zeros_like(b[0])) for k in wanted])


def cast_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without a call where it has that dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def initial_states(problem: Problem, config: FlashRNNConfig) -> Tensor:
    """``config.initial_val`` as states ``[S, B, 1, N, D]``, a view of one number a state."""
    dtype, device = carry_dtype(problem.dtype), problem.device
    sizes = (len(problem.cell.states), problem.B, 1, problem.N, problem.D)
    if config is _DEFAULT:
        return _zeros_of(sizes, dtype, device)
    values = config.initial_values(problem.cell.states)
    if not any(values):
        return _zeros_of(sizes, dtype, device)
    values = tuple(as_dtype_has_it(value, dtype) for value in values)
    if len(set(values)) == 1:
        # Filled where it is needed: no copy from the host, none to wait for.
        start = torch.full((), values[0], dtype=dtype, device=device)
    else:
        start = torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1, 1, 1)
    return start.expand(sizes)


# A number for each dtype on each device; and such numbers expanded, by their sizes.
_zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
_expanded_zeros: dict[tuple[tuple[int, ...], torch.dtype, torch.device], Tensor] = {}
_MOST_EXPANDED = 1024


def _zeros_of(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, one number in memory, the same for as long as they may be shared."""
    if backends.recorded():
        return torch.zeros((), dtype=dtype, device=device).expand(sizes)
    found = _expanded_zeros.get((sizes, dtype, device))
    if found is not None:
        return found
    if (dtype, device) not in _zeros:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.zeros((), dtype=dtype, device=device).expand(sizes)  # The graph's own.
        with torch.inference_mode(False):
            # Copied from the host, which waits for it: every stream then sees it.
            _zeros[dtype, device] = torch.tensor(0.0, dtype=dtype, device=device)
    with torch.inference_mode(False):
        found = _zeros[dtype, device].expand(sizes)
    if len(_expanded_zeros) >= _MOST_EXPANDED:
        _expanded_zeros.clear()
    _expanded_zeros[sizes, dtype, device] = found
    return found


def fitting_sizes(
    cell: Cell,
    of_Wx: Sequence[int],
    R: Tensor,
    b: Tensor,
    states: Tensor | None,
    count: int | None = None,
) -> tuple[int, int, int, int]:
    """B, T, N and D, once every shape is found to fit that of ``Wx``.

    Args:
        cell: the cell.
        of_Wx: the shape of ``Wx``.
        R: see :func:`flashrnn`, as those below.
        b: ...
        states: ...
        count: the number of sequences, where ``Wx`` does not tell.
    """
    if len(of_Wx) == 5:
        B, T, Gw, N, D = of_Wx
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
    _refuse_sizes(cell, of_Wx, R, b, states, count)


def _refuse_sizes(
    cell: Cell,
    of_Wx: Sequence[int],
    R: Tensor,
    b: Tensor,
    states: Tensor | None,
    count: int | None,
) -> NoReturn:
    """Say which tensor does not fit: each is held to the sizes that ``Wx`` sets."""
    check_rank("Wx", of_Wx, "[B, T, Gw, N, D]")
    B, _, _, N, D = of_Wx
    if count is not None:
        B = count
    if N == 0 or D == 0:
        raise ValueError(
            f"Wx has shape {tuple(of_Wx)}, {N} heads of {D} units; accepted are N and D ≥ 1"
        )
    check_gates(cell, "Wx", of_Wx[2])
    check_rank("R", R.shape, "[Gr, N, D, D]")
    check_gates(cell, "R", R.shape[0])
    _check_shape("R", R, "[Gr, N, D, D]", (R.shape[0], N, D, D))
    check_rank("b", b.shape, "[Gb, N, D]")
    check_gates(cell, "b", b.shape[0])
    _check_shape("b", b, "[Gb, N, D]", (b.shape[0], N, D))
    if states is not None:
        S = len(cell.states)
        check_rank("states", states.shape, "[S, B, 1, N, D]")
        if states.shape[0] != S:
            raise ValueError(
                f"states has shape {tuple(states.shape)}, {states.shape[0]} states; "
                f"{cell.name} has {S}: {', '.join(cell.states)}"
            )
        _check_shape("states", states, "[S, B, 1, N, D]", (S, B, 1, N, D))
    raise AssertionError("all shapes fit")


def check_rank(name: str, shape: Sequence[int], layout: str) -> None:
    """Raise an error unless a shape has as many dimensions as the layout."""
    rank = layout.count(",") + 1
    if len(shape) != rank:
        raise ValueError(
            f"{name} has shape {tuple(shape)}; accepted are {rank} dimensions, {layout}"
        )


def check_gates(cell: Cell, name: str, given: int, source: str | None = None) -> None:
    """Raise an error unless a tensor has the number of gates that a source feeds."""
    expected = cell.gate_names(source or name)
    if given != len(expected):
        raise ValueError(
            f"{name} holds {given} gates; {cell.name} takes {len(expected)} there: "
            f"{', '.join(expected) or 'none'}"
        )


def _check_shape(name: str, tensor: Tensor, layout: str, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; with this Wx it must be {expected}, {layout}"
        )


def common_device(tensors: dict[str, Tensor]) -> torch.device:
    """The device of all tensors, once it is found to be one."""
    device = next(iter(tensors.values())).device
    for tensor in tensors.values():
        if tensor.device != device:
            given = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
            raise ValueError(f"{given}; accepted is one device for all: move them with .to(device)")
    return device


def common_dtype(
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

    first = next(iter(tensors.values()))
    requested = dtype if dtype is not None else config.dtype
    if autocast and config.enable_automatic_mixed_precision:
        default = torch.get_autocast_dtype(first.device.type)
        return parse_dtype(default if requested is None else requested)
    if requested is not None:
        return parse_dtype(requested)

    found = first.dtype
    for name, tensor in tensors.items():
        may_be_wider = name in ("b", "states", "reset_states")
        if tensor.dtype != found and not (may_be_wider and tensor.dtype == carry_dtype(found)):
            raise TypeError(
                f"{_listed(tensors)}; accepted is one dtype for all (b and states may be float32 "
                "beside 16 bits). Cast them, or let dtype=... do it"
            )
    return found


def _listed(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
