"""Random calls, held to vanilla.

A case is drawn by its number alone. On a GPU, cases with neighbouring numbers are a family, of one
cell, N, D and dtype and few batch sizes, layouts and options, so that what is compiled serves many.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flashrnn import FlashRNNConfig, flashrnn
from flashrnn.cells import resolve
from tests.fused import at_odd_address, largest_error, poison, round_as_a_gpu, strided
from tests.problems import Inputs, random_inputs, random_weights, relative_error
from tests.residuals import (
    backward_from_residuals,
    clips_that_let_pass,
    infinite_counting_as_largest,
)
from tests.stress.cells import CELLS, plant, suited
from tests.stress.running import Check

INFINITE = (float("nan"), float("inf"), -float("inf"))


# ---- what is drawn


@dataclass(frozen=True)
class Sizes:
    """What cases are drawn from.

    Attributes:
        B: sizes around the edges of the plans, as T, N and D are.
        inputs: how many elements of Wx are not too many.
        matrix: likewise of R.
        family: cases of a family.
    """

    B: tuple[int, ...]
    T: tuple[int, ...]
    N: tuple[int, ...]
    D: tuple[int, ...]
    inputs: int
    matrix: int
    family: int


SIZES = {
    "cuda": Sizes(
        B=(1, 2, 7, 8, 9, 15, 16, 17, 24, 40, 64, 130, 250, 260, 300),
        T=(1, 2, 3, 5, 9, 17, 33, 70, 300),
        N=(1, 2, 3, 5, 12),
        D=(
            *(1, 8, 15, 16, 17, 31, 32, 40, 63, 64, 65, 96, 100, 127, 128, 129, 136, 250, 256, 260),
            *(330, 504, 512, 520, 640, 760, 768, 776, 1000, 1024, 1032, 1536, 2048, 2560),
        ),
        inputs=6_000_000,
        matrix=30_000_000,
        family=24,
    ),
    # What Triton's interpreter or the emulation of CUDA gets through.
    "cpu": Sizes(
        B=(1, 2, 7, 8, 9, 17),
        T=(1, 2, 3, 5),
        N=(1, 2, 3),
        D=(1, 3, 8, 15, 16, 17, 24, 31, 32, 33, 40),
        inputs=4_000,
        matrix=20_000,
        family=1,
    ),
}
_LONG = 4096
"""Elements of a step up to which a hundred steps and more are cheap."""


def transposed(x: Tensor, _: random.Random) -> Tensor:
    backwards = tuple(reversed(range(x.ndim)))
    return x.permute(backwards).contiguous().permute(backwards)


def sliced(x: Tensor, _: random.Random) -> Tensor:
    """Rows of D that lie together, in wider ones."""
    room = x.new_full((*x.shape[:-1], x.shape[-1] + 8), float("nan"))
    room[..., : x.shape[-1]] = x
    return room[..., : x.shape[-1]]


def expanded(x: Tensor, rng: random.Random) -> Tensor:
    """The same along a dimension, with a stride of 0."""
    dims = [dim for dim, size in enumerate(x.shape) if size > 1]
    return x.narrow(rng.choice(dims), 0, 1).expand_as(x) if dims else x


def negated(x: Tensor, _: random.Random) -> Tensor:
    """What memory holds is minus the value, as in ``(x * 1j).conj().imag``."""
    return torch._neg_view(-x)


LAYOUTS: dict[str, Callable[[Tensor, random.Random], Tensor]] = {
    "contiguous": lambda x, _: x,
    "strided": lambda x, _: strided(x),
    "at an odd address": lambda x, _: at_odd_address(x),
    "transposed": transposed,
    "sliced": sliced,
    "expanded": expanded,
    "negated": negated,
}
Results = dict[str, Tensor]
"""Outputs, ``states`` and ``last_states``, and gradients, ``d_Wx`` and so on."""

LEAVES = tuple(field.name for field in fields(Inputs))
MODES = ("training",) * 8 + ("no_grad", "inference_mode")
OPTIONS: list[dict[str, Any]] = [
    {"gradient_recurrent_cut": True},
    {"gradient_recurrent_clipval": 0.05},
    {"forward_clipval": 0.3},
    {"gradient_recurrent_clipval": 0.5, "forward_clipval": 0.6},
]
VALUES = ("ordinary",) * 6 + ("planted",) * 3 + ("planted in R", "large gradients")


@dataclass(frozen=True)
class Case:
    """A call.

    Attributes:
        layouts: of Wx, R, b, states and the incoming gradients.
        asked: of which outputs gradients come in.
        unasked: the inputs that require none.
        values: ordinary; NaN and inf planted among them; or incoming gradients that 16 bits barely
            hold.
        initial_val: in place of initial states.
        tf32: whether products of float32 may be computed so.
        triton: whether it is one for Triton, which compiles slowly, or for the others.
    """

    number: int
    cell: str
    B: int
    T: int
    N: int
    D: int
    dtype: torch.dtype
    tf32: bool
    layouts: tuple[str, ...]
    asked: str
    unasked: tuple[str, ...]
    mode: str
    options: dict[str, Any]
    initial_val: float | None
    values: str
    triton: bool

    def __str__(self) -> str:
        said = [f"{self.cell} B={self.B} T={self.T} N={self.N} D={self.D}"]
        said += [str(self.dtype)[6:] + " tf32" * self.tf32, self.mode, f"{self.values} values"]
        said += [f"{name}={value}" for name, value in self.options.items()]
        if self.initial_val is not None:
            said.append(f"initial_val={self.initial_val}")
        if self.mode == "training":
            said.append(f"gradients of {self.asked}")
            said += [f"none for {name}" for name in self.unasked]
        said += [
            f"{name} {layout}"
            for name, layout in zip((*LEAVES, "gradients"), self.layouts, strict=True)
            if layout != "contiguous"
        ]
        return ", ".join(said)


def draw(number: int, device: str) -> Case:
    """The case of this number; on a GPU another one than without."""
    sizes = SIZES[device]
    family = random.Random(f"family {number // sizes.family} {device}")
    case = random.Random(f"case {number} {device}")
    name = family.choice(list(CELLS))
    cell = resolve(CELLS[name])
    rows = max(len(cell.gates), len(cell.states))

    def matrix(N: int, D: int) -> int:
        return rows * N * D * D

    D = family.choice([D for D in sizes.D if matrix(1, D) <= sizes.matrix])
    N = family.choice([N for N in sizes.N if matrix(N, D) <= sizes.matrix])
    dtype = family.choice([torch.bfloat16, torch.float16, torch.float32])
    tf32 = dtype == torch.float32 and device == "cuda" and family.random() < 0.4
    batches = family.sample(sizes.B, 3)
    options = [{}, family.choice(OPTIONS)]
    layouts = [
        ("contiguous",) * 5,
        *(tuple(family.choice(list(LAYOUTS)) for _ in range(5)) for _ in range(2)),
    ]
    triton = device == "cpu" or (D <= 128 and family.random() < 0.4)

    B = case.choice(batches)
    step = B * N * D
    lengths = [
        T
        for T in sizes.T
        if T == 1 or (T * step * rows <= sizes.inputs and (T < 100 or step <= _LONG))
    ]
    T = case.choice(lengths)
    unasked = tuple(case.sample(LEAVES, 2)) if case.random() < 0.25 else ()
    if case.random() < 0.05:
        # An empty sequence's last states are the initial ones, whatever else requires a gradient.
        (B, T), unasked = case.choice([(0, T), (B, 0)]), ()
    mode = case.choice(MODES)
    values = case.choice(VALUES)
    return Case(
        number=number,
        cell=name,
        B=B,
        T=T,
        N=N,
        D=D,
        dtype=dtype,
        tf32=tf32,
        layouts=case.choice(layouts),
        asked=case.choice(("both", "both", "h", "last_states")),
        unasked=unasked,
        mode=mode,
        options=case.choice(options),
        initial_val=case.choice((0.0, 0.5)) if case.random() < 0.2 and name != "quotient" else None,
        values=values,
        triton=triton,
    )


def inputs_of(case: Case, device: str, seed: int) -> Inputs:
    kind, rng = CELLS[case.cell], random.Random(f"inputs {seed}")
    sizes = (case.B, case.T, case.N, case.D)
    inputs = suited(kind, random_inputs(kind, *sizes, case.dtype, device, seed))
    tensors = inputs.tensors()
    if case.values == "planted":
        for _ in range(rng.randint(0, 2)):
            plant(tensors[rng.choice(("Wx", "Wx", "states", "b"))], rng, INFINITE)
    if case.values == "planted in R":
        plant(tensors["R"], rng, INFINITE)
    laid = {
        name: LAYOUTS[layout](x.detach(), rng).detach().requires_grad_(name not in case.unasked)
        for (name, x), layout in zip(tensors.items(), case.layouts, strict=False)
    }
    return Inputs(**laid)


def results(case: Case, inputs: Inputs, backend: str, seed: int) -> Results:
    """Outputs and gradients."""
    given: dict[str, Any] = dict(inputs.tensors())
    config: dict[str, Any] = dict(case.options)
    if case.initial_val is not None:
        del given["states"]
        config["initial_val"] = case.initial_val
    modes = {"no_grad": torch.no_grad(), "inference_mode": torch.inference_mode()}
    with modes.get(case.mode, nullcontext()):
        outputs = flashrnn(
            **given,
            function=CELLS[case.cell],
            backend=backend,
            config=FlashRNNConfig(**config),
        )
    found = dict(zip(("states", "last_states"), outputs, strict=True))
    leaves = {name: x for name, x in given.items() if x.requires_grad}
    if not len(given["b"]):
        # It feeds no gate, so that vanilla's results do not depend on it.
        leaves.pop("b", None)
    if case.mode != "training" or not leaves:
        return found

    rng = random.Random(f"gradients {seed}")
    weights = random_weights(outputs, seed + 1)
    for weight in weights:
        if case.values == "large gradients":
            weight.mul_(512)
        if case.values == "planted" and rng.random() < 0.3:
            plant(weight, rng, INFINITE)
    asked = {"h": [0], "last_states": [1], "both": [0, 1]}[case.asked]
    if case.T == 0 and "states" not in leaves:
        # The last states are the first, which depend on nothing.
        asked = [k for k in asked if k != 1]
        if not asked:
            return found
    tensors, weights = [outputs[k] for k in asked], [weights[k] for k in asked]
    if case.asked == "h":
        tensors, weights = [tensors[0][0]], [weights[0][0]]
    weights = [LAYOUTS[case.layouts[-1]](x, rng).detach() for x in weights]
    gradients = torch.autograd.grad(
        tensors, list(leaves.values()), weights, allow_unused=True, materialize_grads=True
    )
    return found | {f"d_{name}": x for name, x in zip(leaves, gradients, strict=True)}


# ---- what is held


def check(number: int, backends: Sequence[str], device: str) -> dict[str, list[str]]:
    """Hold one case; what it was, for the summary.

    Raises:
        AssertionError: a result that is wrong; names the case, and what is wrong with it.
    """
    case = draw(number, device)
    with pytest.MonkeyPatch.context() as patch, allowing_tf32(case.tf32):
        poison(patch)
        if device == "cpu" and "triton" in backends:
            round_as_a_gpu(patch)
        first = Draw(case, device, 0)
        ran = [f"{backend} {hold(case, device, backend, first)}" for backend in backends]
    return {
        "backend": ran,
        "cell": [case.cell],
        "dtype": [str(case.dtype)[6:] + " tf32" * case.tf32],
        "D": [str(case.D)],
        "B": [str(case.B)],
        "T": [str(case.T)],
        "mode": [case.mode],
        "options": [", ".join(case.options) or "none"],
        "layout": sorted(set(case.layouts)),
        "values": [case.values],
    }


@contextmanager
def allowing_tf32(allowed: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def as_tf32(x: Tensor) -> Tensor:
    """float32 rounded to the 10 bits that TF32 keeps of its mantissa."""
    rounded = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


class Draw:
    """A case with the values of one draw of several, and what they lead to."""

    def __init__(self, case: Case, device: str, number: int) -> None:
        self.case, self.seed = case, case.number + 10**12 * number
        self.inputs = inputs_of(case, device, self.seed)
        exact = self.inputs.to(torch.float64)
        for name in case.unasked:
            exact.tensors()[name].requires_grad_(False)
        self.truth = results(case, exact, "vanilla", self.seed)
        self.plain = self.by("vanilla")

    @cached_property
    def kept(self) -> Results:
        """By vanilla, with gradients of what fused backends keep."""
        with backward_from_residuals():
            return self.by("vanilla")

    @cached_property
    def of_rounded_R(self) -> Results:
        """By vanilla, of R as TF32 has it: the library's product of a single sequence has all of
        float32."""
        R = self.inputs.R
        kept = R.detach().clone()
        with torch.no_grad():
            R.copy_(as_tf32(kept))
        try:
            return self.by("vanilla")
        finally:
            with torch.no_grad():
                R.copy_(kept)

    @cached_property
    def contained(self) -> Results:
        """By vanilla, to which infinite gradients of gates are float16's largest under R."""
        with infinite_counting_as_largest():
            return self.by("vanilla")

    @cached_property
    def about_the_clip(self) -> list[Results]:
        """By vanilla, if gradients of all h within rounding of the clip pass, and if none do."""
        found, little = [], _beside_a_clip(self.case)
        for share in (1 + little, 1 - little):
            with clips_that_let_pass(share):
                found.append(self.by("vanilla"))
        return found

    def by(self, backend: str) -> Results:
        return results(self.case, self.inputs, backend, self.seed)


