"""One contender against a peer over many cases: share won, geometric mean, worst cases."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flashrnn.bench.report import Row, headline, number
from flashrnn.bench.sequenced import PLAIN

WORST = 10
# How the names of those begin who are compared with the first contender of a case.
PEERS = ("torch.nn", "torchrl", PLAIN)
# Of B·T·D, below which a call's time is the host's.
SMALL = 10**6


class Pair(NamedTuple):
    """Ours and a peer on a case, and which of ``PEERS`` it is."""

    ours: Row
    peer: Row
    kind: str

    @property
    def ratio(self) -> float | None:
        """How many times as long the peer takes; 0 where we fail, ``None`` where it does."""
        if self.peer.value is None:
            return None
        return self.peer.value / self.ours.value if self.ours.value else 0.0


def summary(tasks: Sequence[Sequence[Row]]) -> list[str]:
    """Lines for people, for each suite and measure.

    Args:
        tasks: the rows of each case that was measured in turns; its first contender is ours.
    """
    lines: list[str] = []
    pairs = [pair for rows in tasks for pair in _pairs(rows)]
    for about in dict.fromkeys(map(_about, pairs)):
        chosen = [pair for pair in pairs if _about(pair) == about]
        suite, measure, kind = about
        lines.append(f"{suite}: {measure}, beside {kind}")
        lines += [f"  {name:17}  {_said(group)}" for name, group in _groups(chosen) if group]
        told = sorted((p.ratio, k) for k, p in enumerate(chosen) if p.ratio is not None)
        lines += [f"  worst: {_worst(chosen[k])}" for _, k in told[:WORST]]
    return lines


def _pairs(rows: Sequence[Row]) -> Iterator[Pair]:
    ours = {row.measure: row for row in rows if row.contender == rows[0].contender}
    for row in rows:
        for kind in PEERS:
            if row.contender.startswith(kind):
                yield Pair(ours[row.measure], row, kind)


def _about(pair: Pair) -> tuple[str, str, str]:
    return pair.ours.suite, pair.ours.measure, pair.kind


def _groups(pairs: Sequence[Pair]) -> Iterator[tuple[str, list[Pair]]]:
    yield "all", list(pairs)
    dtypes = sorted({pair.ours.dtype for pair in pairs})
    if len(dtypes) > 1:
        for dtype in dtypes:
            yield dtype, [pair for pair in pairs if pair.ours.dtype == dtype]
        yield (
            f"B·T·D < {SMALL:,}",
            [p for p in pairs if p.ours.B * p.ours.T * p.ours.D < SMALL],
        )


def _said(pairs: Sequence[Pair]) -> str:
    ratios = [pair.ratio for pair in pairs if pair.ratio is not None]
    won = sum(ratio > 1 for ratio in ratios)
    said = f"{won} of {len(ratios)} won"
    if times := [ratio for ratio in ratios if ratio]:
        said += f", {number(statistics.geometric_mean(times))} times as fast (geometric mean)"
    if failed := sum(ratio == 0 for ratio in ratios):
        said += f", {failed} failed"
    if missing := len(pairs) - len(ratios):
        said += f"; {pairs[0].kind} failed in {missing} more"
    return said


def _worst(pair: Pair) -> str:
    about = f"{headline(pair.ours).partition(': ')[2]}, {pair.ours.contender}"
    if pair.ours.value is None:
        return f"{about}: {pair.ours.reason}"
    assert pair.ratio is not None and pair.peer.value is not None
    times = f"{number(pair.ours.value)} and {number(pair.peer.value)} {pair.ours.unit}"
    return f"{about}: {number(pair.ratio)} ({times})"
