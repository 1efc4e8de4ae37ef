"""The charts as inline SVG.

Positions along the width are shares of it and all else is in pixels, so that a chart fills a phone's or a desktop's
width with text of one size. Colours and lines are classes that the page's style sheet gives a theme.
"""

from __future__ import annotations

from itertools import pairwise

from trisparse.bench.report.charts import (
    COLORS,
    MARKERS,
    MUTED,
    SHOWN_CASES,
    Bar,
    Bars,
    Chart,
    Plot,
    Point,
    Scale,
    Series,
)
from trisparse.bench.report.markup import Markup, element, join

_BAR = 18  # height of a bar's line in pixels
_HEIGHT = 300  # of a plot
# Paths of 10 by 10 pixels around the point, in the order of MARKERS.
_PATHS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "square": "M-4-4h8v8h-8z",
    "triangle": "M0-5L5 4H-5z",
    "diamond": "M0-5.5L5.5 0L0 5.5L-5.5 0z",
    "plus": "M-1.6-5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
    "cross": "M-4.7-2.4l2.3-2.3L0-2.3l2.4-2.4l2.3 2.3L2.3 0l2.4 2.4l-2.3 2.3L0 2.3l-2.4 2.4l-2.3-2.3L-2.3 0z",
    "down": "M0 5L5-4H-5z",
}


def draw(chart: Chart) -> Markup:
    """The chart as a ``<figure>``."""
    caption = element("figcaption", chart.title, _bound_tag(isinstance(chart, Bars) and chart.bound))
    body = _bars(chart) if isinstance(chart, Bars) else _plot(chart)
    return element("figure", caption, *body, class_="bars" if isinstance(chart, Bars) else "plot")


def _bound_tag(shown: bool) -> Markup | None:
    return element("span", "bound, not measured", class_="tag") if shown else None


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _bars(chart: Bars) -> list[Markup]:
    scales = chart.scales
    groups = [
        element("div", element("h4", label), *(_bar(bar, chart, scale) for bar in bars), class_="case")
        for (label, bars), scale in zip(chart.groups, scales, strict=True)
    ]
    axis = element("p", chart.label, class_="axis")
    if not chart.own_scales:
        axis = join(_ticks(chart, scales[0]), axis)
    shown = [*groups[:SHOWN_CASES], axis]
    if rest := groups[SHOWN_CASES:]:
        one = "1 more case" if len(rest) == 1 else f"{len(rest)} more cases"
        shown.append(element("details", element("summary", f"Show {one}"), *rest, axis))
    return shown


def _grid(chart: Bars, scale: Scale) -> list[tuple[float, str]]:
    """Values of the axis, and where they are."""
    return [] if chart.own_scales else [(tick, _percent(scale.share(tick))) for tick in scale.ticks(5)]


def _bar(bar: Bar, chart: Bars, scale: Scale) -> Markup:
    start = scale.share(scale.low if chart.reference is None else chart.reference)
    end = scale.share(bar.value)
    marks = [element("line", class_="grid", x1=at, x2=at, y1=0, y2=_BAR) for _, at in _grid(chart, scale)]
    marks.append(
        element(
            "rect",
            class_=f"{_color(bar.color)}{' hollow' if chart.bound else ''}",
            x=_percent(min(start, end)),
            width=_percent(max(abs(end - start), 0.004)),
            y=3,
            height=_BAR - 6,
            rx=2,
        )
    )
    if chart.reference is not None:
        marks.append(element("line", class_="reference", x1=_percent(start), x2=_percent(start), y1=0, y2=_BAR))
    return _line(bar.name, _drawing(marks, _BAR), chart.text(bar.value), "bar")


def _drawing(marks: list[Markup], height: int) -> Markup:
    """As wide as there is room; read aloud is the text beside it."""
    return element("svg", *marks, width="100%", height=height, aria_hidden="true", focusable="false")


def _line(name: str, drawing: Markup, value: str, kind: str) -> Markup:
    cells = (element("span", name, class_="name"), drawing, element("span", value, class_="value"))
    return element("div", *cells, class_=kind)


