"""A graph of scalar operations: the form that tracing gives a cell's step and derivative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashrnn.cells.operations import OPERATIONS, Scalar

Argument = str | Scalar
"""The name of a value computed before, or a constant."""


@dataclass(frozen=True)
class Assignment:
    """``name = operation(*arguments)``, the operation named as in the table."""

    name: str
    operation: str
    arguments: tuple[Argument, ...]

    def __str__(self) -> str:
        return f"{self.name} = {self.operation}({', '.join(map(str, self.arguments))})"


@dataclass(frozen=True)
class Graph:
    """A straight-line program on scalars, applied at every element alike.

    Attributes:
        inputs: names of the inputs, in order.
        body: the assignments, each after those whose names it uses.
        outputs: names or constants, in order.
    """

    inputs: tuple[str, ...]
    body: tuple[Assignment, ...]
    outputs: tuple[Argument, ...]

    def __str__(self) -> str:
        lines = [f"({', '.join(self.inputs)}) ->", *map(str, self.body)]
        return "\n    ".join([*lines, f"({', '.join(map(str, self.outputs))})"])

    def to_json(self) -> list[Any]:
        """Lists, strings and numbers, of which :meth:`from_json` makes the graph again."""
        body = [[x.name, x.operation, *x.arguments] for x in self.body]
        return [list(self.inputs), body, list(self.outputs)]

    @classmethod
    def from_json(cls, given: Sequence[Any]) -> Graph:
        """The graph that :meth:`to_json` wrote.

        Raises:
            ValueError: an operation that the table lacks.
        """
        inputs, body, outputs = given
        unknown = {operation for _, operation, *_ in body} - OPERATIONS.keys()
        if unknown:
            raise ValueError(
                f"a graph of operations that this version does not know: {', '.join(unknown)}"
            )
        assignments = tuple(Assignment(name, op, tuple(args)) for name, op, *args in body)
        return cls(tuple(inputs), assignments, tuple(outputs))


class GraphBuilder:
    """Puts a graph together: what is computed twice gets one name."""

    def __init__(self) -> None:
        self._body: dict[tuple[str, ...], Assignment] = {}

    def emit(self, operation: str, *arguments: Argument) -> Argument:
        """The name of an operation's result: the first one where it is a common subexpression.

        Of constants it is a constant, as is what one of them decides: ``logical_and`` of false, and
        ``where`` of a constant condition, which is one of the two others.
        """
        constants = [x for x in arguments if not isinstance(x, str)]
        if len(constants) == len(arguments):
            return OPERATIONS[operation].python(*constants)
        if operation == "logical_and" and False in constants:
            return False
        if operation == "where" and not isinstance(arguments[0], str):
            return arguments[1 if arguments[0] else 2]
        # repr tells 0.0 from -0.0 and True from 1.0.
        key = (operation, *map(repr, arguments))
        assignment = Assignment(f"v{len(self._body)}", operation, arguments)
        return self._body.setdefault(key, assignment).name

    def inline(self, graph: Graph, inputs: Mapping[str, Argument]) -> tuple[Argument, ...]:
        """Add another graph's body; returns what its outputs are called here.

        Args:
            graph: the graph.
            inputs: what its inputs are called here; those left out keep their names.
        """
        names = dict(inputs)

        def renamed(argument: Argument) -> Argument:
            return names.get(argument, argument) if isinstance(argument, str) else argument

        for x in graph.body:
            names[x.name] = self.emit(x.operation, *map(renamed, x.arguments))
        return tuple(map(renamed, graph.outputs))

    def graph(self, inputs: Sequence[str], outputs: Sequence[Argument]) -> Graph:
        """The graph between these, without what no output depends on."""
        wanted = {name for name in outputs if isinstance(name, str)}
        kept: list[Assignment] = []
        for assignment in reversed(self._body.values()):
            if assignment.name in wanted:
                kept.append(assignment)
                wanted.update(a for a in assignment.arguments if isinstance(a, str))
        return Graph(tuple(inputs), tuple(reversed(kept)), tuple(outputs))


def evaluate(graph: Graph, inputs: Sequence[Scalar]) -> tuple[Scalar, ...]:
    """Run a graph on Python numbers: the meaning that every rendering of it must keep.

    Args:
        graph: the graph.
        inputs: a number for each of ``graph.inputs``.

    Returns:
        A number for each of ``graph.outputs``.
    """
    values: dict[str, Scalar] = dict(zip(graph.inputs, inputs, strict=True))

    def value(argument: Argument) -> Scalar:
        return values[argument] if isinstance(argument, str) else argument

    for assignment in graph.body:
        operation = OPERATIONS[assignment.operation]
        values[assignment.name] = operation.python(*map(value, assignment.arguments))
    return tuple(map(value, graph.outputs))
