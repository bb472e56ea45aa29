"""Options of a call."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from flashrnn.cells.spec import Cell, resolve, unknown_name

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in SUPPORTED_DTYPES}

# The letters of a layout, in the order that flashrnn() has: batch, time, gates, heads, the units of
# a head, the units of a head that R multiplies, states.
LAYOUTS = {
    "input_shape": "BTGHD",
    "output_shape": "SBTHD",
    "recurrent_shape": "GHDP",
    "bias_shape": "GHD",
}


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A supported dtype out of itself or its name.

    Raises:
        TypeError: anything else.
    """
    parsed = _DTYPE_NAMES.get(dtype) if isinstance(dtype, str) else dtype
    if parsed not in SUPPORTED_DTYPES:
        raise TypeError(f"dtype {dtype!r}; accepted are {', '.join(_DTYPE_NAMES)}")
    return parsed


class _Derived:
    """A field of a dataclass whose value follows from others where it is not given."""

    def __init__(self, rule: Callable[[Any, Any], Any]) -> None:
        self._rule = rule

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        # Of the class, the dataclass asks for the field's default.
        return None if config is None else self._rule(config, config.__dict__.get(self._name))

    def __set__(self, config: Any, value: Any) -> None:
        config.__dict__[self._name] = value


def _size(derived: Callable[[dict[str, int | None]], int | None]) -> Any:
    def rule(config: Any, given: int | None) -> int | None:
        return derived(config.given_sizes()) if given is None or given == -1 else given

    return _Derived(rule)


def _of_cell(count: Callable[[Cell], Any]) -> Any:
    def rule(config: Any, given: Any) -> Any:
        return count(resolve("lstm" if config.function is None else config.function))

    return _Derived(rule)


def _torch_dtype(*names: str) -> Any:
    def found(config: Any) -> torch.dtype:
        """The dtype of the first field that is given, else bfloat16, upstream's default."""
        given = (getattr(config, name) for name in names)
        return parse_dtype(next((dtype for dtype in given if dtype is not None), "bfloat16"))

    return property(found)


