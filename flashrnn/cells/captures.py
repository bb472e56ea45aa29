"""The Python values that a step function captures, compared at each call.

A traced cell contains such values as constants, so a changed value means another cell. The captured
values are found in the step's bytecode: each chain of names, attributes and constant subscripts
that begins at a global, a closure's variable, a default value, an imported module or a method's
``self``. The object at the end of a chain is compared by identity if it cannot change in place,
else by its content, of which its class is a part. The same is done with the functions that a chain
ends at, or that are in a container that it ends at.
"""

from __future__ import annotations

import contextvars
import dis
import enum
import functools
import importlib.util
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Set
from operator import is_
from typing import Any

import torch

from flashrnn.cells.spec import Cell, CellError

# A larger object takes too long to compare at each call.
_MOST_PARTS = 1000
_UNCHANGING = (
    *(int, float, complex, bool, str, bytes, type(None), type(Ellipsis), enum.Enum),
    *(torch.dtype, torch.device, types.BuiltinFunctionType, types.FunctionType, Cell),
)
# Modules whose functions are not searched: what those read does not change between calls. `os` has
# the environment.
_TRUSTED = {"torch", "numpy", "builtins", "flashrnn", *sys.stdlib_module_names} - {"test", "os"}
# What a cell is traced in is another thread, with a context of its own.
_OF_A_THREAD = (threading.local, contextvars.ContextVar)


def _is_unchanging(value: Any) -> bool:
    """Whether an object cannot change in place, so that its identity tells its value."""
    if isinstance(value, type):
        return _is_trusted(value)
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
        if _is_unchanging(x):
            return type(x), x  # True is no 1.
        if isinstance(x, torch.Tensor) or (isinstance(x, types.ModuleType) and _is_trusted(x)):
            return type(x), id(x)
        if id(x) in inside:
            return "itself"
        inside.add(id(x))
        try:
            if isinstance(x, type):
                return of_class(x)
            if isinstance(x, types.ModuleType):
                return of_space(x)
            # An attribute of an object may be one of its class.
            return of(type(x)), parts(x), attributes(x)
        finally:
            inside.remove(id(x))

    def of_class(x: type) -> Any:
        left = room[0]
        try:
            return of_space(x)
        except _TooLargeError:
            room[0] = left
            return x  # That of a library, more likely than the user's own.

    def parts(x: Any) -> Any:
        if isinstance(x, (dict, types.MappingProxyType)):
            return tuple((of(k), of(v)) for k, v in x.items())
        if isinstance(x, (list, tuple)):
            return tuple(map(of, x))
        if isinstance(x, (set, frozenset)):
            return frozenset(map(of, x))
        if hasattr(x, "tobytes") and hasattr(x, "shape"):  # NumPy's arrays and scalars
            if x.nbytes > 8 * _MOST_PARTS:
                raise _TooLargeError
            return x.shape, str(x.dtype), x.tobytes()
        return tuple(map(of, _reduced(x)))

    def attributes(x: Any) -> Any:
        slots = [name for kind in type(x).__mro__ for name in getattr(kind, "__slots__", ())]
        held = {name: getattr(x, name) for name in slots if hasattr(x, name)}
        return tuple((name, of(v)) for name, v in (held | getattr(x, "__dict__", {})).items())

    def of_space(x: Any) -> Any:
        """What the user has put into a class or a module."""
        found = []
        for space in x.__mro__ if isinstance(x, type) else (x,):
            if not _is_trusted(space):
                for name, v in vars(space).items():
                    if isinstance(v, types.FunctionType):
                        found.append((name, v))
                    elif not (name.startswith(("__", "_abc_")) or isinstance(v, _DESCRIPTORS)):
                        found.append((name, of(v)))
        return x, tuple(found)

    return of(value)


_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)


def _reduced(x: Any) -> tuple[Any, ...]:
    """What pickle makes of an object that Python's own C code holds: a deque, an array, a range."""
    ways = {"__reduce__", "__reduce_ex__"}
    defines = next(kind for kind in type(x).__mro__ if not ways.isdisjoint(vars(kind)))
    if defines is object or defines.__module__.partition(".")[0] not in sys.stdlib_module_names:
        return ()
    try:
        made = x.__reduce_ex__(4)
    except Exception:
        return ()
    if not isinstance(made, tuple):
        return ()
    # Of the parts, the fourth and the fifth are iterators over elements.
    return made[1], *(tuple(part) for part in made[3:5] if part is not None)


