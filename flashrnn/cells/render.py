"""A graph as program text."""

from __future__ import annotations

import math

from flashrnn.cells.graph import Argument, Graph
from flashrnn.cells.operations import OPERATIONS
from flashrnn.cells.spec import Cell

_TRITON_HEADER = """\
import triton
import triton.language as tl

from flashrnn.kernels import pointwise
"""


def render_triton(cell: Cell) -> str:
    """A Python module with a cell's step and its derivative as Triton functions.

    ``step(states, gates)`` returns the new states; ``derivative(states, gates, gradients)``
    the gradients of the states followed by those of the gates. All are tuples of float32
    tiles of one shape.
    """
    graphs = cell.graphs
    counts = {
        "states": len(cell.states),
        "gates": len(cell.gates),
        "gradients": len(cell.states),
    }
    return "\n\n".join(
        [
            _TRITON_HEADER,
            _triton_function("step", graphs.forward, counts),
            _triton_function("derivative", graphs.derivative, counts),
        ]
    )


def _triton_function(name: str, graph: Graph, counts: dict[str, int]) -> str:
    elements = [f"{group}[{k}]" for group, count in counts.items() for k in range(count)]
    spelled = dict(zip(graph.inputs, elements, strict=False))
    groups = [group for group in counts if any(e.startswith(group) for e in spelled.values())]

    def spell(argument: Argument) -> str:
        if isinstance(argument, str):
            return spelled.get(argument, argument)
        if isinstance(argument, bool):
            return f"tl.full([1, 1], {int(argument)}, tl.int1)"
        return repr(argument) if math.isfinite(argument) else f'float("{argument}")'

    lines = []
    for assignment in graph.body:
        text = OPERATIONS[assignment.operation].triton.format(*map(spell, assignment.arguments))
        lines.append(f"{assignment.name} = {text}")
    # A constant becomes a tile too, and so does a truth value a number.
    outputs = [
        spell(output)
        if isinstance(output, str)
        else f"tl.full(gates[0].shape, {spell(output)}, tl.float32)"
        for output in graph.outputs
    ]
    lines.append(f"return ({''.join(f'{output}, ' for output in outputs)})")
    head = f"@triton.jit\ndef {name}({', '.join(groups)}):"
    return "\n    ".join([head, *lines]) + "\n"
