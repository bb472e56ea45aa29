"""Heads computed with more units than they have, so that their rows are multiples of 16 bytes.

Kernels that move rows in pieces of 16 bytes are faster, and much faster for many sequences. A
layer's input has features of zeros then, where it needs them for the same: the library multiplies
such rows several times as fast.

Each additional unit has the gates of its head's first unit; its own states start at 0. R's columns
for these units are 0, so each adds 0 · h to the other units' sums, which is 0 as long as h is
finite. It is for cells that :func:`flashrnn.cells.bounds.stays_finite` accepts, unless what follows
from gates alone is NaN. Then the first unit's h is NaN too, and so are all h of the next step, with
and without such units.

Backward, an infinite gradient times these zeros is NaN, and so are an infinite R or W of the first
unit times a gradient of 0, and what follows from infinite gates. So gradients that are infinite
without additional units, or where R, W or a gate is, may be NaN. Calls with a
``gradient_recurrent_clipval``, which contains such, have no additional units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashrnn.backends import Backend, autograd, is_direct, protocols
from flashrnn.backends.autograd import own_units
from flashrnn.backends.gradients import Gradients
from flashrnn.backends.protocols import Factors, Kind, PaddingBackend, Resized, Results, pads
from flashrnn.kernels.sizes import tiles_of
from flashrnn.problem import Problem
from flashrnn.products import forward_of_layer, gradients_of_layer
from flashrnn.sequences import Sequences

AnyBackend = TypeVar("AnyBackend", bound=Backend)


def backend_for(backend: AnyBackend, problem: Problem, features: int = 0) -> AnyBackend:
    """A backend as a problem is best computed by it: as it is, or with additional units.

    Args:
        backend: the backend.
        problem: what is computed. A call of one step is never padded, like a Stepper's.
        features: of a layer's input, whose product with weights Wx is. The units are added to the
            weights; without a layer Wx is copied.
    """
    if problem.D * problem.dtype.itemsize % 16 == 0:
        return backend
    units = backend.padded_units(problem, features) if pads(backend) else problem.D
    return backend if units == problem.D else _with_units(cast(Any, backend), units)


class _Padded:
    """A fused backend for problems of heads with fewer units than those it computes.

    It takes and gives what a :class:`flashrnn.backends.protocols.MultiplyingBackend` does, but for
    the states and gates of a forward that backward needs: these have all units.
    """

    def __init__(self, backend: PaddingBackend, units: int) -> None:
        """See :func:`backend_for`.

        Args:
            backend: what computes.
            units: with how many units.
        """
        self._backend, self.units, self.copy = backend, units, backend.copy

    def multiplies(self, problem: Problem, x: Tensor, W: Tensor) -> bool:
        """Always: W is padded in the place of Wx."""
        return True

    def results(self, problem: Problem, like: Tensor, by_time: bool) -> Results:
        """None: they would have all units."""
        return Results()

    def forward(
        self,
        problem: Problem,
        Wx: Tensor | None,
        R: Tensor,
        b: Tensor,
        states: Tensor,
        sequences: Sequences | None = None,
        factors: Factors | None = None,
        results: Results | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`flashrnn.backends.protocols.MultiplyingBackend`."""
        sizes, starts = _sizes(problem), None if sequences is None else sequences.reset_states
        given = {"R": R.view(sizes["R"]), "b": b.view(sizes["b"]), "states": states}
        given |= _present(Wx=Wx, reset_states=starts, **_factors(problem, factors))
        found = self._resized(self._padded(given), self.units, launches=True)
        wide, start = problem._replace(D=self.units), found["states"]
        weights, options = (found["R"], found["b"], start), _options(sequences, found)
        if factors is None:
            outputs = self._backend.forward(wide, found["Wx"], *weights, options)
        else:
            x, W, bias = found.get("x", factors.x), found["W"], found.get("bias")
            outputs = forward_of_layer(self._backend, wide, x, W, *weights, options or (), bias)
        every_state, last_states, gates = outputs
        if not problem.needs_gradient:
            every_state = own_units(problem, every_state).contiguous()
        return every_state, own_units(problem, last_states).contiguous(), gates

    def repeated(
        self, problem: Problem, given: dict[str, Tensor], by_time: bool | None = None
    ) -> _Repeated | None:
        """See :class:`flashrnn.backends.protocols.RepeatingBackend`; states are not turned."""
        pad, padded = self._begun(problem, given)
        inner = self._backend.repeated(problem._replace(D=self.units), padded)
        if inner is None:
            return None
        own = ["last_states"] if problem.needs_gradient else ["states", "last_states"]
        to_narrow = tuple(_ToNarrow(name, Kind.STATES, problem.D) for name in own)
        return _Repeated(self._backend, problem.D, pad, inner, to_narrow)

    def repeated_gradients(
        self, problem: Problem, given: dict[str, Tensor], needs_x: bool, needs_W: bool
    ) -> _Repeated | None:
        """See :class:`flashrnn.backends.protocols.RepeatingBackend`."""
        pad, padded = self._begun(problem, given)
        wide = problem._replace(D=self.units)
        inner = self._backend.repeated_gradients(wide, padded, needs_x, needs_W)
        if inner is None:
            return None
        D = problem.D
        to_narrow = [_ToNarrow("d_R", Kind.WEIGHTS, D), _ToNarrow("d_b", Kind.STATES, D)]
        if needs_W:
            W = given["W"]
            to_narrow.append(_ToNarrow("d_W", Kind.WEIGHTS, W.shape[-1], tuple(W.shape)))
        if needs_x and padded["x"] is not given["x"]:
            to_narrow.append(_ToNarrow("d_x", Kind.STATES, given["x"].shape[-1]))
        return _Repeated(self._backend, problem.D, pad, inner, tuple(to_narrow))

    def _begun(self, problem: Problem, given: dict[str, Tensor]) -> tuple[_Pad, dict[str, Tensor]]:
        """What pads the tensors of a call like this one, and these padded; none has memory."""
        sizes, order, padded = _sizes(problem), [], dict(given)
        places: list[int] = []
        wanted: list[Resized] = []
        for place, (name, x) in enumerate(given.items()):
            if name in ("states", "gates") or (name == "x" and _aligned(x) == x.shape[-1]):
                order.append(place)
                continue
            of, kind = sizes.get(name), _KINDS.get(name, Kind.STATES)
            of = (*of, x.shape[-1]) if of is not None and name == "W" else of
            width = _aligned(x) if name in _OF_FEATURES else self.units
            order.append(len(given) + len(places))
            places.append(place)
            wanted.append((x if of is None else x.view(of), kind, width))
            padded[name] = _by_operations(*wanted[-1], self.units).contiguous()
        resize = self._backend.resizing(wanted, self.units, problem.device)
        return _Pad(tuple(places), resize, tuple(order)), padded

    def backward(
        self,
        problem: Problem,
        R: Tensor,
        states_initial: Tensor,
        states: Tensor,
        gates: Tensor,
        d_states: Tensor | None,
        d_last_states: Tensor | None,
        sequences: Sequences | None = None,
        factors: Factors | None = None,
    ) -> Gradients:
        """See :class:`flashrnn.backends.protocols.MultiplyingBackend`.

        It may be called where nothing can be launched, as for a graph of the gradient.
        """
        starts = None if sequences is None else sequences.reset_states
        given = {"R": R, "states": states_initial}
        given |= _present(d_states=d_states, d_last=d_last_states, reset_states=starts)
        given |= _factors(problem, factors)
        launches = not torch.is_grad_enabled() and is_direct(*given.values())
        found = self._resized(self._padded(given), self.units, launches)
        wide, options = problem._replace(D=self.units), _options(sequences, found) or ()
        residuals = found["R"], found["states"], states, gates, *options
        upstream = len(options), found.get("d_states"), found.get("d_last")
        if factors is None:
            gradients = autograd.gradients_of(self._backend, wide, residuals, *upstream)
        else:
            padded = factors._replace(x=found.get("x", factors.x), W=found["W"])
            gradients = gradients_of_layer(self._backend, wide, padded, residuals, *upstream)
        D, (of_gates, of_states, d_R, d_b, of_resets, d_x, d_W) = problem.D, gradients
        wanted = {"R": (d_R, Kind.WEIGHTS, D), "b": (d_b, Kind.STATES, D)}
        if factors is not None:
            features = factors.x.shape[-1]
            if d_W is not None:
                wanted["W"] = d_W, Kind.WEIGHTS, features
            if d_x is not None and d_x.shape[-1] != features:
                wanted["x"] = d_x, Kind.STATES, features
        own = self._resized(wanted, D, launches)
        d_x = own.get("x", d_x)
        if factors is not None and d_W is not None:
            d_W = own["W"].view(factors.W.shape)
        if of_resets is not None and starts is not None:
            of_resets = _first(of_resets, D)
        of_gates, of_states = _first(of_gates, D), _first(of_states, D)
        return Gradients(of_gates, of_states, own["R"], own["b"], of_resets, d_x, d_W)

    def _padded(self, given: dict[str, Tensor]) -> dict[str, Resized]:
        """How tensors are to have all units."""
        return {
            name: (
                x,
                _KINDS.get(name, Kind.STATES),
                _aligned(x) if name in _OF_FEATURES else self.units,
            )
            for name, x in given.items()
        }

    def _resized(self, wanted: dict[str, Resized], rows: int, launches: bool) -> dict[str, Tensor]:
        """Tensors with more units or fewer, by a launch, or by operations of PyTorch's."""
        if launches:
            given = [x for x, _, _ in wanted.values()]
            resize = self._backend.resizing([*wanted.values()], rows, given[0].device)
            found = resize(given)
        else:
            found = [_by_operations(*each, rows).contiguous() for each in wanted.values()]
        return dict(zip(wanted, found, strict=True))


