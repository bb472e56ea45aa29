"""From a cell's step function to the graphs of the step and of its derivative.

``make_fx`` records the step as aten operations, and ``torch.func.vjp`` under ``make_fx``
records its derivative, with composite operations decomposed. Both are then lowered to the few
operations of the table, on scalars: what is computed twice gets one name, what is never used
none.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from flashrnn.cells.graph import Argument, Assignment, Graph
from flashrnn.cells.operations import OPERATIONS
from flashrnn.cells.spec import Cell, CellError

aten = torch.ops.aten

# Two dimensions, so that a reduction, a transpose or a new axis shows in the shape.
_TRACED_SHAPE = (2, 3)
# Constants keep their digits, and nothing depends on a lower precision's limits.
_TRACED_DTYPE = torch.float64


@dataclass(frozen=True)
class CellGraphs:
    """What the compiler knows of a cell.

    Attributes:
        forward: (states, gates) -> new states.
        derivative: (states, gates, gradients of the new states) -> (gradients of the
            states, gradients of the gates). Inputs that are gradients are named ``d_...``.
    """

    forward: Graph
    derivative: Graph


def trace(cell: Cell) -> CellGraphs:
    """Trace a cell's step function and its derivative.

    Raises:
        CellError: an operation that is not pointwise, that changes a tensor in place, or that
            the table lacks; control flow that depends on a tensor's values; a captured tensor;
            new states of the wrong number, shape or dtype.
    """
    states = [f"state_{name}" for name in cell.states]
    gates = [f"gate_{gate.name}" for gate in cell.gates]
    gradients = [f"d_{name}" for name in states]

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        return _checked_step(cell, inputs[: len(states)], inputs[len(states) :])

    def derivative(*inputs: Tensor) -> tuple[Tensor, ...]:
        values, cotangents = inputs[: -len(states)], inputs[-len(states) :]
        pull_back = torch.func.vjp(forward, *values)[1]
        return pull_back(cotangents)

    return CellGraphs(
        forward=_trace_function(cell, forward, states + gates),
        # Some of PyTorch's own backward formulas work in place; a cell's step must not, so
        # only the derivative is functionalized.
        derivative=_trace_function(
            cell, torch.func.functionalize(derivative), states + gates + gradients
        ),
    )


def _checked_step(
    cell: Cell, states: tuple[Tensor, ...], gates: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    given = cell.step(states, gates)
    expected = f"{len(cell.states)} new states ({', '.join(cell.states)})"
    if not isinstance(given, (tuple, list)):
        raise CellError(
            f"cell {cell.name!r} returned {type(given).__name__}; "
            f"accepted is a tuple of {expected}, also where there is only one"
        )
    if len(given) != len(cell.states):
        raise CellError(f"cell {cell.name!r} returned {len(given)} tensors; expected {expected}")
    for name, state in zip(cell.states, given, strict=True):
        if not isinstance(state, Tensor):
            raise CellError(
                f"cell {cell.name!r} returned {type(state).__name__} as its state {name!r}; "
                "accepted is a tensor (torch.zeros_like(h) where it is a constant)"
            )
        if state.shape != torch.Size(_TRACED_SHAPE) or state.dtype != _TRACED_DTYPE:
            raise CellError(
                f"cell {cell.name!r} turns states and gates of shape {_TRACED_SHAPE} and dtype "
                f"{_TRACED_DTYPE} into a state {name!r} of shape {tuple(state.shape)} and dtype "
                f"{state.dtype}; a cell keeps both: use pointwise operations alone"
            )
    return tuple(given)


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    further = get_decompositions(
        [
            aten.elu,
            aten.elu_backward,
            aten.gelu,
            aten.gelu_backward,
            aten.hardtanh,
            aten.hardtanh_backward,
            aten.leaky_relu,
            aten.leaky_relu_backward,
        ]
    )
    return {**core_aten_decompositions(), **further}


def _trace_function(
    cell: Cell, function: Callable[..., tuple[Tensor, ...]], names: Sequence[str]
) -> Graph:
    # Random values, not zeros: nothing may depend on them, but a step function that divides
    # by a state should not meet its poles here.
    samples = [torch.rand(_TRACED_SHAPE, dtype=_TRACED_DTYPE) for _ in names]
    try:
        module = make_fx(function, _decompositions())(*samples)
    except CellError:
        raise
    except RuntimeError as error:
        if _is_data_dependent(error):
            raise CellError(
                f"cell {cell.name!r} looks at a tensor's values in Python{_where(cell, error)}: "
                "an if, a bool(), .item() or .tolist() that depends on data. Choose between "
                "tensors with torch.where(condition, a, b) instead"
            ) from error
        raise CellError(f"cell {cell.name!r} failed while it was traced: {error}") from error
    return _Lowering(cell, module, names).graph()


def _is_data_dependent(error: RuntimeError) -> bool:
    message = str(error)
    return "value out of a tracing tensor" in message or "Boolean value of Tensor" in message


def _where(cell: Cell, error: BaseException) -> str:
    """`` (file, line n)`` of the step function's line that failed, or nothing."""
    code = inspect.unwrap(cell.step).__code__ if inspect.isfunction(cell.step) else None
    trace_back = error.__traceback__
    while trace_back is not None:
        if trace_back.tb_frame.f_code is code:
            return f" ({trace_back.tb_frame.f_code.co_filename}, line {trace_back.tb_lineno})"
        trace_back = trace_back.tb_next
    return ""


