"""From a cell's step function to the graphs of the step and of its derivative.

The step is called once, on tensors without data, and so is autograd's derivative of it. Every
operation that PyTorch arrives at is written down as it is called, in the few operations of the
table, on scalars: composite operations are taken apart, what is computed twice gets one name, and
what no output depends on is dropped.

``make_fx`` records too, but importing it takes many times as long as all the rest of a first call.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from flashrnn.cells.graph import Argument, Assignment, Graph
from flashrnn.cells.operations import OPERATIONS
from flashrnn.cells.spec import Cell, CellError

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
    # In a thread of its own, for none of the caller's modes is on there: no_grad, autocast, a
    # default device, fake tensors, a functorch transform.
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(_trace, cell).result()


def _trace(cell: Cell) -> CellGraphs:
    states = [f"state_{name}" for name in cell.states]
    gates = [f"gate_{gate.name}" for gate in cell.gates]
    gradients = [f"d_{name}" for name in states]
    inputs = [_Traced(name).requires_grad_() for name in states + gates]
    cotangents = [_Traced(name) for name in gradients]
    recorder = _Recorder(cell)
    try:
        with recorder:
            # Copies, for autograd has its own words against a change of the leaves in place.
            copies = [x.clone() for x in inputs]
            outputs = _checked_step(cell, copies[: len(states)], copies[len(states) :])
            if recorder.refusal:
                raise recorder.refusal
            recorder.judging = False
            derivative = _pull_back(outputs, inputs, cotangents)
    except RuntimeError as error:
        raise CellError(f"cell {cell.name!r} failed while it was traced: {error}") from error
    return CellGraphs(
        forward=recorder.graph(states + gates, outputs),
        derivative=recorder.graph(states + gates + gradients, derivative),
    )


def _pull_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """What autograd makes of gradients of the outputs: gradients of the inputs."""
    if not any(y.requires_grad for y in outputs):
        return tuple(map(torch.zeros_like, inputs))
    number = _WithGradients.apply(cotangents, *outputs)
    return torch.autograd.grad(number, inputs, allow_unused=True, materialize_grads=True)


class _WithGradients(torch.autograd.Function):
    """A number with these gradients: given an output's, ``torch.autograd.grad`` imports SymPy."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


def _checked_step(
    cell: Cell, states: Sequence[Tensor], gates: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    given = cell.step(tuple(states), tuple(gates))
    expected = f"{len(cell.states)} new states ({', '.join(cell.states)})"
    if not isinstance(given, (tuple, list)):
        kind = "Tensor" if isinstance(given, Tensor) else type(given).__name__
        raise CellError(
            f"cell {cell.name!r} returned {kind}; "
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


class _Traced(Tensor):
    """A tensor of which nothing is known but its shape, its dtype and its name in the graph."""

    argument: Argument

    # Functions of PyTorch give tensors of this class only where the recorder does.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        argument: Argument,
        shape: Sequence[int] = _TRACED_SHAPE,
        dtype: torch.dtype = _TRACED_DTYPE,
    ) -> _Traced:
        traced = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        traced.argument = argument
        return traced

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, *_: Any) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} of a tensor that was kept after its cell was traced")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<traced {self.argument}>"


# Operations of the table that aten spells under other names too.
_SYNONYMS = {
    "bitwise_and": "logical_and",
    "bitwise_or": "logical_or",
    "bitwise_not": "logical_not",
    "sgn": "sign",
}
# Operations that hand their first argument on.
_IDENTITIES = {"alias", "detach", "clone"}
# Operations that fill a tensor with one number: which, or None where it is their last argument.
# From uninitialized tensors, decompositions take nothing but their shape.
_FILLS = {
    **dict.fromkeys(["zeros", "zeros_like", "new_zeros", "_efficientzerotensor"], 0.0),
    **dict.fromkeys(["ones", "ones_like", "new_ones"], 1.0),
    **dict.fromkeys(["empty", "empty_like", "new_empty", "empty_permuted"], math.nan),
    **dict.fromkeys(["full", "full_like", "new_full", "scalar_tensor"], None),
}


