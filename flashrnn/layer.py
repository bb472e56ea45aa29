"""``recurrent_layer()``: a layer's input product and its scan, as one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashrnn import backends, calls, checks, padded, sequences
from flashrnn.backends import Backend, autograd
from flashrnn.backends.gradients import Gradients, over_rows, select
from flashrnn.cells.spec import Cell, resolve
from flashrnn.config import FlashRNNConfig
from flashrnn.problem import Problem, without_autocast
from flashrnn.rows import contiguous
from flashrnn.sequences import Given, Sequences


def recurrent_layer(
    x: Tensor,
    W: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None = None,
    function: str | Cell = "lstm",
    backend: str = "auto",
    *,
    config: FlashRNNConfig | None = None,
    dtype: torch.dtype | str | None = None,
    reset: Tensor | None = None,
    reset_states: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    return_states: str = "all",
) -> tuple[Tensor, Tensor]:
    """Run a recurrent layer: the input product ``Wx = x @ Wᵀ`` and :func:`flashrnn.flashrnn`.

    It computes what ``flashrnn(linear(x, W), R, b, ...)`` does as one node of autograd: the step of
    a short sequence is mostly what nodes cost. ``Wx`` is not kept for the backward pass. Only the
    gradients of x and W that are asked for are computed. Where the product is small (up to tens of
    microseconds on a GPU) it is a kernel of this package, and so are the gradients. Those sum in
    another order than the library: results differ by rounding.

    Where one node cannot be (with ``vanilla``, under ``torch.compile`` and ``torch.export``, for
    tensors that are no plain ones), the product and the scan are two, so that a compiler sees both.

    Args:
        x: ``[B, T, I]``, the inputs, of I features; any strides. The transposed view of a
            ``[T, B, I]`` is not copied in the forward pass.
        W: ``[Gw, N, D, I]``, the input matrix. A ``weight_ih`` of ``torch.nn.LSTM``, ``[4 * D,
            I]``, is one as ``weight_ih.view(4, 1, D, I)``, which copies nothing.
        R: ``[Gr, N, D, D]``, the recurrent matrix.
        b: ``[Gb, N, D]``, the bias.
        states: ``[S, B, 1, N, D]``, the initial states; ``None``: zeros, or ``config.initial_val``.
        function: the cell or its name, as in :func:`flashrnn.flashrnn`.
        backend: as in :func:`flashrnn.flashrnn`.
        config: further options; see :class:`flashrnn.FlashRNNConfig`.
        dtype: the dtype that ``x``, ``W``, ``R`` and ``b`` are cast to, and that the product is
            computed in; takes the place of ``config.dtype``. ``None``: the inputs' dtype, which
            must then be one; under ``torch.autocast`` autocast's.
        reset: as in :func:`flashrnn.flashrnn`, as those below.
        reset_states: ...
        lengths: ...
        cu_seqlens: with it ``x`` is packed: ``[1, total, I]`` or ``[total, I]``.
        reverse: ...
        return_states: ...

    Returns:
        As :func:`flashrnn.flashrnn`: ``states`` ``[S, B, T, N, D]`` and ``last_states``
        ``[S, B, 1, N, D]``; of an ``x`` ``[total, I]``, ``states`` ``[S, total, N, D]``. Gradients
        flow from both to ``x``, ``W``, ``R``, ``b``, ``states`` and ``reset_states``.

    Raises:
        TypeError: as :func:`flashrnn.flashrnn`.
        ValueError: as :func:`flashrnn.flashrnn`, or an ``x`` or ``W`` whose shape does not fit.

    Example:
        >>> lstm = torch.nn.LSTM(20, 16, batch_first=True)
        >>> x, D = torch.randn(8, 32, 20), lstm.hidden_size
        >>> states, last_states = recurrent_layer(
        ...     x,
        ...     lstm.weight_ih_l0.view(4, 1, D, 20),
        ...     lstm.weight_hh_l0.view(4, 1, D, D),
        ...     (lstm.bias_ih_l0 + lstm.bias_hh_l0).view(4, 1, D),
        ... )
        >>> torch.allclose(states[0, :, :, 0], lstm(x)[0], atol=1e-6)
        True
    """
    config, cell = checks.checked_options(config, backend), resolve(function)
    options = Given.of(reset, reset_states, lengths, cu_seqlens, reverse, return_states)
    given: tuple[Tensor, ...] = (x, W, R, b) if states is None else (x, W, R, b, states)
    if options is not None:
        given += sequences.tensors_given(options)
    key = None
    if backends.is_direct(*given):
        key = calls.key_of(cell, x, R, b, states, config, dtype, options)
        if key is not None:
            requires_grad = W.requires_grad and torch.is_grad_enabled()
            key = *key, W.shape, W.dtype, W.device, requires_grad
    problem, of_x = None if key is None else calls.problems.get(key), x
    if options is not None:
        x = sequences.in_rows("x", x, "I", options)
    if problem is None:
        tensors = {"x": x, "W": W, "R": R, "b": b}
        problem = calls.accepted(cell, tensors, states, config, dtype, options)
        if key is not None:
            calls.remember(key, problem)
    direct = key is not None
    chosen, problem, states, of_options = calls.prepared(
        problem, cell, backend, states, config, options, direct
    )
    arguments = x, W, R, b, states, of_options
    D, units = problem.D, padded.units(chosen, problem, of_layer=True) if direct else problem.D
    if units == D:
        found, last_states = _computed(chosen, problem, *arguments, direct)
    else:
        arguments = (
            x,
            padded.repeated(W, units, dim=2),
            padded.recurrent(R, units),
            padded.repeated(b, units),
            padded.with_zeros(states, units),
            padded.options(of_options, units),
        )
        outputs = _computed(chosen, problem._replace(D=units), *arguments, direct)
        found, last_states = (padded.narrowed(output, D) for output in outputs)
    return (found if x.ndim == of_x.ndim else found.squeeze(1)), last_states


def _computed(
    backend: Backend,
    problem: Problem,
    x: Tensor,
    W: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    options: Sequences | None,
    direct: bool,
) -> tuple[Tensor, Tensor]:
    """A layer's results; see :func:`flashrnn.backends.autograd.run`."""
    with without_autocast(problem.device.type):
        if not (direct and autograd.is_fused(backend)):
            x, W = factors_as_computed(problem, x, W)
            Wx = input_product(problem, x, W.flatten(0, 2))
            arguments = calls.as_computed(problem, Wx, R, b, states)
            return autograd.run(backend, problem, *arguments, options, direct)
        if problem.needs_gradient:
            found: tuple[Tensor, Tensor] = autograd.apply(
                Layer, x, W, R, b, states, backend, problem, *(options or ())
            )
            return found
        x, W = factors_as_computed(problem, x, W)
        weights = calls.weights_as_computed(problem, R, b, states)
        return forward_of_layer(backend, problem, x, W, *weights, options or ())[:2]


