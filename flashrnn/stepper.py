"""A step at a time, for generation and rollouts: ``Stepper`` and ``step()``."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from flashrnn import backends, calls, checks
from flashrnn.backends import Run, Runs, autograd, protocols
from flashrnn.cells.spec import Cell, resolve
from flashrnn.config import FlashRNNConfig
from flashrnn.functional import flashrnn
from flashrnn.initial import initial_states
from flashrnn.problem import Problem

# Whether a call is in place, and of its tensors shapes, strides, dtypes and devices.
_Layouts = tuple[object, ...]
_MOST_LAYOUTS = 64


class _Known(NamedTuple):
    """What is known of calls whose tensors are laid out alike, which have been found to fit.

    Attributes:
        wx: bytes from its first element to the end of the last.
        states: the same.
        out: the same.
        in_place: whether ``out`` may be ``states``, each element where its new value goes.
        run: computes a step.
    """

    wx: int
    states: int
    out: int
    in_place: bool
    run: Run

    def check_memory(self, wx: int, states: int, out: int) -> None:
        """Raise an error if ``out``, given by its address, shares memory with what a step reads."""
        end = out + self.out
        shares_wx = wx < end and out < wx + self.wx
        shares_states = states < end and out < states + self.states
        if shares_wx or (shares_states and not (self.in_place and states == out)):
            raise ValueError(
                f"out shares a part of its memory with {'wx' if shares_wx else 'states'}; accepted "
                "are memory of its own, and out=states, which is updated in place"
            )


class Stepper:
    """A network that is called for one step at a time.

    A call gives the bits that :func:`flashrnn.flashrnn` gives for T = 1, without what only a
    sequence or a gradient needs. With ``cuda_fused`` it is one launch, of which only the addresses
    differ from the call before; given ``out``, it allocates nothing once it has seen a batch size
    on a stream, in place and not. In place, heads of some 400 units and more that are spread over
    the GPU take 1 to 2 us longer: others must have read ``h`` before it is overwritten. Batches so
    large that PyTorch's library computes the product (the README's "Backends") take two launches,
    and memory for the product. A CUDA graph may record it; the stepper, like all that the graph
    reads, must be there for as long as the graph is.

    Attributes:
        cell: the cell.
        dtype: the dtype that it computes in, which ``wx`` has.
        carry_dtype: the dtype of the states: float32 where ``dtype`` has 16 bits, else ``dtype``.
        device: where all tensors are.
        backend: the name of the backend that computes.
    """

    def __init__(
        self,
        R: Tensor,
        b: Tensor,
        function: str | Cell = "lstm",
        backend: str = "auto",
        *,
        config: FlashRNNConfig | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        """Prepare.

        ``R`` and ``b`` are copied only if they have to be cast or laid out anew. Make a new stepper
        when their values have changed.

        Args:
            R: ``[Gr, N, D, D]``, the recurrent matrix.
            b: ``[Gb, N, D]``, the bias.
            function: the cell or its name, as in :func:`flashrnn.flashrnn`.
            backend: as in :func:`flashrnn.flashrnn`.
            config: further options; see :class:`flashrnn.FlashRNNConfig`.
            dtype: the dtype that is computed in; takes the place of ``config.dtype``. ``None``:
                that of R and b, or within ``torch.autocast`` autocast's.

        Raises:
            TypeError: as :func:`flashrnn.flashrnn`.
            ValueError: as :func:`flashrnn.flashrnn`.
        """
        self._config = checks.checked_options(config, backend)
        self._asked = backend
        self.cell = resolve(function)
        tensors = {"R": R, "b": b}
        checks.checked_kinds(tensors)
        self._sizes = _sizes(self.cell, R, b)
        problem = calls.problem_of(
            self.cell, (1, 1, *self._sizes), tensors, False, self._config, dtype
        )
        self.dtype, self.carry_dtype, self.device = (
            problem.dtype,
            problem.carry_dtype,
            problem.device,
        )
        self._R, self._b = (calls.cast_to(x.detach(), self.dtype) for x in (R, b))
        self._chosen = backends.choose(backend, problem)
        self.backend = self._chosen.__name__.rpartition(".")[2]
        self._prepare(problem)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or one that is unpickled, prepares anew."""
        make = partial(type(self), config=self._config, dtype=self.dtype)
        return make, (self._R, self._b, self.cell, self._asked)

    def __call__(
        self, wx: Tensor, states: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Compute a step.

        Args:
            wx: ``[B, Gw, N, D]`` of ``dtype``, the step's input pre-activations; any strides.
            states: ``[S, B, N, D]``, the states before the step, ``h`` first, of ``carry_dtype`` or
                ``dtype``; any strides. ``None``: zeros, or ``config.initial_val``.
            out: ``[S, B, N, D]`` of ``carry_dtype``, contiguous: where the new states go. It may be
                ``states`` itself, which is then updated in place. ``None``: into new memory.

        Returns:
            ``[S, B, N, D]`` of ``carry_dtype``, the states after the step, ``h`` first; ``out``
            where that is given.

        Raises:
            TypeError: a dtype that does not fit, or something that is no dense tensor.
            ValueError: a shape or a device that does not fit; an ``out`` that is not contiguous, or
                that shares a part of its memory with ``wx`` or ``states``.
            RuntimeError: a tensor requires a gradient, and gradients are enabled: none flows
                through a step.
        """
        if states is None and isinstance(wx, Tensor):
            of_batch = self._problem._replace(B=wx.shape[0])
            states = initial_states(of_batch, self._config).squeeze(2)
        # What is updated in place is looked at once.
        tensors = (wx, states) if out is None or out is states else (wx, states, out)
        if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in tensors):
            raise RuntimeError(
                "a gradient is required of wx, states or out, and none flows through a step: call "
                "it within torch.no_grad(), or take flashrnn() with T = 1"
            )
        if backends.recorded() or not backends.are_plain(tensors):
            self._check(wx, states, out)
            return self._by_flashrnn(wx, states, out)
        traced = self.cell.traced
        if traced is not self._problem.cell:
            # It captures a Python value, which has changed.
            self._prepare(self._problem._replace(cell=traced))
        layouts = (out is states, *[_layout(x) for x in tensors])
        known = self._known.get(layouts) or self._know(layouts, wx, states, out)
        if out is not None:
            known.check_memory(wx.data_ptr(), states.data_ptr(), out.data_ptr())
        return known.run(wx, calls.cast_to(states, self.carry_dtype), out)

    def _prepare(self, problem: Problem) -> None:
        if not protocols.is_fused(self._chosen):
            problem = problem._replace(step=self.cell.step)
        self._problem = problem
        if hasattr(self._chosen, "stepper"):
            self._runs: Runs = cast(Any, self._chosen).stepper(problem, self._R, self._b)
        else:
            fused = cast(protocols.FusedBackend, self._chosen)
            self._runs = autograd.by_scans(fused.forward, problem, self._R, self._b)
        # By the layouts of a call's tensors.
        self._known: dict[_Layouts, _Known] = {}

    def _know(self, layouts: _Layouts, wx: Tensor, states: Tensor, out: Tensor | None) -> _Known:
        self._check(wx, states, out)
        known = _Known(
            _extent(wx),
            _extent(states),
            0 if out is None else _extent(out),
            states.dtype == self.carry_dtype and states.is_contiguous(),
            self._runs(wx.shape[0]),
        )
        if len(self._known) >= _MOST_LAYOUTS:
            self._known.clear()
        self._known[layouts] = known
        return known

    def _by_flashrnn(self, wx: Tensor, states: Tensor, out: Tensor | None) -> Tensor:
        """The step as a call that graphs and transforms know."""
        with torch.no_grad():
            _, last_states = flashrnn(
                wx.unsqueeze(1),
                self._R,
                self._b,
                states.unsqueeze(2),
                self.cell,
                self._asked,
                config=self._config,
                dtype=self.dtype,
            )
            found = last_states.squeeze(2)
            return found if out is None else out.copy_(found)

    def _check(self, wx: Tensor, states: Tensor, out: Tensor | None) -> None:
        """Raise an error unless all three fit."""
        tensors = {"wx": wx, "states": states}
        checks.checked_kinds(tensors if out is None else {**tensors, "out": out})
        cell, (N, D) = self.cell, self._sizes
        checks.check_rank("wx", wx.shape, "[B, Gw, N, D]")
        B = wx.shape[0]
        checks.check_gates(cell, "wx", wx.shape[1], "Wx")
        of_states = "[S, B, N, D]", (len(cell.states), B, N, D)
        for name, tensor, layout, shape, dtypes in (
            ("wx", wx, "[B, Gw, N, D]", (B, wx.shape[1], N, D), (self.dtype,)),
            ("states", states, *of_states, (self.carry_dtype, self.dtype)),
            ("out", out, *of_states, (self.carry_dtype,)),
        ):
            if tensor is None:
                continue
            checks.check_rank(name, tensor.shape, layout)
            if tensor.shape != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; with this R and wx it must be "
                    f"{shape}, {layout}"
                )
            if tensor.dtype not in dtypes:
                raise TypeError(
                    f"{name} is {tensor.dtype}; accepted is "
                    f"{' or '.join(map(str, dict.fromkeys(dtypes)))} by a stepper that computes in "
                    f"{self.dtype}"
                )
            if tensor.device != self.device:
                raise ValueError(
                    f"{name} is on {tensor.device}, R and b on {self.device}; accepted is one "
                    "device for all: move them with .to(device)"
                )
        if out is not None and not out.is_contiguous():
            raise ValueError(f"out has strides {out.stride()}; accepted is a contiguous tensor")


def step(
    wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None = None,
    function: str | Cell = "lstm",
    backend: str = "auto",
    *,
    out: Tensor | None = None,
    config: FlashRNNConfig | None = None,
    dtype: torch.dtype | str | None = None,
) -> Tensor:
    """Compute a single step: ``Stepper(R, b, ...)(wx, states, out)``.

    For many steps with the same R and b make one :class:`Stepper`, which prepares once.

    Args:
        wx: ``[B, Gw, N, D]``, as :class:`Stepper` takes it; so are all others.
        R: ``[Gr, N, D, D]``.
        b: ``[Gb, N, D]``.
        states: ``[S, B, N, D]``; ``None``: zeros, or ``config.initial_val``.
        function: the cell or its name.
        backend: the backend's name, or ``"auto"``.
        out: where the new states go; may be ``states``.
        config: further options.
        dtype: the dtype that is computed in.

    Returns:
        ``[S, B, N, D]``, the new states.

    Raises:
        TypeError: as :class:`Stepper`.
        ValueError: as :class:`Stepper`.
        RuntimeError: as :class:`Stepper`.

    Example:
        >>> R, b = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16)
        >>> states = step(torch.randn(8, 4, 3, 16), R, b)
        >>> states = step(torch.randn(8, 4, 3, 16), R, b, states)
        >>> h, c = states
        >>> h.shape
        torch.Size([8, 3, 16])
    """
    return Stepper(R, b, function, backend, config=config, dtype=dtype)(wx, states, out)


def _sizes(cell: Cell, R: Tensor, b: Tensor) -> tuple[int, int]:
    """N and D, once the shapes of R and b are found to fit."""
    checks.check_rank("R", R.shape, "[Gr, N, D, D]")
    Gw, (_, N, D, _) = len(cell.fed_by("Wx")), R.shape
    checks.fitting_sizes(cell, (0, 1, Gw, N, D), R, b, None)
    return N, D


def _layout(tensor: Tensor) -> tuple[object, ...]:
    # An index takes less time than a device; on the CPU it is -1.
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    steps = (
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.element_size() * (1 + sum(steps))
