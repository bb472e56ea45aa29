"""The names of a cell: its states, its gates, and what feeds them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

SOURCES = ("Wx", "R", "b")


@dataclass(frozen=True)
class Gate:
    """A gate: the pre-activation ``sum(sources)`` that the cell's step function receives.

    Attributes:
        name: the gate's name.
        sources: what feeds it, out of ``"Wx"`` (the input), ``"R"`` (the recurrent
            product with ``h``) and ``"b"`` (the bias).
    """

    name: str
    sources: tuple[str, ...] = SOURCES

    def __post_init__(self) -> None:
        unknown = [source for source in self.sources if source not in SOURCES]
        if unknown or not self.sources or len(set(self.sources)) != len(self.sources):
            raise ValueError(
                f"gate {self.name!r} is fed by {self.sources!r}; accepted is any non-empty "
                f"selection of {SOURCES}, each at most once"
            )


@dataclass(frozen=True, eq=False)
class Signature:
    """Named states and gates.

    Attributes:
        name: the name shown in messages and, once registered, accepted as ``function=``.
        states: names of the states; the first is ``h``, the one that ``R`` multiplies.
        gates: the gates in the order in which the step function receives them.
    """

    name: str
    states: tuple[str, ...]
    gates: tuple[Gate, ...]

    def fed_by(self, source: str) -> tuple[int, ...]:
        """Indices into ``gates`` of those that ``source`` feeds.

        Their order is the order of the gate dimension of ``Wx``, ``R`` and ``b``.
        """
        return self._fed_by[source]

    @cached_property
    def _fed_by(self) -> dict[str, tuple[int, ...]]:
        gates = tuple(enumerate(self.gates))
        return {s: tuple(k for k, gate in gates if s in gate.sources) for s in SOURCES}

    def gate_names(self, source: str) -> tuple[str, ...]:
        """Names of the gates that ``source`` feeds, in the order of its gate dimension."""
        return tuple(self.gates[k].name for k in self.fed_by(source))

    def __repr__(self) -> str:
        return (
            f"<cell {self.name}: states {self.states}, gates {tuple(g.name for g in self.gates)}>"
        )
