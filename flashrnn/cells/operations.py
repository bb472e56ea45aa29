"""The table of operations: every aten operation that a traced cell may contain.

Each has a meaning on Python floats and a spelling in Triton and in CUDA C++, on float32 values.
A spelling that a plain expression cannot give (tanh without overflow or cancellation) calls a
helper of the same name: ``kernels/triton/pointwise.py`` for Triton, for CUDA
``kernels/common/pointwise.cuh``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Scalar = float | bool

LARGEST_FLOAT32 = 3.4028234663852886e38


def _exp(x: float) -> float:
    return math.exp(x) if x < 709.7 or math.isnan(x) else math.inf


def _expm1(x: float) -> float:
    return math.expm1(x) if x < 709.7 or math.isnan(x) else math.inf


def _power(x: float, y: float) -> float:
    try:
        return math.pow(x, y)
    except OverflowError:
        negative = x < 0 and y % 2 == 1
    except ValueError:
        # 0 to a negative power, or a negative number to one that is no integer.
        if x != 0:
            return math.nan
        negative = math.copysign(1, x) < 0 and y % 2 == 1
    return -math.inf if negative else math.inf


def _log(x: float) -> float:
    return math.log(x) if x > 0 else (-math.inf if x == 0 else math.nan)


def _log2(x: float) -> float:
    return math.log2(x) if x > 0 else _log(x)


def _log1p(x: float) -> float:
    return math.log1p(x) if x > -1 else (-math.inf if x == -1 else math.nan)


def _sqrt(x: float) -> float:
    return math.nan if x < 0 else math.sqrt(x)


def _finite(function: Callable[[float], float]) -> Callable[[float], float]:
    return lambda x: function(x) if math.isfinite(x) else math.nan


def _floor(x: float) -> float:
    # -0, infinities and NaN stay as they are.
    return float(math.floor(x)) if x != 0 and math.isfinite(x) else x


def _fmod(x: float, y: float) -> float:
    return math.nan if y == 0 or math.isinf(x) else math.fmod(x, y)


def _divide(x: float, y: float) -> float:
    if y != 0:
        return x / y
    return math.nan if x == 0 or math.isnan(x) else math.copysign(math.inf, x) * math.copysign(1, y)


def _sigmoid(x: float) -> float:
    e = _exp(-abs(x))
    return (1 if x >= 0 else e) / (1 + e)


def _maximum(x: float, y: float) -> float:
    return math.nan if math.isnan(x) or math.isnan(y) else max(x, y)


def _minimum(x: float, y: float) -> float:
    return math.nan if math.isnan(x) or math.isnan(y) else min(x, y)


def _sign(x: float) -> float:
    return float((x > 0) - (x < 0))


@dataclass(frozen=True)
class Within:
    """Spellings of an operation of one argument that hold only where that lies in an interval.

    Attributes:
        least: the interval's least number.
        largest: its largest. NaN is an argument everywhere.
        triton: as :class:`Operation` has it.
        cuda: likewise.
    """

    least: float
    largest: float
    triton: str
    cuda: str


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    Attributes:
        python: the operation on Python floats, with PyTorch's result for infinities and NaN.
        triton: its spelling, ``{0}``, ``{1}`` standing for the arguments.
        cuda: its spelling in CUDA C++, likewise. The compiler brings C's functions for float.
        returns_bool: whether the result is a truth value.
        within: faster spellings, for arguments of which ``bounds.py`` tells that they lie there.
    """

    python: Callable[..., Scalar]
    triton: str
    cuda: str
    returns_bool: bool = False
    within: Within | None = None


def _comparison(python: Callable[..., bool], symbol: str) -> Operation:
    spelling = f"({{0}} {symbol} {{1}})"
    return Operation(python, spelling, spelling, returns_bool=True)


