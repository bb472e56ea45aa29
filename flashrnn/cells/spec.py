"""What a cell is, and the names under which cells are known."""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

if TYPE_CHECKING:
    from flashrnn.cells.trace import CellGraphs

SOURCES = ("Wx", "R", "b")

_numbers = itertools.count()

Step = Callable[
    [tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]],
    Sequence[torch.Tensor],
]


@dataclass(frozen=True)
class Gate:
    """A gate: the pre-activation ``sum(sources)`` that the cell's step function receives.

    Attributes:
        name: the gate's name.
        sources: what feeds it, out of ``"Wx"`` (the input), ``"R"`` (the recurrent
            product with ``h``) and ``"b"`` (the bias).
    """

    name: str
    sources: tuple[str, ...] = SOURCES

    def __post_init__(self) -> None:
        unknown = [source for source in self.sources if source not in SOURCES]
        if unknown or not self.sources or len(set(self.sources)) != len(self.sources):
            raise ValueError(
                f"gate {self.name!r} is fed by {self.sources!r}; accepted is any non-empty "
                f"selection of {SOURCES}, each at most once"
            )


@dataclass(frozen=True, eq=False)
class Cell:
    """A recurrent cell: named states and gates, and the pointwise step between them.

    Made by :func:`cell`. Two cells are equal only if they are the same object.

    Attributes:
        name: the name shown in messages and, once registered, accepted as ``function=``.
        states: names of the states; the first is ``h``, the one that ``R`` multiplies.
        gates: the gates in the order in which the step function receives them.
        step: ``step(states, gates) -> new states``; tensors of one shape and dtype.
        handle: stands for the cell within this process; see :func:`cell_of`.
    """

    name: str
    states: tuple[str, ...]
    gates: tuple[Gate, ...]
    step: Step
    handle: str = field(default_factory=lambda: f"cell {next(_numbers)}", init=False)

    def __post_init__(self) -> None:
        _cells[self.handle] = self
        for kind, names in (("state", self.states), ("gate", tuple(g.name for g in self.gates))):
            if not names or len(set(names)) != len(names):
                raise ValueError(
                    f"cell {self.name!r} has {kind}s {names!r}; "
                    f"accepted is one {kind} or more, each with a name of its own"
                )
        for source in ("Wx", "R"):
            if not self.fed_by(source):
                raise ValueError(
                    f"no gate of cell {self.name!r} is fed by {source!r}; "
                    "a recurrent cell needs an input (Wx) and a recurrent product (R)"
                )

    def fed_by(self, source: str) -> tuple[int, ...]:
        """Indices into ``gates`` of those that ``source`` feeds.

        Their order is the order of the gate dimension of ``Wx``, ``R`` and ``b``.
        """
        return self._fed_by[source]

    @cached_property
    def _fed_by(self) -> dict[str, tuple[int, ...]]:
        gates = tuple(enumerate(self.gates))
        return {s: tuple(k for k, gate in gates if s in gate.sources) for s in SOURCES}

    def gate_names(self, source: str) -> tuple[str, ...]:
        """Names of the gates that ``source`` feeds, in the order of its gate dimension."""
        return tuple(self.gates[k].name for k in self.fed_by(source))

    @cached_property
    def graphs(self) -> CellGraphs:
        """The aten graphs of the step and of its derivative (:mod:`flashrnn.cells.trace`).

        Raises:
            CellError: the step function is not one that a cell may have.
        """
        from flashrnn.cells.trace import trace

        return trace(self)

    @cached_property
    def fingerprint(self) -> str:
        """Name and digest: the same for the same cell in every process."""
        program = f"{self.states} {self.gates} {self.graphs.forward} {self.graphs.derivative}"
        return f"{self.name}-{hashlib.sha256(program.encode()).hexdigest()[:16]}"

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, here or in another process, gets a handle of its own.
        return Cell, (self.name, self.states, self.gates, self.step)

    def __repr__(self) -> str:
        return (
            f"<cell {self.name}: states {self.states}, gates {tuple(g.name for g in self.gates)}>"
        )


_cells: WeakValueDictionary[str, Cell] = WeakValueDictionary()


def cell_of(handle: str) -> Cell:
    """The cell with this handle.

    ``torch.compile`` takes strings, and no cells, as arguments of what it does not look into.
    """
    return _cells[handle]


class CellError(ValueError):
    """A step function that cannot be a cell, and why."""


