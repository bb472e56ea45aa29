"""From a cell's step function to the graphs of the step and of its derivative.

The step is called once, on tensors without data, and so is autograd's derivative of it. Every
operation that PyTorch dispatches is recorded as scalar operations of the table: composite
operations are decomposed, common subexpressions get one name, and what no output depends on is
dropped.

``make_fx`` records too, but importing it takes many times as long as all the rest of a first call.
"""

from __future__ import annotations

import ctypes
import inspect
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from flashrnn.cells.formulas import FORMULAS
from flashrnn.cells.graph import Argument, Graph, GraphBuilder
from flashrnn.cells.operations import OPERATIONS
from flashrnn.cells.spec import Cell, CellError
from flashrnn.cells.traced import CellGraphs

# Two dimensions, so that a reduction, a transpose or a new axis shows in the shape. Constants keep
# their digits in float64, and nothing depends on a lower precision's limits.
_TRACED_AS = ((2, 3), torch.float64)
# What the graphs are held against: the other dtype that a cell computes in, another shape.
_TRACED_AGAIN_AS = ((4, 2), torch.float32)


def trace(cell: Cell, checked: bool = True) -> CellGraphs:
    """Trace a cell's step function and its derivative.

    Args:
        cell: the cell.
        checked: trace twice, as another dtype and shape, and refuse a cell whose graphs differ.

    Raises:
        CellError: an operation that is not pointwise, that changes a tensor in place, or that
            the table lacks; a look at a tensor's values, shape, device or whatever else differs
            from call to call; a captured tensor; new states of the wrong number, shape or dtype;
            a function that is another one in float32, or when it is called again.
    """
    # In a thread of its own, for none of the caller's modes is on there: no_grad, autocast, a
    # default device, fake tensors, a functorch transform.
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(_trace_checked if checked else _trace, cell).result()


def _trace_checked(cell: Cell) -> CellGraphs:
    found = _trace(cell)
    again = _trace(cell, *_TRACED_AGAIN_AS)
    for graph, other in ((found.forward, again.forward), (found.derivative, again.derivative)):
        if _in_float32(graph) != _in_float32(other):
            raise CellError(
                f"cell {cell.name!r} is one function in float64 and another in float32, or at its "
                "next call: it depends on a dtype (g.dtype, torch.finfo), on time or on chance. "
                "Write numbers that hold for both, and feed what changes through a gate (Wx)"
            )
    return found


def _in_float32(graph: Graph) -> list[Any]:
    """What a graph says, its constants rounded; the numbers of names have no gaps."""
    numbers = {x.name: number for number, x in enumerate(graph.body)}

    def rounded(argument: Argument) -> str:
        if isinstance(argument, str):
            return repr(numbers.get(argument, argument))
        if isinstance(argument, bool):
            return repr(argument)
        return repr(ctypes.c_float(argument).value)

    body = [(x.operation, *map(rounded, x.arguments)) for x in graph.body]
    return [*body, *map(rounded, graph.outputs)]


def _trace(
    cell: Cell,
    shape: tuple[int, ...] = _TRACED_AS[0],
    dtype: torch.dtype = _TRACED_AS[1],
) -> CellGraphs:
    states = [f"state_{name}" for name in cell.states]
    gates = [f"gate_{gate.name}" for gate in cell.gates]
    gradients = [f"d_{name}" for name in states]
    inputs = [_Traced(name, shape, dtype).requires_grad_() for name in states + gates]
    cotangents = [_Traced(name, shape, dtype) for name in gradients]
    recorder = _Recorder(cell, shape, dtype)
    try:
        with recorder:
            # Copies, for autograd has its own words against a change of the leaves in place.
            copies = [x.clone() for x in inputs]
            with _Watch(cell):
                given = cell.step(tuple(copies[: len(states)]), tuple(copies[len(states) :]))
            outputs = _checked(cell, given, shape, dtype)
            if recorder.refusal:
                raise recorder.refusal
            recorder.judging = False
            derivative = _pull_back(outputs, inputs, cotangents)
    except CellError as error:
        if recorder.refusal in (None, error):
            raise
        raise CellError(f"{error}. Before that, {recorder.refusal}") from error
    except RuntimeError as error:
        words = f"cell {cell.name!r} failed while it was traced: {error}"
        if "derivative for" in str(error):
            words += ", not by PyTorch either. Hand it x.detach(): no gradient flows through it"
        if recorder.refusal:
            words += f". Before that, {recorder.refusal}"
        raise CellError(words) from error
    return CellGraphs(
        forward=recorder.graph(states + gates, outputs),
        derivative=recorder.graph(states + gates + gradients, derivative),
    )


