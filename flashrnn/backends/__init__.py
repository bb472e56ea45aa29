"""The backends, in the order in which ``backend="auto"`` prefers them.

A backend is a module of this package. All of them have two functions:

    unavailable(device) -> str | None      why it does not run on a device
    unsupported(problem) -> str | None     why it cannot do this problem

The fused ones have a scan in each direction. :func:`flashrnn.backends.autograd.run` makes one
differentiable function of both:

    forward(problem, Wx, R, b, states, sequences) -> (states, last_states, gates)
    backward(problem, R, states_initial, states, gates, d_states, d_last_states, sequences)
        -> Gradients

``vanilla`` consists of PyTorch's own differentiable operations and has one function instead:

    run(problem, Wx, R, b, states, sequences) -> (states, last_states)

``sequences`` is ``None`` where a call has no option that says how its sequences run.

A backend may have a way of its own to compute a step at a time, for T = 1 and no gradients:

    stepper(problem, R, b) -> Runs

``problem`` has a B of 1. ``stepper(...)(B)`` is a :data:`Run` for tensors of that batch size that
are all laid out alike. Of a backend that has none, ``forward`` is called.

A module is imported when it is first asked for, so that ``import flashrnn`` loads none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from flashrnn.cells.spec import Cell, unknown_name
from flashrnn.problem import Problem

PREFERENCE = ("cuda_fused", "triton", "cuda", "vanilla")
_ALIASES = {"triton_fused": "triton", "vanilla_fwbw": "vanilla"}


Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A step: ``run(wx, states, out)`` gives the new states, in ``out`` unless that is ``None``.

``wx`` is ``[B, Gw, N, D]``, all states are ``[S, B, N, D]``. ``out`` may be ``states``."""

Runs = Callable[[int], Run]
"""A step for each batch size."""


class Backend(Protocol):
    """What every backend's module offers."""

    __name__: str

    def unavailable(self, device: torch.device) -> str | None:
        """Why the backend does not run on a device of this machine; ``None`` if it does.

        The device's type is checked first. If the tensors are on the CPU, CUDA is not called.
        """

    def unsupported(self, problem: Problem) -> str | None:
        """Why the backend cannot do this problem, on a device it runs on; ``None`` if it can."""


def load(name: str) -> Backend:
    """The module of a backend.

    Raises:
        ValueError: no such backend; names the nearest.
    """
    name = _ALIASES.get(name, name)
    # Statements that name the modules: Dynamo follows those.
    if name == "cuda_fused":
        from flashrnn.backends import cuda_fused

        return cuda_fused
    if name == "triton":
        from flashrnn.backends import triton

        return triton
    if name == "cuda":
        from flashrnn.backends import cuda

        return cuda
    if name == "vanilla":
        from flashrnn.backends import vanilla

        return vanilla
    raise ValueError(unknown_name("backend", name, ("auto", *PREFERENCE)))


loaded = cache(load)
"""The same with a cache, which Dynamo does not follow."""


def choose(name: str, problem: Problem, direct: bool = False) -> Backend:
    """The backend for a problem: the one named, or with ``"auto"`` the fastest that can.

    Args:
        name: a backend's name, or ``"auto"``.
        problem: the problem.
        direct: whether :func:`is_direct` is known to hold for the call's tensors.

    Raises:
        ValueError: unknown name, or the named backend cannot do the problem; says why.
    """
    if direct:
        return loaded(_best_of_all(name, problem))
    if torch.compiler.is_compiling():
        from flashrnn.backends import constants

        # Plans are made for one N and one D. B and T decide nothing: a graph may leave them open.
        N, D = operator.index(problem.N), operator.index(problem.D)
        dtype, device, needs_gradient = problem.dtype, problem.device, problem.needs_gradient
        handle = cast(Cell, problem.cell).handle
        options = (
            problem.allow_tf32,
            problem.resets,
            problem.ragged,
            problem.packed,
            problem.reverse,
            problem.returned,
        )
        chosen = constants.chosen(name, handle, N, D, dtype, device, needs_gradient, *options)
        return load(chosen)
    return loaded(best(name, without_symbols(problem)))


