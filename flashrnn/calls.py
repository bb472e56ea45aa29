"""From a call's arguments to its problem, and to what computes it.

The problem of a call like one before is looked up. That of any other is worked out, once all of the
call is found to fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from flashrnn import backends, checks, sequences
from flashrnn.backends import Backend, autograd, kept_calls, protocols
from flashrnn.backends.kept_calls import Kept
from flashrnn.cells.spec import Cell
from flashrnn.cells.traced import TracedCell
from flashrnn.config import DEFAULT, FlashRNNConfig
from flashrnn.initial import initial_states
from flashrnn.problem import Problem, autocast_dtype, autocast_enabled, carry_dtype
from flashrnn.sequences import Given, Sequences

# The problems of calls that have been found to fit, by all that they follow from. To check a call
# takes longer than to launch its kernel.
problems: dict[tuple[object, ...], Problem] = {}
_MOST_PROBLEMS = 1024


# By what a call's problem and backend follow from, and the tensors' strides. None: nothing is kept.
kept: dict[tuple[object, ...], Kept | None] = {}
# Kernels stay loaded for as long as a call of them is kept.
_MOST_KEPT = 256


class Again(NamedTuple):
    """A call that may be like one before.

    Attributes:
        key: by which :func:`keep` keeps what its backend prepares.
        states: the initial states ``[S, B, 1, N, D]``.
        kept: what has been kept of a call like this one, if its backend would do the same now.
    """

    key: tuple[object, ...]
    states: Tensor
    kept: Kept | None


def again(
    key: tuple[object, ...] | None,
    problem: Problem | None,
    tensors: Sequence[Tensor],
    states: Tensor | None,
    config: FlashRNNConfig = DEFAULT,
) -> Again | None:
    """Whether a call may be like one before; ``None``: it is not of the kind of which any is kept.

    Args:
        key: what the problem and its backend follow from.
        problem: that of a call before that had this key.
        tensors: those given, without the initial states.
        states: the initial states, if any are given.
        config: the call's.
    """
    if key is None or problem is None or problem.is_sequenced:
        return None
    if states is None:
        states = initial_states(problem, config, direct=True)
    elif states.size(1) != problem.B:
        states = states.expand(-1, problem.B, -1, -1, -1)
    key = *key, *[tensor.stride() for tensor in tensors], states.stride()
    found = kept.get(key)
    if found is not None and not found.forward.is_current():
        kept.pop(key, None)
        found = None
    return Again(key, states, found)


def repeat(
    key: tuple[object, ...] | None,
    problem: Problem | None,
    node: type[torch.autograd.Function],
    tensors: Sequence[Tensor],
    states: Tensor | None,
    config: FlashRNNConfig,
) -> tuple[Again | None, tuple[Tensor, Tensor] | None]:
    """What :func:`again` returns, and a call's results if something has been kept of one like it.

    Args:
        key: as there.
        problem: ...
        node: what computes the call where a gradient is needed.
        tensors: as there.
        states: ...
        config: ...
    """
    found = again(key, problem, tensors, states, config)
    if found is None or found.kept is None:
        return found, None
    kept, given = found.kept, (*tensors, found.states)
    if kept.problem.needs_gradient:
        results: tuple[Tensor, Tensor] = autograd.apply(
            node, *given, kept.backend, kept.problem, kept
        )
        return found, results
    made = kept_calls.forward_again(kept, given)
    return found, None if made is None else made[:2]


def keep(
    call: Again,
    backend: Backend,
    problem: Problem,
    tensors: dict[str, Tensor],
    by_time: bool | None = None,
) -> None:
    """Keep what a backend prepares for a call.

    Args:
        call: from :func:`again`.
        backend: the backend that computed it.
        problem: ...
        tensors: by the names of :class:`flashrnn.backends.protocols.RepeatingBackend`, without
            the initial states.
        by_time: see there.
    """
    if call.key in kept or not protocols.keeps(backend):
        return
    found, states = None, call.states
    of_computation = all(tensor.dtype == problem.dtype for tensor in tensors.values())
    if of_computation and states.dtype == problem.carry_dtype:
        names, given = (*tensors,), kept_calls.without_memory([*tensors.values(), states])
        named = dict(zip((*names, "initial"), given, strict=True))
        forward = backend.repeated(problem, named, by_time)
        if forward is not None:
            found = Kept(backend, problem, names, forward, {})
    if len(kept) >= _MOST_KEPT:
        # The oldest goes.
        oldest, *_ = [*kept]
        kept.pop(oldest, None)
    kept[call.key] = found


def key_of(
    cell: Cell,
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None,
    config: FlashRNNConfig,
    dtype: torch.dtype | str | None,
    options: Given | None,
) -> tuple[object, ...] | None:
    """What the problem of a call follows from; ``None`` for a dtype or options that are none.

    :func:`flashrnn.backends.is_direct` holds for the tensors.
    """
    if not (dtype is None or isinstance(dtype, (torch.dtype, str))):
        return None
    of_options = None
    if options is not None:
        of_options = sequences.key_of(options)
        if of_options is None:
            return None
    kind = "cuda" if Wx.is_cuda else Wx.device.type
    requires_grad = Wx.requires_grad or R.requires_grad or b.requires_grad
    of_states, of_config = None, None
    if states is not None:
        requires_grad = requires_grad or states.requires_grad
        of_states = states.shape, states.dtype, states.device
    if config is not DEFAULT:
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
        autocast_dtype(kind),
        requires_grad and torch.is_grad_enabled(),
        dtype,
        Wx.shape,
        R.shape,
        b.shape,
        Wx.dtype,
        R.dtype,
        b.dtype,
        Wx.device,
        R.device,
        b.device,
        of_states,
        of_config,
        of_options,
    )


def remember(key: tuple[object, ...], problem: Problem) -> None:
    """Keep the problem of a call that has been found to fit."""
    if len(problems) >= _MOST_PROBLEMS:
        problems.clear()
    problems[key] = problem


def accepted(
    cell: Cell,
    tensors: dict[str, Tensor],
    states: Tensor | None,
    config: FlashRNNConfig,
    dtype: torch.dtype | str | None,
    options: Given | None,
) -> Problem:
    """The problem of a call, once all of it but values of its options is found to fit.

    It lacks the cell's step, and what :func:`prepared` finds out.

    Args:
        cell: the cell.
        tensors: ``Wx``, or ``x`` and ``W``, of which it is the product, then ``R`` and ``b``, by
            these names. ``Wx`` or ``x`` has all dimensions, of packed batches too.
        states: see :func:`flashrnn.flashrnn`.
        config: ...
        dtype: ...
        options: those that say how sequences run, if there are any.
    """
    tensors, count = dict(tensors), None
    fields: dict[str, Any] = {}
    if states is not None:
        tensors["states"] = states
    if options is not None and options.reset_states is not None:
        tensors["reset_states"] = options.reset_states
    of_options = {} if options is None else sequences.named_tensors(options)
    needs_gradient = checks.checked_kinds({**tensors, **of_options})
    if "Wx" in tensors:
        of_Wx: tuple[int, ...] = tensors["Wx"].shape
    else:
        of_Wx = checks.product_shape(cell, *(tensors[name] for name in ("x", "W", "R")))
    if options is not None:
        device = next(iter(tensors.values())).device
        count, fields = sequences.accept(cell, of_Wx, device, options)
    sizes = checks.fitting_sizes(cell, of_Wx, tensors["R"], tensors["b"], states, count)
    return problem_of(cell, sizes, tensors, needs_gradient, config, dtype)._replace(**fields)


def problem_of(
    cell: Cell,
    sizes: tuple[int, int, int, int],
    tensors: dict[str, Tensor],
    needs_gradient: bool,
    config: FlashRNNConfig,
    dtype: torch.dtype | str | None,
) -> Problem:
    """The problem of sizes B, T, N, D, once the tensors' devices and dtypes are found to fit."""
    device = checks.common_device(tensors)
    return Problem(
        # A graph of torch.compile needs the names alone, and finds the rest by the handle.
        cast(TracedCell, cell) if torch.compiler.is_compiling() else cell.traced,
        *sizes,
        checks.common_dtype(tensors, config, dtype, autocast_enabled(device.type)),
        device,
        needs_gradient and torch.is_grad_enabled(),
        config.gradient_recurrent_cut,
        config.gradient_recurrent_clipval,
        config.forward_clipval,
        config.allow_tf32,
    )


