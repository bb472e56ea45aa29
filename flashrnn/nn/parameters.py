"""The arguments and the parameters of a layer: checks, names, shapes and first values."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from flashrnn import backends
from flashrnn.cells.spec import Cell, resolve
from flashrnn.nn.masks import Masks
from flashrnn.nn.modes import MODES, mode_of
from flashrnn.nn.weights import Weights


class RecurrentParameters(torch.nn.RNNBase):
    """What a layer consists of, under torch.nn's names; :class:`Recurrent` computes with it.

    :class:`Recurrent` has the arguments and the attributes. :mod:`flashrnn.nn` reads the parameters
    by the functions below.
    """

    # What an instance of a torch.nn class has once `replace` made it one of these.
    heads: int = 1
    backend: str = "auto"
    forget_bias: float | None = None
    variational: bool = False
    _masks: Masks | None = None

    def __init__(
        self,
        cell: str | Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
        backend: str = "auto",
        forget_bias: float | None = None,
        variational: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
    ) -> None:
        # Not RNNBase's, which knows the cells of torch.nn alone.
        torch.nn.Module.__init__(self)
        if isinstance(num_layers, numbers.Integral) and not isinstance(num_layers, bool):
            num_layers = int(num_layers)  # NumPy's too, as of torch.nn's layers.
        _check_types(
            input_size=(input_size, int),
            hidden_size=(hidden_size, int),
            num_layers=(num_layers, int),
            bias=(bias, bool),
            batch_first=(batch_first, bool),
            proj_size=(proj_size, int),
            heads=(heads, int),
            backend=(backend, str),
            variational=(variational, bool),
        )
        _check_values(input_size, hidden_size, num_layers, dropout, proj_size, heads)
        cell = resolve(cell)
        self.mode = mode_of(cell)
        if self.mode not in MODES:
            self._cell = cell
        if proj_size and (self.mode != "LSTM" or heads != 1):
            raise ValueError(
                f"proj_size={proj_size} with cell {cell.name!r} and {heads} heads; accepted is a "
                "projection of cell 'lstm' with one head"
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bidirectional, proj_size
        self.heads, self.backend = heads, backends.checked(backend)

        if forget_bias is not None and not (bias and "f" in self.cell.gate_names("b")):
            gates = ", ".join(self.cell.gate_names("b")) if bias else "none"
            raise ValueError(
                f"forget_bias={forget_bias} for biases of the gates {gates}; accepted is None, or "
                "a cell with a bias of a gate f"
            )
        self.forget_bias, self.variational = forget_bias, variational
        self._set_masks(recurrent_dropout, zoneout)

        # RNNBase keeps both, and out of them `all_weights` and `_flat_weights`.
        self._all_weights: list[list[str]] = []
        self._flat_weights_names: list[str] = []
        for layer in range(num_layers):
            for suffix in ("", "_reverse")[: 1 + bidirectional]:
                names = []
                for name, shape in self._shapes(layer).items():
                    names.append(f"{name}_l{layer}{suffix}")
                    weight = torch.empty(shape, device=device, dtype=dtype)
                    self.register_parameter(names[-1], torch.nn.Parameter(weight))
                self._all_weights.append(names)
                self._flat_weights_names.extend(names)
        self._init_flat_weights()
        self.reset_parameters()

    @property
    def recurrent_dropout(self) -> float:
        """The probability, 0 without; as ``dropout``, it may be set at any time."""
        return 0.0 if self._masks is None else self._masks.dropout

    @recurrent_dropout.setter
    def recurrent_dropout(self, probability: float) -> None:
        self._set_masks(probability, self.zoneout or 0.0)

    @property
    def zoneout(self) -> tuple[float, ...]:
        """The probability for each state, ``()`` without; it may be set as it is given at first."""
        return self._masks.zoneout if self._masks is not None and any(self._masks.zoneout) else ()

    @zoneout.setter
    def zoneout(self, probabilities: float | Sequence[float]) -> None:
        self._set_masks(self.recurrent_dropout, probabilities)

    def _set_masks(self, recurrent_dropout: float, zoneout: float | Sequence[float]) -> None:
        masks = Masks.of(self.cell, recurrent_dropout, zoneout)
        if masks is not None and self.proj_size:
            raise ValueError(
                f"proj_size={self.proj_size} with recurrent_dropout or zoneout; accepted is a "
                "layer without a projection: h is what they are of"
            )
        self._masks = masks

    def _shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The weights of one direction of a layer, in torch.nn's order."""
        cell, H = self.cell, self.hidden_size
        outputs = self.proj_size or H
        inputs = outputs * (1 + self.bidirectional) if layer else self.input_size
        Gw, Gr, Gb = (len(cell.fed_by(source)) for source in ("Wx", "R", "b"))
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (Gw * H, inputs),
            "weight_hh": (Gr * H, self.proj_size or H // self.heads),
        }
        if self.bias:
            if self.mode in MODES:
                shapes |= {"bias_ih": (Gw * H,), "bias_hh": (Gr * H,)}
            elif Gb:
                shapes["bias"] = (Gb * H,)
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, H)
        return shapes

    def reset_parameters(self) -> None:
        """First values: torch.nn's, but ``forget_bias``."""
        super().reset_parameters()
        if self.forget_bias is None:
            return
        f, H = self.cell.gate_names("b").index("f"), self.hidden_size
        with torch.no_grad():
            for names in self._all_weights:
                first, *others = (name for name in names if name.startswith("bias_"))
                for name in (first, *others):
                    of_f = getattr(self, name)[f * H : (f + 1) * H]
                    of_f.fill_(self.forget_bias if name == first else 0)

    @property
    def cell(self) -> Cell:
        """The cell."""
        return MODES[self.mode].cell if self.mode in MODES else self._cell

    def flatten_parameters(self) -> None:
        """Do nothing: kernels read the weights where they are.

        torch.nn's layers move theirs into one piece of memory for cuDNN, which has one head only.
        """


