"""``replace`` and ``restore``: turn a model's torch.nn layers into this package's, and back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch

from flashrnn import backends
from flashrnn.nn.layers import GRU, LSTM, RNN
from flashrnn.nn.modes import MODES
from flashrnn.nn.recurrent import Recurrent

_OURS: dict[type, type[Recurrent]] = {torch.nn.LSTM: LSTM, torch.nn.GRU: GRU, torch.nn.RNN: RNN}
_TORCHS = {"LSTM": torch.nn.LSTM, "GRU": torch.nn.GRU}


@dataclass
class Replaced:
    """What :func:`replace` or :func:`restore` did.

    Attributes:
        swapped: the printed form of each swapped layer, by its name in the model.
        left: the reason for each layer that was not swapped, by its name.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name or '(the model)'}: {now}" for name, now in self.swapped.items()]
        lines += [f"{name or '(the model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "no recurrent layer of torch.nn"


def replace(model: torch.nn.Module, *, keep_types: bool = True, backend: str = "auto") -> Replaced:
    """Make every ``torch.nn.LSTM``, ``GRU`` and ``RNN`` in a model one of this package, in place.

    A layer stays the same object, with its parameters, hooks and mode; only its class changes. So
    optimizers, tied weights and other references stay valid. :func:`restore` undoes it.

    Args:
        model: the model, or a layer itself.
        keep_types: whether ``isinstance(layer, torch.nn.LSTM)`` holds afterwards, which
            initialisers and wrappers of many libraries check. ``False``: each becomes a
            :class:`Recurrent`, which ``torch.compile`` traces with ``fullgraph=True``;
            it refuses a ``torch.nn.LSTM``.
        backend: for all of them; see :class:`Recurrent`.

    Returns:
        Which layers were swapped, and which were left and why: those of this package that are not
        as asked for, and instances of a subclass, whose ``forward`` may differ (the
        parametrizations of ``torch.nn.utils`` make subclasses).

    Raises:
        TypeError: ``model`` is not a module, or ``keep_types`` no bool.
        ValueError: there is no such backend.

    Example:
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(8, 16)})
        >>> print(replace(model))
        encoder: LSTM(8, 16)
    """
    backends.checked(backend)
    if not isinstance(keep_types, bool):
        raise TypeError(f"keep_types is {type(keep_types).__name__}; accepted are True and False")
    report = Replaced()
    for name, layer in _modules(model):
        if isinstance(layer, Recurrent):
            if backend not in ("auto", layer.backend) or not (keep_types or _is_plain(layer)):
                report.left[name] = (
                    f"it is {type(layer).__name__} of this package, backend {layer.backend!r}; set "
                    "its backend, or restore() it first"
                )
            continue
        if not isinstance(layer, torch.nn.RNNBase):
            continue
        ours = _OURS.get(type(layer))
        if ours is None:
            report.left[name] = (
                f"its class {type(layer).__qualname__} is not torch.nn's own but may compute "
                "something else"
            )
            continue
        layer.__class__ = ours if keep_types else Recurrent
        if backend != "auto":
            layer.backend = backend
        report.swapped[name] = str(layer)
    return report


def _is_plain(layer: Recurrent) -> bool:
    """Whether it is no ``torch.nn.LSTM``, ``GRU`` or ``RNN`` besides."""
    return not isinstance(layer, tuple(_OURS))


def restore(model: torch.nn.Module) -> Replaced:
    """Turn this package's layers in a model into torch.nn's, in place, where torch.nn has them.

    Returns:
        Which layers were swapped, and which were left and why: torch.nn has no heads and no other
        cells.

    Raises:
        TypeError: ``model`` is not a module.
    """
    report = Replaced()
    for name, layer in _modules(model):
        if not isinstance(layer, Recurrent):
            continue
        reason = _own(layer)
        if reason:
            report.left[name] = reason
            continue
        _to_torchs(layer)
        report.swapped[name] = str(layer)
    return report


def torchs(layer: Recurrent) -> torch.nn.Module:
    """A layer of torch.nn with the parameters of one of ours.

    Raises:
        ValueError: torch.nn has none such.
    """
    reason = _own(layer)
    if reason:
        raise ValueError(f"{type(layer).__name__} cannot be torch.nn's: {reason}")
    twin = copy.copy(layer)
    _to_torchs(twin)
    return twin


def _own(layer: Recurrent) -> str | None:
    """Why a layer is none of torch.nn."""
    if layer.mode not in MODES:
        return f"torch.nn has no cell {layer.cell.name!r}"
    if layer.heads != 1:
        return f"torch.nn has no heads, and it has {layer.heads}"
    if layer.variational or layer.recurrent_dropout or layer.zoneout:
        return "torch.nn has neither variational dropout nor zoneout"
    if type(layer) not in (*_OURS.values(), Recurrent):
        return f"its class {type(layer).__qualname__} may compute something else"
    return None


def _to_torchs(layer: Recurrent) -> None:
    if layer.mode in ("RNN_TANH", "RNN_RELU"):
        # A Recurrent, which has no such argument, is not to lack it.
        layer.nonlinearity = layer.mode.removeprefix("RNN_").lower()
    for name in ("heads", "backend", "variational", "_masks"):
        layer.__dict__.pop(name, None)
    layer.__class__ = _TORCHS.get(layer.mode, torch.nn.RNN)


def _modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {type(model).__name__}; accepted is a torch.nn.Module")
    return list(model.named_modules())