def _ticks(chart: Bars, scale: Scale) -> Markup:
    labels = [
        element("text", chart.text(tick), x=at, y=12, text_anchor=_anchor(scale.share(tick)))
        for tick, at in _grid(chart, scale)
    ]
    return _line("", _drawing(labels, 16), "", "bar ticks")


def _anchor(share: float) -> str:
    return "start" if share < 0.04 else "end" if share > 0.96 else "middle"


def _color(index: int) -> str:
    return "muted" if index == MUTED else f"c{index % len(COLORS)}"


def _plot(chart: Plot) -> list[Markup]:
    across, up = chart.scales()

    def y(value: float) -> float:
        return round(_HEIGHT * (1 - up.share(value)), 1)

    marks: list[Markup] = []
    for tick in up.ticks(6):
        marks.append(element("line", class_="grid", x1="0", x2="100%", y1=y(tick), y2=y(tick)))
        marks.append(element("text", chart.y.text(tick), x=-8, y=y(tick) + 4, text_anchor="end"))
    for tick in across.ticks(5):
        at = _percent(across.share(tick))
        marks.append(element("line", class_="grid", x1=at, x2=at, y1=0, y2=_HEIGHT))
        marks.append(element("text", chart.x.text(tick), x=at, y=_HEIGHT + 18, text_anchor="middle"))
    for index, guide in enumerate(chart.guides):
        marks += _segments([(across.share(x), y(value)) for x, value in guide.points], f"guide g{index % 3}")
    for index, series in enumerate(chart.series):
        if series.line:
            line = [(across.share(point.x), y(point.y)) for point in series.points]
            marks += _segments(line, f"line {_color(index)}")
    for index, series in enumerate(chart.series):
        for point in series.points:
            marks.append(_marker(index, series, point, _percent(across.share(point.x)), y(point.y)))
    svg = element(
        "svg",
        *marks,
        class_="plot",
        height=_HEIGHT,
        role="img",
        aria_label=f"{chart.title}: {chart.y.label} over {chart.x.label}; its numbers are in the table below",
    )
    return [
        element("p", chart.y.label, class_="axis y"),
        svg,
        element("p", chart.x.label, class_="axis"),
        _legend(chart),
    ]


def _segments(points: list[tuple[float, float]], kind: str) -> list[Markup]:
    """A line through points; ``<polyline>`` takes no shares of the width."""
    return [
        element("line", class_=kind, x1=_percent(x1), y1=y1, x2=_percent(x2), y2=y2)
        for (x1, y1), (x2, y2) in pairwise(points)
    ]


def _marker(index: int, series: Series, point: Point, x: str, y: float) -> Markup:
    said = f"{series.name}: {point.text}" + (" (bound, not measured)" if series.hollow else "")
    shape = element("path", element("title", said), d=_PATHS[MARKERS[index % len(MARKERS)]])
    # A nested svg is what can stand at a share of the width.
    return element("svg", shape, class_=_marker_class(index, series), x=x, y=y, overflow="visible", width=1, height=1)


def _marker_class(index: int, series: Series) -> str:
    return f"marker {_color(index)}{' hollow' if series.hollow else ''}"


def _legend(chart: Plot) -> Markup:
    entries = []
    for index, series in enumerate(chart.series):
        shape = element("path", d=_PATHS[MARKERS[index % len(MARKERS)]])
        swatch = element(
            "svg",
            shape,
            class_=_marker_class(index, series),
            viewBox="-7 -7 14 14",
            width=14,
            height=14,
            aria_hidden="true",
        )
        entries.append(element("li", swatch, series.name, _bound_tag(series.hollow)))
    for index, guide in enumerate(chart.guides):
        line = element("line", class_=f"guide g{index % 3}", x1=0, x2=20, y1=7, y2=7)
        entries.append(element("li", element("svg", line, width=20, height=14, aria_hidden="true"), guide.name))
    return element("ul", *entries, class_="legend")
