"""The options of a call that say how its sequences run: resets, lengths, packing and directions.

:class:`Sequences` has their tensors. What of them decides how a problem is computed is in
:class:`flashrnn.problem.Problem`. ``docs/sequences.md`` defines each option.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashrnn.cells.spec import Cell
from flashrnn.problem import Problem

RETURNED = ("all", "h", "last")
_INTEGERS = (torch.int32, torch.int64)


class Sequences(NamedTuple):
    """The tensors of a call's options, on the device of the computation; ``None``: not given.

    Attributes:
        reset: ``[B, T]`` of bool (packed: ``[1, total]``): before step t the states go back.
        reset_states: ``[S, B, T, N, D]`` (packed: ``[S, 1, total, N, D]``) or ``[S, B, 1, N, D]``
            of ``problem.carry_dtype``, what they go back to; ``None``: zeros.
        lengths: ``[B]`` of int32 or int64: how many steps each sequence has.
        cu_seqlens: ``[B + 1]`` of int32 or int64: where each sequence begins among all rows.
    """

    reset: Tensor | None = None
    reset_states: Tensor | None = None
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None


def bounds(
    sequences: Sequences, T: int, dtype: torch.dtype = torch.int64
) -> tuple[Tensor | None, Tensor | None]:
    """Where each sequence begins among the rows ``[B · T]``, and its length; ``[B]`` of ``dtype``.

    ``None`` for what the shapes tell: a sequence begins every T rows; all have T steps. Values that
    are out of range are moved into it, without waiting for the GPU: whatever was given, sequences
    lie within the rows and share none of them.

    Args:
        sequences: the options.
        T: the number of steps; of a packed batch its rows.
        dtype: int64, or int32, in which T must fit.
    """
    if sequences.cu_seqlens is not None:
        cuts = _within(sequences.cu_seqlens, T, dtype).cummax(0).values
        return cuts[:-1], cuts.diff()
    if sequences.lengths is not None:
        return None, _within(sequences.lengths, T, dtype)
    return None, None


def _within(x: Tensor, T: int, dtype: torch.dtype) -> Tensor:
    """x clamped to 0 … T, of ``dtype``; clamped in the wider dtype, which holds all values."""
    return x.to(dtype).clamp(0, T) if dtype == torch.int64 else x.clamp(0, T).to(dtype)


class Arranged(NamedTuple):
    """The options of a call as kernels read them; ``common/sequence.cuh`` says how.

    Attributes:
        order: ``[B]`` of int32, the sequences, the longest first.
        rows: ``[B]`` of int32, their first rows in that order.
        lengths: ``[B]`` of int32, their lengths in that order.
        backwards: ``[N]`` of int32, 1 for heads that run backwards.
        flags: ``[rows]`` of int32, those of ``reset``.
        reset_states: ``[S, B, T, N, D]``, a view: a dimension that tells nothing has stride 0.
    """

    order: Tensor | None
    rows: Tensor | None
    lengths: Tensor | None
    backwards: Tensor | None
    flags: Tensor | None
    reset_states: Tensor | None


def arrange(problem: Problem, sequences: Sequences) -> Arranged:
    """See :class:`Arranged`. Nothing waits for the GPU, and nothing is copied from the host."""
    B, T = problem.B, problem.T
    order, rows = None, None
    # Of 32 bits, for as few launches as can be: each takes microseconds.
    first, lengths = bounds(sequences, T, torch.int32)
    if lengths is not None:
        lengths, order = lengths.sort(descending=True, stable=True)
        rows = None if first is None else first[order]
        order = order.int()
        rows = order * T if rows is None else rows
    backwards = None if problem.reverse is False else runs_backwards(problem)
    flags = None if sequences.reset is None else sequences.reset.reshape(-1).int()
    starts = sequences.reset_states
    starts = None if starts is None else starts.expand(-1, B, T, -1, -1)
    return Arranged(order, rows, lengths, backwards, flags, starts)


def operands(problem: Problem, sequences: Sequences) -> dict[str, Tensor]:
    """The operands of a record that say how sequences run, of :func:`arrange`'s tensors."""
    if not problem.is_sequenced:
        return {}
    arranged = arrange(problem, sequences)
    named = {
        "sequence_order": arranged.order,
        "sequence_rows": arranged.rows,
        "sequence_lengths": arranged.lengths,
        "runs_backwards": arranged.backwards,
        "reset_flags": arranged.flags,
        "reset_states": arranged.reset_states,
    }
    return {name: x for name, x in named.items() if x is not None}


