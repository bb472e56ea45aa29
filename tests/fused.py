"""The checks that every fused backend must pass, on the CPU and on a GPU."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from flashrnn import Cell, FlashRNNConfig
from flashrnn.backends import load, protocols
from flashrnn.cells import resolve
from flashrnn.problem import Problem
from tests.problems import (
    Inputs,
    call,
    gradients,
    random_inputs,
    random_weights,
    relative_error,
    steep,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPTIONS = [
    {"gradient_recurrent_cut": True},
    {"gradient_recurrent_clipval": 0.05},
    {"forward_clipval": 0.3},
]
# Every dtype and how its products round: in float32 exactly, or with TF32.
PRODUCTS = [(torch.bfloat16, False), (torch.float16, False)]
PRODUCTS += [(torch.float32, False), (torch.float32, True)]
# Half a unit in the last place.
_HALF_UNIT = {torch.bfloat16: 2**-9, torch.float16: 2**-12}
# With fewer elements of h than this, a gradient's error depends on chance as much as on arithmetic.
_FEW = 4096


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Within it an error says what waits for the GPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def same_bits_from_a_graph(step: Callable[[], Sequence[Tensor]], inputs: Inputs) -> bool:
    """Whether a CUDA graph that records a step of these inputs gives its bits for other values."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        inputs.Wx.mul_(0.5)
    graph.replay()
    given = [x.clone() for x in results]
    return all(torch.equal(x, y) for x, y in zip(given, step(), strict=True))


def hold_to_vanilla(
    backend: str,
    kind: str | Cell,
    B: int,
    T: int,
    N: int,
    D: int,
    dtype: torch.dtype,
    device: str = "cpu",
    change: Callable[[Inputs], Inputs] = lambda inputs: inputs,
    **options: object,
) -> None:
    """Hold every output and gradient to vanilla in float64.

    The error is at most twice that of vanilla in the same dtype; in float32 at most 1e-5; in
    bfloat16, over 64 steps or more, at most 3e-3 for the states and 7e-3 for gradients.

    A gradient may always be off by half a unit in the last place. In small problems it may be off
    by the same amount again: the backward scan reads pre-activations that were rounded to 16 bits,
    while vanilla's graph keeps float32, and the effect of that rounding varies.
    """
    config = FlashRNNConfig(**options)  # type: ignore[arg-type]
    inputs = change(random_inputs(kind, B, T, N, D, dtype, device, seed=B + T + N + D))
    exact = inputs.to(torch.float64)
    runs = {}
    for name, leaves, by in (
        ("truth", exact, "vanilla"),
        ("plain", inputs, "vanilla"),
        ("given", inputs, backend),
    ):
        outputs = call(kind, leaves, backend=by, config=config)
        found = gradients(outputs, leaves)
        runs[name] = dict(zip(("states", "last_states"), outputs, strict=True))
        runs[name] |= {f"d_{leaf}": gradient for leaf, gradient in found.items()}
    for name, truth in runs["truth"].items():
        given, plain = runs["given"][name], runs["plain"][name]
        assert given.dtype == plain.dtype and given.shape == plain.shape, name
        if name in ("states", "last_states"):
            assert given.is_contiguous(), name
        error, allowed = relative_error(given, truth), relative_error(plain, truth)
        bound = largest_error(name, allowed, dtype, B * T * N * D, T)
        assert error <= bound, f"{name}: error {error:.3g}, at most {bound:.3g} is right"


def largest_error(name: str, plain: float, dtype: torch.dtype, elements: int, T: int) -> float:
    """What a result's error may be, as :func:`hold_to_vanilla` says.

    Args:
        name: of the result; those of gradients begin with ``d_``.
        plain: the error of vanilla in the same dtype.
        dtype: of the computation.
        elements: B·T·N·D.
        T: the number of steps; 64 and more bound the errors of bfloat16 besides.
    """
    allowed, is_gradient = 2 * plain, name.startswith("d_")
    if dtype == torch.float32:
        return max(allowed, 1e-5)
    if not is_gradient:
        allowed += 1e-6
    elif elements < _FEW:
        allowed += _HALF_UNIT[dtype]
    else:
        allowed = max(allowed, _HALF_UNIT[dtype])
    if dtype == torch.bfloat16 and T >= 64:
        allowed = min(allowed, 7e-3 if is_gradient else 3e-3)
    return allowed


