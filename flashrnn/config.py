"""Options of a call."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in SUPPORTED_DTYPES}


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A supported dtype out of itself or its name.

    Raises:
        TypeError: anything else.
    """
    parsed = _DTYPE_NAMES.get(dtype) if isinstance(dtype, str) else dtype
    if parsed not in SUPPORTED_DTYPES:
        raise TypeError(f"dtype {dtype!r}; accepted are {', '.join(_DTYPE_NAMES)}")
    return parsed


@dataclass(frozen=True)
class FlashRNNConfig:
    """Options of :func:`flashrnn.flashrnn`.

    Attributes:
        gradient_recurrent_cut: no gradient flows from a step to the one before through
            ``R``; what flows through the cell itself (``c`` to ``c``) remains, and ``R`` still
            gets its gradient.
        gradient_recurrent_clipval: at every step the gradient that reaches ``h`` through
            ``R`` is clipped, element by element, to ``[-clipval, clipval]``; ``None``: not.
        forward_clipval: at every step ``h`` is clipped to ``[-clipval, clipval]``, in what is
            returned and in what the next step sees; ``None``: not.
        enable_automatic_mixed_precision: under ``torch.autocast`` the inputs are cast to
            ``dtype``, or where that is ``None`` to autocast's own dtype. ``False``: autocast
            is ignored.
        dtype: the dtype (``torch.bfloat16`` or ``"bfloat16"``) that ``Wx``, ``R`` and ``b``
            are cast to and the states are returned in; ``None``: that of the inputs.
        initial_val: what the states start from when ``states`` is not given: one number, or
            one for each state.
        allow_tf32: whether products of float32 with ``R`` may see 10 bits of its mantissa, as TF32
            has them; ``None``: as ``torch.backends.cuda.matmul`` says.

    Raises:
        TypeError: a dtype other than float16, bfloat16, float32, float64; a clip or initial value
            that is no number; an ``allow_tf32`` that is no bool.
        ValueError: a clip value that is not positive and finite.
    """

    gradient_recurrent_cut: bool = False
    gradient_recurrent_clipval: float | None = None
    forward_clipval: float | None = None
    enable_automatic_mixed_precision: bool = True
    dtype: torch.dtype | str | None = None
    initial_val: float | Sequence[float] = 0.0
    allow_tf32: bool | None = None

    def __post_init__(self) -> None:
        for option in ("gradient_recurrent_clipval", "forward_clipval"):
            value = getattr(self, option)
            if value is None:
                continue
            accepted = "accepted are positive numbers, or None"
            if not isinstance(value, (int, float)):
                raise TypeError(f"{option} is {type(value).__name__}; {accepted}")
            if not 0 < value <= sys.float_info.max:
                raise ValueError(f"{option}={value!r}; {accepted}")
        values = self.initial_val if isinstance(self.initial_val, Sequence) else [self.initial_val]
        largest = sys.float_info.max
        if not all(
            isinstance(value, float) or (isinstance(value, int) and abs(value) <= largest)
            for value in values
        ):
            raise TypeError(
                f"initial_val={self.initial_val!r}; accepted is one number, or one for each state"
            )
        if self.dtype is not None:
            parse_dtype(self.dtype)
        if self.allow_tf32 is not None and not isinstance(self.allow_tf32, bool):
            raise TypeError(
                f"allow_tf32 is {type(self.allow_tf32).__name__}; accepted are True, False and None"
            )

    def initial_values(self, states: Sequence[str]) -> tuple[float, ...]:
        """A starting value for each of a cell's states.

        Raises:
            ValueError: ``initial_val`` has another number of values than there are states.
        """
        if not isinstance(self.initial_val, Sequence):
            return (float(self.initial_val),) * len(states)
        values = tuple(map(float, self.initial_val))
        if len(values) != len(states):
            raise ValueError(
                f"initial_val has {len(values)} values; accepted is one number, or one for each "
                f"of the states ({', '.join(states)})"
            )
        return values