def cell(
    *,
    states: Sequence[str],
    gates: Sequence[str] | Mapping[str, Sequence[str]],
    name: str | None = None,
) -> Callable[[Step], Cell]:
    """Make a cell out of an ordinary pointwise PyTorch function.

    Args:
        states: names of the states. The first is ``h``: the recurrent matrix multiplies
            it, and it is the first of the states that :func:`flashrnn.flashrnn` returns.
        gates: names of the gates, each fed by ``Wx``, ``R`` and ``b``; or a mapping from
            names to what feeds them, for instance ``{"g": ("R", "b"), "n": ("Wx", "b")}``.
        name: defaults to the function's name.

    Returns:
        A decorator that turns ``step(states, gates) -> new states`` into a :class:`Cell`.
        ``step`` gets a tuple of states and a tuple of gates, tensors of one shape and a
        floating dtype, and returns the new states in the order of ``states``. It may use
        any pointwise operation, no Python control flow that depends on the tensors' values.

    Raises:
        ValueError: names that are missing or doubled, unknown sources, no gate that is fed
            by ``Wx`` or none that is fed by ``R``.

    Example:
        >>> @cell(states=("h",), gates=("z", "n"))
        ... def light_gru(states, gates):
        ...     (h,) = states
        ...     z, n = gates
        ...     z = torch.sigmoid(z)
        ...     return (z * h + (1 - z) * torch.relu(n),)
        >>> light_gru.gate_names("R")
        ('z', 'n')
    """
    if isinstance(states, str) or isinstance(gates, str):
        raise ValueError('names of states and gates come as a sequence: states=("h", "c")')
    if not isinstance(gates, Mapping):
        gates = dict.fromkeys(_distinct(gates), SOURCES)
    specs = tuple(Gate(gate, tuple(sources)) for gate, sources in gates.items())

    def decorate(step: Step) -> Cell:
        own_name = str(getattr(step, "__name__", "cell"))
        return Cell(name or own_name, tuple(states), specs, step)

    return decorate


def _distinct(names: Sequence[str]) -> Sequence[str]:
    if len(set(names)) != len(names):
        raise ValueError(f"gates {tuple(names)!r}: each needs a name of its own")
    return names


@cache
def clipped(cell: Cell, clipval: float | None) -> Cell:
    """The cell whose new ``h`` is clipped to ``[-clipval, clipval]``; ``None``: the cell itself."""
    if clipval is None:
        return cell

    def step(states: tuple[torch.Tensor, ...], gates: tuple[torch.Tensor, ...]) -> Any:
        h, *others = cell.step(states, gates)
        return (h.clamp(-clipval, clipval), *others)

    return Cell(f"{cell.name}_clipped", cell.states, cell.gates, step)


_library: dict[str, Cell] = {}
_registered: dict[str, Cell] = {}


def add_to_library(cell: Cell) -> Cell:
    """Give a built-in cell its name; that name cannot be registered again."""
    _library[cell.name] = cell
    return cell


def register(cell: Cell, name: str | None = None) -> Cell:
    """Make a cell known by name, so that ``flashrnn(..., function=name)`` finds it.

    Args:
        cell: the cell.
        name: defaults to the cell's own name. A name registered before is replaced,
            so that a notebook's cell can be run twice.

    Returns:
        The cell, so that ``register`` can stand above ``@cell(...)`` as a decorator.

    Raises:
        TypeError: not a cell.
        ValueError: the name is that of a built-in cell.
    """
    if not isinstance(cell, Cell):
        raise TypeError(f"register() takes a cell made by @cell, got {type(cell).__name__}")
    name = name or cell.name
    if name in _library:
        raise ValueError(f"{name!r} is a built-in cell; register yours under another name")
    _registered[name] = cell
    return cell


def available_functions() -> tuple[str, ...]:
    """Names accepted as ``function=``: the built-in cells, then the registered ones."""
    return (*_library, *_registered)


def resolve(function: str | Cell) -> Cell:
    """The cell that ``function`` means.

    A cell that is not built in is traced at its first use, whatever the backend, so that a
    step function that no fused backend could run is refused on the CPU already. The built-in
    ones are held to the same by tests, and spare every process the tracing.

    Raises:
        TypeError: neither a name nor a cell.
        ValueError: an unknown name.
        CellError: the step function is not one that a cell may have.
    """
    if isinstance(function, str):
        if function in _library:
            return _library[function]
        if function not in _registered:
            raise ValueError(unknown_name("function", function, available_functions()))
        function = _registered[function]
    if not isinstance(function, Cell):
        raise TypeError(
            f"function is {type(function).__name__}; accepted are a cell made by @cell, "
            f"or a name out of {', '.join(available_functions())}"
        )
    if not torch.compiler.is_compiling() and function not in _library.values():
        _ = function.graphs
    return function


def unknown_name(kind: str, given: str, known: Sequence[str]) -> str:
    """The message for a name that nobody knows: what was given, the nearest, and all."""
    near = difflib.get_close_matches(given, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {given!r}.{hint} Accepted: {', '.join(known)}"
