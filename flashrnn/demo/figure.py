"""The demo's figures: lines over an axis, readable in print and by the colour-blind."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashrnn.demo.errors import optional
from flashrnn.demo.output import write

# Of Okabe and Ito's palette; line style and marker tell the lines apart as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73")
STYLES = ("-", "--", ":")


@dataclass(frozen=True)
class Line:
    """A line of a figure; ``marker`` as in matplotlib, ``""`` for none."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marker: str = ""


def check() -> None:
    """Fail before the training rather than after it where matplotlib is missing."""
    optional("matplotlib")


def draw(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    y_limits: tuple[float, float] | None = None,
    shaded: tuple[float, float, str] | None = None,
) -> None:
    """Write a PNG.

    Args:
        path: where to.
        title: above the figure.
        x_label: below it.
        y_label: beside it.
        lines: at most three.
        y_limits: range of the y axis; ``None``: that of the lines.
        shaded: a range of x to shade, and what it means.

    Raises:
        DemoError: the file cannot be written.
    """
    # Not pyplot: that would look for a display.
    figure = optional("matplotlib.figure").Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if shaded:
        start, end, meaning = shaded
        axes.axvspan(start, end, color="#BBBBBB", alpha=0.4, linewidth=0, label=meaning)
    for line, colour, style in zip(lines, COLOURS, STYLES, strict=False):
        axes.plot(
            line.x, line.y, style, color=colour, marker=line.marker, linewidth=2, label=line.label
        )
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    if y_limits:
        axes.set_ylim(*y_limits)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write(path, picture.getvalue())