@dataclass
class FlashRNNConfig:
    """Options of :func:`flashrnn.flashrnn`.

    The fields are those of upstream's class of this name, in its order, and ``allow_tf32``, so that
    one class serves both. Seven change what is computed: ``gradient_recurrent_cut``,
    ``gradient_recurrent_clipval``, ``forward_clipval``, ``enable_automatic_mixed_precision``,
    ``dtype``, ``initial_val`` and ``allow_tf32``; ``simple_agg`` and the five numbers that follow
    from ``function`` change nothing. A config of which any other field is not at its default is
    upstream's: :mod:`flashrnn.compat.call` has what follows for the call. Fields may be changed
    later and are checked whenever they are set.

    Attributes:
        backend: as the call's ``backend``; ``None``: that of the call.
        function: as the call's ``function``; ``None``: that of the call.
        gradient_recurrent_cut: no gradient flows from a step to the one before through
            ``R``; what flows through the cell itself (``c`` to ``c``) remains, and ``R`` still
            gets its gradient.
        gradient_recurrent_clipval: at every step the gradient that reaches ``h`` through
            ``R`` is clipped, element by element, to ``[-clipval, clipval]``; ``None``: not.
        forward_clipval: at every step ``h`` is clipped to ``[-clipval, clipval]``, in what is
            returned and in what the next step sees; ``None``: not.
        constants: none; a cell of your own captures Python values instead.
        simple_agg: whether ``Wx``, ``R`` and ``b`` feed every gate. It follows from
            ``function``, as the five numbers below; what is given is ignored.
        hidden_dim: ``num_heads · head_dim``.
        num_heads: N, compared with the tensors.
        head_dim: D, compared with the tensors. Of these three, one may be left out (or -1).
        num_states: S.
        num_gates_r: gates that ``R`` holds.
        num_gates_w: gates that ``Wx`` holds.
        num_gates_i: gates of the cell.
        num_gates_t: gates that ``b`` holds.
        batch_size: what upstream compiles for. Any B may be given: a positive number, unused.
        input_shape: layout of ``Wx``: the letters B, T, G, H (or N), D in any order.
        output_shape: layout of both results and of ``states``: S, B, T, H (or N), D.
        recurrent_shape: layout of ``R``: G, H (or N), D, and P, the one that is summed over.
        bias_shape: layout of ``b``: G, H (or N), D.
        dtype: the dtype (``torch.bfloat16`` or ``"bfloat16"``) that ``Wx``, ``R`` and ``b``
            are cast to and the states are returned in; ``None``: that of the inputs.
        dtype_acc: of sums: float32 (or the wider ``dtype``), whatever is given here.
        dtype_b: of ``b``, as the four below: that of the computation, or float32 where that has 16
            bits. Every input is cast to the one dtype of the computation.
        dtype_r: of ``R``.
        dtype_w: of ``Wx``; where ``dtype`` is not given, it takes its place.
        dtype_g: of the gates.
        dtype_s: that both results are returned in; ``None``: the dtype of the computation.
        dtype_a: of the arithmetic within a step.
        enable_automatic_mixed_precision: under ``torch.autocast`` the inputs are cast to
            ``dtype``, or where that is ``None`` to autocast's own dtype. ``False``: autocast
            is ignored.
        trainable_r: unused, as upstream has it: ``R.requires_grad`` decides.
        trainable_b: unused, as upstream has it: ``b.requires_grad`` decides.
        initial_val: what the states start from when ``states`` is not given: one number, or
            one for each state.
        allow_tf32: whether products of float32 with ``R`` may see 10 bits of its mantissa, as TF32
            has them; ``None``: as ``torch.backends.cuda.matmul`` says.

    Raises:
        TypeError: an unknown field (the message names the nearest), a dtype other than float16,
            bfloat16, float32, float64; a clip or initial value that is no number; an
            ``allow_tf32`` that is no bool.
        ValueError: a clip value or a size that is not positive and finite, a layout of other
            letters, an unknown function.
    """

    of_upstream: ClassVar[bool] = False
    """Whether a field is set that only upstream's class has."""

    backend: str | None = None
    function: str | Cell | None = None
    gradient_recurrent_cut: bool = False
    gradient_recurrent_clipval: float | None = None
    forward_clipval: float | None = None
    constants: Mapping[str, float] | None = None
    simple_agg: bool | None = _of_cell(
        lambda cell: all(len(cell.fed_by(x)) == len(cell.gates) for x in ("Wx", "R", "b"))
    )
    hidden_dim: int | None = _size(
        lambda n: n["num_heads"] * n["head_dim"] if n["num_heads"] and n["head_dim"] else None
    )
    num_heads: int | None = _size(
        lambda n: (
            (n["hidden_dim"] // n["head_dim"] if n["head_dim"] else 1) if n["hidden_dim"] else None
        )
    )
    head_dim: int | None = _size(
        lambda n: n["hidden_dim"] // (n["num_heads"] or 1) if n["hidden_dim"] else None
    )
    num_states: int | None = _of_cell(lambda cell: len(cell.states))
    num_gates_r: int | None = _of_cell(lambda cell: len(cell.fed_by("R")))
    num_gates_w: int | None = _of_cell(lambda cell: len(cell.fed_by("Wx")))
    num_gates_i: int | None = _of_cell(lambda cell: len(cell.gates))
    num_gates_t: int | None = _of_cell(lambda cell: len(cell.fed_by("b")))
    batch_size: int | None = None
    input_shape: str = LAYOUTS["input_shape"]
    output_shape: str = LAYOUTS["output_shape"]
    recurrent_shape: str = LAYOUTS["recurrent_shape"]
    bias_shape: str = LAYOUTS["bias_shape"]
    dtype: torch.dtype | str | None = None
    dtype_acc: torch.dtype | str | None = None
    dtype_b: torch.dtype | str | None = None
    dtype_r: torch.dtype | str | None = None
    dtype_w: torch.dtype | str | None = None
    dtype_g: torch.dtype | str | None = None
    dtype_s: torch.dtype | str | None = None
    dtype_a: torch.dtype | str | None = None
    enable_automatic_mixed_precision: bool = True
    trainable_r: bool | Sequence[bool] = True
    trainable_b: bool | Sequence[bool] = True
    initial_val: float | Sequence[float] = 0.0
    allow_tf32: bool | None = None

    torch_dtype = _torch_dtype("dtype")
    torch_dtype_b = _torch_dtype("dtype_b", "dtype")
    torch_dtype_r = _torch_dtype("dtype_r", "dtype")
    torch_dtype_w = _torch_dtype("dtype_w", "dtype")
    torch_dtype_s = _torch_dtype("dtype_s", "dtype_w", "dtype")

    def __new__(cls, *_: Any, **fields: Any) -> FlashRNNConfig:
        """Refuse unknown fields, with the nearest known."""
        for name in fields.keys() - cls.__dataclass_fields__.keys():
            # A subclass with an __init__ of its own knows others.
            parameters = inspect.signature(cls.__init__).parameters
            kinds = {parameter.kind for parameter in parameters.values()}
            if name not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
                known = [known for known in parameters if known != "self"]
                raise TypeError(unknown_name(f"field of {cls.__name__}", name, known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Hold the sizes to each other."""
        hidden, N, D = self.hidden_dim, self.num_heads, self.head_dim
        if hidden is not None and N is not None and D is not None and hidden != N * D:
            given = (f"{name}={size}" for name, size in self.given_sizes().items() if size)
            raise ValueError(
                f"{', '.join(given)}; accepted is hidden_dim = num_heads · head_dim, of which one "
                "may be left out"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a field before it is set."""
        if name in _CHECKS:
            _CHECKS[name](name, value)
        elif type(self) is FlashRNNConfig and name[:1] != "_" and not hasattr(type(self), name):
            # A class made of it may have more.
            known = [field.name for field in fields(self) if field.init]
            raise AttributeError(unknown_name("field", name, known))
        before = getattr(self, name, value)
        super().__setattr__(name, value)
        if name not in _UPSTREAM:
            return
        if value != _UPSTREAM[name]:
            self.__dict__["of_upstream"] = True
        elif before != value:
            values = self.__dict__ | self.given_sizes()
            self.__dict__["of_upstream"] = any(
                values.get(name, nothing) != nothing for name, nothing in _UPSTREAM.items()
            )

    @property
    def input_dim(self) -> int | None:
        """Numbers that ``Wx`` has for one step of one sequence, or ``None``."""
        hidden, gates = self.hidden_dim, self.num_gates_w
        return None if hidden is None or gates is None else gates * hidden

    def given_sizes(self) -> dict[str, int | None]:
        """``hidden_dim``, ``num_heads`` and ``head_dim`` as they were given, else ``None``."""
        given = {name: self.__dict__.get(f"_{name}", self.__dict__.get(name)) for name in _SIZES}
        return {name: None if size == -1 else size for name, size in given.items()}

    def initial_values(self, states: Sequence[str]) -> tuple[float, ...]:
        """A starting value for each of a cell's states.

        Raises:
            ValueError: ``initial_val`` has another number of values than there are states.
        """
        if not isinstance(self.initial_val, Sequence):
            return (float(self.initial_val),) * len(states)
        values = tuple(map(float, self.initial_val))
        if len(values) != len(states):
            raise ValueError(
                f"initial_val has {len(values)} values; accepted is one number, or one for each "
                f"of the states ({', '.join(states)})"
            )
        return values


_SIZES = ("hidden_dim", "num_heads", "head_dim")


def _check_clipval(name: str, value: object) -> None:
    if value is None:
        return
    accepted = "accepted are positive numbers, or None"
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {type(value).__name__}; {accepted}")
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name}={value!r}; {accepted}")


def _check_initial_val(name: str, value: object) -> None:
    values = value if isinstance(value, Sequence) else [value]
    largest = sys.float_info.max
    if not all(
        isinstance(value, float) or (isinstance(value, int) and abs(value) <= largest)
        for value in values
    ):
        raise TypeError(f"{name}={value!r}; accepted is one number, or one for each state")


def _check_allow_tf32(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} is {type(value).__name__}; accepted are True, False and None")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {type(value).__name__}; accepted are True and False")


def _check_dtype(name: str, value: Any) -> None:
    if value is not None:
        try:
            parse_dtype(value)
        except TypeError as error:
            raise TypeError(str(error) if name == "dtype" else f"{name}: {error}") from None


def _check_size(name: str, value: object) -> None:
    if value is None or (value == -1 and name in _SIZES):
        return
    accepted = "accepted are whole numbers ≥ 1, or None"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {type(value).__name__}; {accepted}")
    if value < 1:
        raise ValueError(f"{name}={value}; {accepted}")


def _check_layout(name: str, value: object) -> None:
    accepted = f"accepted are the letters of {LAYOUTS[name]} in any order, H or N for the heads"
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}; {accepted}")
    if sorted(value.replace("N", "H")) != sorted(LAYOUTS[name]):
        raise ValueError(f"{name}={value!r}; {accepted}")


