"""Random calls with resets, lengths, packing and directions, and the same by plain calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from flashrnn import Cell, FlashRNNConfig, flashrnn
from flashrnn.cells import resolve
from flashrnn.problem import carry_dtype
from tests.fused import largest_error
from tests.patterns import linear
from tests.problems import Inputs, random_inputs, random_weights, relative_error

BACKENDS = ("cuda_fused", "triton", "cuda")
"""Those that have all options."""
KINDS = [
    {"resets": "zeros"},
    {"resets": "sequence"},
    {"resets": "step"},
    {"ragged": "lengths"},
    {"ragged": "packed"},
    {"reverse": "all"},
    {"reverse": "some"},
    {"return_states": "h"},
    {"return_states": "last"},
    {"resets": "step", "ragged": "lengths", "reverse": "some", "return_states": "h"},
    {"resets": "sequence", "ragged": "packed", "reverse": "some", "return_states": "last"},
]
"""Each kind of each option, and all at once."""
ALL = KINDS[-2:]
"""All at once, with ``lengths`` and packed."""


def alternating(
    firsts: Iterable[Any], seconds: Iterable[Any], thirds: Sequence[Any] = ALL
) -> list[tuple[Any, Any, Any]]:
    """Every two of the values, each with one of the thirds by turns, all of which a value meets."""
    return [
        (first, second, thirds[(i + j) % len(thirds)])
        for i, first in enumerate(firsts)
        for j, second in enumerate(seconds)
    ]


@dataclass
class Ragged:
    """A call.

    Attributes:
        function: the cell.
        inputs: leaves; ``Wx`` is ``[1, total, ...]`` where the batch is packed.
        options: arguments of :func:`flashrnn.flashrnn`.
        lengths: of the sequences.
        reset_states: a leaf, where resets have a start of their own.
    """

    function: str | Cell
    inputs: Inputs
    lengths: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    reset_states: Tensor | None = None

    def leaves(self) -> dict[str, Tensor]:
        found = dict(self.inputs.tensors())
        if self.reset_states is not None:
            found["reset_states"] = self.reset_states
        return found

    def to(self, dtype: torch.dtype) -> Ragged:
        """The same values as new leaves."""
        starts = self.reset_states
        if starts is not None:
            starts = starts.detach().to(carry_dtype(dtype)).requires_grad_()
        return replace(self, inputs=self.inputs.to(dtype), reset_states=starts)

    def arguments(self, backend: str) -> dict[str, Any]:
        return {
            **self.inputs.tensors(),
            "function": self.function,
            "backend": backend,
            "reset_states": self.reset_states,
            **self.options,
        }

    def call(self, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
        return flashrnn(**{**self.arguments(backend), **options})


def random_ragged(
    function: str | Cell,
    B: int,
    T: int,
    N: int,
    D: int,
    seed: int = 0,
    resets: str = "none",
    ragged: str = "none",
    reverse: str = "none",
    return_states: str = "all",
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Ragged:
    """A call with options of such kinds.

    Args:
        function: the cell.
        B: the number of sequences.
        T: the largest length.
        N: the number of heads.
        D: the head dimension.
        seed: of all that is random.
        resets: ``"none"``; to ``"zeros"``; to a start of each ``"sequence"`` or each ``"step"``.
        ragged: ``"none"``, ``"lengths"`` or ``"packed"``.
        reverse: ``"none"``, ``"all"`` or ``"some"`` heads.
        return_states: as of :func:`flashrnn.flashrnn`.
        dtype: of the inputs.
        device: of the inputs.
    """
    generator = torch.Generator().manual_seed(seed)

    def randint(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    lengths = [T] * B
    options: dict[str, Any] = {"return_states": return_states}
    inputs = random_inputs(function, B, T, N, D, dtype, device, seed)
    rows = (B, T)
    if ragged != "none":
        lengths = randint(0, T + 1, B).tolist()
        lengths[int(randint(0, B, 1))] = T
    if ragged == "lengths":
        if min(lengths, default=0) == T > 1:
            # Lengths on the CPU that are all T are left out.
            lengths[0] = T - 1
        options["lengths"] = torch.tensor(lengths, device=device)
    if ragged == "packed":
        rows = (1, sum(lengths))
        padded = inputs.Wx.detach()
        packed = torch.cat([x[:length] for x, length in zip(padded, lengths, strict=True)])
        inputs = replace(inputs, Wx=packed.unsqueeze(0).requires_grad_())
        cuts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        options["cu_seqlens"] = cuts.to(device)
    starts = None
    if resets != "none":
        options["reset"] = (torch.rand(rows, generator=generator) < 0.4).to(device)
    if resets in ("sequence", "step"):
        lead = (B, 1) if resets == "sequence" else rows
        like = random_inputs(function, *lead, N, D, torch.float64, seed=seed + 1)
        S = len(resolve(function).states)
        if resets == "sequence":
            starts = like.states.detach()
        else:
            like = random_inputs(function, rows[0] * rows[1], 1, N, D, torch.float64, seed=seed + 1)
            starts = like.states.detach().view(S, *rows, N, D)
        starts = starts.to(device, carry_dtype(dtype)).requires_grad_()
    if reverse != "none":
        heads = [bool(x) for x in randint(0, 2, N)]
        options["reverse"] = True if reverse == "all" else heads
    return Ragged(function, inputs, lengths, options, starts)


def few_cuts(case: Ragged) -> Ragged:
    """Cuts of several sequences at once, one after another, at the first step and at the last one.

    Between them are steps without any, more than the kernels' rings have stages.
    """
    Wx = case.inputs.Wx
    reset = torch.zeros(Wx.shape[:2], dtype=torch.bool, device=Wx.device)
    reset[0, 0] = reset[3, -1] = True
    reset[1:4, 3] = reset[2, 3:6] = reset[-1, -9] = True
    return replace(case, options=case.options | {"reset": reset})


def hold_options_of_no_effect(
    backend: str,
    B: int,
    T: int,
    N: int,
    D: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> None:
    """Resets at no step, equal lengths and no head backwards give a plain call's bits.

    Args:
        backend: by which backend.
        B: the number of sequences, as T, N and D of an LSTM.
        T: the number of steps.
        N: the number of heads.
        D: the head dimension.
        dtype: of the inputs.
        device: of the inputs.
    """
    case = random_ragged("lstm", B, T, N, D, dtype=dtype, device=device)
    expected = gradients_of(case, case.call(backend))
    nowhere = torch.zeros(B, T, dtype=torch.bool, device=device)
    equal = torch.full((B,), T, device=device)
    for options in (
        {"reset": nowhere},
        {"lengths": equal},
        {"reset": nowhere, "lengths": equal},
        {"reverse": [False] * N},
    ):
        found = gradients_of(case, case.call(backend, **options))
        for name in expected:
            assert torch.equal(found[name], expected[name]), (name, list(options))


def episode_by_episode(case: Ragged) -> tuple[Tensor, Tensor]:
    """The same by plain calls: a head of a sequence from one cut to the next."""
    Wx, R, b, states = case.inputs.tensors().values()
    options, N = case.options, Wx.shape[3]
    packed = "cu_seqlens" in options
    reverse = options.get("reverse", False)
    heads = reverse if isinstance(reverse, list) else [reverse] * N
    S, B = len(resolve(case.function).states), len(case.lengths)
    config = FlashRNNConfig()
    every, last, first = [], [], 0
    for i, length in enumerate(case.lengths):
        line, begin = (0, first) if packed else (i, 0)
        first += length
        rows = slice(begin, begin + length)
        flags = [False] * length
        if "reset" in options:
            flags = options["reset"][line, rows].tolist()
        of_heads, ends = [], []
        for n in range(N):
            cuts = [t for t in range(length) if flags[t]]
            pieces = list(zip([0, *cuts], [*cuts, length], strict=True))
            now, found = states[:, i : i + 1, :, n : n + 1], []
            for start, end in reversed(pieces) if heads[n] else pieces:
                # A cut before the first step leaves an empty piece before it.
                is_first = end == length if heads[n] else start == 0
                is_reset = not is_first or (not heads[n] and flags[:1] == [True] and end > 0)
                if heads[n] and end == 0:
                    continue
                if is_reset:
                    now = torch.zeros_like(now)
                    if case.reset_states is not None:
                        at = end - 1 if heads[n] else start
                        if case.reset_states.shape[2] == 1 and case.reset_states.shape[1] == B:
                            now = case.reset_states[:, i : i + 1, :, n : n + 1]
                        else:
                            row = case.reset_states[:, line, begin + at, n]
                            now = row[:, None, None, None]
                x = Wx[line : line + 1, begin + start : begin + end, :, n : n + 1]
                x = x.flip(1) if heads[n] else x
                seen, now = flashrnn(
                    *(x, R[:, n : n + 1], b[:, n : n + 1], now, case.function, "vanilla"),
                    config=config,
                )
                found.append(seen.flip(2) if heads[n] else seen)
            if heads[n]:
                found.reverse()
            empty = Wx.new_zeros(S, 1, 0, 1, Wx.shape[-1])
            of_heads.append(torch.cat([empty, *found], dim=2))
            ends.append(now)
        line_states = torch.cat(of_heads, dim=3)
        if not packed:
            rest = line_states.new_zeros(S, 1, Wx.shape[1] - length, *line_states.shape[3:])
            line_states = torch.cat([line_states, rest], dim=2)
        every.append(line_states)
        last.append(torch.cat(ends, dim=3))
    found = torch.cat(every, dim=2 if packed else 1)
    returned = {"all": S, "h": 1, "last": 0}[options["return_states"]]
    return found[:returned], torch.cat(last, dim=1)


def gradients_of(case: Ragged, outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Outputs, and gradients of a random weighted sum of both."""
    weights = random_weights(outputs, seed=1)
    leaves = case.leaves()
    found = torch.autograd.grad(
        outputs, list(leaves.values()), weights, allow_unused=True, materialize_grads=True
    )
    named = {f"d_{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return {"states": outputs[0], "last_states": outputs[1], **named}


def hold_ragged_to_vanilla(backend: str, case: Ragged, **options: Any) -> dict[str, Tensor]:
    """Hold every output and gradient to vanilla in float64, as ``hold_to_vanilla`` does.

    Returns the backend's.
    """
    dtype = case.inputs.Wx.dtype
    exact = case.to(torch.float64)
    truth = gradients_of(exact, exact.call("vanilla", **options))
    plain = gradients_of(case, case.call("vanilla", **options))
    found = gradients_of(case, case.call(backend, **options))
    T, N, D = max(1, *case.lengths), *case.inputs.R.shape[1:3]
    for name, expected in truth.items():
        given = found[name]
        assert given.dtype == plain[name].dtype and given.shape == expected.shape, name
        error, allowed = (relative_error(x, expected) for x in (given, plain[name]))
        bound = largest_error(name, allowed, dtype, sum(case.lengths) * N * D, T)
        assert error <= bound, f"{name} is off by {error}, more than {bound}"
    if "lengths" in case.options and case.options["return_states"] != "last":
        for i, length in enumerate(case.lengths):
            assert (found["states"][:, i, length:] == 0).all()
            assert (found["d_Wx"][i, length:] == 0).all()
    return found


def hold_to_each_alone(
    backend: str, case: Ragged, which: Sequence[int] | None = None, copies: int = 1
) -> None:
    """Where a sequence lies, and beside which others, changes no bit of what is its own.

    Args:
        backend: by which backend.
        case: lengths or a packed batch.
        which: the sequences that are called alone; ``None``: all.
        copies: how often each, for a plan of as many sequences.
    """
    packed = "cu_seqlens" in case.options
    every_state, last_states = case.call(backend)
    for i, (end, length) in enumerate(zip(accumulate(case.lengths), case.lengths, strict=True)):
        if length == 0 or (which is not None and i not in which):
            continue
        row, steps = (0, slice(end - length, end)) if packed else (i, slice(0, length))
        Wx, states = case.inputs.Wx[row, steps], case.inputs.states[:, i : i + 1]
        inputs = case.inputs.tensors() | {
            "Wx": Wx.expand(copies, *Wx.shape),
            "states": states.expand(-1, copies, -1, -1, -1),
        }
        found, last = flashrnn(**inputs, backend=backend)
        assert torch.equal(found[:, 0], every_state[:, row, steps])
        assert torch.equal(last[:, 0], last_states[:, i])


def hold_padding_out(backend: str, reverse: str, device: str = "cpu", D: int = 16) -> None:
    """What lies past a sequence's end reaches no output and no gradient: neither inputs, nor resets
    and what they go back to, nor gradients of the states there, even if none of it is finite."""
    case = random_ragged(
        *("lstm", 4, 5, 2, D, 1),
        resets="step",
        ragged="lengths",
        reverse=reverse,
        dtype=torch.float32,
        device=device,
    )
    assert case.reset_states is not None
    runs = []
    for planted in (0.0, torch.nan):
        Wx, starts = case.inputs.Wx.detach().clone(), case.reset_states.detach().clone()
        reset = case.options["reset"].clone()
        past = torch.arange(5, device=device) >= case.options["lengths"][:, None]
        Wx[past], starts[:, past], reset[past] = planted, planted, True
        changed = replace(
            case,
            inputs=replace(case.inputs, Wx=Wx.requires_grad_()),
            reset_states=starts.requires_grad_(),
            options=case.options | {"reset": reset},
        )
        states, last_states = changed.call(backend)
        weights = torch.ones_like(states)
        weights[:, past] = planted
        leaves = list(changed.leaves().values())
        found = torch.autograd.grad(
            (states, last_states), leaves, (weights, torch.ones_like(last_states))
        )
        runs.append((states, last_states, *found))
    for given, expected in zip(*runs, strict=True):
        assert torch.equal(expected, given)


def hold_rows_of_no_sequence(backend: str, reverse: str, device: str = "cpu", D: int = 16) -> None:
    """Rows of a packed batch before its first sequence and behind its last one, as they may be
    where nobody looks at ``cu_seqlens``: states and gradients are 0 there."""
    case = random_ragged(
        *("lstm", 3, 6, 2, D, 3),
        resets="step",
        ragged="packed",
        reverse=reverse,
        dtype=torch.float32,
        device=device,
    )
    total = case.inputs.Wx.shape[1]
    cuts = torch.tensor([1, 3, 3, total - 2], device=device)
    case = replace(case, options=case.options | {"cu_seqlens": cuts})
    given, expected = (gradients_of(case, case.call(x)) for x in (backend, "vanilla"))
    for name, x in given.items():
        torch.testing.assert_close(x, expected[name], atol=1e-4, rtol=1e-3, msg=name)
    for rows in (given["states"][0], given["d_Wx"], given["d_reset_states"][0]):
        assert not rows[0, :1].any() and not rows[0, total - 2 :].any()


def hold_empty_sequences_out(backend: str, ragged: str, device: str = "cpu", D: int = 16) -> None:
    """What a sequence without steps starts with is in no gradient but its own, whatever it is."""
    case = random_ragged("lstm", 3, 4, 2, D, ragged=ragged, dtype=torch.float32, device=device)
    # Packed, it is of as many rows as it happens to have: the last sequence takes the rest.
    total = case.inputs.Wx.shape[1]
    options = {
        "lengths": {"lengths": torch.tensor([2, 0, 4], device=device)},
        "packed": {"cu_seqlens": torch.tensor([0, 2, 2, total], device=device)},
    }[ragged]
    leaves, found = [case.inputs.R, case.inputs.b], []
    for planted in (0.0, torch.nan, torch.inf):
        start = case.inputs.states.detach().clone()
        start[:, 1] = planted
        states, _ = flashrnn(case.inputs.Wx, *leaves, start, "lstm", backend, **options)
        found.append((states, *torch.autograd.grad(states.sum(), leaves)))
    for other in found[1:]:
        for given, expected in zip(other, found[0], strict=True):
            assert torch.equal(given, expected)


def hold_last_states_out(backend: str, ragged: str, device: str = "cpu") -> None:
    """No h follows a sequence's last one: it is in no gradient of R, whatever it is."""
    case = random_ragged(linear, 3, 4, 2, 16, ragged=ragged, dtype=torch.float32, device=device)
    lengths, cuts = torch.tensor(case.lengths), [0, *accumulate(case.lengths)]
    leaves, found = [case.inputs.R, case.inputs.b, case.inputs.states], []
    for planted in (0.0, torch.nan, torch.inf):
        Wx = case.inputs.Wx.detach().clone()
        for i, length in enumerate(lengths.tolist()):
            if length and ragged == "packed":
                Wx[0, cuts[i + 1] - 1] = planted
            elif length:
                Wx[i, length - 1] = planted
        states, _ = replace(case, inputs=replace(case.inputs, Wx=Wx)).call(backend)
        found.append(torch.autograd.grad(states, leaves, torch.ones_like(states)))
    for other in found[1:]:
        for given, expected in zip(other, found[0], strict=True):
            assert torch.equal(given, expected)
