"""A traced cell: its names and graphs, which are all that kernels need.

It holds none of the user's objects, so caches may keep it. It equals every other traced cell with
the same names and graphs, and another process can make it from its text.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache

import flashrnn
from flashrnn.cells.graph import Graph, GraphBuilder
from flashrnn.cells.signature import Gate, Signature

FORWARD_CLIPVAL = "forward_clipval"


@dataclass(frozen=True)
class CellGraphs:
    """The graphs of a cell's step and of its derivative.

    Attributes:
        forward: (states, gates) -> new states.
        derivative: (states, gates, gradients of the new states) -> (gradients of the
            states, gradients of the gates). Inputs that are gradients are named ``d_...``.
    """

    forward: Graph
    derivative: Graph


@dataclass(frozen=True, eq=False, repr=False)
class TracedCell(Signature):
    """A cell's names and graphs; equal to every other one with the same.

    Attributes:
        graphs: the graphs of the step and of its derivative.
    """

    graphs: CellGraphs

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, TracedCell) and self.fingerprint == other.fingerprint
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """Name and digest: the same for the same cell in every process."""
        program = json.dumps(self._content)
        return f"{self.name}-{hashlib.sha256(program.encode()).hexdigest()[:16]}"

    @cached_property
    def text(self) -> str:
        """The cell as a string, from which :func:`parsed` makes it again."""
        return self.text_for("")

    def text_for(self, handle: str) -> str:
        """The same, with the handle of the cell that it was traced from."""
        # torch.compile keeps graphs on disk. Operators of another version of this package may lay
        # out their results differently.
        about = {"version": flashrnn.__version__, "handle": handle, "cell": self._content}
        return json.dumps(about)

    @property
    def _content(self) -> list[object]:
        gates = [[gate.name, list(gate.sources)] for gate in self.gates]
        graphs = [self.graphs.forward.to_json(), self.graphs.derivative.to_json()]
        return [self.name, list(self.states), gates, *graphs]

    @property
    def clips(self) -> bool:
        """Whether :func:`clipped` made it."""
        return FORWARD_CLIPVAL in self.graphs.forward.inputs


@lru_cache(maxsize=256)
def parsed(text: str) -> tuple[TracedCell, str]:
    """The traced cell and the handle in a :meth:`TracedCell.text_for`."""
    about = json.loads(text)
    name, states, gates, forward, derivative = about["cell"]
    cell = TracedCell(
        name,
        tuple(states),
        tuple(Gate(gate, tuple(sources)) for gate, sources in gates),
        CellGraphs(Graph.from_json(forward), Graph.from_json(derivative)),
    )
    return cell, about["handle"]


@lru_cache(maxsize=256)
def clipped(cell: TracedCell) -> TracedCell:
    """The cell whose new ``h`` is clipped to ±``forward_clipval``, its graphs' last input."""
    forward, derivative = cell.graphs.forward, cell.graphs.derivative
    builder = GraphBuilder()
    h, *others = builder.inline(forward, {})
    lower = builder.emit("neg", FORWARD_CLIPVAL)
    new_h = builder.emit("minimum", builder.emit("maximum", h, lower), FORWARD_CLIPVAL)
    # As autograd's derivative of torch.clamp: 1 within the bounds and on them, else 0.
    d_h = derivative.inputs[len(cell.states) + len(cell.gates)]
    inside = builder.emit(
        "logical_and", builder.emit("ge", h, lower), builder.emit("le", h, FORWARD_CLIPVAL)
    )
    gradients = builder.inline(derivative, {d_h: builder.emit("where", inside, d_h, 0.0)})
    return TracedCell(
        f"{cell.name}_clipped",
        cell.states,
        cell.gates,
        CellGraphs(
            builder.graph((*forward.inputs, FORWARD_CLIPVAL), (new_h, *others)),
            builder.graph((*derivative.inputs, FORWARD_CLIPVAL), gradients),
        ),
    )