def _check_constants(name: str, value: object) -> None:
    if value:
        raise ValueError(
            f"{name}={value!r}; no function has any. A cell of your own, made by @cell, captures "
            "Python values: pass it as function"
        )


def _check_function(name: str, value: Any) -> None:
    if value is not None:
        resolve(value)


def _check_backend(name: str, value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}; accepted is a name, or 'auto'")


def _check_trainable(name: str, value: object) -> None:
    values = value if isinstance(value, Sequence) else [value]
    if not all(isinstance(value, bool) for value in values):
        raise TypeError(f"{name}={value!r}; accepted is a truth value, or one for each gate")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "backend": _check_backend,
    "function": _check_function,
    "constants": _check_constants,
    "initial_val": _check_initial_val,
    "allow_tf32": _check_allow_tf32,
    **dict.fromkeys(("gradient_recurrent_cut", "enable_automatic_mixed_precision"), _check_bool),
    **dict.fromkeys(("gradient_recurrent_clipval", "forward_clipval"), _check_clipval),
    **dict.fromkeys(("dtype", *(f"dtype_{x}" for x in ("acc", *"brwgsa"))), _check_dtype),
    **dict.fromkeys((*_SIZES, "batch_size"), _check_size),
    **dict.fromkeys(LAYOUTS, _check_layout),
    **dict.fromkeys(("trainable_r", "trainable_b"), _check_trainable),
}

# What only upstream's class has, with the value that asks for nothing.
_UPSTREAM: dict[str, Any] = {
    **dict.fromkeys(("backend", "function", "constants", *_SIZES, "batch_size")),
    **dict.fromkeys(f"dtype_{x}" for x in ("acc", *"brwgsa")),
    **dict.fromkeys(("trainable_r", "trainable_b"), True),
    **LAYOUTS,
}

DEFAULT = FlashRNNConfig()
"""That of calls without one; nobody sets its fields."""
