"""The Python values that a step function captures, compared at each call.

A traced cell contains such values as constants, so a changed value means another cell. The captured
values are found in the step's bytecode: each chain of names, attributes and constant subscripts
that begins at a global, a closure's variable, a default value or a method's ``self``. The object at
the end of a chain is compared by identity if it cannot change in place, else by its content.
"""

from __future__ import annotations

import dis
import enum
import functools
import sys
import types
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any

import torch

from flashrnn.cells.spec import CellError

# A larger object takes too long to compare at each call.
_MOST_PARTS = 1000
_UNCHANGING = (
    *(int, float, complex, bool, str, bytes, type(None), type(Ellipsis), enum.Enum),
    *(type, torch.dtype, torch.device, types.BuiltinFunctionType, types.FunctionType),
)
# Modules whose functions are not searched: what those read does not change between calls.
_TRUSTED = {"torch", "numpy", "builtins", "flashrnn", *sys.stdlib_module_names} - {"test"}


def _is_unchanging(value: Any) -> bool:
    """Whether an object cannot change in place, so that its identity tells its value."""
    numpy = sys.modules.get("numpy")
    is_number_of_numpy = numpy is not None and isinstance(value, numpy.generic)
    return is_number_of_numpy or isinstance(value, _UNCHANGING)


class _TooLargeError(Exception):
    pass


def _content(value: Any) -> Any:
    """A value's content as nested tuples, which are equal only if the contents are."""
    if isinstance(value, (float, complex)):
        return type(value), repr(value)  # Tells 0.0 from -0.0; NaN equals NaN.
    room = [_MOST_PARTS]
    inside: set[int] = set()

    def of(x: Any) -> Any:
        room[0] -= 1
        if room[0] < 0:
            raise _TooLargeError
        if isinstance(x, (float, complex)):
            return type(x), repr(x)
        if isinstance(x, _UNCHANGING):
            return type(x), x  # True is no 1.
        if isinstance(x, (torch.Tensor, types.ModuleType)):
            return type(x), id(x)
        if id(x) in inside:
            return "itself"
        inside.add(id(x))
        try:
            return type(x), parts(x)
        finally:
            inside.remove(id(x))

    def parts(x: Any) -> Any:
        if isinstance(x, dict):
            return tuple((of(k), of(v)) for k, v in x.items())
        if isinstance(x, (list, tuple)):
            return tuple(map(of, x))
        if isinstance(x, (set, frozenset)):
            return frozenset(map(of, x))
        if hasattr(x, "tobytes") and hasattr(x, "shape"):  # NumPy's arrays and scalars
            if x.nbytes > 8 * _MOST_PARTS:
                raise _TooLargeError
            return x.shape, str(x.dtype), x.tobytes()
        slots = [name for kind in type(x).__mro__ for name in getattr(kind, "__slots__", ())]
        held = {name: getattr(x, name) for name in slots if hasattr(x, name)}
        return tuple((name, of(v)) for name, v in (held | getattr(x, "__dict__", {})).items())

    return of(value)


class Captures:
    """What a step function captured when it was traced."""

    def __init__(self, reads: dict[str, Any], names: dict[str, Any]) -> None:
        """``reads`` has expressions over ``names`` and the values that they had."""
        parts = [part for read in reads.items() for part in _parts(*read)]
        self._read: Callable[[], tuple[Any, ...]] = eval(f"lambda: ({''.join(parts)})", names)
        self._values = self._read()
        # An object that can change in place is compared by content, not by identity.
        self._by_identity = all(map(_is_unchanging, self._values))
        self._contents = tuple(map(_content, self._values))

    @property
    def exist(self) -> bool:
        """Whether there are any."""
        return bool(self._values)

    def changed(self) -> bool:
        """Whether any captured value has changed."""
        if not self._values:
            return False
        try:
            values = self._read()
        except Exception:  # A name or an attribute that no longer exists.
            return True
        before = self._values
        if self._by_identity and len(values) == len(before) and all(map(is_, values, before)):
            return False
        return tuple(map(_content, values)) != self._contents


def _parts(expression: str, value: Any) -> Iterator[str]:
    """Elements of a tuple that tell whether what an expression gives has changed."""
    kind = type(value)
    elements = value if kind in (list, tuple) else value.values() if kind is dict else ()
    if elements and all(map(_is_unchanging, elements)):
        yield f"type({expression}), len({expression}), *{expression}, "
        if kind is dict:
            yield f"*{expression}.values(), "
    else:
        yield f"{expression}, "


NOTHING = Captures({}, {})


def captures_of(name: str, step: Any) -> Captures:
    """What a step function captures.

    Args:
        name: the cell's name, for errors.
        step: a function, or any other callable.

    Raises:
        CellError: an object too large to be compared at each call.
    """
    finder = _Finder()
    finder.follow(_Chain(finder.named(step), step))
    for expression, value in finder.reads.items():
        try:
            _content(value)
        except _TooLargeError:
            path = finder.paths[expression]
            raise CellError(
                f"cell {name!r} captures `{path}`, a {type(value).__name__} too large to compare "
                "at each call; capture the numbers that the cell needs"
            ) from None
    return Captures(finder.reads, finder.names)


class _Chain:
    """An expression that the step reads, its present value, and its name in messages."""

    def __init__(self, expression: str, value: Any, path: str = "") -> None:
        self.expression, self.value, self.path = expression, value, path

    def attribute(self, name: str) -> _Chain:
        value = getattr(self.value, name)
        path = f"{self.path}.{name}" if self.path else name
        return _Chain(f"{self.expression}.{name}", value, path)

    def item(self, key: Any) -> _Chain:
        expression = f"{self.expression}[{key!r}]"
        return _Chain(expression, self.value[key], f"{self.path}[{key!r}]")


