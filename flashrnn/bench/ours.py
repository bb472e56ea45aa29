"""The backends of this package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashrnn import backends, flashrnn
from flashrnn.bench.case import Case, leaf
from flashrnn.bench.contender import Contender, Work
from flashrnn.cells import resolve
from flashrnn.problem import Problem

WITH_PRODUCT = "+Wx"
# torch.nn includes the product of the input and W. So does the last entry, for a fair comparison.
DEFAULT = (*backends.PREFERENCE, f"auto{WITH_PRODUCT}")


@dataclass(frozen=True)
class Ours(Contender):
    """A backend, or ``auto``, on a given Wx, or with the product of input and W.

    Attributes:
        backend: its name.
        product: whether a linear layer computes Wx within what is measured.
    """

    backend: str
    product: bool = False

    @staticmethod
    def named(name: str) -> Ours:
        """From ``triton`` or ``triton+Wx``, ``auto`` or ``auto+Wx``, and so on.

        Raises:
            ValueError: no such backend; names the nearest.
        """
        backend = name.removesuffix(WITH_PRODUCT)
        if backend != "auto":
            backends.load(backend)
        return Ours(backend, product=name.endswith(WITH_PRODUCT))

    @property
    def name(self) -> str:
        """See :class:`Contender`."""
        return self.backend + WITH_PRODUCT * self.product

    def includes(self, case: Case, device: torch.device) -> str:
        """See :class:`Contender`."""
        given, leaves = "Wx given", "Wx, R, b"
        if self.product:
            given, leaves = "with the product of input and W", "x, W, R, b"
        said = f"{given}; gradients of {leaves}; [B, T, ...]"
        if self.backend != "auto":
            return said
        return f"auto takes {backends.best('auto', _problem(case, device, backward=True))}; {said}"

    def refusal(self, case: Case, device: torch.device, backward: bool) -> str | None:
        """See :class:`Contender`."""
        if self.backend == "auto":
            return None
        backend = backends.load(self.backend)
        problem = _problem(case, device, backward)
        return backend.unavailable(device) or backend.unsupported(problem)

    def prepare(self, case: Case, device: torch.device) -> Work:
        """See :class:`Contender`."""
        cell, (B, T, N, D) = resolve(case.function), (case.B, case.T, case.N, case.D)
        Gw, Gr, Gb = (len(cell.fed_by(source)) for source in ("Wx", "R", "b"))
        dtype, width = case.dtype, N * D
        R = leaf(Gr, N, D, D, dtype=dtype, device=device, fan_in=D)
        b = leaf(Gb, N, D, dtype=dtype, device=device)

        def recurrence(backend: str, Wx: Tensor, R: Tensor, b: Tensor) -> Tensor:
            states, _ = flashrnn(Wx, R, b, function=case.function, backend=backend)
            return states[0]

        def whole(backend: str, x: Tensor, W: Tensor, R: Tensor, b: Tensor) -> Tensor:
            return recurrence(backend, linear(x, W).unflatten(-1, (Gw, N, D)), R, b)

        if self.product:
            inputs = (leaf(B, T, width, dtype=dtype, device=device),)
            W = leaf(Gw * width, width, dtype=dtype, device=device, fan_in=width)
            weights: tuple[Tensor, ...] = (W, R, b)
        else:
            inputs = (leaf(B, T, Gw, N, D, dtype=dtype, device=device),)
            weights = (R, b)
        run = whole if self.product else recurrence
        return Work(
            inputs,
            weights,
            run=lambda *leaves: run(self.backend, *leaves),
            reference=lambda *leaves: run("vanilla", *leaves),
            time=1,
            ours=True,
        )


def _problem(case: Case, device: torch.device, backward: bool) -> Problem:
    return Problem(
        cell=resolve(case.function).traced,
        B=case.B,
        T=case.T,
        N=case.N,
        D=case.D,
        dtype=case.dtype,
        device=device,
        needs_gradient=backward,
    )
