"""Figures out of a CSV: time over a suite's axis, forward and forward + backward.

They are read in print and by the colour-blind: marker and line style tell the lines apart, and
colour helps. Ours are solid with filled markers, peers broken with hollow ones, and what was not
measured in the same run is dotted.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flashrnn.bench.contender import TIMES
from flashrnn.bench.errors import BenchError
from flashrnn.bench.suites import SUITES, WIDTH, Selection, goals

Values = Mapping[str, str]


class Style(NamedTuple):
    """Of a line; the colours are of Okabe and Ito's palette."""

    colour: str
    marker: str
    line: Any = "-"
    hollow: bool = False


BROKEN, CHAINED, DOTTED = "--", "-.", (0, (1, 1.5))
STYLES = {
    "cuda_fused": Style("#0072B2", "o"),
    "triton": Style("#D55E00", "s"),
    "cuda": Style("#009E73", "^"),
    "vanilla": Style("#777777", "D"),
    "auto+Wx": Style("#000000", "*"),
    "torch.nn float16, one head": Style("#CC79A7", "v", BROKEN, True),
    "torch.nn bfloat16, one head": Style("#E69F00", "v", BROKEN, True),
    "torch.nn float32, one head": Style("#56B4E9", "v", BROKEN, True),
    "torch.nn float16, full width": Style("#CC79A7", "P", CHAINED, True),
    "torch.nn bfloat16, full width": Style("#E69F00", "P", CHAINED, True),
    "torch.nn float32, full width": Style("#56B4E9", "P", CHAINED, True),
    "attention": Style("#000000", "X", CHAINED, True),
    "upstream cuda_fused": Style("#0072B2", "h", BROKEN, True),
    "upstream cuda": Style("#009E73", "<", BROKEN, True),
    "upstream triton_fused": Style("#D55E00", ">", BROKEN, True),
}
OTHERS = Style("#000000", "d")
BEFORE = "best peer on one H200, measured apart"


class Figure(NamedTuple):
    """What a figure shows: points ``(x, y)`` by measure and label."""

    name: str
    title: str
    axis: str
    lines: dict[str, dict[str, dict[Any, float]]]


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        return False
    return True


def draw(rows: Sequence[Values], folder: Path) -> list[Path]:
    """Write an SVG and a PNG for each group of rows that differ in their suite's axis alone.

    Args:
        rows: of the CSV; of several of the same, the last counts.
        folder: where to.

    Returns:
        The files.

    Raises:
        BenchError: matplotlib is missing, or the rows have nothing to draw.
    """
    if not available():
        raise BenchError("figures need matplotlib, which is not installed: pip install matplotlib")
    figures = arrange(rows)
    if not figures:
        drawn = ", ".join(name for name, suite in SUITES.items() if suite.axis)
        raise BenchError(f"no times to draw; figures are made of the suites {drawn}")
    paths = []
    for figure in figures:
        picture = _draw(figure)
        for kind in ("svg", "png"):
            path = folder / f"{figure.name}.{kind}"
            try:
                picture.savefig(path)
            except OSError as error:
                raise BenchError(f"{path}: {error.strerror}") from error
            paths.append(path)
    return paths


def arrange(rows: Sequence[Values]) -> list[Figure]:
    """Which figures the rows give."""
    groups: dict[tuple[str, ...], list[Values]] = defaultdict(list)
    for row in rows:
        suite = SUITES.get(row["suite"])
        if suite and suite.axis and row["value"] and row["measure"] in TIMES:
            shared = (row["suite"], *_fixed(row, suite.axis).values())
            groups[shared].append(row)
    return [_figure(group) for group in groups.values()]


def _fixed(row: Values, axis: str) -> dict[str, str]:
    """What all rows of a figure share."""
    fixed = {
        "function": row["function"],
        "heads": f"{row['N']}×{row['D']}",
        "B": f"B {row['B']}",
        "T": f"T {row['T']}",
        "dtype": row["dtype"],
    }
    fixed.pop("heads" if axis == "D" else axis)
    return fixed