@lru_cache(maxsize=256)
def _with_units(backend: Any, units: int) -> Any:
    return _Padded(backend, units)


_OF_FEATURES = {"x", "W"}
# All others are states or their gradients, or x.
_KINDS = {
    "Wx": Kind.GATES,
    "b": Kind.GATES,
    "bias": Kind.GATES,
    "W": Kind.WEIGHTS,
    "R": Kind.WEIGHTS,
}


class _Pad(NamedTuple):
    """What pads some of a call's tensors.

    Attributes:
        places: theirs among the given.
        resize: what gives them all units.
        order: what the backend is given, by the places of the given tensors and, behind them,
            of the padded ones.
    """

    places: tuple[int, ...]
    resize: Callable[[Sequence[Tensor]], list[Tensor]]
    order: tuple[int, ...]

    def __call__(self, given: Sequence[Tensor]) -> list[Tensor]:
        """What the backend is given."""
        found = [*given, *self.resize([given[place] for place in self.places])]
        return [found[place] for place in self.order]


class _ToNarrow(NamedTuple):
    """A result that loses the additional units.

    Attributes:
        name: ...
        kind: ...
        width: how long its rows become.
        sizes: those that it is returned in; ``None``: its own.
    """

    name: str
    kind: Kind
    width: int
    sizes: tuple[int, ...] | None = None


