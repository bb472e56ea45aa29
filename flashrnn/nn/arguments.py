"""The arguments of a layer's call: whether input, ``hx``, ``reset`` and ``cu_seqlens`` fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashrnn.nn.parameters import RecurrentParameters, first_of, rows_of
from flashrnn.problem import autocast_enabled


def states_in(layers: RecurrentParameters, hx: Any, dim: int) -> list[Tensor] | None:
    """The states in ``hx``, once they are found to be tensors of ``dim`` dimensions."""
    if hx is None:
        return None
    names = layers.cell.states
    several = len(names) > 1
    states = list(hx) if several and isinstance(hx, (tuple, list)) else [hx]
    if len(states) != len(names) or not all(isinstance(state, Tensor) for state in states):
        given = [type(state).__name__ for state in states]
        raise TypeError(
            f"hx is {', '.join(given)}; accepted is "
            + (f"a tuple of tensors, ({', '.join(names)})" if several else "one tensor, h")
        )
    for state in states:
        if state.dim() != dim:
            raise RuntimeError(
                f"hx has {state.dim()} dimensions, {tuple(state.shape)}; accepted are {dim}: "
                + ("layers, sequences and units" if dim == 3 else "layers and units")
            )
    return states


def check_input(layers: RecurrentParameters, input: Tensor, dim: int) -> None:
    """Raise an error unless the input has so many dimensions, of which the last are features."""
    weight = first_of(layers)
    dtype, device = weight.dtype, weight.device
    if input.dtype != dtype and not autocast_enabled(input.device.type):
        raise ValueError(
            f"RNN input dtype {input.dtype} does not match weight dtype {dtype}. Convert one: "
            f"input.to({dtype}), or model.to({input.dtype})"
        )
    if input.device != device:
        raise RuntimeError(f"input is on {input.device}, the weights are on {device}: move one")
    if input.dim() != dim:
        raise RuntimeError(f"input must have {dim} dimensions, got {input.dim()}")
    if input.size(-1) != layers.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {layers.input_size}, got "
            f"{input.size(-1)}"
        )


def check_states(
    layers: RecurrentParameters, states: list[Tensor] | None, input: Tensor, B: int
) -> None:
    """Raise an error unless there is a state for each sequence, of which there are B."""
    rows = rows_of(layers)
    for k, state in enumerate(states or ()):
        size = layers.proj_size if layers.proj_size and k == 0 else layers.hidden_size
        if state.shape != (rows, B, size):
            raise RuntimeError(
                f"Expected hidden[{k}] size {(rows, B, size)}, got {tuple(state.shape)}"
            )
        if state.device != input.device:
            raise RuntimeError(f"input is on {input.device}, hx on {state.device}: move one")
        if state.dtype != input.dtype and not autocast_enabled(input.device.type):
            raise RuntimeError(f"input is of {input.dtype}, hx of {state.dtype}: convert one")


def flags_in(layers: RecurrentParameters, reset: Any, input: Tensor, batched: bool) -> Tensor:
    """The flags in ``reset``, of bool, once they are found to have the input's first dimensions.

    ``input`` has two of them, and ``reset`` too if it is ``batched``.
    """
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset is {type(reset).__name__}; accepted is a torch.Tensor")
    one = 0 if layers.batch_first else 1
    shape = input.shape[:2] if batched else input.shape[1 - one : 2 - one]
    if reset.shape != shape:
        raise RuntimeError(
            f"reset has shape {tuple(reset.shape)}; accepted is {tuple(shape)}, the input's "
            "without its features"
        )
    return (reset if batched else reset.unsqueeze(one)).ne(0)


def returned(states: Sequence[Tensor]) -> Any:
    """States as torch.nn hands them over: a tuple of several, or the one."""
    return tuple(states) if len(states) > 1 else states[0]


def check_bounds_are_integers(bounds: Any) -> None:
    """Raise an error unless ``cu_seqlens`` are integers ``[B + 1]``."""
    if not isinstance(bounds, Tensor):
        raise TypeError(f"cu_seqlens is {type(bounds).__name__}; accepted is a torch.Tensor")
    if bounds.is_floating_point() or bounds.is_complex() or bounds.dtype == torch.bool:
        raise TypeError(f"cu_seqlens is of {bounds.dtype}; accepted are integers")
    if bounds.dim() != 1 or len(bounds) < 2:
        raise RuntimeError(
            f"cu_seqlens has shape {tuple(bounds.shape)}; accepted is [B + 1], B of 1 or more: 0, "
            "and where each sequence ends"
        )


def check_bounds(bounds: Tensor, rows: int) -> None:
    """Raise an error unless ``cu_seqlens``, on the CPU, are bounds of so many rows."""
    if bounds[0] != 0 or bounds[-1] != rows or (bounds.diff() < 0).any():
        raise RuntimeError(
            f"cu_seqlens is {bounds.tolist()} for {rows} rows; accepted are numbers that do not "
            "fall, from 0 to the number of rows"
        )