def zeros_like_starts(sequences: Sequences | None) -> Tensor | None:
    """Memory for the gradient of what resets go back to, to which kernels add."""
    if sequences is None or sequences.reset_states is None:
        return None
    return sequences.reset_states.new_zeros(sequences.reset_states.shape)


def runs_backwards(problem: Problem) -> Tensor:
    """``[N]`` of int32, 1 for heads that run backwards. For reading: later calls get the same."""
    device = problem.device
    heads = (
        problem.reverse if isinstance(problem.reverse, tuple) else (problem.reverse,) * problem.N
    )
    if device.type != "cuda":
        return _kept_directions(heads, device, None)
    if torch.cuda.is_current_stream_capturing():
        return _directions_of(heads, device)  # The graph's own.
    # What one stream fills, another might read too early.
    return _kept_directions(heads, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=256)
def _kept_directions(heads: tuple[bool, ...], device: torch.device, _: int | None) -> Tensor:
    """For a stream, whose handle the last argument is: what leaves the cache goes back to it."""
    with torch.inference_mode(False):
        return _directions_of(heads, device)


def _directions_of(heads: tuple[bool, ...], device: torch.device) -> Tensor:
    found = torch.zeros(len(heads), dtype=torch.int32, device=device)
    begin = 0
    for backwards, group in groupby(heads):
        end = begin + len(tuple(group))
        if backwards:
            found[begin:end].fill_(1)
        begin = end
    return found


class Given(NamedTuple):
    """The options of a call as they are given; see :func:`flashrnn.flashrnn`."""

    reset: Tensor | None
    reset_states: Tensor | None
    lengths: Tensor | None
    cu_seqlens: Tensor | None
    reverse: bool | Sequence[bool]
    return_states: str

    @classmethod
    def of(
        cls,
        reset: Tensor | None,
        reset_states: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool | Sequence[bool],
        return_states: str,
    ) -> Given | None:
        """The options of a call; ``None`` where it has none."""
        if (
            reset is not None
            or reset_states is not None
            or lengths is not None
            or cu_seqlens is not None
            or reverse is not False
            or return_states != "all"
        ):
            return cls(reset, reset_states, lengths, cu_seqlens, reverse, return_states)
        return None


def tensors_given(given: Given) -> tuple[Tensor, ...]:
    """The tensors among a call's options."""
    found = given.reset, given.reset_states, given.lengths, given.cu_seqlens
    return tuple([x for x in found if x is not None])


def named_tensors(given: Given) -> dict[str, Tensor]:
    """The same by their names."""
    found = {name: getattr(given, name) for name in Sequences._fields}
    return {name: x for name, x in found.items() if x is not None}


def key_of(given: Given) -> tuple[object, ...] | None:
    """All that the problem of a call follows from of its options, if they fit; ``None`` where they
    do not. :func:`flashrnn.backends.is_direct` holds for their tensors."""
    *tensors, reverse, return_states = given
    if not isinstance(reverse, bool):
        # 1 is equal to True, and is none.
        if not isinstance(reverse, list | tuple) or {*map(type, reverse)} != {bool}:
            return None
        reverse = tuple(reverse)
    if not isinstance(return_states, str):
        return None
    layouts = [None if x is None else (x.shape, x.dtype, x.device) for x in tensors]
    starts = given.reset_states
    requires_grad = starts is not None and starts.requires_grad and torch.is_grad_enabled()
    return *layouts, requires_grad, reverse, return_states


