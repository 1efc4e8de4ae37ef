"""A table as a picture (PNG): ours on the left, the paper's on the right."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from trisparse.bench.papers.matrix_plot import draw_matrix
from trisparse.bench.papers.run import Comparison
from trisparse.bench.papers.table import Place

# Okabe and Ito's colours, which people with colour-blindness can tell apart, each with a marker of its own.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_MOST_IN_LEGEND = 20


def draw(found: Comparison, file: Path) -> None:
    """Write the picture of ``found`` to ``file``.

    Raises:
        ModuleNotFoundError: matplotlib is missing, with the command that installs it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib: run `pip install 'trisparse[plot]'`") from error

    if found.table.plot == "matrix":
        return draw_matrix(found, file)
    aside = {  # columns that are no points of the curve
        place[1]
        for place, one in found.layout.entries.items()
        if one.metric == "trainable_share" or one.statistic == "deviation"
    }
    columns = [column for column in found.columns if column not in aside]
    panels: list[tuple[str, dict[Place, float | None], float | None]] = [
        (f"ours: {found.model}, scale {found.scale.name}", found.ours, found.dense)
    ]
    if found.published is not None:
        theirs = {place: found.theirs(place) for place in found.ours}
        panels.append((f"published: {Path(found.published.model).name}", theirs, found.published.dense))
    dots = found.table.plot == "dots"
    height = max(3.6, 0.24 * len(found.rows) + 1.4) if dots else 4.2
    figure = Figure(figsize=(5.4 * len(panels) + 1.2, height), dpi=130, layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, values, dense) in zip(every, panels, strict=True):
        (_dots if dots else _lines)(axes, found, columns, values)
        if dense is not None:
            line = axes.axvline if dots else axes.axhline
            line(dense, color="#555555", linewidth=1, linestyle=":", label="dense")
        axes.set_title(title, fontsize=10)
        numbers = axes.xaxis if dots else axes.yaxis
        if found.table.log:
            (axes.set_xscale if dots else axes.set_yscale)("log")
            _plain_ticks(numbers)
        axes.grid(alpha=0.25, which="both")
        numbers.set_label_text(found.table.metric)
    handles, labels = every[0].get_legend_handles_labels()
    if 1 < len(labels) <= _MOST_IN_LEGEND:
        figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
    figure.suptitle(f"{found.table.title}: {found.table.about}", fontsize=11)
    figure.savefig(file)


def _lines(axes: Any, found: Comparison, columns: list[str], values: dict[Place, float | None]) -> None:
    numbers = [_leading_number(column) for column in columns]
    numeric = None not in numbers and len(set(numbers)) == len(numbers)
    places = numbers if numeric else list(range(len(columns)))
    for index, row in enumerate(found.rows):
        points = [
            (x, value)
            for x, column in zip(places, columns, strict=True)
            if (value := values.get((row, column))) is not None and math.isfinite(value)
        ]
        color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
        style = "-" if index < len(_COLORS) else "--"
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, style, color=color, marker=marker, markersize=4, label=row)
    axes.set_xticks(places, columns)


def _dots(axes: Any, found: Comparison, columns: list[str], values: dict[Place, float | None]) -> None:
    """One line a row, one marker a column: on a logarithmic axis a bar's length means nothing."""
    for index, column in enumerate(columns):
        points = [
            (place, value)
            for place, row in enumerate(found.rows)
            if (value := values.get((row, column))) is not None and math.isfinite(value)
        ]
        color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
        xs, ys = [value for _, value in points], [place for place, _ in points]
        axes.plot(xs, ys, linestyle="none", color=color, marker=marker, markersize=6, alpha=0.85, label=column)
    axes.set_yticks(range(len(found.rows)), found.rows, fontsize=8)
    axes.set_ylim(len(found.rows) - 0.5, -0.5)


def _plain_ticks(axis: Any) -> None:
    """Numbers instead of powers of ten, at 1, 2 and 5 of each power where there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 300 * low else (1,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=30))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _leading_number(column: str) -> float | None:
    found = re.match(r"-?\d+(\.\d+)?(?=%?$)", column.replace(",", ""))
    return None if found is None else float(found[0])