_DRAWS = 16


def hold(case: Case, device: str, backend: str, first: Draw) -> str:
    """Hold a backend to vanilla; what was done.

    The error of a few numbers is as much chance as arithmetic. So where it is too large, values are
    drawn again, and all draws are held as one.
    """
    try:
        given = first.by(backend)
    except ValueError as error:
        if "cannot do this call" in str(error):
            return "refused"
        raise
    again = first.by(backend)
    wrong = _other_bits(given, again) or _other_kinds(case, first, given, backend)
    done = [(first, given)]
    if not wrong and _errors(case, done):
        draws = [Draw(case, device, k) for k in range(1, _DRAWS)]
        done += [(draw, draw.by(backend)) for draw in draws]
        wrong = _errors(case, done)
    complaints = [f"\n  {name}: {complaint}" for name, complaint in wrong.items()]
    assert not wrong, f"{backend}: {case}" + "".join(complaints)
    return "held"


# Each of these says by name what is wrong, if anything is.


def _other_bits(given: Results, again: Results) -> dict[str, str]:
    return {
        name: f"{int((x != again[name]).sum())} elements of other bits the second time"
        for name, x in given.items()
        if not same_bits(x, again[name])
    }


def _other_kinds(case: Case, draw: Draw, given: Results, backend: str) -> dict[str, str]:
    """Other dtypes and shapes than vanilla's, or other elements that are finite, inf or NaN."""
    wrong = {}
    for name, truth in draw.truth.items():
        x, plain = given[name], draw.plain[name]
        if x.dtype != plain.dtype or x.shape != plain.shape:
            wrong[name] = f"{x.dtype} {tuple(x.shape)}, not {plain.dtype} {tuple(plain.shape)}"
        elif not name.startswith("d_") and not x.is_contiguous():
            wrong[name] = "not contiguous"
        elif _is_comparable(case, name, draw.truth):
            # Within rounding of the largest number it is chance which side a result is on.
            largest = torch.finfo(x.dtype).max
            chance = (truth.abs() > 0.98 * largest) & (truth.abs() < 1.02 * largest)
            differs = (pattern(x) != pattern(plain)) & ~chance
            if name.startswith("d_") and differs.any():
                # NaN · 0 is 0 to a clip or a clamp, of whose sides a rounded pre-activation is on
                # another; and to vanilla's graph, where nothing that was asked for depends on it.
                differs &= pattern(x) != pattern(draw.kept[name])
            if name.startswith("d_") and differs.any() and "forward_clipval" in case.options:
                # Where an h lies so near the clip that rounding decides its side, it is chance
                # whether NaN passes. What does not depend on such an h is held.
                passing, clipped = (pattern(found[name]) for found in draw.about_the_clip)
                differs &= passing == clipped
            if name.startswith("d_") and differs.any() and _contains(case, backend):
                differs &= pattern(x) != pattern(draw.contained[name])
            if differs.any():
                where = tuple(differs.nonzero()[0].tolist())
                wrong[name] = (
                    f"{int(differs.sum())} of {x.numel()} elements are finite, inf or NaN where "
                    f"vanilla's are not alike, first at {where}: {x[where].item()}, "
                    f"vanilla {plain[where].item()}"
                )
    return wrong


