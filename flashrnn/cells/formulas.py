"""Operations that the table lacks, written in operations that it has.

PyTorch has formulas for most composite operations; here are those for which it has none. Each is
right to a few units in the last place, and its result is finite, infinite, NaN or -0 where the
operation's is. Derivatives are not here: autograd has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_PI = math.pi
_LN2 = math.log(2)
# Beyond it, x² + 1 is x², in float64 too.
_LARGE = 1e8


def _ceil(x: Tensor) -> Tensor:
    return -torch.floor(-x)


def _trunc(x: Tensor) -> Tensor:
    return torch.copysign(torch.floor(x.abs()), x)


def _round(x: Tensor, decimals: int = 0) -> Tensor:
    if decimals:
        scale = 10.0 ** abs(decimals)
        return torch.round(x * scale) / scale if decimals > 0 else torch.round(x / scale) * scale
    # To the nearest; where two are, to the even one.
    lower = torch.floor(x.abs())
    rest = x.abs() - lower
    is_odd = lower != 2 * torch.floor(lower / 2)
    is_up = (rest > 0.5) | (rest == 0.5) & is_odd
    return torch.copysign(torch.where(is_up, lower + 1, lower), x)


def _remainder(x: Tensor | float, y: Tensor | float) -> Tensor:
    if not isinstance(x, Tensor):
        assert isinstance(y, Tensor)
        x = torch.full_like(y, x)
    rest = torch.fmod(x, y)
    is_other_side = (rest != 0) & ((rest < 0) != (y < 0))
    return torch.where(is_other_side, rest + y, rest)


def _log10(x: Tensor) -> Tensor:
    return torch.log(x) * (1 / math.log(10))


def _tan(x: Tensor) -> Tensor:
    return torch.sin(x) / torch.cos(x)


def _sinh(x: Tensor) -> Tensor:
    # Of halves, for e^x is infinite before sinh(x) is; of two terms of one sign, for e^x - e^-x
    # cancels.
    x = x / 2
    return 0.5 * (torch.expm1(x) - torch.expm1(-x)) * (torch.exp(x) + torch.exp(-x))


def _cosh(x: Tensor) -> Tensor:
    up, down = torch.exp(x / 2), torch.exp(-x / 2)
    return 0.5 * up * up + 0.5 * down * down


def _asinh(x: Tensor) -> Tensor:
    size = x.abs()
    near = torch.log1p(size + size * size / (1 + torch.sqrt(1 + size * size)))
    return torch.copysign(torch.where(size > _LARGE, torch.log(size) + _LN2, near), x)


def _acosh(x: Tensor) -> Tensor:
    over = x - 1
    near = torch.log1p(over + torch.sqrt(over) * torch.sqrt(over + 2))
    return torch.where(x > _LARGE, torch.log(x) + _LN2, near)


def _atanh(x: Tensor) -> Tensor:
    return 0.5 * (torch.log1p(x) - torch.log1p(-x))


def _asin(x: Tensor) -> Tensor:
    return torch.atan(x / torch.sqrt((1 - x) * (1 + x)))


def _acos(x: Tensor) -> Tensor:
    return 2 * torch.atan(torch.sqrt((1 - x) / (1 + x)))


def _atan2(y: Tensor, x: Tensor) -> Tensor:
    smaller, larger = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
    # 0 / 0 is 0 here, and inf / inf is 1.
    ratio = torch.where(smaller == larger, torch.where(larger == 0, 0.0, 1.0), smaller / larger)
    angle = torch.atan(ratio)
    angle = torch.where(y.abs() > x.abs(), _PI / 2 - angle, angle)
    angle = torch.where(torch.signbit(x), _PI - angle, angle)
    return torch.copysign(angle, y)


def _angle(x: Tensor) -> Tensor:
    return torch.where(x < 0, _PI, torch.where(torch.isnan(x), x, 0.0))


def _hypot(x: Tensor, y: Tensor) -> Tensor:
    smaller, larger = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
    ratio = torch.where(larger == 0, 0.0, smaller / larger)
    length = larger * torch.sqrt(1 + ratio * ratio)
    # Also where the other one is NaN.
    return torch.where(torch.isinf(x) | torch.isinf(y), math.inf, length)


def _signbit(x: Tensor) -> Tensor:
    return torch.copysign(torch.ones_like(x), x) < 0


def _fmax(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(torch.isnan(x), y, torch.where(torch.isnan(y), x, torch.maximum(x, y)))


def _fmin(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(torch.isnan(x), y, torch.where(torch.isnan(y), x, torch.minimum(x, y)))


def _nan_to_num(
    x: Tensor, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Tensor:
    # Of float32, in which a cell's kernels compute.
    largest = torch.finfo(torch.float32).max
    x = torch.where(x == math.inf, largest if posinf is None else posinf, x)
    x = torch.where(x == -math.inf, -largest if neginf is None else neginf, x)
    return torch.where(torch.isnan(x), nan or 0.0, x)


def _where_large(gradient: Tensor, x: Tensor, bound: float) -> Tensor:
    return torch.where(x.abs() <= bound, 0.0, gradient)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "ceil": _ceil,
    "trunc": _trunc,
    "round": _round,
    "remainder": _remainder,
    "log10": _log10,
    "tan": _tan,
    "sinh": _sinh,
    "cosh": _cosh,
    "asinh": _asinh,
    "acosh": _acosh,
    "atanh": _atanh,
    "asin": _asin,
    "acos": _acos,
    "atan2": _atan2,
    "angle": _angle,
    "hypot": _hypot,
    "signbit": _signbit,
    "fmax": _fmax,
    "fmin": _fmin,
    "nan_to_num": _nan_to_num,
    "hardshrink_backward": _where_large,
    "softshrink_backward": _where_large,
}
"""By the name of the operation of aten, all its overloads."""
