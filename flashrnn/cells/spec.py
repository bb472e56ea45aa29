"""The class of a cell, and the registry of cells by name."""

from __future__ import annotations

import difflib
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from flashrnn.cells.signature import SOURCES, Gate, Signature

if TYPE_CHECKING:
    from flashrnn.cells.captures import Captures
    from flashrnn.cells.traced import CellGraphs, TracedCell

Step = Callable[
    [tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]],
    Sequence[torch.Tensor],
]


@dataclass(frozen=True, eq=False, repr=False)
class Cell(Signature):
    """A recurrent cell: named states and gates, and the pointwise step between them.

    Made by :func:`cell`. Two cells are equal only if they are the same object. A cell never
    changes, so a copy is the cell itself.

    Attributes:
        step: ``step(states, gates) -> new states``; tensors of one shape and dtype.
        handle: a string that stands for the cell; see :func:`cell_of`.
    """

    step: Step
    handle: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)
    # The captured values of the last trace, and its result.
    _trace: list[tuple[Captures, TracedCell]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        _check_name(self.name)
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

    @property
    def traced(self) -> TracedCell:
        """The cell as kernels have it: traced at its first use, and again where a Python value
        that the step captures has changed since (:mod:`flashrnn.cells.captures`).

        Raises:
            CellError: the step function is not one that a cell may have.
        """
        if self._trace:
            captures, traced = self._trace[0]
            if not captures.changed():
                return traced
        return self._traced_anew()

    def _traced_anew(self) -> TracedCell:
        from flashrnn.cells.captures import NOTHING, captures_of
        from flashrnn.cells.trace import trace
        from flashrnn.cells.traced import TracedCell

        # The built-in cells capture nothing; tests check that.
        built_in = _library.get(self.name) is self
        # Values are read before they are used: one that changes meanwhile is found changed.
        captures = NOTHING if built_in else captures_of(self.name, self.step)
        graphs = trace(self, checked=not built_in)
        if not captures.missing.isdisjoint(sys.modules):
            return self._traced_anew()  # The step has imported them: now they can be searched.
        traced = TracedCell(self.name, self.states, self.gates, graphs)
        self._trace[:] = [(captures, traced)]
        return traced

    @property
    def captures(self) -> bool:
        """Whether the step captures Python values, so that the cell may change."""
        return bool(self._trace) and self._trace[0][0].exist

    @property
    def graphs(self) -> CellGraphs:
        """See :attr:`flashrnn.cells.traced.TracedCell.graphs`."""
        return self.traced.graphs

    @property
    def fingerprint(self) -> str:
        """See :attr:`flashrnn.cells.traced.TracedCell.fingerprint`."""
        return self.traced.fingerprint

    def __copy__(self) -> Cell:
        return self

    def __deepcopy__(self, _: Any) -> Cell:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        module, name = getattr(self.step, "__module__", ""), getattr(self.step, "__qualname__", "")
        try:
            by_name = _imported(module, name) is self
        except (ImportError, AttributeError):
            by_name = False
        if by_name:
            # The cell has the function's name, so the function cannot be found by it.
            return _imported, (module, name)
        return Cell, (self.name, self.states, self.gates, self.step)


def _imported(module: str, name: str) -> Any:
    """The object with a qualified name in a module."""
    if module not in sys.modules:
        __import__(module)
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part)
    return found


# A cell stays here as long as something else refers to it.
_cells: WeakValueDictionary[str, Cell] = WeakValueDictionary()


def cell_of(handle: str) -> Cell | None:
    """The cell with this handle; ``None`` if this process has not made it, or it is gone.

    Functions that ``torch.compile`` does not trace may have strings as arguments, but not cells.
    """
    return _cells.get(handle)


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
        return Cell(own_name if name is None else name, tuple(states), specs, step)

    return decorate


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a cell's name is a string, got {type(name).__name__}: {name!r}")
    if not name:
        raise ValueError("a cell's name has at least one character, got ''")


def _distinct(names: Sequence[str]) -> Sequence[str]:
    if len(set(names)) != len(names):
        raise ValueError(f"gates {tuple(names)!r}: each needs a name of its own")
    return names


# No caches: what has a name is to be found by it.
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
        TypeError: not a cell, or a name that is no string.
        ValueError: an empty name, or that of a built-in cell.
    """
    if not isinstance(cell, Cell):
        raise TypeError(f"register() takes a cell made by @cell, got {type(cell).__name__}")
    name = cell.name if name is None else name
    _check_name(name)
    if name in _library:
        raise ValueError(f"{name!r} is a built-in cell; register yours under another name")
    _registered[name] = cell
    return cell


def available_functions() -> tuple[str, ...]:
    """Names accepted as ``function=``: the built-in cells, then the registered ones."""
    return (*_library, *_registered)


def resolve(function: str | Cell) -> Cell:
    """The cell that ``function`` means.

    Raises:
        TypeError: neither a name nor a cell.
        ValueError: an unknown name.
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
    return function


def unknown_name(kind: str, given: str, known: Sequence[str]) -> str:
    """The message for a name that nobody knows: what was given, the nearest, and all."""
    near = difflib.get_close_matches(given, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {given!r}.{hint} Accepted: {', '.join(known)}"