def factors_as_computed(problem: Problem, x: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """x and W in the dtype of the computation."""
    return calls.cast_to(x, problem.dtype), calls.cast_to(W, problem.dtype)


def input_product(problem: Problem, x: Tensor, W: Tensor) -> Tensor:
    """``Wx`` ``[B, T, Gw, N, D]``: one product for all steps and gates.

    ``x`` is ``[B, T, I]``, ``W`` ``[Gw * N * D, I]``.
    """
    (rows, T), N, D = problem.rows, problem.N, problem.D
    Gw = W.shape[0] // (N * D)
    if torch.compiler.is_compiling() or x.is_contiguous() or not _is_time_major(x):
        return linear(x, W).view(rows, T, Gw, N, D)
    # The rows in the order in which they lie in memory. Kernels take Wx of any strides.
    return linear(x.transpose(0, 1), W).view(T, rows, Gw, N, D).transpose(0, 1)


def factors_gradients(
    d_Wx: Tensor, x: Tensor, W: Tensor, needs_x: bool, needs_W: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of what :func:`input_product` multiplies, of those that are needed."""
    if not (needs_x or needs_W):
        return None, None
    # Not by flatten(), which gradients of a batch (is_grads_batched) do not have.
    B, T, Gw, N, D = d_Wx.shape
    rows = d_Wx.reshape(B * T, Gw * N * D)
    if needs_W and _is_time_major(x):
        # Other inputs' rows mostly lie so that they need no copy.
        x = contiguous(x)
    return (
        torch.mm(rows, W).view(x.shape) if needs_x else None,
        over_rows(rows, x.flatten(0, 1)) if needs_W else None,
    )


def _is_time_major(x: Tensor) -> bool:
    """Whether ``[B, T, I]`` is a view of a ``[T, B, I]``."""
    (B, T, _), (of_B, of_T, _) = x.shape, x.stride()
    return B > 1 and T > 1 and of_T == B * of_B > 0


def forward_of_layer(
    backend: autograd.FusedBackend,
    problem: Problem,
    x: Tensor,
    W: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    options: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A fused backend's forward of a layer: the backend computes the product too, where it can.

    All tensors are of the dtypes of the computation.
    """
    of_scan = R, b, states, Sequences(*options) if options else None
    if autograd.multiplies(backend, problem, x, W):
        return backend.forward(problem, None, *of_scan, autograd.Factors(x, W))
    Wx = input_product(problem, x, W.flatten(0, -2))
    return backend.forward(problem, Wx, *of_scan)


def gradients_of_layer(
    backend: autograd.FusedBackend,
    problem: Problem,
    factors: autograd.Factors,
    residuals: Sequence[Any],
    given: int,
    d_states: Tensor | None,
    d_last: Tensor | None,
) -> Gradients:
    """The same backward, from what a node has kept; see :func:`autograd.gradients_of`."""
    arguments = backend, problem, residuals, given, d_states, d_last
    x, W, needs_x, needs_W, _ = factors
    # A hook on saved tensors may have changed these, too.
    if backends.are_plain((x, W)) and autograd.multiplies(backend, problem, x, W):
        found = autograd.gradients_of(*arguments, factors=factors)
    else:
        found = autograd.gradients_of(*arguments)
    if (found.x is None and needs_x) or (found.W is None and needs_W):
        d_Wx = select(found.gates, 2, problem.cell.fed_by("Wx"))
        d_x, d_W = factors_gradients(d_Wx, x, W.flatten(0, -2), needs_x, needs_W)
        found = found._replace(x=d_x, W=None if d_W is None else d_W.view(W.shape))
    return found


class Layer(torch.autograd.Function):
    """The input product, and :class:`flashrnn.backends.autograd.Scan` within the same node.

    A product is one for all steps and gates, in each direction: none of them depends on the step
    before, and the larger a product, the nearer it is to what the GPU can do; of a short sequence
    what counts is that there are few. In the backward pass ``d_Wx``, where a cell has gates that
    ``Wx`` does not feed, is a part of each row of the gates' gradients. BLAS takes it as it lies,
    by the distance from row to row: no copy, and no product with zeros for the other gates.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        W: Tensor,
        R: Tensor,
        b: Tensor,
        states: Tensor,
        backend: autograd.FusedBackend,
        problem: Problem,
        *options: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        # Autograd casts the gradients back to the dtypes of what is given here.
        x, W = factors_as_computed(problem, x, W)
        R, b, states = calls.weights_as_computed(problem, R, b, states)
        found = forward_of_layer(backend, problem, x, W, R, b, states, options)
        every_state, last_states, gates = found
        output, residuals = autograd.residuals_of(problem, R, states, every_state, gates, options)
        ctx.save_for_backward(x, W, *residuals)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.problem, ctx.given = backend, problem, len(options)
        return output, last_states

    @staticmethod
    def backward(  # noqa: D102
        ctx: Any, d_states: Tensor | None, d_last: Tensor | None
    ) -> tuple[Any, ...]:
        problem, given = ctx.problem, ctx.given
        x, W, *residuals = ctx.saved_tensors
        needs_x, needs_W, needs_R, needs_b, needs_states, *further = ctx.needs_input_grad
        factors = autograd.Factors(x, W, needs_x, needs_W)
        with without_autocast(problem.device.type):
            arguments = ctx.backend, problem, factors, residuals, given, d_states, d_last
            found = gradients_of_layer(*arguments)
        needed = (
            *(found.x, found.W),
            found.R if needs_R else None,
            found.b if needs_b else None,
            found.states if needs_states else None,
        )
        if not given:
            return *needed, None, None
        of_resets = found.reset_states if further[3] else None
        return *needed, None, None, None, of_resets, None, None
