"""The table of operations: every aten operation that a traced cell may contain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Scalar = float | bool


def _exp(x: float) -> float:
    return math.exp(x) if x < 709.7 or math.isnan(x) else math.inf


def _expm1(x: float) -> float:
    return math.expm1(x) if x < 709.7 or math.isnan(x) else math.inf


def _log(x: float) -> float:
    return math.log(x) if x > 0 else (-math.inf if x == 0 else math.nan)


def _log1p(x: float) -> float:
    return math.log1p(x) if x > -1 else (-math.inf if x == -1 else math.nan)


def _sqrt(x: float) -> float:
    return math.nan if x < 0 else math.sqrt(x)


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
class Operation:
    """One row of the table.

    Attributes:
        python: the operation on Python floats, with PyTorch's result for infinities and NaN.
        returns_bool: whether the result is a truth value.
    """

    python: Callable[..., Scalar]
    returns_bool: bool = False


OPERATIONS: dict[str, Operation] = {
    "add": Operation(lambda x, y: x + y),
    "sub": Operation(lambda x, y: x - y),
    "mul": Operation(lambda x, y: x * y),
    "div": Operation(_divide),
    "neg": Operation(lambda x: -x),
    "abs": Operation(abs),
    "sign": Operation(_sign),
    "sqrt": Operation(_sqrt),
    "exp": Operation(_exp),
    "expm1": Operation(_expm1),
    "log": Operation(_log),
    "log1p": Operation(_log1p),
    "sin": Operation(math.sin),
    "cos": Operation(math.cos),
    "erf": Operation(math.erf),
    "tanh": Operation(math.tanh),
    "sigmoid": Operation(_sigmoid),
    "maximum": Operation(_maximum),
    "minimum": Operation(_minimum),
    "eq": Operation(lambda x, y: x == y, returns_bool=True),
    "ne": Operation(lambda x, y: x != y, returns_bool=True),
    "lt": Operation(lambda x, y: x < y, returns_bool=True),
    "le": Operation(lambda x, y: x <= y, returns_bool=True),
    "gt": Operation(lambda x, y: x > y, returns_bool=True),
    "ge": Operation(lambda x, y: x >= y, returns_bool=True),
    "logical_and": Operation(lambda x, y: bool(x) and bool(y), returns_bool=True),
    "logical_or": Operation(lambda x, y: bool(x) or bool(y), returns_bool=True),
    "logical_not": Operation(lambda x: not x, returns_bool=True),
    "where": Operation(lambda condition, x, y: x if condition else y),
}