# Operations of the table that aten spells under other names too.
_SYNONYMS = {
    "bitwise_and": "logical_and",
    "bitwise_or": "logical_or",
    "bitwise_not": "logical_not",
    "sgn": "sign",
}
# Operations that hand their first argument on.
_IDENTITIES = {"alias", "detach", "clone", "lift_fresh_copy"}
# Uninitialized tensors: decompositions take nothing from them but their shape.
_EMPTY = {"empty", "empty_like", "empty_permuted"}
_CONSTANTS = {"full", "full_like", "scalar_tensor", "zeros_like", "ones_like"}


class _Lowering:
    """Turns a traced FX graph into a :class:`Graph` over the table's operations."""

    def __init__(self, cell: Cell, module: fx.GraphModule, names: Sequence[str]) -> None:
        self.cell = cell
        self.module = module
        self.names = tuple(names)
        self.values: dict[fx.Node, Argument] = {}
        self.body: dict[tuple[Any, ...], Assignment] = {}

    def graph(self) -> Graph:
        names = iter(self.names)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(names)
            elif node.op == "get_attr":
                self.values[node] = self._captured(node)
            elif node.op == "call_function":
                self.values[node] = self._lower(node)
            elif node.op == "output":
                outputs = tuple(self._value(argument) for argument in node.args[0])
        return Graph(self.names, self._needed(outputs), outputs)

    def _needed(self, outputs: tuple[Argument, ...]) -> tuple[Assignment, ...]:
        """The body without what no output depends on."""
        wanted = {name for name in outputs if isinstance(name, str)}
        kept: list[Assignment] = []
        for assignment in reversed(self.body.values()):
            if assignment.name in wanted:
                kept.append(assignment)
                wanted.update(a for a in assignment.arguments if isinstance(a, str))
        return tuple(reversed(kept))

    def _emit(self, operation: str, *arguments: Argument) -> str:
        """The name of an operation's result: the first one where it is a common subexpression."""
        # repr tells 0.0 from -0.0 and True from 1.0.
        key = (operation, *map(repr, arguments))
        assignment = Assignment(f"v{len(self.body)}", operation, arguments)
        return self.body.setdefault(key, assignment).name

    def _value(self, argument: Any) -> Argument:
        if isinstance(argument, fx.Node):
            return self.values[argument]
        if isinstance(argument, bool):
            return argument
        if isinstance(argument, (int, float)):
            return float(argument)
        raise CellError(
            f"cell {self.cell.name!r} passes {argument!r} to an operation; "
            "accepted are tensors and Python numbers"
        )

    def _captured(self, node: fx.Node) -> Argument:
        tensor = operator.attrgetter(str(node.target))(self.module)
        if tensor.ndim == 0:
            return bool(tensor) if tensor.dtype == torch.bool else float(tensor)
        raise CellError(
            f"cell {self.cell.name!r} captures a tensor of shape {tuple(tensor.shape)}; a cell "
            "sees its states and gates alone. Feed it through a gate (Wx or b) or a state"
        )

    def _lower(self, node: fx.Node) -> Argument:
        overload = node.target
        if not isinstance(overload, torch._ops.OpOverload):
            raise CellError(
                f"cell {self.cell.name!r} uses {overload}, which is not an aten operation"
            )
        name = overload.overloadpacket.__name__
        name = _SYNONYMS.get(name, name)
        arguments, keywords = node.args, node.kwargs

        if name in _IDENTITIES:
            return self._value(arguments[0])
        if name in _EMPTY:
            return math.nan
        if name in _CONSTANTS:
            return self._constant(name, arguments)
        if name == "_to_copy":
            return self._convert(node)
        if name in ("clamp", "clamp_min", "clamp_max"):
            return self._clamp(node)
        if name == "pow":
            return self._power(arguments)
        if name == "rsub":
            name, arguments = "sub", (arguments[1], arguments[0], *arguments[2:])
        if name == "reciprocal":
            return self._emit("div", 1.0, self._value(arguments[0]))
        if name == "rsqrt":
            return self._emit("div", 1.0, self._emit("sqrt", self._value(arguments[0])))
        if name == "relu":
            return self._emit("maximum", self._value(arguments[0]), 0.0)

        if name not in OPERATIONS or any(key != "alpha" for key in keywords):
            raise CellError(self._refusal(overload))
        values = [self._value(argument) for argument in arguments]
        if keywords.get("alpha", 1) != 1:
            values[1] = self._emit("mul", values[1], self._value(keywords["alpha"]))
        return self._emit(name, *values)

    def _constant(self, name: str, arguments: tuple[Any, ...]) -> Argument:
        if name in ("zeros_like", "ones_like"):
            return float(name == "ones_like")
        if name == "full" and tuple(arguments[0]) not in ((), _TRACED_SHAPE):
            raise CellError(
                f"cell {self.cell.name!r} makes a tensor of shape {tuple(arguments[0])}; "
                "write a Python number, or torch.full_like(h, number)"
            )
        return self._value(arguments[0] if name == "scalar_tensor" else arguments[1])

    def _convert(self, node: fx.Node) -> Argument:
        source, target = node.args[0].meta["val"].dtype, node.kwargs.get("dtype")  # type: ignore[union-attr]
        value = self._value(node.args[0])
        if target in (None, source):
            return value
        if source == torch.bool and target == _TRACED_DTYPE:
            return self._emit("where", value, 1.0, 0.0)
        if target == torch.bool:
            return self._emit("ne", value, 0.0)
        raise CellError(
            f"cell {self.cell.name!r} converts {source} to {target}; "
            "a cell computes in the dtype that it is given (x.to(h.dtype) of a condition is fine)"
        )

    def _clamp(self, node: fx.Node) -> Argument:
        name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
        low = node.kwargs.get("min")
        high = node.kwargs.get("max")
        given = list(node.args[1:])
        if name == "clamp_max":
            given.insert(0, None)
        if given and given[0] is not None:
            low = given[0]
        if len(given) > 1 and given[1] is not None:
            high = given[1]
        value = self._value(node.args[0])
        if low is not None:
            value = self._emit("maximum", value, self._value(low))
        if high is not None:
            value = self._emit("minimum", value, self._value(high))
        return value

    def _power(self, arguments: tuple[Any, ...]) -> Argument:
        base, exponent = arguments
        if exponent == 0.5:
            return self._emit("sqrt", self._value(base))
        if not isinstance(exponent, (int, float)) or exponent not in range(-8, 9):
            raise CellError(
                f"cell {self.cell.name!r} takes the power {exponent}; "
                "accepted are 0.5 and whole numbers from -8 to 8"
            )
        value: Argument = 1.0
        for _ in range(abs(int(exponent))):
            value = (
                self._value(base) if value == 1.0 else self._emit("mul", value, self._value(base))
            )
        return self._emit("div", 1.0, value) if exponent < 0 else value

    def _refusal(self, overload: torch._ops.OpOverload) -> str:
        supported = ", ".join(OPERATIONS)
        name = f"cell {self.cell.name!r} uses {overload}"
        if torch.Tag.nondeterministic_seeded in overload.tags:
            return f"{name}, which draws random numbers; feed them through a gate (Wx)"
        if overload._schema.is_mutable:
            return f"{name}, which changes a tensor in place; write h = h * x, not h.mul_(x)"
        if torch.Tag.pointwise in overload.tags:
            return f"{name}, which the table of operations lacks. Supported: {supported}"
        return (
            f"{name}, which is not pointwise: a cell computes every unit from the states and "
            f"gates of that unit alone (R mixes units). Supported: {supported}"
        )