def clips_h(backend: str, B: int, D: int) -> None:
    """Hold outputs to vanilla in float64, not gradients: rounding decides which h are clipped."""
    inputs = random_inputs("gru", B, 4, 2, D, torch.float16)
    config = FlashRNNConfig(forward_clipval=0.3)
    with torch.no_grad():
        truth = call("gru", inputs.to(torch.float64), backend="vanilla", config=config)
        plain = call("gru", inputs, backend="vanilla", config=config)
        given = call("gru", inputs, backend=backend, config=config)
    for exact, near, found in zip(truth, plain, given, strict=True):
        assert relative_error(found, exact) <= 2 * relative_error(near, exact) + 1e-6
    assert given[0][0].abs().max() == given[0].new_tensor(0.3)


def same_without_gradients(backend: str, D: int = 24, B: int = 3, kind: str = "slstm") -> bool:
    """Whether a call that saves nothing for a backward gives the same bits."""
    inputs = random_inputs(kind, B, 4, 2, D, torch.bfloat16)
    with torch.no_grad():
        given = call(kind, inputs, backend=backend)
    expected = call(kind, inputs, backend=backend)
    return all(torch.equal(x, y) for x, y in zip(given, expected, strict=True))


def continues_exactly(backend: str, D: int = 24, B: int = 3) -> bool:
    """Whether two calls, one with the other's last states, give the bits of one."""
    inputs = random_inputs("lstm", B, 5, 2, D, torch.bfloat16)
    whole, last = call("lstm", inputs, backend=backend)
    Wx, *others = inputs.tensors().values()
    states, carried = call("lstm", Inputs(Wx[:, :2], *others), backend=backend)
    rest, end = call("lstm", Inputs(Wx[:, 2:], *others[:2], carried), backend=backend)
    return torch.equal(torch.cat([states, rest], dim=2), whole) and torch.equal(end, last)


def gives_the_same_bits(backend: str, kind: str | Cell, *sizes: int) -> bool:
    """Whether two calls of the same inputs give the same bits, gradients included."""
    inputs = random_inputs(kind, *sizes, torch.bfloat16)
    runs = []
    for _ in range(2):
        outputs = call(kind, inputs, backend=backend)
        runs.append([*outputs, *gradients(outputs, inputs).values()])
    return all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def absent_gradients_are_zeros(backend: str, *sizes: int, device: str = "cpu") -> bool:
    """Whether gradients of outputs that are not given count as zeros, to the bit.

    They are absent of the last states, of every step's states, and of all these but ``h``.
    """
    module, (B, T, N, D) = cast(protocols.FusedBackend, load(backend)), sizes
    inputs = random_inputs("lstm", *sizes, torch.bfloat16, device)
    Wx, R, b, initial = (x.detach() for x in inputs.tensors().values())
    problem = Problem(resolve("lstm").traced, B, T, N, D, Wx.dtype, Wx.device, needs_gradient=True)
    states, last_states, gates = module.forward(problem, Wx, R, b, initial)
    d_states, d_last = random_weights((states, last_states), seed=2)
    none, h_alone = torch.zeros_like(d_states), d_states.clone()
    h_alone[1:] = 0
    runs = [
        module.backward(problem, R, initial, states, gates, *asked)
        for asked in (
            *((d_states, torch.zeros_like(d_last)), (d_states, None)),
            *((none, d_last), (None, d_last)),
            *((h_alone, d_last), (d_states[:1], d_last)),
        )
    ]
    pairs = zip(runs[::2], runs[1::2], strict=True)
    return all(
        torch.equal(given, expected)
        for expected, given in (x for pair in pairs for x in zip(*pair, strict=True))
        if expected is not None
    )


def keeps_a_nan_to_its_sequence_and_head(backend: str, B: int, D: int) -> bool:
    """Whether a NaN that one unit is given reaches its head and nothing else."""
    inputs = random_inputs("lstm", B, 3, 2, D, torch.bfloat16)
    with torch.no_grad():
        inputs.Wx[1, 1, 0, 0, 3] = torch.nan
    outputs = call("lstm", inputs, backend=backend)
    is_nan, others = outputs[0].isnan(), [b for b in range(B) if b != 1]
    # All its units have it at the next step.
    arrives = is_nan[:, 1, 1, 0].any() and is_nan[0, 1, 2, 0].all() and not is_nan[:, 1, 0].any()
    elsewhere = is_nan[:, others].any() or is_nan[:, :, :, 1].any()
    d_Wx = gradients(outputs, inputs)["Wx"]
    return bool(arrives and not elsewhere and not d_Wx[others].isnan().any())