def _figure(group: Sequence[Values]) -> Figure:
    last = group[-1]
    axis = SUITES[last["suite"]].axis
    assert axis is not None
    fixed = _fixed(last, axis).values()
    lines: dict[str, dict[str, dict[Any, float]]] = {
        measure: defaultdict(dict) for measure in TIMES
    }
    for row in group:
        x = row[axis] if axis == "function" else int(row[axis])
        lines[row["measure"]][row["contender"]][x] = float(row["value"])
    if SUITES[last["suite"]].device == "cuda":
        for measure, points in _measured_before(last, axis).items():
            lines[measure][BEFORE] = points
    versions = f"{last['device']}, PyTorch {last['torch']}, {last['date'][:10]}"
    name = "-".join([last["suite"], *(part.replace(" ", "").replace("×", "x") for part in fixed)])
    return Figure(name, f"{', '.join(fixed)}\n{versions}", axis, lines)


def _measured_before(row: Values, axis: str) -> dict[str, dict[Any, float]]:
    """The best peers' times in the table of goals that belong into a row's figure."""
    points: dict[str, dict[Any, float]] = defaultdict(dict)
    for entry in goals(Selection()):
        case = entry.case
        as_row = {name: str(value) for name, value in vars(case).items()}
        as_row["dtype"] = case.dtype_name
        if _fixed(as_row, axis) != _fixed(row, axis):
            continue
        if axis == "D" and case.N * case.D != WIDTH and case.D < WIDTH:
            continue
        x = getattr(case, axis)
        for measure, mark in entry.marks.items():
            if mark.peer_value is not None:
                points[measure][x] = min(mark.peer_value, points[measure].get(x, mark.peer_value))
    return points


def _draw(figure: Figure) -> Any:
    # Not pyplot: that would look for a display.
    drawing = importlib.import_module("matplotlib.figure").Figure(
        figsize=(11, 6.6), dpi=150, layout="constrained"
    )
    panels = drawing.subplots(1, len(figure.lines), sharey=True)
    labels = dict.fromkeys(label for lines in figure.lines.values() for label in lines)
    ordered = sorted(labels, key=[*STYLES, *labels].index)
    ticks = sorted({x for lines in figure.lines.values() for p in lines.values() for x in p})
    handles = {}
    for axes, (measure, lines) in zip(panels, figure.lines.items(), strict=True):
        for label in ordered:
            points = sorted(lines.get(label, {}).items(), key=lambda point: ticks.index(point[0]))
            if not points:
                continue
            style = STYLES.get(label, OTHERS)
            if label == BEFORE:
                style = Style("#000000", "+", DOTTED)
            (handles[label],) = axes.plot(
                [ticks.index(x) if figure.axis == "function" else x for x, _ in points],
                [y for _, y in points],
                color=style.colour,
                marker=style.marker,
                markersize=7,
                markerfacecolor="white" if style.hollow else style.colour,
                # Cells are in no order: no line leads from one to the next.
                linestyle="none" if figure.axis == "function" else style.line,
                linewidth=1.4 if style.hollow else 2.2,
                zorder=2 if style.hollow else 3,
            )
        _axes(axes, figure.axis, ticks, measure)
    panels[0].set_ylabel("milliseconds a call")
    drawing.suptitle(figure.title, fontsize="medium")
    shown = [label for label in ordered if label in handles]
    drawing.legend(
        [handles[label] for label in shown],
        shown,
        loc="outside lower center",
        ncols=4,
        fontsize="small",
        frameon=False,
        handlelength=4,
    )
    return drawing


def _axes(axes: Any, axis: str, ticks: Sequence[Any], title: str) -> None:
    axes.set_title(title)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    if axis == "function":
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xmargin(0.15)
    else:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, _apart(ticks))
        axes.tick_params(axis="x", which="minor", bottom=False)
    names = {"D": "units a head", "B": "sequences", "T": "length", "function": "cell"}
    axes.set_xlabel(names[axis])
    if axis == "D" and ticks[-1] > WIDTH:
        axes.axvline(WIDTH, color="#999999", linewidth=1)
        place = {"va": "top", "fontsize": "small", "transform": axes.get_xaxis_transform()}
        axes.text(WIDTH / 1.03, 0.99, f"{WIDTH} units in all", ha="right", **place)
        axes.text(WIDTH * 1.03, 0.99, "one head", ha="left", **place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def _apart(ticks: Sequence[int]) -> list[str]:
    """Numbers for the ticks, none where it would lie over the one before."""
    labels: list[str] = []
    last = 0.0
    for x in ticks:
        fits = x >= 1.45 * last
        labels.append(str(x) if fits else "")
        last = x if fits else last
    return labels