def in_rows(name: str, x: Tensor, of_step: str, given: Given) -> Tensor:
    """``[B, T, ...]``: of a packed batch the first dimension may have been left out.

    Args:
        name: what the tensor is called.
        x: a tensor of the call.
        of_step: its dimensions behind the first two.
        given: the call's options.
    """
    packed, rank = given.cu_seqlens is not None, 3 + of_step.count(",")
    if isinstance(x, Tensor):
        if x.ndim == rank and (x.shape[0] == 1 or not packed):
            return x
        if x.ndim == rank - 1 and packed:
            return x.unsqueeze(0)
    kind = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
    if not packed:
        raise ValueError(f"{name} is {kind}; accepted is a tensor [B, T, {of_step}]")
    raise ValueError(
        f"{name} is {kind} and cu_seqlens is given; accepted is a packed batch, "
        f"[1, total, {of_step}] or [total, {of_step}]"
    )


def accept(
    cell: Cell,
    of_Wx: Sequence[int],
    device: torch.device,
    given: Given,
) -> tuple[int, dict[str, Any]]:
    """Check the options of a call, but for values of tensors, which :func:`tensors_of` sees.

    Where a tensor belongs, there is a dense one.

    Args:
        cell: the cell.
        of_Wx: the shape of ``Wx``, five dimensions.
        device: that of the call.
        given: the options.

    Returns:
        The number of sequences, and the fields of the problem.

    Raises:
        TypeError: something of another type or dtype.
        ValueError: a shape that does not fit, or options that exclude each other.
    """
    reset, reset_states, lengths, cu_seqlens, reverse, return_states = given
    packed = cu_seqlens is not None
    B, T, _, N, D = of_Wx
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError("lengths and cu_seqlens are given; accepted is one of them")
        _check_integers("cu_seqlens", "[B + 1]", cu_seqlens, None, device)
        B = cu_seqlens.shape[0] - 1
        if B == 0 and T > 0:
            raise ValueError(f"cu_seqlens has one element, no sequence; the input has {T} rows")
    if lengths is not None:
        _check_integers("lengths", "[B]", lengths, B, device)
    rows = (1, T) if packed else (B, T)
    if reset is not None:
        _check_flags(reset, rows, device)
    if reset_states is not None:
        if reset is None:
            raise ValueError("reset_states is given without reset, which says where")
        _check_starts(reset_states, len(cell.states), B, rows, N, D, device)
    if return_states not in RETURNED:
        raise ValueError(
            f"return_states is {return_states!r}; accepted are {', '.join(map(repr, RETURNED))}"
        )
    fields = {
        "T": T,
        "resets": reset is not None,
        "ragged": lengths is not None or packed,
        "packed": packed,
        "reverse": _directions(reverse, N),
        "returned": {"all": len(cell.states), "h": 1, "last": 0}[return_states],
    }
    return B, fields


class Lengths(NamedTuple):
    """What is known of sequences' lengths.

    Attributes:
        longest: see :class:`flashrnn.problem.Problem`.
        even: ...
        whole: whether they are those of all rows, as if none were given.
    """

    longest: int
    even: bool
    whole: bool = False

    @classmethod
    def of(cls, longest: int, total: int, count: int, whole: bool = False) -> Lengths:
        """Out of the largest of so many lengths, and their sum."""
        return cls(longest, 10 * total >= 9 * count * longest, whole)


def tensors_of(
    given: Given, problem: Problem, check_values: bool
) -> tuple[Sequences, Lengths | None]:
    """The tensors of options that :func:`accept` has found to fit.

    Args:
        given: the options.
        problem: the problem of the call.
        check_values: whether values on the CPU may be read.

    Returns:
        The tensors, on the device of the call; and what is known of lengths on the CPU.

    Raises:
        ValueError: values on the CPU that are out of range.
    """
    reset, reset_states, lengths, cu_seqlens, _, _ = given
    known = None
    if problem.ragged:
        known = _known(lengths, cu_seqlens, problem.T) if check_values else None
        if known is not None and known.whole:
            lengths = None
        if lengths is not None:
            lengths = lengths.to(problem.device, non_blocking=True)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(problem.device, non_blocking=True)
    if reset is not None and reset.ndim == 1:
        reset = reset.unsqueeze(0)
    if reset_states is not None and problem.B != 1 and reset_states.shape[1:3] == (1, 1):
        reset_states = reset_states.expand(-1, problem.B, -1, -1, -1)
    return Sequences(reset, reset_states, lengths, cu_seqlens), known


