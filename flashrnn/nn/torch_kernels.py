"""Layers by PyTorch's own kernels: what torch.nn computes, too, where no fused backend runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from flashrnn import backends
from flashrnn.nn.arguments import returned
from flashrnn.nn.modes import MODES
from flashrnn.nn.parameters import (
    RecurrentParameters,
    cell_of,
    drops_after,
    has_masks,
    parameters_of,
    rows_of,
)
from flashrnn.problem import autocast_enabled


def compute(layers: RecurrentParameters, device: torch.device) -> bool:
    """Whether PyTorch's kernels compute a call: they fail in a graph of training."""
    # The layers come first: one that breaks the graph, as an LSTM does, then keeps this function
    # out of the compiler, where is_dynamo_compiling() would hold for a call that runs eagerly.
    if not compute_cell(layers.mode, layers.heads, layers.backend, device):
        return False
    if has_masks(layers) or cell_of(layers) is not layers.cell:
        return False
    # Of an export the compiler takes nothing apart; is_exporting() holds within Dynamo of
    # PyTorch 2.9 whatever it traces for.
    return not (torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled())


def compute_cell(mode: str, heads: int, backend: str, device: torch.device) -> bool:
    """The same of what has a cell of torch.nn's name ``mode``, and no masks."""
    return (
        backend == "auto"
        and mode in MODES
        and heads == 1
        and not backends.fused_on(device)
        # They fail within torch.func.vmap.
        and not backends.transformed()
    )


def run(
    layers: RecurrentParameters,
    x: Tensor,
    states: list[Tensor] | None,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """All layers over a batch as it is given, or with ``batch_sizes`` over packed rows."""
    if states is None:
        # No number of Python's: torch.jit.trace and torch.export would keep it for every batch.
        batch = x.size(0 if layers.batch_first else 1) if batch_sizes is None else batch_sizes[0]
        states = _zeros(layers, x, batch)
    arguments = (
        returned(states),
        parameters_of(layers),
        layers.bias,
        layers.num_layers,
        layers.dropout,
        layers.training,
        layers.bidirectional,
    )
    kernel = MODES[layers.mode].layers
    if batch_sizes is None:
        output, *last = kernel(x, *arguments, layers.batch_first)
    else:
        output, *last = kernel(x, batch_sizes, *arguments)
    return output, last


def step(
    layers: RecurrentParameters, x: Tensor, states: list[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """One step: PyTorch has a kernel that does without what a sequence needs."""
    if autocast_enabled(x.device.type):
        # It does not cast what that kernel reads, as it does for sequences.
        time = 1 if layers.batch_first else 0
        output, ended = run(layers, x.unsqueeze(time), states, None)
        return output.squeeze(time), list(ended)
    states = states or _zeros(layers, x, x.shape[0])
    kernel, last = MODES[layers.mode].step, []
    for layer, weights in enumerate(layers.all_weights):
        after = kernel(x, returned([state[layer] for state in states]), *weights)
        last.append(after if isinstance(after, tuple) else (after,))
        x = last[-1][0]
        if drops_after(layers, layer):
            x = dropout(x, layers.dropout)
    return x, [torch.stack(rows) for rows in zip(*last, strict=True)]


def _zeros(layers: RecurrentParameters, x: Tensor, B: Any) -> list[Tensor]:
    """States of a cell that torch.nn has, of B sequences: a number, or a tensor of one."""
    rows = rows_of(layers)
    h = x.new_zeros(rows, B, layers.proj_size or layers.hidden_size)
    return [h, x.new_zeros(rows, B, layers.hidden_size)] if layers.mode == "LSTM" else [h]