class _Recorder(TorchDispatchMode):
    """Writes down what is computed of traced tensors, over the table's operations."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell
        self.body: dict[tuple[Any, ...], Assignment] = {}
        # Whether the step itself calls, and not a formula of PyTorch's, which may work in place.
        self.judging = True
        # The first operation of the step that a cell may not have.
        self.refusal: CellError | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Skipping it would import it.

    def graph(self, names: Sequence[str], outputs: Sequence[Tensor]) -> Graph:
        """The graph from the inputs of these names to outputs."""
        values = tuple(map(self._value, outputs))
        return Graph(tuple(names), self._needed(values), values)

    def _needed(self, outputs: tuple[Argument, ...]) -> tuple[Assignment, ...]:
        """The body without what no output depends on."""
        wanted = {name for name in outputs if isinstance(name, str)}
        kept: list[Assignment] = []
        for assignment in reversed(self.body.values()):
            if assignment.name in wanted:
                kept.append(assignment)
                wanted.update(a for a in assignment.arguments if isinstance(a, str))
        return tuple(reversed(kept))

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _Traced in types and torch.Tag.data_dependent_output in func.tags:
            raise CellError(
                f"cell {self.cell.name!r} looks at a tensor's values in Python"
                f"{_where(self.cell)}: an if, a bool(), .item() or .tolist() that depends on data. "
                "Choose between tensors with torch.where(condition, a, b) instead"
            )
        try:
            return self._record(func, types, args, kwargs)
        except CellError as refusal:
            if not self.judging:
                raise
            # The step goes on, for what it does next may be what is wrong with it.
            self.refusal = self.refusal or refusal

            def unknown(tensor: Tensor) -> Tensor:
                return _Traced(math.nan, tensor.shape, tensor.dtype)

            return tree_map_only(Tensor, unknown, _sample(func, args, kwargs))

    def _record(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = _name(func)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self._refused(func)
        if func._schema.is_mutable:
            return self._rename(func, args, kwargs)
        if _Traced not in types and name not in _FILLS:
            return func(*args, **kwargs)  # Of constants alone: another constant.
        value = self._lower(name, args, kwargs)
        if value is None:
            return self._take_apart(func, args, kwargs)
        result = _sample(func, args, kwargs)
        if tuple(result.shape) not in ((), _TRACED_SHAPE):
            raise CellError(
                f"cell {self.cell.name!r} makes a tensor of shape {tuple(result.shape)}; "
                "write a Python number, or torch.full_like(h, number)"
            )
        return _Traced(value, result.shape, result.dtype)

    def _rename(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation in place, by the one that is not: the tensor then means its result."""
        name = func.overloadpacket.__name__.removesuffix("_")
        if self.judging or not isinstance(args[0], _Traced):
            raise self._refused(func)
        functional = getattr(getattr(torch.ops.aten, name), func._overloadname)
        with self:
            args[0].argument = self._value(functional(*args, **kwargs))
        return args[0]

    def _take_apart(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation that the table lacks, by way of those that it has."""
        judging, self.judging = self.judging, False
        try:
            with self:
                # PyTorch's formula itself, without the casts around it: all is float64 already.
                formula = get_decompositions([func]).get(func, func.decompose)
                result = inspect.unwrap(formula)(*args, **kwargs)
        except CellError as error:
            raise self._refused(func) from error
        finally:
            self.judging = judging
        if result is NotImplemented:
            raise self._refused(func)
        return result

    def _emit(self, operation: str, *arguments: Argument) -> str:
        """The name of an operation's result: the first one where it is a common subexpression."""
        # repr tells 0.0 from -0.0 and True from 1.0.
        key = (operation, *map(repr, arguments))
        assignment = Assignment(f"v{len(self.body)}", operation, arguments)
        return self.body.setdefault(key, assignment).name

    def _value(self, argument: Any) -> Argument:
        if isinstance(argument, _Traced):
            return argument.argument
        if isinstance(argument, Tensor):
            if argument.ndim > 0:
                raise CellError(
                    f"cell {self.cell.name!r} captures a tensor of shape {tuple(argument.shape)}; "
                    "a cell sees its states and gates alone. Feed it through a gate (Wx or b) or "
                    "a state"
                )
            argument = argument.detach().item()
        if isinstance(argument, bool):
            return argument
        if isinstance(argument, (int, float)):
            return float(argument)
        raise CellError(
            f"cell {self.cell.name!r} passes {argument!r} to an operation; "
            "accepted are tensors and Python numbers"
        )

    def _lower(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Argument | None:
        """The value of an operation of the table, or near to one; ``None`` for any other."""
        if name in _IDENTITIES:
            return self._value(args[0])
        if name in _FILLS:
            fill = _FILLS[name]
            return self._value(args[-1] if fill is None else fill)
        if name == "_to_copy":
            return self._convert(args[0], kwargs.get("dtype"))
        if name in ("clamp", "clamp_min"):
            return self._clamp(*args, **kwargs)
        if name == "clamp_max":
            return self._clamp(args[0], max=args[1])
        if name == "pow":
            return self._power(*args)
        if name == "rsub":
            name, args = "sub", (args[1], args[0], *args[2:])
        if name == "reciprocal":
            return self._emit("div", 1.0, self._value(args[0]))
        if name == "rsqrt":
            return self._emit("div", 1.0, self._emit("sqrt", self._value(args[0])))
        if name == "relu":
            return self._emit("maximum", self._value(args[0]), 0.0)

        if name not in OPERATIONS or any(key != "alpha" for key in kwargs):
            return None
        values = [self._value(argument) for argument in args]
        if kwargs.get("alpha", 1) != 1:
            values[1] = self._emit("mul", values[1], self._value(kwargs["alpha"]))
        return self._emit(name, *values)

    def _convert(self, tensor: Tensor, target: torch.dtype | None) -> Argument:
        source, value = tensor.dtype, self._value(tensor)
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

    def _clamp(self, tensor: Tensor, min: Any = None, max: Any = None) -> Argument:
        value = self._value(tensor)
        if min is not None:
            value = self._emit("maximum", value, self._value(min))
        if max is not None:
            value = self._emit("minimum", value, self._value(max))
        return value

    def _power(self, base: Any, exponent: Any) -> Argument:
        if not isinstance(exponent, (int, float)) or exponent not in (0.5, *range(-8, 9)):
            raise CellError(
                f"cell {self.cell.name!r} takes the power {exponent}; "
                "accepted are 0.5 and whole numbers from -8 to 8"
            )
        if exponent == 0.5:
            return self._emit("sqrt", self._value(base))
        value: Argument = 1.0
        for _ in range(abs(int(exponent))):
            value = (
                self._value(base) if value == 1.0 else self._emit("mul", value, self._value(base))
            )
        return self._emit("div", 1.0, value) if exponent < 0 else value

    def _refused(self, func: OpOverload) -> CellError:
        supported = ", ".join(OPERATIONS)
        name = f"cell {self.cell.name!r} uses {func}"
        if torch.Tag.nondeterministic_seeded in func.tags:
            return CellError(f"{name}, which draws random numbers; feed them through a gate (Wx)")
        if func._schema.is_mutable:
            return CellError(
                f"{name}, which changes a tensor in place; write h = h * x, not h.mul_(x)"
            )
        if torch.Tag.pointwise in func.tags:
            return CellError(f"{name}, which the table of operations lacks. Supported: {supported}")
        return CellError(
            f"{name}, which is not pointwise: a cell computes every unit from the states and "
            f"gates of that unit alone (R mixes units). Supported: {supported}"
        )


def _name(func: OpOverload) -> str:
    """An operation's name in the table, or as it is."""
    name = func.overloadpacket.__name__ if func.namespace == "aten" else str(func)
    return _SYNONYMS.get(name, name)


def _sample(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What comes out of ones: tensors of the shape and the dtype of the result."""

    def ones(tensor: Tensor) -> Tensor:
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    args, kwargs = tree_map_only(Tensor, ones, (args, kwargs))
    return func(*args, **kwargs)


def _where(cell: Cell) -> str:
    """`` (file, line n)`` of the step function's line that runs, or nothing."""
    code = inspect.unwrap(cell.step).__code__ if inspect.isfunction(cell.step) else None
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is code:
            return f" ({code.co_filename}, line {frame.f_lineno})"
        frame = frame.f_back
    return ""
