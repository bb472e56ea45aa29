"""Where every call of a backend passes: fused ones become differentiable here, as one operator.

The residuals are the same for all: the states and, where a gradient may be asked for, the gates'
pre-activations ``[B, T, G, N, D]``.

``torch.library`` makes operators of both directions, so that ``torch.compile`` sees them whole.
An operator's arguments are tensors, numbers and strings: a backend goes in by its name and a cell
as its text, so that a saved program runs wherever this package is imported. Where nothing records
operators, an autograd function runs instead, and where no gradient is needed, the backend's forward
alone: each takes a fraction of the host time of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashrnn.backends import Backend, Run, Runs, are_plain, jit_traced, loaded, recorded
from flashrnn.backends.gradients import Gradients, select
from flashrnn.backends.kept_calls import Kept, forward_again, gradients_again
from flashrnn.backends.protocols import (
    DifferentiableBackend,
    FusedBackend,
    has_additional_units,
    is_fused,
)
from flashrnn.cells.spec import Cell, cell_of
from flashrnn.cells.traced import TracedCell, parsed
from flashrnn.problem import Problem, without_autocast
from flashrnn.sequences import Sequences


def run(
    backend: Backend,
    problem: Problem,
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    sequences: Sequences | None = None,
    direct: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute, differentiably.

    Args:
        backend: by which backend.
        problem: one that the backend's ``unsupported`` has nothing against.
        Wx: ``[B, T, Gw, N, D]``, of ``problem.dtype``, as are ``R`` and ``b``; any strides.
        R: ``[Gr, N, D, D]``.
        b: ``[Gb, N, D]``.
        states: ``[S, B, 1, N, D]`` of ``problem.carry_dtype``.
        sequences: the options that say how sequences run; ``None``: none.
        direct: whether :func:`flashrnn.backends.is_direct` is known to hold for the tensors.

    Returns:
        ``[S, B, T, N, D]`` of ``problem.dtype``, where S is ``problem.returned``, and
        ``[S, B, 1, N, D]`` of ``problem.carry_dtype``, both contiguous.
    """
    if not is_fused(backend):
        return cast(DifferentiableBackend, backend).run(problem, Wx, R, b, states, sequences)
    if direct:
        return run_directly(backend, problem, Wx, R, b, states, sequences)
    given = [x for x in (Wx, R, b, states, *(sequences or ())) if x is not None]
    if recorded() or not are_plain(given):
        every_state, last_states, _ = scan(
            Wx,
            R,
            b,
            states,
            _name(backend),
            _text(problem.cell),
            problem.needs_gradient,
            problem.gradient_recurrent_cut,
            problem.gradient_recurrent_clipval,
            problem.forward_clipval,
            problem.allow_tf32,
            *_of_operator(problem, sequences),
        )
        returned = problem.returned
        return every_state if returned is None else every_state[:returned], last_states
    return run_directly(backend, problem, Wx, R, b, states, sequences)


