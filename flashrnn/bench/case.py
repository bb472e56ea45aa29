"""What a contender is asked to compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A function, its sizes and its dtype; B, T, N and D as in :func:`flashrnn.flashrnn`."""

    function: str
    B: int
    T: int
    N: int
    D: int
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """As on the command line and in the CSV."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.function} {self.N}×{self.D}, B {self.B}, T {self.T}, {self.dtype_name}"


def leaf(*shape: int, dtype: torch.dtype, device: torch.device, fan_in: int = 1) -> Tensor:
    """Normal numbers of variance 1 / ``fan_in``, a leaf that gradients are asked of."""
    # Drawn in float32 and rounded: a generator's stream depends on the dtype.
    x = torch.randn(shape, device=device) / fan_in**0.5
    return x.to(dtype).requires_grad_()