def _contains(case: Case, backend: str) -> bool:
    """Whether infinite gradients of gates count as float16's largest before they are clipped."""
    clipped = "gradient_recurrent_clipval" in case.options and case.dtype == torch.float16
    return clipped and backend in ("triton", "cuda")


def _beside_a_clip(case: Case) -> float:
    """How near the clip, as a share of it, it is chance on which side a step's h is.

    It is four times the dtype's unit: in bfloat16 vanilla's h were up to 1.2% off in a cell with a
    quotient. Products of float32 are right to 2⁻²¹, those of TF32 to 2⁻¹¹.
    """
    if case.dtype == torch.float32:
        return 4 * (2**-10 if case.tf32 else 2**-19)
    return 4 * torch.finfo(case.dtype).eps


def _is_comparable(case: Case, name: str, truth: Results) -> bool:
    """Whether vanilla says where a result is finite."""
    if not name.startswith("d_"):
        return True
    # Where 16 bits do not hold a state, h rounded to inf goes on where the truth stays finite, and
    # backward starts from it. Vanilla's own graph keeps more.
    if any(_beyond(case, truth[x]) for x in ("states", "last_states")):
        return False
    # The gradients of pre-activations have the dtype's range, and what is summed of them too.
    return name not in ("d_R", "d_b") or not _is_beyond_float16(case)


