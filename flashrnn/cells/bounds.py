"""Intervals that contain a graph's values for any inputs.

An interval holds for every value that is not NaN; any operation may give NaN. It holds for float32
as kernels compute it, with approximations, rounding and overflow, and for float64: every interval
is a little wider than exact arithmetic would make it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from flashrnn.cells.graph import Argument, Graph
from flashrnn.cells.operations import LARGEST_FLOAT32, OPERATIONS
from flashrnn.cells.traced import FORWARD_CLIPVAL, TracedCell

Interval = tuple[float, float]
"""The least and the largest number, each of which may be infinite."""

ANYTHING: Interval = (-math.inf, math.inf)

# :func:`stays_finite` takes gates to be within ± this when it bounds slopes.
LARGEST_GATE = 2.0**20

# An upper limit of the relative error of any operation: that of tanh for 16-bit operands is 2^-11.
_RELATIVE_SLACK = 2.0**-10
# Numbers below 2^-126 may be taken for 0.
_ABSOLUTE_SLACK = 2.0**-120


def bound_of_h(forward: Graph) -> float | None:
    """The largest absolute value of the new ``h``, a cell's first state; ``None`` if any may be.

    It is a little more than the cell's definition says: 1.003 for ``σ(o)·tanh(c)``.

    Args:
        forward: a cell's step, as :class:`flashrnn.cells.traced.CellGraphs` has it.
    """
    h = forward.outputs[0]
    least, largest = _of(h, intervals(forward))
    bound = max(-least, largest)
    return bound if math.isfinite(bound) else None


MOST_STEPS = 2**12
"""Up to so many steps :func:`stays_finite` follows."""


@lru_cache(maxsize=256)
def stays_finite(cell: TracedCell, steps: int, largest: float) -> bool:
    """Whether states that begin at zero stay finite for any gates, and slopes are finite for gates
    within ±``LARGEST_GATE``.

    A value that follows from gates alone may be NaN where a gate is not finite. The answer may be
    ``False`` for a cell whose states do stay finite.

    Args:
        cell: the cell.
        steps: how many there are; for more than :data:`MOST_STEPS` the answer is ``False``.
        largest: the largest number of the dtype that states are stored in.
    """
    if steps > MOST_STEPS:
        return False
    forward, derivative = cell.graphs.forward, cell.graphs.derivative
    states, gates = len(cell.states), len(cell.gates)
    reached = [(0.0, 0.0)] * states
    for _ in range(steps):
        known = intervals(forward, dict(zip(forward.inputs, reached, strict=False)))
        after = [_of(output, known) for output in forward.outputs]
        hull = [(min(x[0], y[0]), max(x[1], y[1])) for x, y in zip(reached, after, strict=True)]
        if hull == reached:
            break
        reached = hull
    known = intervals(forward, dict(zip(forward.inputs, reached, strict=False)))
    if not _are_finite(forward, known, forward.inputs[:states]):
        return False
    # The derivative is linear in the gradients, so ±1 is enough.
    of_inputs = [*reached, *[(-LARGEST_GATE, LARGEST_GATE)] * gates, *[(-1.0, 1.0)] * states]
    known = intervals(derivative, dict(zip(derivative.inputs, of_inputs, strict=False)))
    own = (*derivative.inputs[:states], *derivative.inputs[states + gates :])
    return (
        all(-largest <= least and most <= largest for least, most in reached)
        and all(map(_is_finite, known.values()))
        and _are_finite(derivative, known, own)
    )


# Intervals do not tell where these are NaN.
_UNDEFINED_SOMEWHERE = {"sqrt", "log", "log2", "log1p", "pow", "fmod"}


def _are_finite(graph: Graph, known: Mapping[str, Interval], inputs: Iterable[str]) -> bool:
    """Whether all that follows from some inputs is finite, and what it is computed of."""
    following = set(inputs)
    for x in graph.body:
        if following.isdisjoint(x.arguments):
            continue
        following.add(x.name)
        values = [known[x.name], *(_of(argument, known) for argument in x.arguments)]
        if x.operation in _UNDEFINED_SOMEWHERE or not all(map(_is_finite, values)):
            return False
    return True


def _is_finite(interval: Interval) -> bool:
    return all(map(math.isfinite, interval))


def intervals(graph: Graph, given: Mapping[str, Interval] | None = None) -> dict[str, Interval]:
    """Where every named value of a cell's step, or of its derivative, lies.

    States, gates and gradients may be anything: a call begins with states of the caller's. A value
    that clips is positive, and infinite where float32 does not hold it.

    Args:
        graph: the step's or the derivative's.
        given: where some of its inputs lie instead.
    """
    known = dict.fromkeys(graph.inputs, ANYTHING)
    if FORWARD_CLIPVAL in known:
        known[FORWARD_CLIPVAL] = (0.0, math.inf)
    known |= given or {}
    for x in graph.body:
        known[x.name] = _widened(_applied(x.operation, [_of(y, known) for y in x.arguments]))
    return known


def _of(argument: Argument, known: Mapping[str, Interval]) -> Interval:
    if isinstance(argument, str):
        return known[argument]
    return _widened((float(argument), float(argument)))


def _widened(interval: Interval) -> Interval:
    """The interval, widened by the rounding of float32; all numbers if an end is NaN."""
    least, largest = interval
    if math.isnan(least) or math.isnan(largest):
        return ANYTHING
    return -_upwards(-least), _upwards(largest)


def _upwards(x: float) -> float:
    """A number above, as far as approximations go; infinity where float32 may have that."""
    x = max(x, -LARGEST_FLOAT32)
    x += abs(x) * _RELATIVE_SLACK + _ABSOLUTE_SLACK
    return x if x <= LARGEST_FLOAT32 else math.inf


def _applied(operation: str, of: list[Interval]) -> Interval:
    """Where a result lies in exact arithmetic; ``of`` has an interval for each argument."""
    if operation in _RULES:
        return _RULES[operation](*of)
    if OPERATIONS[operation].returns_bool:
        return 0.0, 1.0
    # What no rule is known for may be anything.
    return ANYTHING


def _increasing(name: str, lowest: float = -math.inf) -> Callable[[Interval], Interval]:
    """The rule of a function that grows from ``lowest`` on, and is NaN before."""
    function = OPERATIONS[name].python

    def rule(x: Interval) -> Interval:
        return float(function(max(x[0], lowest))), float(function(max(x[1], lowest)))

    return rule


def _add(x: Interval, y: Interval) -> Interval:
    return x[0] + y[0], x[1] + y[1]


def _negate(x: Interval) -> Interval:
    return -x[1], -x[0]


def _multiply(x: Interval, y: Interval) -> Interval:
    # An infinite end stands for numbers without end, each of which 0 makes 0 of.
    corners = [a * b if a and b else 0.0 for a in x for b in y]
    return min(corners), max(corners)


def _divide(x: Interval, y: Interval) -> Interval:
    if y[0] <= 0 <= y[1]:
        return ANYTHING
    # A divisor of which float32 makes infinity leaves 0.
    inverse = [0.0, 1 / y[0], 1 / y[1]]
    return _multiply(x, (min(inverse), max(inverse)))


def _absolute(x: Interval) -> Interval:
    return max(x[0], -x[1], 0.0), max(-x[0], x[1])


def _maximum(x: Interval, y: Interval) -> Interval:
    return max(x[0], y[0]), max(x[1], y[1])


def _minimum(x: Interval, y: Interval) -> Interval:
    return min(x[0], y[0]), min(x[1], y[1])


def _power(x: Interval, y: Interval) -> Interval:
    # It grows or falls with either alone; of a negative number it is of either sign.
    power = OPERATIONS["pow"].python
    most = max(float(power(a, b)) for a in _absolute(x) for b in y)
    return 0.0 if x[0] >= 0 else -most, most


def _remainder(x: Interval, y: Interval) -> Interval:
    # It has x's sign, and is larger than neither.
    most = min(_absolute(x)[1], _absolute(y)[1])
    return max(x[0], -most) if x[0] < 0 else 0.0, min(x[1], most) if x[1] > 0 else 0.0


def _copysign(x: Interval, _: Interval) -> Interval:
    most = _absolute(x)[1]
    return -most, most


def _where(_: Interval, x: Interval, y: Interval) -> Interval:
    return min(x[0], y[0]), max(x[1], y[1])


_RULES: dict[str, Callable[..., Interval]] = {
    "add": _add,
    "sub": lambda x, y: _add(x, _negate(y)),
    "mul": _multiply,
    "div": _divide,
    "neg": _negate,
    "abs": _absolute,
    # Of NaN it is 0.
    "sign": lambda x: (-1.0 if x[0] < 0 else 0.0, 1.0 if x[1] > 0 else 0.0),
    "sqrt": _increasing("sqrt", lowest=0.0),
    "exp": _increasing("exp"),
    "exp2": _increasing("exp2"),
    "expm1": _increasing("expm1"),
    "log": _increasing("log", lowest=0.0),
    "log2": _increasing("log2", lowest=0.0),
    "log1p": _increasing("log1p", lowest=-1.0),
    "sin": lambda x: (-1.0, 1.0),
    "cos": lambda x: (-1.0, 1.0),
    "pow": _power,
    "atan": _increasing("atan"),
    "erf": _increasing("erf"),
    "erfc": lambda x: (math.erfc(x[1]), math.erfc(x[0])),
    "floor": _increasing("floor"),
    "fmod": _remainder,
    "copysign": _copysign,
    "tanh": _increasing("tanh"),
    "sigmoid": _increasing("sigmoid"),
    "maximum": _maximum,
    "minimum": _minimum,
    "where": _where,
}