OPERATIONS: dict[str, Operation] = {
    "add": Operation(lambda x, y: x + y, "{0} + {1}", "{0} + {1}"),
    "sub": Operation(lambda x, y: x - y, "{0} - {1}", "{0} - {1}"),
    "mul": Operation(lambda x, y: x * y, "{0} * {1}", "{0} * {1}"),
    "div": Operation(_divide, "{0} / {1}", "divide_approximate({0}, {1})"),
    "neg": Operation(lambda x: -x, "-{0}", "-{0}"),
    "abs": Operation(abs, "tl.abs({0})", "fabsf({0})"),
    "sign": Operation(_sign, "pointwise.sign({0})", "pointwise::sign({0})"),
    "sqrt": Operation(_sqrt, "tl.sqrt({0})", "sqrtf({0})"),
    "exp": Operation(_exp, "pointwise.exp({0})", "pointwise::exp({0})"),
    "exp2": Operation(lambda x: _power(2.0, x), "pointwise.exp2({0})", "exp2_approximate({0})"),
    "expm1": Operation(_expm1, "pointwise.expm1({0})", "expm1f({0})"),
    "log": Operation(_log, "tl.log({0})", "logf({0})"),
    "log2": Operation(_log2, "tl.log2({0})", "log2f({0})"),
    "log1p": Operation(
        _log1p,
        "pointwise.log1p({0})",
        "log1pf({0})",
        # From 0 to 1, and as much more as bounds are wide: of exp(-|x|), as in logsigmoid.
        within=Within(
            *(-(2.0**-10), 1 + 2.0**-8),
            triton="pointwise.log1p_up_to_1({0})",
            cuda="pointwise::log1p_up_to_1({0})",
        ),
    ),
    "pow": Operation(_power, "pointwise.pow({0}, {1})", "powf({0}, {1})"),
    "sin": Operation(_finite(math.sin), "tl.sin({0})", "sinf({0})"),
    "cos": Operation(_finite(math.cos), "tl.cos({0})", "cosf({0})"),
    "atan": Operation(math.atan, "pointwise.atan({0})", "atanf({0})"),
    "erf": Operation(math.erf, "tl.erf({0})", "erff({0})"),
    "erfc": Operation(math.erfc, "pointwise.erfc({0})", "erfcf({0})"),
    "tanh": Operation(math.tanh, "pointwise.tanh({0})", "pointwise::tanh({0})"),
    "sigmoid": Operation(_sigmoid, "pointwise.sigmoid({0})", "pointwise::sigmoid({0})"),
    "floor": Operation(_floor, "tl.floor({0})", "floorf({0})"),
    "fmod": Operation(_fmod, "pointwise.fmod({0}, {1})", "fmodf({0}, {1})"),
    "copysign": Operation(math.copysign, "pointwise.copysign({0}, {1})", "copysignf({0}, {1})"),
    "maximum": Operation(
        _maximum, "tl.maximum({0}, {1}, tl.PropagateNan.ALL)", "pointwise::maximum({0}, {1})"
    ),
    "minimum": Operation(
        _minimum, "tl.minimum({0}, {1}, tl.PropagateNan.ALL)", "pointwise::minimum({0}, {1})"
    ),
    "eq": _comparison(lambda x, y: x == y, "=="),
    "ne": _comparison(lambda x, y: x != y, "!="),
    "lt": _comparison(lambda x, y: x < y, "<"),
    "le": _comparison(lambda x, y: x <= y, "<="),
    "gt": _comparison(lambda x, y: x > y, ">"),
    "ge": _comparison(lambda x, y: x >= y, ">="),
    "logical_and": _comparison(lambda x, y: bool(x) and bool(y), "&"),
    "logical_or": _comparison(lambda x, y: bool(x) or bool(y), "|"),
    "logical_not": Operation(lambda x: not x, "({0} == 0)", "({0} == 0)", returns_bool=True),
    "where": Operation(
        lambda condition, x, y: x if condition else y,
        "tl.where({0}, {1}, {2})",
        "{0} ? {1} : {2}",
    ),
}