def without_symbols(problem: Problem) -> Problem:
    """The problem, its sizes numbers where what records operators has symbols for them.

    A plan is made for one N and one D. B and T decide nothing, and stay open.
    """
    B, T, N, D = problem.B, problem.T, problem.N, problem.D
    if type(B) is type(T) is type(N) is type(D) is int:
        return problem
    return problem._replace(B=1, T=1, N=operator.index(N), D=operator.index(D))


def jit_traced() -> bool:
    """Whether ``torch.jit.trace`` records operators: as others do, but for lists of bool."""
    return torch._C._get_tracing_state() is not None


_BEFORE_AUTOGRAD = torch._C.DispatchKey.PreDispatch


def recorded() -> bool:
    """Whether something records operators, or gives tensors another meaning."""
    # In this thread. What torch.utils._python_dispatch tells holds for all threads, and is wrong
    # for good once modes of two threads have overlapped, as those that trace cells may.
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(_BEFORE_AUTOGRAD)
        or torch._C._are_functorch_transforms_active()
        or jit_traced()
    )


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether the tensors' memory holds their values, so that kernels can read them.

    That of negated views, subclasses, nested tensors, and tensors that stand for others or for
    zeros does not.
    """
    try:
        for tensor in tensors:
            kind = type(tensor)
            if (kind is not Tensor and kind is not Parameter) or tensor.is_nested:
                return False
            if tensor.is_neg() or not (tensor.data_ptr() or tensor.numel() == 0):
                return False
    except RuntimeError:  # One has no storage.
        return False
    return True


def is_direct(*tensors: Tensor) -> bool:
    """Whether kernels can be launched for a call as it stands: nothing records or transforms it,
    and the tensors' memory holds their values."""
    # Of what transforms a call, recorded() tells all but derivatives forward.
    return not (recorded() or forward_ad._current_level >= 0) and are_plain(tensors)


def transformed() -> bool:
    """Whether derivatives are taken forward, or a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def checked(name: str) -> str:
    """The name of a backend, or ``"auto"``, once it is found to be one.

    Raises:
        TypeError: no string.
        ValueError: no such backend; names the nearest.
    """
    if not isinstance(name, str):
        raise TypeError(f"backend is {type(name).__name__}; accepted is a name, or 'auto'")
    if name not in ("auto", *PREFERENCE, *_ALIASES):
        raise ValueError(unknown_name("backend", name, ("auto", *PREFERENCE)))
    return name


def fused_on(device: torch.device) -> bool:
    """Whether a fused backend runs on a device: else ``"auto"`` can only take ``vanilla``."""
    if torch.compiler.is_compiling():
        from flashrnn.backends import constants

        return constants.fused_on(device)
    return _fused_on(device)


@cache
def _fused_on(device: torch.device) -> bool:
    return any(not load(name).unavailable(device) for name in PREFERENCE if name != "vanilla")


def best(name: str, problem: Problem) -> str:
    """The name of the backend that :func:`choose` gives."""
    if transformed():
        if name not in ("auto", "vanilla"):
            load(name)  # Raises if there is no such backend.
            raise ValueError(
                f"backend {name!r} cannot do this call: it is within a transform of torch.func "
                "(grad, vjp, jvp, vmap, ...) or of torch.autograd.forward_ad, which only "
                "backend='vanilla' can be; backend='auto' takes that one there"
            )
        return "vanilla"
    return _best_of_all(name, problem)


def _best_of_all(name: str, problem: Problem) -> str:
    """The same for a call that nothing transforms."""
    if name != "auto":
        backend = loaded(name)
        reason = backend.unavailable(problem.device) or backend.unsupported(problem)
        if reason:
            raise ValueError(
                f"backend {name!r} cannot do this call: {reason}. "
                'backend="auto" takes the fastest one that can'
            )
        return name
    for candidate in PREFERENCE:
        backend = loaded(candidate)
        if not (backend.unavailable(problem.device) or backend.unsupported(problem)):
            return candidate
    raise AssertionError("vanilla supports every problem")