def _is_beyond_float16(case: Case) -> bool:
    return case.values == "large gradients" and case.dtype == torch.float16


# tanh of bfloat16 is one instruction, right to 2⁻¹¹ at worst (kernels/common/pointwise.cuh). Where
# no h was rounded before, that is all the error of the carried states, and vanilla has nothing like
# it. Over a tensor 2⁻¹⁸ was measured, on an H200; this is four times that, and h rounded is 2⁻⁹·³
# off.
_TANH = 2**-16
# float32 in full is three products of factors cut to 11 bits and 11 more: right to 2⁻²¹ where a
# product of vanilla's is to 2⁻²⁴. A cell that makes much of such errors does so of both.
_SPLIT = 2**3


def _errors(case: Case, done: list[tuple[Draw, Results]]) -> dict[str, str]:
    """Errors that are larger than the arithmetic allows, over all draws."""
    wrong = {}
    for name in done[0][1]:
        is_gradient = name.startswith("d_")
        # Which h are clipped, by the rounding of products, is chance to a gradient.
        if is_gradient and (
            _is_beyond_float16(case) or (case.tf32 and "forward_clipval" in case.options)
        ):
            continue
        if not _is_comparable(case, name, done[0][0].truth):
            continue
        error, plain = _together(name, done, lambda draw: draw.plain)
        if is_gradient and not error <= _allowed(case, name, plain):
            _, kept = _together(name, done, lambda draw: draw.kept)
            plain = max(plain, kept)
        if case.tf32 and is_gradient and not error <= _allowed(case, name, plain):
            _, rounded = _together(name, done, lambda draw: draw.of_rounded_R)
            plain = max(plain, rounded)
        bound = _allowed(case, name, plain)
        if not error <= bound:
            wrong[name] = f"error {error:.3g}, at most {bound:.3g} is right"
    return wrong