def _pull_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of the inputs from gradients of the outputs, by autograd."""
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


def _checked(
    cell: Cell, given: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, ...]:
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
        if state.shape != torch.Size(shape) or state.dtype != dtype:
            raise CellError(
                f"cell {cell.name!r} turns states and gates of shape {shape} and dtype "
                f"{dtype} into a state {name!r} of shape {tuple(state.shape)} and dtype "
                f"{state.dtype}; a cell keeps both: use pointwise operations alone"
            )
    return tuple(given)


class _Traced(Tensor):
    """A tensor without data: it has a shape, a dtype and a name in the graph."""

    argument: Argument

    # PyTorch's functions return tensors of this class only if the recorder does.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, argument: Argument, shape: Sequence[int], dtype: torch.dtype) -> _Traced:
        traced = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        traced.argument = argument
        return traced

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise RuntimeError(f"{func} of a tensor that was kept after its cell was traced")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<traced {self.argument}>"


# What a cell may ask of a tensor: it is the same in every call. dtype is not, but a cell that
# depends on it shows when it is traced again.
_ALWAYS_ALIKE = {"dtype", "layout", "is_floating_point", "is_complex", "__hash__"}
_ALWAYS_ALIKE |= {"__repr__", "__str__", "__format__"}


class _Watch(TorchFunctionMode):
    """Refuses what would make a cell differ from call to call: captured tensors, and reads of
    properties of tensors.

    Shapes and devices may be passed on (``torch.zeros(h.shape, device=h.device)``), not inspected.
    """

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell
        # Tensors that the step made, by id; kept alive, so that no other object gets the same id.
        self.own: dict[int, Tensor] = {}

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for tensor in tensors:
            if not isinstance(tensor, _Traced) and id(tensor) not in self.own:
                raise captured(self.cell, tensor)
        is_read = func.__name__ == "__get__"
        name = func.__self__.__name__ if is_read else func.__name__
        if name == "shape" or (func is Tensor.size and len(args) + len(kwargs) == 1):
            return _Shape.of(self.cell, args[0])
        if is_read and name == "device":
            return _Device.of(self.cell)
        if func is torch.device and isinstance(args[0], _Device):
            raise _looked_at(self.cell, "device")
        args, kwargs = tree_map_only(_Device, lambda _: "cpu", (args, kwargs))
        result = func(*args, **kwargs)
        found = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        is_a_look = not found and any(isinstance(x, _Traced) for x in tensors)
        if is_a_look and name not in _ALWAYS_ALIKE:
            raise _looked_at(self.cell, name)
        self.own.update((id(x), x) for x in found if not isinstance(x, _Traced))
        return result


def captured(cell: Cell, tensor: Tensor) -> CellError:
    """The refusal of a tensor that is neither a state nor a gate."""
    return CellError(
        f"cell {cell.name!r} captures a tensor of shape {tuple(tensor.shape)}{_where(cell)}; a "
        "cell sees its states and gates alone, so it would get no gradient. What is learned or "
        'changes comes through a gate: gates={..., "a": ("b",)} gives the step a gate `a` that '
        "b alone feeds, a number for each unit (peepholes; a single number by expand), and "
        '("Wx",) one for each step. A constant is a Python number'
    )


def _looked_at(cell: Cell, name: str) -> CellError:
    return CellError(
        f"cell {cell.name!r} looks at a tensor's {name}{_where(cell)}, which differs from call to "
        "call: a cell is one pointwise function for every size, dtype and device. Use Python "
        "numbers, and torch.zeros_like(h) or torch.full_like(h, number) for tensors"
    )


class _Shape(tuple[int, ...]):
    """A shape that PyTorch's functions accept and that a step cannot inspect."""

    cell: Cell

    @classmethod
    def of(cls, cell: Cell, tensor: Tensor) -> _Shape:
        shape = cls(tensor.shape)
        shape.cell = cell
        return shape

    def _refuse(self, *_: Any) -> NoReturn:
        raise _looked_at(self.cell, "shape")

    __getitem__ = __iter__ = __len__ = __contains__ = __hash__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __mul__ = __rmul__ = numel = count = index = _refuse


