"""The backends, in the order in which ``backend="auto"`` prefers them.

A backend is a module of this package with one signature:

    unavailable() -> str | None            why it does not run on this machine
    unsupported(problem) -> str | None     why it cannot do this problem
    run(problem, Wx, R, b, states) -> (states, last_states)

It is imported when it is first asked for, so that ``import flashrnn`` loads none.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from torch import Tensor

from flashrnn.cells.spec import unknown_name
from flashrnn.problem import Problem

PREFERENCE = ("triton", "cuda", "vanilla")
_ALIASES = {"triton_fused": "triton"}


class Backend(Protocol):
    """What a backend's module offers."""

    def unavailable(self) -> str | None:
        """Why the backend does not run on this machine; ``None`` where it does."""

    def unsupported(self, problem: Problem) -> str | None:
        """Why the backend cannot do this problem; ``None`` where it can."""

    def run(
        self, problem: Problem, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute.

        Args:
            problem: one that ``unsupported`` has nothing against.
            Wx: ``[B, T, Gw, N, D]``, of ``problem.dtype``, as are ``R`` and ``b``; any strides.
            R: ``[Gr, N, D, D]``.
            b: ``[Gb, N, D]``.
            states: ``[S, B, 1, N, D]`` of ``problem.carry_dtype``.

        Returns:
            ``[S, B, T, N, D]`` of ``problem.dtype`` and ``[S, B, 1, N, D]`` of
            ``problem.carry_dtype``, both contiguous.
        """


def load(name: str) -> Backend:
    """The module of a backend.

    Raises:
        ValueError: no such backend; names the nearest.
    """
    name = _ALIASES.get(name, name)
    if name not in PREFERENCE:
        raise ValueError(unknown_name("backend", name, ("auto", *PREFERENCE)))
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


def choose(name: str, problem: Problem) -> Backend:
    """The backend for a problem: the one named, or with ``"auto"`` the fastest that can.

    Raises:
        ValueError: unknown name, or the named backend cannot do the problem; says why.
    """
    if name != "auto":
        backend = load(name)
        reason = backend.unavailable() or backend.unsupported(problem)
        if reason:
            raise ValueError(
                f"backend {name!r} cannot do this call: {reason}. "
                'backend="auto" takes the fastest one that can'
            )
        return backend
    for candidate in PREFERENCE:
        backend = load(candidate)
        if not (backend.unavailable() or backend.unsupported(problem)):
            return backend
    raise AssertionError("vanilla supports every problem")