def _allowed(case: Case, name: str, plain: float) -> float:
    """What the error may be: twice vanilla's in the same dtype, and what chance may add.

    Args:
        case: the case.
        name: of the result.
        plain: vanilla's error; of a gradient, as it is or from what fused backends keep, whichever
            is more.
    """
    # Fixed bounds over many steps are for ordinary problems; vanilla exceeds them in others.
    elements = case.B * case.T * case.N * case.D
    allowed = largest_error(name, plain, case.dtype, elements, T=0)
    if name == "last_states" and case.dtype == torch.bfloat16:
        allowed += _TANH
    if case.tf32:
        allowed = max(allowed, 2e-3 if name.startswith("d_") else 1e-3)
    elif case.dtype == torch.float32:
        allowed = max(allowed, 2 * _SPLIT * plain)
    return allowed


def _together(
    name: str, done: list[tuple[Draw, Results]], near: Callable[[Draw], Results]
) -> tuple[float, float]:
    """The relative error of what was given, and of what is near: root mean squares over all draws.

    So every draw counts the same, however large its numbers are: over many steps gradients of one
    draw may be 10⁻¹⁵ of another's.
    """
    squares = []
    for draw, x in done:
        given, plain, truth = x[name], near(draw)[name], draw.truth[name]
        finite = given.isfinite() & draw.plain[name].isfinite() & truth.isfinite()
        given, plain, truth = given[finite], plain[finite], truth[finite]
        plain = torch.where(plain.isfinite(), plain, truth)
        squares.append((relative_error(given, truth) ** 2, relative_error(plain, truth) ** 2))
    error, allowed = (math.sqrt(sum(x) / len(squares)) for x in zip(*squares, strict=True))
    return error, allowed