class _Device(str):
    """A device that PyTorch's functions accept and that a step cannot inspect."""

    cell: Cell

    @classmethod
    def of(cls, cell: Cell) -> _Device:
        device = cls("the device of a cell's tensors")
        device.cell = cell
        return device

    def _refuse(self, *_: Any) -> NoReturn:
        raise _looked_at(self.cell, "device")

    __eq__ = __ne__ = __hash__ = __contains__ = _refuse
    startswith = split = _refuse  # type: ignore[assignment]
    type = index = property(_refuse)


# Names in the table of operations whose arguments are all truth values.
_OF_TRUTHS = {
    **dict.fromkeys(["bitwise_and", "mul", "minimum"], "logical_and"),
    **dict.fromkeys(["bitwise_or", "add", "maximum"], "logical_or"),
    **dict.fromkeys(["bitwise_xor", "logical_xor"], "ne"),
    "bitwise_not": "logical_not",
}
# Operations that hand their first argument on; the shape of the result is looked at.
_IDENTITIES = {"alias", "detach", "clone", "view", "expand"}
# Operations that fill a tensor with one number, which a dtype may round. Zeros of autograd have no
# memory that could be read.
_ZEROS = {"zeros", "zeros_like", "new_zeros", "_efficientzerotensor"}
_FILLS = {"ones", "ones_like", "new_ones", "full", "full_like", "new_full", "scalar_tensor"}
# From uninitialized tensors, decompositions take nothing but their shape.
_UNINITIALIZED = {"empty", "empty_like", "new_empty", "empty_permuted"}