def run_directly(
    backend: FusedBackend,
    problem: Problem,
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for a fused backend where :func:`flashrnn.backends.is_direct` holds."""
    if sequences is not None:
        if problem.needs_gradient:
            return apply(Scan, Wx, R, b, states, backend, problem, None, *sequences)
        return backend.forward(problem, Wx, R, b, states, sequences)[:2]
    if problem.needs_gradient:
        return apply(Scan, Wx, R, b, states, backend, problem, None)
    return backend.forward(problem, Wx, R, b, states)[:2]


def apply(node: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``node.apply()`` where :func:`flashrnn.backends.is_direct` holds: without what PyTorch asks
    and unwraps for torch.func, of which there is nothing then."""
    return super(torch.autograd.Function, node).apply(*arguments)  # type: ignore[misc]


def by_scans(
    forward: Callable[..., tuple[Tensor, Tensor, Tensor | None]],
    problem: Problem,
    R: Tensor,
    b: Tensor,
) -> Runs:
    """Steps by a backend's forward scan, where it has no other way to compute them."""

    def run_of(B: int) -> Run:
        of_batch = problem._replace(B=B)

        def run(wx: Tensor, states: Tensor, out: Tensor | None) -> Tensor:
            scanned = forward(of_batch, wx.unsqueeze(1), R, b, states.unsqueeze(2))
            found = scanned[1].squeeze(2)
            return found if out is None else out.copy_(found)

        return run

    return run_of


def _of_operator(problem: Problem, sequences: Sequences | None) -> tuple[Any, ...]:
    """The options of sequences as arguments of an operator, which may lack them."""
    if problem.returned is None:
        return ()
    sequences = sequences or Sequences()
    reverse = problem.reverse if isinstance(problem.reverse, tuple) else (problem.reverse,)
    if not any(reverse):
        return *sequences, None, problem.returned
    if jit_traced():
        raise NotImplementedError(
            "torch.jit.trace records no heads that run backwards (reverse=...) of a fused backend; "
            "torch.export and torch.compile do, and so does it of backend='vanilla'"
        )
    return *sequences, reverse, problem.returned


def _name(backend: FusedBackend) -> str:
    """The string that stands for a backend in a graph."""
    return backend.__name__.rpartition(".")[2]


def _named(name: str) -> FusedBackend:
    return cast(FusedBackend, loaded(name))


def _text(cell: TracedCell) -> str:
    """The string that stands for a cell in a graph: all of it."""
    if torch.compiler.is_compiling():
        from flashrnn.backends import constants

        return constants.text(cast(Cell, cell).handle)
    return cell.text


def stored(problem: Problem) -> int:
    """How many states a forward has to store of every step: in training all."""
    all_of_them = problem.returned is None or problem.needs_gradient
    return len(problem.cell.states) if all_of_them else cast(int, problem.returned)


def returned_of(problem: Problem, states: Tensor) -> Tensor:
    """Of the states that a forward has stored those that it returns: in training all."""
    returned = problem.returned
    if returned is None or problem.needs_gradient or returned == states.shape[0]:
        return states
    return states[:returned]


def new_outputs(
    problem: Problem, Wx: Tensor, count: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Memory for what a fused backend's forward returns.

    Args:
        problem: the problem.
        Wx: as given.
        count: how many states are stored of every step, if not as many as :func:`stored` says.
    """
    cell, (B, T, N, D) = problem.cell, (problem.B, problem.T, problem.N, problem.D)
    S, rows = len(cell.states), 1 if problem.packed else B
    if count is None:
        count = S if problem.returned is None else stored(problem)
    return (
        Wx.new_empty(count, rows, T, N, D),
        Wx.new_empty(S, B, 1, N, D, dtype=problem.carry_dtype),
        Wx.new_empty(rows, T, len(cell.gates), N, D) if problem.needs_gradient else None,
    )


def state_strides(states: Tensor) -> tuple[int, int, int, int]:
    """Of ``[S, B, 1, N, D]``, without that of the 1."""
    s, b, _, n, d = states.stride()
    return s, b, n, d


@torch.library.custom_op("flashrnn::scan", mutates_args=())
def scan(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    backend: str,
    cell: str,
    save_gates: bool,
    cut: bool,
    clipval: float | None,
    forward_clipval: float | None,
    allow_tf32: bool | None = None,
    reset: Tensor | None = None,
    reset_states: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: Sequence[bool] | None = None,
    returned: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every step's states, the last states as carried, and the gates' pre-activations, of which
    there are none if they are not to be saved."""
    sequences, fields = _options(reset, reset_states, lengths, cu_seqlens, reverse, returned)
    (_, T, _, N, D), B = Wx.shape, states.shape[1]
    problem = Problem(
        parsed(cell)[0],
        *(B, T, N, D, Wx.dtype, Wx.device, save_gates, cut, clipval, forward_clipval, allow_tf32),
        **fields,
    )
    _check_no_derivative_forward(backend)
    _check_memory({"Wx": Wx, "R": R, "b": b, "states": states})
    _check_captures(cell)
    given = () if returned is None else (sequences,)
    return _for_graphs(*_named(backend).forward(problem, Wx, R, b, states, *given))


def _for_graphs(
    states: Tensor, last_states: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """An operator returns the same number of tensors whatever it is asked for."""
    return states, last_states, states.new_empty(0) if gates is None else gates


def _options(
    reset: Tensor | None = None,
    reset_states: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: Sequence[bool] | None = None,
    returned: int | None = None,
) -> tuple[Sequences, dict[str, Any]]:
    """An operator's last arguments: the options' tensors, and the problem's fields."""
    sequences, heads = Sequences(reset, reset_states, lengths, cu_seqlens), tuple(reverse or ())
    return sequences, {
        "resets": sequences.reset is not None,
        "ragged": sequences.lengths is not None or sequences.cu_seqlens is not None,
        "packed": sequences.cu_seqlens is not None,
        "reverse": any(heads) if len(heads) < 2 else heads,
        "returned": returned,
    }


def _check_no_derivative_forward(backend: str) -> None:
    """For operators in a graph. Calls are refused by :func:`flashrnn.backends.best`."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"backend {backend!r} has no derivative forward (torch.func.jvp, jacfwd, "
            "torch.autograd.forward_ad); backend='vanilla' has"
        )


def _check_captures(text: str) -> None:
    """A graph of torch.compile has the cell of the time when it was compiled."""
    traced, handle = parsed(text)
    cell = cell_of(handle)
    if cell is not None and cell.traced != traced:
        raise RuntimeError(
            f"cell {traced.name!r} captures a Python value that has changed since torch.compile "
            "compiled this call. Call torch.compiler.reset(), or feed what changes through a gate"
        )


def _check_memory(tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() and not tensor.data_ptr():
            raise TypeError(
                f"{name} is a {type(tensor).__name__} without memory of its own; accepted are "
                "dense tensors. Convert it, or take backend='vanilla'"
            )


@scan.register_fake
def _(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    backend: str,
    cell: str,
    save_gates: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    (_, T, _, N, D), B = Wx.shape, states.shape[1]
    _, fields = _options(*options[4:])
    problem = Problem(parsed(cell)[0], B, T, N, D, Wx.dtype, Wx.device, save_gates, **fields)
    return _for_graphs(*new_outputs(problem, Wx))


@torch.library.custom_op("flashrnn::scan_backward", mutates_args=())
def scan_backward(
    R: Tensor,
    states_initial: Tensor,
    states: Tensor,
    gates: Tensor,
    d_states: Tensor | None,
    d_last_states: Tensor | None,
    backend: str,
    cell: str,
    cut: bool,
    clipval: float | None,
    forward_clipval: float | None,
    allow_tf32: bool | None = None,
    reset: Tensor | None = None,
    reset_states: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: Sequence[bool] | None = None,
    returned: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the gates' pre-activations, of the initial states, of R, b and resets."""
    sequences, fields = _options(reset, reset_states, lengths, cu_seqlens, reverse, returned)
    (_, _, T, N, D), B = states.shape, states_initial.shape[1]
    problem = Problem(
        parsed(cell)[0],
        *(B, T, N, D, R.dtype, R.device, True, cut, clipval, forward_clipval, allow_tf32),
        **fields,
    )
    _check_no_derivative_forward(backend)
    _check_memory({"the gradient of states": d_states, "that of last_states": d_last_states})
    given = () if returned is None else (sequences,)
    found = _named(backend).backward(
        problem, R, states_initial, states, gates, d_states, d_last_states, *given
    )
    # A graph is made for one layout, whichever layout the backend returns.
    of_resets = R.new_empty(0) if found.reset_states is None else found.reset_states
    return found.gates, found.states, found.R.contiguous(), found.b.contiguous(), of_resets


@scan_backward.register_fake
def _(
    R: Tensor,
    states_initial: Tensor,
    states: Tensor,
    gates: Tensor,
    d_states: Tensor | None,
    d_last_states: Tensor | None,
    backend: str,
    cell: str,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, N, D, _ = R.shape
    reset_states = _options(*options[4:])[0].reset_states
    return (
        gates.new_empty(gates.shape),
        states_initial.new_empty(states_initial.shape),
        R.new_empty(R.shape),
        R.new_empty(len(parsed(cell)[0].fed_by("b")), N, D),
        R.new_empty(0) if reset_states is None else reset_states.new_empty(reset_states.shape),
    )


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        f"backend {ctx.backend!r} has no second derivative; backend='vanilla' has"
    )


def _remember_backend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend = inputs[6]


scan_backward.register_autograd(_no_second_derivative, setup_context=_remember_backend)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, R, _, states_initial, backend, cell, _, *options = inputs
    options, of_sequences = options[:4], options[4:]
    states, _, gates = output
    ctx.save_for_backward(R, states_initial, states, gates, *of_sequences[:4])
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)
    ctx.call = (backend, cell, *options)
    ctx.options = tuple(of_sequences[4:])


def _backward(ctx: Any, d_states: Tensor | None, d_last: Tensor | None, _: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    with without_autocast(saved[0].device.type):
        given = *_residuals(saved), d_states, d_last
        found = Gradients(*scan_backward(*given, *ctx.call, *saved[4:], *ctx.options))
    # Arguments that are left out, as they are for a plain call, are not counted there.
    of_resets = found.reset_states if any(ctx.needs_input_grad[12:13]) else None
    needed = _needed(ctx, parsed(ctx.call[1])[0], found)
    return *needed, *(None,) * 8, of_resets, *(None,) * 4


scan.register_autograd(_backward, setup_context=_setup_context)


class Scan(torch.autograd.Function):
    """The same as :func:`scan`, at a fraction of its cost on the host."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        Wx: Tensor,
        R: Tensor,
        b: Tensor,
        states_initial: Tensor,
        backend: FusedBackend,
        problem: Problem,
        kept: Kept | None,
        *options: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        given = Wx, R, b, states_initial
        of_options = (Sequences(*options),) if options else ()
        found = forward_again(kept, given) or backend.forward(problem, *given, *of_options)
        states, last_states, gates = found
        output, residuals = residuals_of(problem, R, states_initial, states, gates, options)
        ctx.save_for_backward(*residuals)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.problem, ctx.kept, ctx.given = backend, problem, kept, len(options)
        return output, last_states

    @staticmethod
    def backward(  # noqa: D102
        ctx: Any, d_states: Tensor | None, d_last: Tensor | None
    ) -> tuple[Any, ...]:
        problem, given = ctx.problem, ctx.given
        # Autocast may be on where backward() is called.
        with without_autocast(problem.device.type):
            arguments = ctx.backend, problem, ctx.saved_tensors, given, d_states, d_last
            found = gradients_of(*arguments, ctx.kept)
        needed = _needed(ctx, problem.cell, found)
        if not given:
            return *needed, None, None, None
        of_resets = found.reset_states if ctx.needs_input_grad[8] else None
        return *needed, None, None, None, None, of_resets, None, None


def residuals_of(
    problem: Problem,
    R: Tensor,
    states_initial: Tensor,
    states: Tensor,
    gates: Tensor | None,
    options: Sequence[Tensor | None],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The states that a node returns of a backend's forward, and what it keeps."""
    output = states
    if problem.returned is not None and problem.returned != states.shape[0]:
        output = states[: problem.returned]
    if states.shape[-1] != problem.D:
        output = own_units(problem, output).contiguous()
    residuals = R, states_initial, states, gates, *options
    return output, (residuals if output is states else (*residuals, output))


def own_units(problem: Problem, x: Tensor) -> Tensor:
    """Without the units that :mod:`flashrnn.padded` adds, if it has."""
    return x if x.shape[-1] == problem.D else x[..., : problem.D]


def gradients_of(
    backend: FusedBackend,
    problem: Problem,
    residuals: Sequence[Any],
    given: int,
    d_states: Tensor | None,
    d_last: Tensor | None,
    kept: Kept | None = None,
    **further: Any,
) -> Gradients:
    """A node's gradients.

    Args:
        backend: the backend.
        problem: the problem.
        residuals: what :func:`residuals_of` said.
        given: how many of these are options.
        d_states: of the states that were returned; ``None``: zeros.
        d_last: of the last states, likewise.
        kept: what is kept of the call, if there is something.
        further: arguments for the backend's backward.
    """
    if kept is not None and (found := gradients_again(kept, residuals, d_states, d_last)):
        return found
    options, part = residuals[4 : 4 + given], residuals[4 + given :]
    if problem.returned == 0:
        d_states = None
    with_graph = torch.is_grad_enabled()
    # A hook on saved tensors may have changed their layout.
    R, states_initial, states, gates = residuals[:4]
    if part and with_graph:
        gates = _Followed.apply(gates, *part)
    sequences = Sequences(*options) if options else None
    tensors = R, states_initial, states.contiguous(), gates.contiguous(), d_states, d_last
    is_direct = not (with_graph or recorded()) and are_plain(x for x in tensors if x is not None)
    # A backend with additional units calls this function for the backend that computes them.
    if is_direct or has_additional_units(backend):
        return backend.backward(problem, *tensors, sequences, **further)
    # With a graph of the gradient the operator's own derivative raises an error, which says that
    # there is none.
    return Gradients(
        *scan_backward(
            *tensors,
            _name(backend),
            _text(problem.cell),
            problem.gradient_recurrent_cut,
            problem.gradient_recurrent_clipval,
            problem.forward_clipval,
            problem.allow_tf32,
            *_of_operator(problem, sequences),
        )
    )


class _Followed(torch.autograd.Function):
    """What a node keeps, as it follows from what the node returned.

    Of all states autograd knows that, for they are what is returned; where only a part of them is,
    a graph of the gradient would else be cut off from the call's inputs, and its derivative be
    none in place of an error.
    """

    @staticmethod
    def forward(ctx: Any, kept: Tensor, returned: Tensor) -> Tensor:
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise AssertionError("what reads it has no derivative, and says so before")


def _residuals(saved: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R, the initial states, all states and pre-activations: a hook on saved tensors may have
    changed their layout."""
    R, states_initial, states, gates = saved[:4]
    return R, states_initial, states.contiguous(), gates.contiguous()


def _needed(ctx: Any, cell: TracedCell, found: Gradients) -> tuple[Tensor | None, ...]:
    """The gradients of Wx, R, b and the initial states, of those that are asked for."""
    needs_Wx, needs_R, needs_b, needs_states, *_ = ctx.needs_input_grad
    return (
        select(found.gates, 2, cell.fed_by("Wx")) if needs_Wx else None,
        found.R if needs_R else None,
        found.b if needs_b else None,
        found.states if needs_states else None,
    )
