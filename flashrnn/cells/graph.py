"""A graph of scalar operations: what is left of a cell once it is traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
