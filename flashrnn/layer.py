"""``recurrent_layer()``: a layer's input product and its scan, as one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashrnn import backends, calls, checks, padded, sequences
from flashrnn.backends import Backend, autograd, kept_calls, protocols
from flashrnn.backends.library import input_product
from flashrnn.cells.spec import Cell, resolve
from flashrnn.config import FlashRNNConfig
from flashrnn.problem import Problem, without_autocast
from flashrnn.products import factors_as_computed, forward_of_layer, gradients_of_layer
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
    of_backend = None if key is None else (backend, *key)
    again, repeated = calls.repeat(of_backend, problem, Layer, (x, W, R, b), states, config)
    if repeated is not None:
        return repeated
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
    if direct:
        chosen = padded.backend_for(chosen, problem, features=x.shape[-1])
    found, last_states = _computed(chosen, problem, x, W, R, b, states, of_options, direct)
    if again is not None:
        tensors = {"x": x, "W": W, "R": R, "b": b}
        calls.keep(again, chosen, problem, tensors)
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
        if not (direct and protocols.is_fused(backend)):
            x, W = factors_as_computed(problem, x, W)
            Wx = input_product(problem, x, W.flatten(0, 2))
            arguments = calls.as_computed(problem, Wx, R, b, states)
            return autograd.run(backend, problem, *arguments, options, direct)
        if problem.needs_gradient:
            found: tuple[Tensor, Tensor] = autograd.apply(
                Layer, x, W, R, b, states, backend, problem, None, *(options or ())
            )
            return found
        x, W = factors_as_computed(problem, x, W)
        weights = calls.weights_as_computed(problem, R, b, states)
        return forward_of_layer(backend, problem, x, W, *weights, options or ())[:2]


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
        backend: protocols.FusedBackend,
        problem: Problem,
        kept: kept_calls.Kept | None,
        *options: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        # Autograd casts the gradients back to the dtypes of what is given here.
        x, W = factors_as_computed(problem, x, W)
        R, b, states = calls.weights_as_computed(problem, R, b, states)
        given = x, W, R, b, states
        found = kept_calls.forward_again(kept, given)
        found = found or forward_of_layer(backend, problem, *given, options)
        every_state, last_states, gates = found
        output, residuals = autograd.residuals_of(problem, R, states, every_state, gates, options)
        ctx.save_for_backward(x, W, *residuals)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.problem, ctx.kept, ctx.given = backend, problem, kept, len(options)
        return output, last_states

    @staticmethod
    def backward(  # noqa: D102
        ctx: Any, d_states: Tensor | None, d_last: Tensor | None
    ) -> tuple[Any, ...]:
        problem, given = ctx.problem, ctx.given
        x, W, *residuals = ctx.saved_tensors
        needs_x, needs_W, needs_R, needs_b, needs_states, *further = ctx.needs_input_grad
        factors = protocols.Factors(x, W, needs_x, needs_W)
        with without_autocast(problem.device.type):
            arguments = ctx.backend, problem, factors, residuals, given, d_states, d_last
            found = gradients_of_layer(*arguments, ctx.kept)
        needed = (
            *(found.x, found.W),
            found.R if needs_R else None,
            found.b if needs_b else None,
            found.states if needs_states else None,
        )
        if not given:
            return *needed, None, None, None
        of_resets = found.reset_states if further[4] else None
        return *needed, None, None, None, None, of_resets, None, None