def _check_integers(
    name: str, layout: str, given: Tensor, count: int | None, device: torch.device
) -> None:
    if given.dtype not in _INTEGERS:
        raise TypeError(f"{name} is of {given.dtype}; accepted are torch.int32 and torch.int64")
    if given.ndim != 1 or given.shape[0] != (given.shape[0] if count is None else count):
        must = layout if count is None else f"({count},), {layout}"
        raise ValueError(f"{name} has shape {tuple(given.shape)}; accepted is {must}")
    if count is None and given.shape[0] == 0:
        raise ValueError(f"{name} has no element; accepted are {layout}: 0, the ends of all")
    if given.device != device and given.device.type != "cpu":
        raise ValueError(
            f"the input on {device}, {name} on {given.device}; accepted is its device or the CPU"
        )


def _check_flags(reset: Tensor, rows: tuple[int, int], device: torch.device) -> None:
    if reset.dtype != torch.bool:
        raise TypeError(f"reset is of {reset.dtype}; accepted is torch.bool: make it reset.bool()")
    if reset.device != device:
        raise ValueError(f"the input on {device}, reset on {reset.device}; accepted is one device")
    if reset.shape != rows and not (rows[0] == 1 and reset.shape == rows[1:]):
        raise ValueError(
            f"reset has shape {tuple(reset.shape)}; with this input it must be {rows}, a flag a "
            "step"
        )


def _check_starts(
    given: Tensor, S: int, B: int, rows: tuple[int, int], N: int, D: int, device: torch.device
) -> None:
    """``reset_states`` has one start for all, one a sequence or one a step."""
    if given.device != device:
        raise ValueError(
            f"the input on {device}, reset_states on {given.device}; accepted is one device for all"
        )
    each, every = (S, B, 1, N, D), (S, *rows, N, D)
    if given.shape in (every, each, (S, 1, 1, N, D)):
        return
    raise ValueError(
        f"reset_states has shape {tuple(given.shape)}; with this input it must be {every}, a start "
        f"a step, {each}, a start a sequence, or {(S, 1, 1, N, D)}, one for all"
    )


def _directions(reverse: Any, N: int) -> bool | tuple[bool, ...]:
    """One for all heads where they agree."""
    if isinstance(reverse, bool):
        return reverse
    if isinstance(reverse, (Tensor, str)) or not isinstance(reverse, Sequence):
        given = f"{type(reverse).__module__}.{type(reverse).__name__}".removeprefix("builtins.")
        raise TypeError(f"reverse is {given}; accepted is a bool, or a list with one a head")
    heads = tuple(reverse)
    if not all(isinstance(head, bool) for head in heads):
        raise TypeError(f"reverse is {reverse!r}; accepted are bools")
    if len(heads) != N:
        raise ValueError(
            f"reverse has {len(heads)} elements; accepted is one for each of {N} heads"
        )
    if len(set(heads)) == 1:
        return heads[0]
    return heads


def _known(lengths: Tensor | None, cu_seqlens: Tensor | None, T: int) -> Lengths | None:
    """Of lengths on the CPU, which are checked; a GPU is not waited for."""
    if lengths is not None and lengths.device.type == "cpu" and lengths.numel():
        least, most = map(int, lengths.aminmax())
        if least < 0 or most > T:
            raise ValueError(
                f"lengths has values from {least} to {most}; accepted are 0 to {T}, the steps of "
                "the input"
            )
        return Lengths.of(most, int(lengths.sum()), lengths.numel(), whole=least == T)
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        first, last, each = int(cu_seqlens[0]), int(cu_seqlens[-1]), cu_seqlens.long().diff()
        least, most = map(int, each.aminmax()) if each.numel() else (0, 0)
        if first != 0 or last != T or least < 0:
            falls = f" and falls by {-least} between" if least < 0 else ""
            raise ValueError(
                f"cu_seqlens goes from {first} to {last}{falls}; accepted are values that do not "
                f"fall, from 0 to {T}, the rows of the input"
            )
        return Lengths.of(most, T, each.numel())
    return None