class _Repeated:
    """What is kept of a direction; see :class:`flashrnn.backends.protocols.Repeatable`."""

    def __init__(
        self,
        backend: PaddingBackend,
        D: int,
        pad: _Pad,
        inner: protocols.Repeatable,
        to_narrow: tuple[_ToNarrow, ...],
    ) -> None:
        """Keep it.

        Args:
            backend: what computes with all units.
            D: a head's own units.
            pad: what gives the call's tensors all units.
            inner: what the backend keeps.
            to_narrow: the results that lose the additional units.
        """
        self._backend, self._D, self._pad, self._inner = backend, D, pad, inner
        self._to_narrow = to_narrow
        # Out of the first results, which all others are like.
        self._narrow: Callable[[Sequence[Tensor]], list[Tensor]] | None = None

    def is_current(self) -> bool:
        """See :class:`flashrnn.backends.protocols.Repeatable`."""
        return self._inner.is_current()

    def run(self, given: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """See :class:`flashrnn.backends.protocols.Repeatable`."""
        made = self._inner.run(self._pad(given))
        if made is None:
            return None
        results = [made[each.name] for each in self._to_narrow]
        if self._narrow is None:
            wanted = [(x, o.kind, o.width) for x, o in zip(results, self._to_narrow, strict=True)]
            self._narrow = self._backend.resizing(wanted, self._D, results[0].device)
        for each, own in zip(self._to_narrow, self._narrow(results), strict=True):
            made[each.name] = own if each.sizes is None else own.view(each.sizes)
        for name in ("d_gates", "d_initial"):
            if name in made:
                made[name] = _first(made[name], self._D)
        return made


def _sizes(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Those of weights that may be given with fewer dimensions; of W without the last."""
    cell, N, D = problem.cell, problem.N, problem.D
    Gw, Gr, Gb = (len(cell.fed_by(source)) for source in ("Wx", "R", "b"))
    return {"W": (Gw, N, D), "bias": (Gw, N, D), "R": (Gr, N, D, D), "b": (Gb, N, D)}


def _aligned(x: Tensor) -> int:
    """The length of rows of features that are whole pieces of 16 bytes."""
    return tiles_of(x.shape[-1] * x.itemsize, 16) * 16 // x.itemsize


def _first(x: Tensor, columns: int) -> Tensor:
    return x if x.shape[-1] == columns else x.narrow(-1, 0, columns)


def _present(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if x is not None}


def _factors(problem: Problem, factors: Factors | None) -> dict[str, Tensor]:
    """``W`` ``[Gw, N, D, I]``, any ``bias`` ``[Gw, N, D]``, and an x that needs more features."""
    if factors is None:
        return {}
    x, W, _, _, bias = factors
    of_gates = _sizes(problem)["W"]
    found = {"W": W.view(*of_gates, W.shape[-1])}
    if bias is not None:
        found["bias"] = bias.view(of_gates)
    if _aligned(x) != x.shape[-1]:
        found["x"] = x
    return found


def _options(sequences: Sequences | None, padded: dict[str, Tensor]) -> Sequences | None:
    """Options of sequences whose states have all units."""
    if sequences is None or sequences.reset_states is None:
        return sequences
    return sequences._replace(reset_states=padded["reset_states"])


def _by_operations(x: Tensor, kind: Kind, width: int, rows: int) -> Tensor:
    """Differentiably."""
    if kind is Kind.WEIGHTS:
        x = _repeated(x, rows, dim=-2)
    if kind is Kind.GATES:
        return _repeated(x, width, dim=-1)
    return pad(x, (0, width - x.shape[-1]))


def _repeated(x: Tensor, size: int, dim: int) -> Tensor:
    """With the first index along a dimension again behind the last, or with fewer of them."""
    missing = size - x.shape[dim]
    if missing <= 0:
        return x.narrow(dim, 0, size)
    first = x.detach().narrow(dim, 0, 1)
    sizes = list(x.shape)
    sizes[dim] = missing
    return torch.cat([x, first.expand(sizes)], dim)
