"""What a contender is asked to compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A function, its sizes and its dtype, as in :func:`flashrnn.flashrnn`.

    Attributes:
        function: the cell.
        B: batch size.
        T: sequence length.
        N: number of heads.
        D: head dimension.
        dtype: of the inputs.
        tf32: whether products of float32 may be TF32's, of whoever computes it.
    """

    function: str
    B: int
    T: int
    N: int
    D: int
    dtype: torch.dtype
    tf32: bool = False

    @property
    def dtype_name(self) -> str:
        """As on the command line and in the CSV; ``"tf32"`` for float32 by TF32."""
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.function} {self.N}×{self.D}, B {self.B}, T {self.T}, {self.dtype_name}"


def leaf(*shape: int, dtype: torch.dtype, device: torch.device, fan_in: int = 1) -> Tensor:
    """Normal numbers of variance 1 / ``fan_in``, a leaf that gradients are asked of."""
    # Drawn in float32 and rounded: a generator's stream depends on the dtype.
    x = torch.randn(shape, device=device) / fan_in**0.5
    return x.to(dtype).requires_grad_()


@contextmanager
def tf32_allowed(allowed: bool = True) -> Iterator[None]:
    """Whether products of float32 may be TF32's, those of cuDNN and all others."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    if allowed:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