def same_pattern_as_vanilla(
    backend: str,
    kind: str | Cell,
    inputs: Inputs,
    asked: Sequence[Tensor] | None = None,
    **options: object,
) -> None:
    """Hold which elements are finite, inf, -inf and NaN to vanilla in the same dtype.

    Compared are every step's states, the last states and the gradients of all inputs; the message
    names the first element that differs.

    A gradient may be infinite where vanilla has NaN, if vanilla in float64 has the same infinity of
    the same numbers. In 16 bits vanilla rounds what comes back through R before it adds the step's
    own gradient, and the two may cancel to exactly 0, which times an infinite h is NaN. A sum that
    is rounded once is nearer to the truth: tiny, and so infinite. Nothing else is held to float64,
    where 16 bits' overflows are none.

    Args:
        backend: the backend.
        kind: the cell.
        inputs: the call's; they may hold anything.
        asked: the gradients of ``states`` and ``last_states``, random where absent.
        options: fields of :class:`flashrnn.FlashRNNConfig`.
    """
    config = FlashRNNConfig(**options)  # type: ignore[arg-type]

    def results(leaves: Inputs, by: str) -> dict[str, Tensor]:
        nonlocal asked
        outputs = call(kind, leaves, backend=by, config=config)
        if asked is None:
            asked = random_weights(outputs, seed=1)
        slopes = torch.autograd.grad(
            outputs,
            list(leaves.tensors().values()),
            [slope.to(x) for slope, x in zip(asked, outputs, strict=True)],
            allow_unused=True,
            materialize_grads=True,
        )
        found = dict(zip(("states", "last_states"), outputs, strict=True))
        return found | {f"d_{x}": slope for x, slope in zip(leaves.tensors(), slopes, strict=True)}

    every, exact = results(inputs, backend), None
    for name, expected in results(inputs, "vanilla").items():
        given = every[name]
        # What rounding alone takes past the largest number, or leaves there.
        largest = torch.finfo(given.dtype).max
        near = torch.minimum(given.abs(), expected.abs()) > (1 - 2**-6) * largest
        same_sign = given.signbit() == expected.signbit()
        differs = (pattern(given) != pattern(expected)) & ~(near & same_sign)
        if name.startswith("d_") and differs.any():
            exact = exact or results(inputs.to(torch.float64), "vanilla")
            differs &= ~(expected.isnan() & given.isinf() & (given.double() == exact[name]))
        places = differs.nonzero()
        if len(places):
            at = tuple(places[0].tolist())
            raise AssertionError(
                f"{name}{list(at)} is {given[at].item()}, of vanilla {expected[at].item()}, "
                f"and {len(places) - 1} more of {given.numel()}"
            )


def contains_what_is_beyond_float16(backend: str, D: int, device: str = "cpu") -> None:
    """Hold a clip of the recurrent gradient to vanilla where a gate's gradient passes 65504."""
    inputs = random_inputs(steep, 2, 3, 1, D, torch.float16, device)
    with torch.no_grad():
        for x in inputs.tensors().values():
            x.zero_()
        inputs.R.fill_(0.25)
        # Zero times inf would be NaN.
        inputs.R[..., 0] = 0
    runs = []
    for name in (backend, "vanilla"):
        config = FlashRNNConfig(gradient_recurrent_clipval=0.5)
        _, last_states = call(steep, inputs, backend=name, config=config)
        slopes = torch.full_like(last_states, 100.0)
        runs.append(torch.autograd.grad(last_states, [inputs.Wx, inputs.states], slopes))
    (d_Wx, d_states), expected = runs
    assert torch.equal(pattern(d_Wx), pattern(expected[0]))
    assert d_Wx[:, 2, 0].isposinf().all() and d_Wx[:, :2].isfinite().all()
    assert torch.equal(d_states, expected[1]) and (d_states[..., 1:] == 0.5).all()


def put(inputs: Inputs, name: str, value: float, *at: int) -> None:
    """Change one element of what the name says."""
    with torch.no_grad():
        getattr(inputs, name)[at] = value


def pattern(x: Tensor) -> Tensor:
    """0 where finite, ±1 where ±inf, 2 where NaN."""
    return x.isnan() * 2 + x.isposinf() * 1 - x.isneginf() * 1