def _beyond(case: Case, truth: Tensor) -> bool:
    finite = truth[truth.isfinite()]
    return bool((finite.abs() > torch.finfo(case.dtype).max / 2).any())


def pattern(x: Tensor) -> Tensor:
    """0 where finite, and a number for each of NaN, inf and −inf."""
    return x.isnan() + 2 * x.isposinf() + 3 * x.isneginf()


def same_bits(x: Tensor, y: Tensor) -> bool:
    integer = torch.int16 if x.element_size() == 2 else torch.int32
    return torch.equal(x.contiguous().view(integer), y.contiguous().view(integer))


# ---- which cases


def case_check(number: int, backends: Sequence[str], device: str) -> Check:
    """The check of one case, by whichever of the backends it names."""
    return Check(f"seed:{number}", partial(check, number, tuple(backends), device))


def cases(
    backends: Sequence[str], device: str, seed: int, seconds: float, worker: int, workers: int
) -> Iterator[Check]:
    """One worker's checks, until the time is over: every so many-th family."""
    end, size = time.monotonic() + seconds, SIZES[device].family
    first = seed * 1_000_000 // size * size
    for start in itertools.count(first + worker * size, workers * size):
        of_triton = draw(start, device).triton
        chosen = [name for name in backends if device == "cpu" or (name == "triton") == of_triton]
        for number in range(start, start + size) if chosen else ():
            if time.monotonic() > end:
                return
            yield case_check(number, chosen, device)