class _Recorder(TorchDispatchMode):
    """Writes down what is computed of traced tensors, over the table's operations."""

    def __init__(self, cell: Cell, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.cell, self.shape, self.dtype = cell, shape, dtype
        self.builder = GraphBuilder()
        # Whether calls come from the step itself. A formula of PyTorch's may work in place.
        self.judging = True
        # The first operation of the step that a cell may not have.
        self.refusal: CellError | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Skipping it would import it.

    def graph(self, names: Sequence[str], outputs: Sequence[Tensor]) -> Graph:
        """The graph from the inputs of these names to outputs."""
        return self.builder.graph(names, tuple(map(self._value, outputs)))

    def __torch_dispatch__(
        self,
        func: Any,
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
            # The step goes on: a later operation may show the actual mistake.
            self.refusal = self.refusal or refusal

            def unknown(tensor: Tensor) -> Tensor:
                return _Traced(math.nan, tensor.shape, tensor.dtype)

            return tree_map_only(Tensor, unknown, _sample(func, args, kwargs))

    def _record(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = _name(func)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self._refused(func)
        if func._schema.is_mutable:
            return self._rename(func, args, kwargs)
        if _Traced not in types and name not in _ZEROS | _FILLS | _UNINITIALIZED:
            return func(*args, **kwargs)  # All arguments are constants, so the result is one.
        value = 0.0 if name in _ZEROS | _FILLS else self._lower(name, args, kwargs)
        if value is None:
            return self._take_apart(func, args, kwargs)
        result = _sample(func, args, kwargs)
        if name == "div" and not result.is_floating_point():
            raise self._refused(func)  # It rounds the quotient; the table's div does not.
        if tuple(result.shape) not in ((), self.shape):
            raise CellError(
                f"cell {self.cell.name!r} makes a tensor of shape {tuple(result.shape)}; "
                "write a Python number, or torch.full_like(h, number)"
            )
        if name in _FILLS:
            value = self._value(result.flatten()[0])
        return _Traced(value, result.shape, result.dtype)

    def _rename(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An in-place operation as its out-of-place form; the tensor then means the result."""
        name = func.overloadpacket.__name__.removesuffix("_")
        if self.judging or not isinstance(args[0], _Traced):
            raise self._refused(func)
        overload = func.__name__.rpartition(".")[2]
        functional = getattr(getattr(torch.ops.aten, name), overload)
        with self:
            args[0].argument = self._value(functional(*args, **kwargs))
        return args[0]

    def _take_apart(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation that the table lacks, computed by operations that it has."""
        judging, self.judging = self.judging, False
        try:
            with self:
                # PyTorch's formula itself, without the casts around it: all is float64 already.
                formula = FORMULAS.get(_name(func)) or get_decompositions([func]).get(
                    func, func.decompose
                )
                result = inspect.unwrap(formula)(*args, **kwargs)
        except CellError as error:
            raise self._refused(func) from error
        finally:
            self.judging = judging
        if result is NotImplemented:
            raise self._refused(func)
        return result

    def _value(self, argument: Any) -> Argument:
        if isinstance(argument, _Traced):
            return argument.argument
        if isinstance(argument, Tensor):
            if argument.ndim > 0:
                raise CellError(
                    f"cell {self.cell.name!r} makes a tensor of shape {tuple(argument.shape)}; "
                    "write a Python number, or torch.full_like(h, number)"
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
        if name in _UNINITIALIZED:
            return math.nan
        if name == "_to_copy":
            return self._convert(args[0], kwargs.get("dtype"))
        if name in ("clamp", "clamp_min"):
            return self._clamp(*args, **kwargs)
        if name == "clamp_max":
            return self._clamp(args[0], max=args[1])
        if name == "pow":
            return self._power(*map(self._value, args))
        if name == "rsub":
            name, args = "sub", (args[1], args[0], *args[2:])
        if name == "reciprocal":
            return self.builder.emit("div", 1.0, self._value(args[0]))
        if name == "rsqrt":
            return self.builder.emit("div", 1.0, self.builder.emit("sqrt", self._value(args[0])))
        if name == "relu":
            return self.builder.emit("maximum", self._value(args[0]), 0.0)

        if all(map(_is_truth, args)):
            name = _OF_TRUTHS.get(name, name)
        if name not in OPERATIONS or any(key != "alpha" for key in kwargs):
            return None
        values = [self._value(argument) for argument in args]
        if name in ("logical_and", "logical_or"):
            # Of numbers, PyTorch asks whether they are 0.
            values = [
                value if _is_truth(argument) else self.builder.emit("ne", value, 0.0)
                for value, argument in zip(values, args, strict=True)
            ]
        if kwargs.get("alpha", 1) != 1:
            values[1] = self.builder.emit("mul", values[1], self._value(kwargs["alpha"]))
        return self.builder.emit(name, *values)

    def _convert(self, tensor: Tensor, target: torch.dtype | None) -> Argument:
        source, value = tensor.dtype, self._value(tensor)
        if target in (None, source):
            return value
        if source == torch.bool and target in (torch.float32, torch.float64):
            return self.builder.emit("where", value, 1.0, 0.0)
        if target == self.dtype:
            return value  # Only what was chosen by a truth value is of another dtype.
        if target == torch.bool:
            return self.builder.emit("ne", value, 0.0)
        raise CellError(
            f"cell {self.cell.name!r} converts {source} to {target}; "
            "a cell computes in the dtype that it is given. Of a condition, x.to(h.dtype) is fine; "
            "torch.floor, torch.trunc and torch.round give whole numbers in that dtype"
        )

    def _clamp(self, tensor: Tensor, min: Any = None, max: Any = None) -> Argument:
        value = self._value(tensor)
        if min is not None:
            value = self.builder.emit("maximum", value, self._value(min))
        if max is not None:
            value = self.builder.emit("minimum", value, self._value(max))
        return value

    def _power(self, base: Argument, exponent: Argument) -> Argument:
        # Products are faster; those with a root are NaN of -inf, where a power may be another.
        if isinstance(exponent, str) or 2 * exponent not in range(-18, 19):
            return self.builder.emit("pow", base, exponent)
        factors = [base] * abs(int(exponent))
        if exponent % 1:
            factors.append(self.builder.emit("sqrt", base))
        value: Argument = 1.0
        for factor in factors:
            value = factor if value == 1.0 else self.builder.emit("mul", value, factor)
        return self.builder.emit("div", 1.0, value) if exponent < 0 else value

    def _refused(self, func: Any) -> CellError:
        supported = f"{', '.join(OPERATIONS)}, and what consists of these (round, tan, gelu, ...)"
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


def _name(func: Any) -> str:
    """An operation's name in the table, or as it is."""
    name = func.overloadpacket.__name__ if func.namespace in ("aten", "prims") else str(func)
    return "sign" if name == "sgn" else name


def _is_truth(argument: Any) -> bool:
    return isinstance(argument, bool) or (
        isinstance(argument, Tensor) and argument.dtype == torch.bool
    )


def _sample(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result for inputs of ones, which has the result's shape and dtype."""

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