class _Finder:
    def __init__(self) -> None:
        self.reads: dict[str, Any] = {}
        self.paths: dict[str, str] = {}
        self.names: dict[str, Any] = {}
        # Ids of functions (closures share their code) and of the objects whose methods they are.
        self._followed: set[tuple[int, int]] = set()

    def named(self, root: Any) -> str:
        """A name for an object, in the expressions."""
        name = f"o{len(self.names)}"
        self.names[name] = root
        return name

    def follow(self, chain: _Chain) -> None:
        """What a chain ends at is read, and where it is called, so is what it captures."""
        value = chain.value
        if isinstance(value, (torch.Tensor, types.ModuleType)):
            return  # Refused when it is used; nothing by itself.
        if isinstance(value, types.MethodType):
            self._read(chain.attribute("__func__"))
            if isinstance(value.__func__, types.FunctionType):
                self._function(value.__func__, chain.attribute("__self__"))
            return
        if isinstance(value, functools.partial):
            for part in ("func", "args", "keywords"):
                self.follow(chain.attribute(part))
            return
        if isinstance(value, types.BuiltinMethodType) and not isinstance(
            value.__self__, type(None) | type | types.ModuleType
        ):
            self.follow(chain.attribute("__self__"))  # A method of a list, of an array.
            return
        self._read(chain)
        if isinstance(value, types.FunctionType):
            self._function(value, None)
        elif not isinstance(value, type) and not _is_trusted(type(value)):
            for method in ("forward", "__call__"):
                function = getattr(type(value), method, None)
                if isinstance(function, types.FunctionType):
                    self._function(function, chain)

    def _read(self, chain: _Chain) -> None:
        if chain.expression not in self.names:
            self.reads[chain.expression] = chain.value
            self.paths[chain.expression] = chain.path

    def _function(self, function: types.FunctionType, owner: _Chain | None) -> None:
        key = (id(function), id(owner.value) if owner is not None else 0)
        if _is_trusted(function) or key in self._followed:
            return
        self._followed.add(key)
        name, code = self.named(function), function.__code__
        known: dict[str, _Chain] = {}
        positional = code.co_varnames[: code.co_argcount]
        defaults = function.__defaults__ or ()
        for k, parameter in enumerate(positional[len(positional) - len(defaults) :]):
            known[parameter] = _Chain(f"{name}.__defaults__[{k}]", defaults[k], parameter)
        for parameter, value in (function.__kwdefaults__ or {}).items():
            expression = f"{name}.__kwdefaults__[{parameter!r}]"
            known[parameter] = _Chain(expression, value, parameter)
        if owner is not None and positional:
            known[positional[0]] = owner
        for k, variable in enumerate(code.co_freevars):
            cell = function.__closure__[k]  # type: ignore[index]
            try:
                value = cell.cell_contents
            except ValueError:
                continue  # Not yet assigned.
            known[variable] = _Chain(f"{self.named(cell)}.cell_contents", value, variable)
        self._code(code, known, function.__globals__)

    def _code(self, code: types.CodeType, known: dict[str, _Chain], scope: dict[str, Any]) -> None:
        for chain in self._chains(code, known, scope):
            self.follow(chain)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):  # A nested function or comprehension.
                inner = {name: known[name] for name in constant.co_freevars if name in known}
                self._code(constant, inner, scope)

    def _chains(
        self, code: types.CodeType, known: dict[str, _Chain], scope: dict[str, Any]
    ) -> Iterator[_Chain]:
        """The chains that a code object reads, each as long as it can be followed."""
        instructions = [x for x in dis.get_instructions(code) if x.opname != "EXTENDED_ARG"]
        chain: _Chain | None = None
        for k, x in enumerate(instructions):
            if chain is not None:
                longer = self._continued(chain, instructions, k)
                if longer is not None:
                    chain = longer
                    continue
                if x.opname == "LOAD_CONST" and instructions[k + 1].opname == "BINARY_SUBSCR":
                    continue
                yield chain
                chain = None
            if x.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                chain = self._global(x.argval, scope)
            elif x.opname.startswith(("LOAD_", "STORE_FAST_LOAD")) and "CONST" not in x.opname:
                # Some instructions load two variables, or store one and load another.
                *first, last = x.argval if isinstance(x.argval, tuple) else (x.argval,)
                yield from (known[name] for name in first if name in known)
                chain = known.get(last) if isinstance(last, str) else None
        if chain is not None:
            yield chain

    @staticmethod
    def _continued(chain: _Chain, instructions: list[dis.Instruction], k: int) -> _Chain | None:
        x = instructions[k]
        try:
            if x.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                return chain.attribute(x.argval)
            if x.opname == "BINARY_SUBSCR" and instructions[k - 1].opname == "LOAD_CONST":
                key = instructions[k - 1].argval
                return chain.item(key) if isinstance(key, (int, str)) else None
        except Exception:  # The step fails there too, or never gets there.
            return None
        return None

    def _global(self, name: str, scope: dict[str, Any]) -> _Chain | None:
        if name not in scope or _is_trusted(scope[name]):
            return None
        return _Chain(f"{self._scope(scope)}[{name!r}]", scope[name], name)

    def _scope(self, scope: dict[str, Any]) -> str:
        for name, root in self.names.items():
            if root is scope:
                return name
        return self.named(scope)


def _is_trusted(value: Any) -> bool:
    """Whether a module, function or class is PyTorch's, NumPy's or Python's own."""
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] in _TRUSTED
    if isinstance(value, (types.FunctionType, type)):
        return (value.__module__ or "").partition(".")[0] in _TRUSTED
    return False
