"""Rows: in a CSV as they come, and as a table on the terminal."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from flashrnn.bench import stamp
from flashrnn.bench.case import Case
from flashrnn.bench.contender import Found
from flashrnn.bench.errors import BenchError
from flashrnn.bench.suites import Mark


@dataclass(frozen=True)
class Row:
    """A measure of a contender on a case, as in the CSV; what does not apply is empty.

    Attributes:
        suite: the suite.
        contender: who.
        function: the case's, as are the five below. A contender that computes something else,
            another dtype say, has it in its name or in ``includes``.
        B: ...
        T: ...
        N: ...
        D: ...
        dtype: ...; ``tf32`` for float32 by TF32.
        measure: what was measured.
        unit: of ``value``, ``q1``, ``q3``, ``goal`` and ``peer_value``.
        value: the median.
        q1: lower quartile; of cold starts, which are few, the lowest.
        q3: upper quartile; of cold starts the highest.
        repetitions: how often it was measured.
        error: ‖given − truth‖ / ‖truth‖ of the output against float64.
        gradient_error: the largest of the gradients'.
        goal: what this package aims for.
        peer: who reaches ``peer_value``; not measured in this run.
        peer_value: ...
        includes: what the value includes.
        reason: why there is no value.
    """

    suite: str
    contender: str
    function: str
    B: int
    T: int
    N: int
    D: int
    dtype: str
    measure: str
    unit: str
    value: float | None
    q1: float | None
    q3: float | None
    repetitions: int | None
    error: float | None
    gradient_error: float | None
    goal: float | None
    peer: str | None
    peer_value: float | None
    includes: str
    reason: str | None

    @staticmethod
    def of(
        suite: str,
        contender: str,
        case: Case,
        includes: str,
        measure: str,
        found: Found,
        mark: Mark | None,
    ) -> Row:
        """Put a row together."""
        return Row(
            suite=suite,
            contender=contender,
            **{name: getattr(case, name) for name in ("function", "B", "T", "N", "D")},
            dtype=case.dtype_name,
            measure=measure,
            includes=includes,
            goal=mark.goal if mark else None,
            peer=mark.peer if mark else None,
            peer_value=mark.peer_value if mark else None,
            **asdict(found),
        )


COLUMNS = (*(field.name for field in fields(Row)), *stamp.FIELDS)


class Results:
    """A CSV to which rows are added; a row that is added is in the file, whatever comes then.

    Args:
        path: the file; rows that it holds stay.
        stamp: what is added to each row, see :mod:`flashrnn.bench.stamp`.

    Raises:
        BenchError: it cannot be written, or has other columns.
    """

    def __init__(self, path: Path, stamp: Mapping[str, str]) -> None:
        self.stamp = stamp
        exists = path.exists()
        if exists:
            read(path)
        try:
            self._file = path.open("a", encoding="utf-8", newline="")
        except OSError as error:
            raise BenchError(f"{path}: {error.strerror}") from error
        self._writer = csv.DictWriter(self._file, COLUMNS)
        if not exists:
            self._writer.writeheader()

    def add(self, row: Row) -> None:
        """Write a row out."""
        content = {
            name: f"{value:.6g}" if isinstance(value, float) else value
            for name, value in asdict(row).items()
        }
        self._writer.writerow({**content, **self.stamp})
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path) -> list[dict[str, str]]:
    """The rows of such a CSV.

    Raises:
        BenchError: it is none, or of another version of this package.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BenchError(f"{path}: {getattr(error, 'strerror', None) or 'not a CSV'}") from error
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise BenchError(
            f"{path} has other columns than this version's results. Move it away, or name another "
            "folder with --output"
        )
    return rows


def headline(row: Row) -> str:
    """What stands above the lines of a case."""
    sizes = f"{row.N}×{row.D}, B {row.B}, T {row.T}"
    return f"{row.suite}: {row.function} {sizes}, {row.dtype}"


def lines(rows: Sequence[Row]) -> list[str]:
    """A contender's measures of a case, for people."""
    name = f"  {rows[0].contender:36}"
    if len({row.reason for row in rows}) == 1 and rows[0].reason:
        return [f"{name}  {rows[0].reason}"]
    return [
        f"{name if k == 0 else ' ' * len(name)}  {row.measure:27}  {_cell(row)}"
        for k, row in enumerate(rows)
    ]


def _cell(row: Row) -> str:
    if row.value is None:
        return row.reason or ""
    said = f"{number(row.value):>7} {row.unit}"
    if row.q1 is not None and row.q3 is not None:
        said += f"  ({number(row.q1)} to {number(row.q3)})"
    if row.goal is not None:
        said += f"  goal {number(row.goal)}"
    if row.peer_value is not None:
        said += f"  {row.peer}: {number(row.peer_value)}"
    return said


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class Terminal:
    """Prints, and shows how far a run has come where there are tqdm and a terminal."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._headline = ""

    def show(self, rows: Sequence[Row]) -> None:
        """A task's rows, below their case's headline."""
        above = headline(rows[0])
        if above != self._headline:
            self.say(above)
        for _, of_contender in groupby(rows, lambda row: row.contender):
            for line in lines(list(of_contender)):
                self.say(line)
        self._headline = above
        if self._bar is not None:
            self._bar.update()

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()


@contextmanager
def terminal(total: int) -> Iterator[Terminal]:
    """A terminal for so many tasks."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield Terminal(None)
        return
    # disable=None: no bar where the output is no terminal.
    with tqdm(total=total, unit="task", disable=None, leave=False) as bar:
        yield Terminal(bar)
