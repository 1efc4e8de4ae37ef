"""The charts as PNGs, by matplotlib (the extra ``plot``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trisparse.bench.report.charts import COLORS, MARKERS, MUTED, SHOWN_CASES, Bars, Chart, Plot, Scale

_SYMBOLS = dict(zip(MARKERS, ("o", "s", "^", "D", "P", "X", "v"), strict=True))
_GRAY = "#8c97a5"
_STYLES = ("--", ":", "-.")  # of guides


def check_matplotlib() -> None:
    """Raise early where matplotlib is missing.

    Raises:
        ImportError: says what to install.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "PNGs need matplotlib: pip install 'trisparse[plot]', or give --no-png for the page alone"
        ) from error


def save_png(chart: Chart, file: Path) -> Path:
    """Draw the chart to ``file``, and return it."""
    figure = _bars(chart) if isinstance(chart, Bars) else _plot(chart)
    figure.savefig(file)
    return file


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _bars(chart: Bars) -> Any:
    """Bars over shares of the axis, as on the page: groups may have scales of their own. Of the cases that it shows."""
    groups = chart.groups[:SHOWN_CASES]
    figure, axes = _figure(8, 1.1 + 0.2 * sum(len(bars) + 1 for _, bars in groups))
    at, names = 0.0, {}
    for (label, bars), scale in zip(groups, chart.scales[: len(groups)], strict=True):
        # Above the line of the reference, which is not to cross the words.
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        axes.text(0.01, at, label, fontsize=8, fontweight="bold", va="center", parse_math=False, zorder=3, bbox=behind)
        at -= 1
        for bar in bars:
            color = _GRAY if bar.color == MUTED else COLORS[bar.color % len(COLORS)]
            how: dict[str, Any] = {"fill": False, "ls": "--", "edgecolor": color} if chart.bound else {"color": color}
            start = scale.share(scale.low if chart.reference is None else chart.reference)
            end = scale.share(bar.value)
            axes.barh(at, end - start, left=start, height=0.7, **how)
            axes.text(max(start, end), at, f" {chart.text(bar.value)}", fontsize=7, va="center")
            names[at] = bar.name
            at -= 1
    scale = chart.scales[0]
    ticks = [] if chart.own_scales else scale.ticks(5)
    axes.set_xticks([scale.share(tick) for tick in ticks], [chart.text(tick) for tick in ticks], fontsize=8)
    axes.set_yticks(list(names), list(names.values()), fontsize=7, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.08)  # room for the last bar's number
    axes.set_ylim(at + 0.3, 0.7)
    if chart.reference is not None:
        axes.axvline(scale.share(chart.reference), color="#1c2430", linewidth=0.8)
    rest = len(chart.groups) - len(groups)
    label = f"{chart.label}; {rest} more on the page" if rest else chart.label
    axes.set_xlabel(label, fontsize=8, parse_math=False)
    title = f"{chart.title} (bound, not measured)" if chart.bound else chart.title
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    return figure


def _plot(chart: Plot) -> Any:
    figure, axes = _figure(7, 4.6)
    across, up = chart.scales()
    for index, guide in enumerate(chart.guides):
        axes.plot(
            *zip(*guide.points, strict=True),
            color="#5a6675",
            linewidth=1.2,
            linestyle=_STYLES[index % 3],
            label=_plain(guide.name),
        )
    for index, series in enumerate(chart.series):
        color = COLORS[index % len(COLORS)]
        axes.plot(
            [point.x for point in series.points],
            [point.y for point in series.points],
            color=color,
            linestyle="-" if series.line else "none",
            marker=_SYMBOLS[MARKERS[index % len(MARKERS)]],
            markerfacecolor="white" if series.hollow else color,
            markersize=6,
            label=_plain(f"{series.name} (bound, not measured)" if series.hollow else series.name),
        )
    _set_scale(axes, "x", across, chart.x.text)
    _set_scale(axes, "y", up, chart.y.text)
    axes.set_xlabel(chart.x.label, fontsize=8, parse_math=False)
    axes.set_ylabel(chart.y.label, fontsize=8)
    axes.set_title(chart.title, fontsize=10, loc="left", parse_math=False)
    figure.legend(loc="outside lower left", frameon=False, fontsize=7, ncols=2)
    return figure


def _plain(label: str) -> str:
    """A legend's label, which has no ``parse_math``: a dollar would begin a formula."""
    return label.replace("$", r"\$")


def _set_scale(axes: Any, name: str, scale: Scale, text: Any) -> None:
    """The limits and the ticks of the page."""
    from matplotlib.ticker import NullLocator

    getattr(axes, f"set_{name}scale")("log" if scale.log else "linear")
    getattr(axes, f"set_{name}lim")(scale.low, scale.high)
    ticks = scale.ticks()
    getattr(axes, f"set_{name}ticks")(ticks, [text(tick) for tick in ticks], fontsize=8)
    getattr(axes, f"{name}axis").set_minor_locator(NullLocator())
