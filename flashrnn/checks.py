"""The checks of a call's tensors: kinds, shapes, devices and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from flashrnn.cells.spec import Cell
from flashrnn.config import DEFAULT, SUPPORTED_DTYPES, FlashRNNConfig, parse_dtype
from flashrnn.problem import carry_dtype


def checked_options(config: FlashRNNConfig | None, backend: str) -> FlashRNNConfig:
    """The config, or the default one."""
    if config is None:
        config = DEFAULT
    elif not hasattr(config, "of_upstream"):
        raise TypeError(f"config is {type(config).__name__}; accepted is a FlashRNNConfig")
    elif config.of_upstream:
        raise ValueError(
            "config sets fields of the upstream package, layouts or sizes among them; only "
            "flashrnn() takes such ones"
        )
    if not isinstance(backend, str):
        raise TypeError(f"backend is {type(backend).__name__}; accepted is a name, or 'auto'")
    return config


def checked_kinds(tensors: dict[str, Tensor]) -> bool:
    """Whether any of the tensors requires a gradient, once all are found to be dense tensors."""
    needs_gradient = False
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; accepted is a torch.Tensor")
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise TypeError(
                f"{name} is a tensor of layout {kind}; accepted are dense tensors: "
                "torch.nested.to_padded_tensor() and .to_dense() make such"
            )
        needs_gradient = needs_gradient or tensor.requires_grad
    return needs_gradient


def product_shape(cell: Cell, x: Tensor, W: Tensor, R: Tensor) -> tuple[int, ...]:
    """That of ``Wx``, the product of x and W, once these are found to fit each other, and R."""
    check_rank("x", x.shape, "[B, T, I]")
    check_rank("W", W.shape, "[Gw, N, D, I]")
    check_gates(cell, "W", W.shape[0], "Wx")
    if W.shape[3] != x.shape[2]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, {x.shape[2]} features, and W {tuple(W.shape)}, for "
            f"{W.shape[3]}; accepted are x [B, T, I] and W [Gw, N, D, I] with one I"
        )
    check_rank("R", R.shape, "[Gr, N, D, D]")
    if W.shape[1:3] != R.shape[1:3]:
        raise ValueError(
            f"W has shape {tuple(W.shape)}, {W.shape[1]} heads of {W.shape[2]} units, and R "
            f"{tuple(R.shape)}, {R.shape[1]} of {R.shape[2]}; accepted are W [Gw, N, D, I] and "
            "R [Gr, N, D, D] with one N and D"
        )
    return *x.shape[:2], *W.shape[:3]


def fitting_sizes(
    cell: Cell,
    of_Wx: Sequence[int],
    R: Tensor,
    b: Tensor,
    states: Tensor | None,
    count: int | None = None,
) -> tuple[int, int, int, int]:
    """B, T, N and D, once every shape is found to fit that of ``Wx``.

    Args:
        cell: the cell.
        of_Wx: the shape of ``Wx``.
        R: see :func:`flashrnn`, as those below.
        b: ...
        states: ...
        count: the number of sequences, where ``Wx`` does not tell.
    """
    if len(of_Wx) == 5:
        B, T, Gw, N, D = of_Wx
        if count is not None:
            B = count
        if (
            (Gw == len(cell.fed_by("Wx")) and N > 0 and D > 0)
            and R.shape == (len(cell.fed_by("R")), N, D, D)
            and b.shape == (len(cell.fed_by("b")), N, D)
            and (
                states is None
                or states.shape == (len(cell.states), B, 1, N, D)
                or states.shape == (len(cell.states), 1, 1, N, D)
            )
        ):
            return B, T, N, D
    _refuse_sizes(cell, of_Wx, R, b, states, count)


def _refuse_sizes(
    cell: Cell,
    of_Wx: Sequence[int],
    R: Tensor,
    b: Tensor,
    states: Tensor | None,
    count: int | None,
) -> NoReturn:
    """Say which tensor does not fit: each is held to the sizes that ``Wx`` sets."""
    check_rank("Wx", of_Wx, "[B, T, Gw, N, D]")
    B, _, _, N, D = of_Wx
    if count is not None:
        B = count
    if N == 0 or D == 0:
        raise ValueError(
            f"Wx has shape {tuple(of_Wx)}, {N} heads of {D} units; accepted are N and D ≥ 1"
        )
    check_gates(cell, "Wx", of_Wx[2])
    check_rank("R", R.shape, "[Gr, N, D, D]")
    check_gates(cell, "R", R.shape[0])
    _check_shape("R", R, "[Gr, N, D, D]", (R.shape[0], N, D, D))
    check_rank("b", b.shape, "[Gb, N, D]")
    check_gates(cell, "b", b.shape[0])
    _check_shape("b", b, "[Gb, N, D]", (b.shape[0], N, D))
    if states is not None:
        S = len(cell.states)
        check_rank("states", states.shape, "[S, B, 1, N, D]")
        if states.shape[0] != S:
            raise ValueError(
                f"states has shape {tuple(states.shape)}, {states.shape[0]} states; "
                f"{cell.name} has {S}: {', '.join(cell.states)}"
            )
        layout = f"[S, B, 1, N, D], or {(S, 1, 1, N, D)}, one for all sequences"
        _check_shape("states", states, layout, (S, B, 1, N, D))
    raise AssertionError("all shapes fit")


def check_rank(name: str, shape: Sequence[int], layout: str) -> None:
    """Raise an error unless a shape has as many dimensions as the layout."""
    rank = layout.count(",") + 1
    if len(shape) != rank:
        raise ValueError(
            f"{name} has shape {tuple(shape)}; accepted are {rank} dimensions, {layout}"
        )


def check_gates(cell: Cell, name: str, given: int, source: str | None = None) -> None:
    """Raise an error unless a tensor has the number of gates that a source feeds."""
    expected = cell.gate_names(source or name)
    if given != len(expected):
        raise ValueError(
            f"{name} holds {given} gates; {cell.name} takes {len(expected)} there: "
            f"{', '.join(expected) or 'none'}"
        )


def _check_shape(name: str, tensor: Tensor, layout: str, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; with this input it must be {expected}, "
            f"{layout}"
        )


def common_device(tensors: dict[str, Tensor]) -> torch.device:
    """The device of all tensors, once it is found to be one."""
    device = next(iter(tensors.values())).device
    for tensor in tensors.values():
        if tensor.device != device:
            given = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
            raise ValueError(f"{given}; accepted is one device for all: move them with .to(device)")
    return device


def common_dtype(
    tensors: dict[str, Tensor],
    config: FlashRNNConfig,
    dtype: torch.dtype | str | None,
    autocast: bool,
) -> torch.dtype:
    """The dtype of the computation, once every given dtype is found to fit."""
    for tensor in tensors.values():
        if tensor.dtype not in SUPPORTED_DTYPES:
            names = ", ".join(str(supported) for supported in SUPPORTED_DTYPES)
            raise TypeError(f"{_listed(tensors)}; accepted are {names}")

    first = next(iter(tensors.values()))
    requested = dtype if dtype is not None else config.dtype
    if autocast and config.enable_automatic_mixed_precision:
        default = torch.get_autocast_dtype(first.device.type)
        return parse_dtype(default if requested is None else requested)
    if requested is not None:
        return parse_dtype(requested)

    found = first.dtype
    for name, tensor in tensors.items():
        may_be_wider = name in ("b", "states", "reset_states")
        if tensor.dtype != found and not (may_be_wider and tensor.dtype == carry_dtype(found)):
            raise TypeError(
                f"{_listed(tensors)}; accepted is one dtype for all (b and states may be float32 "
                "beside 16 bits). Cast them, or let dtype=... do it"
            )
    return found


def _listed(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