def parameters_of(layers: RecurrentParameters) -> list[Tensor]:
    """All of them, those of a layer and its directions after those of the one before."""
    return [getattr(layers, name) for name in layers._flat_weights_names]


def parameter(layers: RecurrentParameters, name: str) -> Tensor:
    """One of them by its name. Not by ``getattr``, which asks for it in three places first; but
    what takes a parameter's place, as ``torch.nn.utils.parametrize`` does, is an attribute."""
    found = layers._parameters.get(name)
    return getattr(layers, name) if found is None else found


def parameters_named(layers: RecurrentParameters, names: list[str]) -> list[Tensor]:
    """Several of them, likewise."""
    found = [*map(layers._parameters.get, names)]
    return [
        getattr(layers, name) if weight is None else weight
        for name, weight in zip(names, found, strict=True)
    ]


def names_of(layers: RecurrentParameters, row: int) -> list[str]:
    """The names of one direction's; ``row`` counts the directions of all layers."""
    return layers._all_weights[row]


def weights_of(layers: RecurrentParameters, row: int) -> Weights:
    """Those of one direction of a layer, as :func:`names_of` counts."""
    weight_ih, weight_hh, *biases = (getattr(layers, name) for name in names_of(layers, row))
    weight_hr = biases.pop() if layers.proj_size else None
    return Weights.of(
        layers.mode, layers.cell, layers.heads, weight_ih, weight_hh, biases, weight_hr
    )


def first_of(layers: RecurrentParameters) -> Tensor:
    """The first of the parameters, which have one dtype and one device."""
    return parameter(layers, layers._flat_weights_names[0])


def rows_of(layers: RecurrentParameters) -> int:
    """How many directions all layers have together."""
    return len(layers._all_weights)


def masks_of(layers: RecurrentParameters) -> Masks | None:
    """What is random within a layer, which is so in training alone."""
    return layers._masks if layers.training else None


def has_masks(layers: RecurrentParameters) -> bool:
    """Whether a call has random masks that PyTorch's kernels have not."""
    varied = layers.variational and layers.dropout > 0 and layers.num_layers > 1
    return layers.training and (varied or layers._masks is not None)


def cell_of(layers: RecurrentParameters) -> Cell:
    """The cell of a call without random masks."""
    return layers.cell if layers.training or layers._masks is None else layers._masks.evaluated


def drops_after(layers: RecurrentParameters, layer: int) -> bool:
    """Whether a call drops elements of a layer's output: in training, but of the last one."""
    return bool(layers.dropout and layers.training and layer < layers.num_layers - 1)


def _check_types(**given: tuple[object, type]) -> None:
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise TypeError(
                f"{name} should be of type {kind.__name__}, got: {type(value).__name__}"
            )


def _check_values(
    input_size: int, hidden_size: int, num_layers: int, dropout: float, proj_size: int, heads: int
) -> None:
    if (
        not isinstance(dropout, numbers.Number)
        or isinstance(dropout, bool)
        or not 0 <= dropout <= 1
    ):
        raise ValueError(f"dropout={dropout!r}; accepted is a probability, a number from 0 to 1")
    for name, size in (
        ("input_size", input_size),
        ("hidden_size", hidden_size),
        ("num_layers", num_layers),
        ("heads", heads),
    ):
        if size <= 0:
            raise ValueError(f"{name}={size}; accepted are numbers greater than zero")
    if hidden_size % heads:
        raise ValueError(f"{hidden_size} units in {heads} heads; accepted is a multiple of heads")
    if not 0 <= proj_size < hidden_size:
        raise ValueError(
            f"proj_size={proj_size}; accepted are numbers smaller than hidden_size={hidden_size}, "
            "or 0: no projection"
        )
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            f"dropout={dropout} with num_layers=1: the output of every layer but the last is "
            "dropped, here of none",
            stacklevel=4,
        )