def prepared(
    problem: Problem,
    cell: Cell,
    backend: str,
    states: Tensor | None,
    config: FlashRNNConfig,
    options: Given | None,
    direct: bool,
) -> tuple[Backend, Problem, Tensor, Sequences | None]:
    """What computes a problem, the problem as that takes it, initial states ``[S, B, 1, N, D]``,
    and the options' tensors.

    Args:
        problem: the problem, as :func:`accepted` has it.
        cell: the cell.
        backend: a backend's name, or ``"auto"``.
        states: see :func:`flashrnn.flashrnn`, as ``config``.
        config: ...
        options: those that say how sequences run, if there are any.
        direct: whether :func:`flashrnn.backends.is_direct` is known to hold for the tensors.
    """
    chosen, tensors = backends.choose(backend, problem, direct), None
    if options is not None:
        problem, tensors = _with_tensors(problem, options, config)
    if states is None:
        states = initial_states(problem, config, direct)
    elif states.size(1) != problem.B:
        states = states.expand(-1, problem.B, -1, -1, -1)  # One start was given for all.
    if not protocols.is_fused(chosen):
        problem = problem._replace(step=cell.step)
    return chosen, problem, states, tensors


def _with_tensors(
    problem: Problem, options: Given, config: FlashRNNConfig
) -> tuple[Problem, Sequences | None]:
    """A problem with what the values of its options tell, and the options' tensors, as
    :func:`flashrnn.backends.autograd.run` has them: ``None`` where sequences run as without."""
    if not problem.is_sequenced:
        return problem, None
    check_values = problem.ragged and not backends.recorded()
    tensors, known = sequences.tensors_of(options, problem, check_values)
    if known is not None and known.whole:
        problem = problem._replace(ragged=False)
        if not problem.is_sequenced:
            return problem, None
    elif known is not None:
        problem = problem._replace(longest=known.longest, even=known.even)
    if not problem.resets:
        return problem, tensors
    starts = tensors.reset_states
    if starts is None and config is not DEFAULT and any(config.initial_values(problem.cell.states)):
        starts = initial_states(problem, config)
    if starts is not None:
        tensors = tensors._replace(reset_states=cast_to(starts, carry_dtype(problem.dtype)))
    return problem, tensors


def as_computed(
    problem: Problem, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors in the dtypes of the computation."""
    return cast_to(Wx, problem.dtype), *weights_as_computed(problem, R, b, states)


def weights_as_computed(
    problem: Problem, R: Tensor, b: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same without ``Wx``."""
    computed_in = problem.dtype
    return (
        cast_to(R, computed_in),
        cast_to(b, computed_in),
        # Dynamo of PyTorch 2.9 and 2.10 does not follow `problem.carry_dtype`.
        cast_to(states, carry_dtype(computed_in)),
    )


def cast_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without a call where it has that dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