def others_keep_their_bits(
    backend: str,
    B: int,
    D: int,
    dtype: torch.dtype,
    device: str = "cpu",
    kind: str = "slstm",
    where: str = "Wx",
) -> bool:
    """Whether NaN and inf in one sequence and head leave the bits of all others as they are.

    They are planted in a step's ``Wx`` or in the first ``states``.
    """
    inputs = random_inputs(kind, B, 4, 2, D, dtype, device)
    place = {"Wx": (1, 1, 0, 0, 3), "states": (0, 1, 0, 0, 3)}[where]

    def results() -> list[Tensor]:
        outputs = call(kind, inputs, backend=backend)
        found = gradients(outputs, inputs)
        per_sequence = [*outputs, found["states"]]
        return [*per_sequence, found["Wx"].transpose(1, 2).unsqueeze(0)]

    expected = results()
    for value in (torch.nan, torch.inf):
        planted = inputs.tensors()[where].detach().clone()
        planted[place] = value
        inputs = Inputs(**inputs.tensors() | {where: planted.requires_grad_()})
        for given, right in zip(results(), expected, strict=True):
            # [·, B, ·, N, D], but for the gates' dimension, which is the third there.
            given, right = (
                x.flatten(2, -3).movedim(-2, 2).detach().clone() for x in (given, right)
            )
            given[:, 1, 0], right[:, 1, 0] = 0, 0
            if not torch.equal(given, right):
                return False
    return True


def strided(x: Tensor) -> Tensor:
    """The same values, neither contiguous nor aligned, as a leaf of its own."""
    *sizes, last = x.shape
    room = torch.full((last, *sizes, 2), math.nan, dtype=x.dtype, device=x.device)
    view = room[..., 1].movedim(0, -1)
    view.copy_(x.detach())
    return view.requires_grad_()


def all_strided(inputs: Inputs) -> Inputs:
    return Inputs(**{name: strided(x) for name, x in inputs.tensors().items()})


def at_odd_addresses(inputs: Inputs) -> Inputs:
    """The same values, contiguous, but one element behind an aligned address."""
    return Inputs(**{name: at_odd_address(x) for name, x in inputs.tensors().items()})


def at_odd_address(x: Tensor) -> Tensor:
    """See :func:`at_odd_addresses`."""
    x = x.detach()
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x).requires_grad_()


def with_gaps(inputs: Inputs) -> Inputs:
    """The same values in rows that lie two elements further apart."""

    def laid_out(x: Tensor) -> Tensor:
        room = x.new_full((*x.shape[:-1], x.shape[-1] + 2), math.nan)[..., :-2]
        return room.copy_(x.detach()).detach().requires_grad_()

    return Inputs(**{name: laid_out(x) for name, x in inputs.tensors().items()})


def transposed(inputs: Inputs) -> Inputs:
    """Every dimension's neighbours lie far apart, but those of the first."""

    def laid_out(x: Tensor) -> Tensor:
        order = tuple(reversed(range(x.ndim)))
        return x.detach().permute(order).contiguous().permute(order).requires_grad_()

    return Inputs(**{name: laid_out(x) for name, x in inputs.tensors().items()})


def as_the_backward_reads_R(inputs: Inputs) -> Inputs:
    """R lies as a kernel would lay it out for itself, from an odd address on."""
    R = inputs.R.detach().permute(1, 3, 0, 2)
    room = R.new_empty(R.numel() + 1)[1:].view(R.shape).copy_(R)
    return Inputs(inputs.Wx, room.permute(2, 0, 3, 1).requires_grad_(), inputs.b, inputs.states)


def expanded(inputs: Inputs) -> Inputs:
    """All sequences, steps and heads share the same memory."""

    def first(x: Tensor, *dimensions: int) -> Tensor:
        kept = [slice(0, 1) if i in dimensions else slice(None) for i in range(x.ndim)]
        return x.detach()[tuple(kept)].expand(x.shape).requires_grad_()

    return Inputs(
        first(inputs.Wx, 0, 1, 3),
        first(inputs.R, 1),
        first(inputs.b, 1),
        first(inputs.states, 1, 3),
    )


LAYOUTS = [transposed, as_the_backward_reads_R, expanded]


def check_clipped(backend: str, clipval: float, device: str = "cpu") -> None:
    """Hold a call whose h and gradient are clipped to a value to vanilla's."""
    options = {"forward_clipval": clipval, "gradient_recurrent_clipval": clipval}
    inputs = random_inputs("elman", 3, 3, 1, 16, torch.float32, device)
    runs = []
    for name in (backend, "vanilla"):
        outputs = call("elman", inputs, backend=name, config=FlashRNNConfig(**options))
        runs.append([*outputs, *gradients(outputs, inputs).values()])
    for given, expected in zip(*runs, strict=True):
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    """What PyTorch is told about products of float32: the parameter."""
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what a backend allocates with NaN, so that an element that it never writes shows."""
    poison(monkeypatch)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """See :func:`poisoned`. Of integers every bit is set, which in any float dtype is NaN."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **options: Any) -> Tensor:
            x = make(*arguments, **options)
            if x.is_floating_point():
                return x.fill_(math.nan)
            return x.fill_(-1) if x.dtype == torch.int32 else x

        return made

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def round_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend Triton's interpreter, which truncates to bfloat16 where a GPU rounds."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
