"""A graph as program text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from flashrnn.cells.bounds import intervals
from flashrnn.cells.graph import Argument, Assignment, Graph
from flashrnn.cells.operations import (
    LARGEST_FLOAT32,
    OPERATIONS,
    Operation,
    Scalar,
    Within,
)
from flashrnn.cells.spec import Cell
from flashrnn.cells.traced import FORWARD_CLIPVAL, TracedCell

_TRITON_HEADER = """\
import triton
import triton.language as tl

from flashrnn.kernels.triton import pointwise
"""


def render_triton(cell: Cell | TracedCell) -> str:
    """A Python module with a cell's step and its derivative as Triton functions.

    ``step(states, gates, forward_clipval)`` returns the new states; ``derivative(states, gates,
    gradients, forward_clipval)`` the gradients of the states followed by those of the gates. All
    but ``forward_clipval``, a number that only a clipped cell reads, are tuples of float32 tiles of
    one shape.
    """
    graphs = cell.graphs
    inputs = {"states": len(cell.states), "gates": len(cell.gates)}
    gradients = {"gradients": len(cell.states)}
    return "\n\n".join(
        [
            _TRITON_HEADER,
            _triton_function("step", graphs.forward, inputs),
            _triton_function("derivative", graphs.derivative, inputs | gradients),
        ]
    )


def _triton_function(name: str, graph: Graph, groups: Mapping[str, int]) -> str:
    spelled = _spelled(graph, groups)

    def spell(argument: Argument) -> str:
        if isinstance(argument, str):
            return spelled.get(argument, argument)
        if isinstance(argument, bool):
            return f"tl.full([1, 1], {int(argument)}, tl.int1)"
        return repr(argument) if math.isfinite(argument) else f'float("{argument}")'

    lines, tiles = [], set(graph.inputs) - {FORWARD_CLIPVAL}
    for assignment, operation in _operations(graph):
        text = operation.triton.format(*map(spell, assignment.arguments))
        lines.append(f"{assignment.name} = {text}")
        if not tiles.isdisjoint(assignment.arguments):
            tiles.add(assignment.name)
    # A constant becomes a tile too, as does a constant that is clipped, and a truth value a number.
    outputs = [
        spell(output)
        if output in tiles
        else f"tl.full(gates[0].shape, {spell(output)}, tl.float32)"
        for output in graph.outputs
    ]
    lines.append(f"return ({''.join(f'{output}, ' for output in outputs)})")
    head = f"@triton.jit\ndef {name}({', '.join(groups)}, {FORWARD_CLIPVAL}):"
    return "\n    ".join([head, *lines]) + "\n"


def render_cuda(cell: Cell | TracedCell) -> str:
    """What a CUDA kernel needs of a cell, as C++ text.

    Constants: ``S``, ``G``, ``GW`` and ``GR``, the numbers of states, of gates and of those that
    ``Wx`` and ``R`` feed; ``FED_WX``, ``FED_R`` and ``FED_B``, where each gate stands in the gate
    dimension of ``Wx``, ``R`` and ``b``, -1 where it does not; ``RECURRENT``, the gates that ``R``
    feeds. And the functions ``step(states, gates, new_states, forward_clipval)`` and
    ``derivative(states, gates, gradients, d_states, d_gates, forward_clipval)`` on arrays of
    float32 numbers, of which they write ``new_states``, ``d_states`` and ``d_gates``;
    ``forward_clipval`` is a number that only a clipped cell reads. They call ``pointwise.cuh``.
    """
    graphs = cell.graphs
    states, gates = len(cell.states), len(cell.gates)
    fed = {source: cell.fed_by(source) for source in ("Wx", "R", "b")}
    positions = {
        source: [indices.index(k) if k in indices else -1 for k in range(gates)]
        for source, indices in fed.items()
    }
    return "\n\n".join(
        [
            f"constexpr int S = {states}, G = {gates};\n"
            f"constexpr int GW = {len(fed['Wx'])}, GR = {len(fed['R'])};\n"
            f"constexpr int FED_WX[G] = {{{_listed(positions['Wx'])}}};\n"
            f"constexpr int FED_R[G] = {{{_listed(positions['R'])}}};\n"
            f"constexpr int FED_B[G] = {{{_listed(positions['b'])}}};\n"
            f"constexpr int RECURRENT[GR] = {{{_listed(fed['R'])}}};",
            _cuda_function(
                "step",
                graphs.forward,
                inputs={"states": states, "gates": gates},
                outputs={"new_states": states},
            ),
            _cuda_function(
                "derivative",
                graphs.derivative,
                inputs={"states": states, "gates": gates, "gradients": states},
                outputs={"d_states": states, "d_gates": gates},
            ),
        ]
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _cuda_function(
    name: str, graph: Graph, inputs: Mapping[str, int], outputs: Mapping[str, int]
) -> str:
    spelled = _spelled(graph, inputs)

    def spell(argument: Argument) -> str:
        if isinstance(argument, str):
            return spelled.get(argument, argument)
        return _cuda_constant(argument)

    lines = []
    for assignment, operation in _operations(graph):
        text = operation.cuda.format(*map(spell, assignment.arguments))
        lines.append(f"const auto {assignment.name} = {text};")
    for element, output in zip(_elements(outputs), graph.outputs, strict=True):
        lines.append(f"{element} = {spell(output)};")
    parameters = [f"const float (&{group})[{count}]" for group, count in inputs.items()]
    parameters += [f"float (&{group})[{count}]" for group, count in outputs.items()]
    parameters.append(f"float {FORWARD_CLIPVAL}")
    head = f"__device__ inline void {name}(\n    {', '.join(parameters)}) {{"
    return "\n    ".join([head, *lines]) + "\n}"


def _operations(graph: Graph) -> Iterator[tuple[Assignment, Operation | Within]]:
    """A graph's assignments, each with what has the spellings of its operation."""
    known = intervals(graph)
    for assignment in graph.body:
        operation = OPERATIONS[assignment.operation]
        within = operation.within
        if within is None:
            yield assignment, operation
            continue
        (name,) = assignment.arguments
        least, largest = known[str(name)]
        is_within = within.least <= least and largest <= within.largest
        yield assignment, within if is_within else operation


def _spelled(graph: Graph, groups: Mapping[str, int]) -> dict[str, str]:
    """How a graph's inputs are spelled; a clipped cell's last one has its own name."""
    return dict(zip(graph.inputs, [*_elements(groups), FORWARD_CLIPVAL], strict=False))


def _elements(groups: Mapping[str, int]) -> list[str]:
    return [f"{group}[{k}]" for group, count in groups.items() for k in range(count)]


def _cuda_constant(value: Scalar) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if math.isnan(value):
        return "NOT_A_NUMBER"
    # A negative one in parentheses, for `-` may stand before it.
    if abs(value) > LARGEST_FLOAT32:
        return "INFINITE" if value > 0 else "(-INFINITE)"
    return f"{value!r}f" if math.copysign(1, value) > 0 else f"({value!r}f)"