class Captures:
    """What a step function captured when it was traced."""

    def __init__(
        self, reads: dict[str, Any], names: dict[str, Any], missing: Set[str] = frozenset()
    ) -> None:
        """``reads`` has expressions over ``names`` and the values that they had; ``missing`` are
        modules that the step names and nobody has imported."""
        self.missing = missing
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
        CellError: an object too large to be compared at each call, or that differs from thread to
            thread.
    """
    finder = _Finder(name)
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
    return Captures(finder.reads, finder.names, finder.missing)


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
    def __init__(self, cell: str) -> None:
        self.cell = cell
        self.reads: dict[str, Any] = {}
        self.paths: dict[str, str] = {}
        self.names: dict[str, Any] = {}
        # Ids of functions (closures share their code) and of the objects whose methods they are.
        self._followed: set[tuple[int, int]] = set()
        self.missing: set[str] = set()

    def named(self, root: Any) -> str:
        """A name for an object, in the expressions."""
        name = f"o{len(self.names)}"
        self.names[name] = root
        return name

    def follow(self, chain: _Chain) -> None:
        """What a chain ends at is read, and where it is called, so is what it captures."""
        value = chain.value
        if isinstance(value, torch.Tensor) or (
            isinstance(value, types.ModuleType) and _is_trusted(value)
        ):
            return  # Refused when it is used; nothing by itself.
        if isinstance(value, _OF_A_THREAD):
            raise CellError(
                f"cell {self.cell!r} captures `{chain.path}`, a {type(value).__name__}, which "
                "differs from thread to thread; capture numbers, or feed them through a gate (Wx)"
            )
        if isinstance(value, types.MethodType):
            self._read(chain.attribute("__func__"))
            if not isinstance(value.__func__, types.FunctionType) or _is_trusted(value.__func__):
                self.follow(chain.attribute("__self__"))
            else:
                owner = chain.attribute("__self__")
                self._function(value.__func__, owner)
                self._methods(type(value.__self__), value.__func__.__name__, owner)
            return
        if isinstance(value, functools.partial):
            for part in ("func", "args", "keywords"):
                self.follow(chain.attribute(part))
            return
        if isinstance(value, types.BuiltinMethodType):
            bound = value.__self__
            if not (bound is None or isinstance(bound, types.ModuleType) or _is_trusted(bound)):
                # A method of a list, of an array; `apply` of a torch.autograd.Function.
                self.follow(chain.attribute("__self__"))
                return
        self._read(chain)
        if callable(getattr(value, "__wrapped__", None)):
            # A function with a cache of results, or the cell of a layer with masks.
            self.follow(chain.attribute("__wrapped__"))
        for one in _functions_in(value):
            self._function(one, None)
        if isinstance(value, types.FunctionType):
            self._function(value, None)
        elif not isinstance(value, type) and not _is_trusted(type(value)):
            for method in ("forward", "__call__"):
                self._methods(type(value), method, chain)

    def _methods(self, kind: type, name: str, owner: _Chain) -> None:
        """A method, and those of base classes that it may call by super()."""
        for each in kind.__mro__:
            function = vars(each).get(name)
            if isinstance(function, types.FunctionType):
                self._function(function, owner)

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
        imported: _Chain | None = None
        for k, x in enumerate(instructions):
            if chain is not None:
                longer = self._continued(chain, instructions, k)
                if longer is not None:
                    chain = longer
                    continue
                if x.opname == "LOAD_CONST" and instructions[k + 1].opname == "BINARY_SUBSCR":
                    continue
                if x.opname.startswith("STORE_FAST") and isinstance(chain.value, types.ModuleType):
                    # `import module`: what is read of it comes later.
                    known[x.argval[0] if isinstance(x.argval, tuple) else x.argval] = chain
                else:
                    yield chain
                chain = None
            if x.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                chain = self._global(x.argval, scope)
            elif x.opname == "IMPORT_NAME":
                chain = imported = self._module(x.argval, instructions[k - 2].argval, scope)
            elif x.opname == "IMPORT_FROM" and imported is not None:
                chain = imported.attribute(x.argval) if hasattr(imported.value, x.argval) else None
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
        if isinstance(chain.value, _OF_A_THREAD):
            return None
        try:
            if x.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                return chain.attribute(x.argval)
            if x.opname == "BINARY_SUBSCR" and instructions[k - 1].opname == "LOAD_CONST":
                key = instructions[k - 1].argval
                return chain.item(key) if isinstance(key, (int, str)) else None
        except Exception:  # The step fails there too, or never gets there.
            return None
        return None

    def _module(self, name: str, level: int, scope: dict[str, Any]) -> _Chain | None:
        """A module that the step imports, if it is there: to look must not import it."""
        try:
            name = importlib.util.resolve_name("." * level + name, scope.get("__package__"))
        except ImportError:  # The step fails there too, or never gets there.
            return None
        module = sys.modules.get(name)
        if module is None:
            self.missing.add(name)
        if module is None or _is_trusted(module):
            return None
        return _Chain(self.named(module), module, name)

    def _global(self, name: str, scope: dict[str, Any]) -> _Chain | None:
        if name == "globals" and name not in scope:
            # In parentheses, for what is no more than a name is not compared.
            return _Chain(f"({self._scope(scope)})", scope, "globals()")
        if name not in scope or _is_trusted(scope[name]):
            return None
        return _Chain(f"{self._scope(scope)}[{name!r}]", scope[name], name)

    def _scope(self, scope: dict[str, Any]) -> str:
        for name, root in self.names.items():
            if root is scope:
                return name
        return self.named(scope)


def _functions_in(value: Any) -> list[types.FunctionType]:
    """Those that may be called where a value is read: which of a container's, running tells."""
    elements: Iterable[Any] = ()
    if isinstance(value, (list, tuple)):
        elements = value
    elif isinstance(value, dict):
        elements = value.values()
    elif isinstance(value, type) and issubclass(value, torch.autograd.Function):
        elements = value.forward, value.backward  # Its `apply` calls both.
    return [x for x in elements if isinstance(x, types.FunctionType)]


def _is_trusted(value: Any) -> bool:
    """Whether a module, function or class is PyTorch's, NumPy's or Python's own."""
    if isinstance(value, types.ModuleType):
        return _is_trusted_name(value.__name__)
    if isinstance(value, (types.FunctionType, type)):
        return _is_trusted_name(value.__module__)
    return False


@functools.lru_cache(maxsize=1024)
def _is_trusted_name(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _TRUSTED
