"""The sections of points over two axes: perplexity over sparsity and over speed, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from trisparse.bench.report import reading
from trisparse.bench.report.charts import Axis, Guide, Plot, Point, Scale, Series, pareto_frontier
from trisparse.bench.report.content import Content, Table, file_name
from trisparse.bench.report.numbers import number, or_none, percent, ratio
from trisparse.bench.report.reading import PAPERS, grouped, positive
from trisparse.bench.rows import Row

_PERPLEXITY = Axis("perplexity, log scale (less is better)", True, number)


def perplexity(rows: Sequence[Row]) -> Content:
    """Curves over sparsity; N:M patterns are points beside the curve of their method."""
    known = [(row, reading.sparsity(row), reading.perplexity(row)) for row in rows]
    places = {id(row): (100 * x, y) for row, x, y in known if x is not None and y is not None}
    used = sorted((row for row in rows if id(row) in places), key=lambda row: row.benchmark.startswith(PAPERS))
    charts = []
    for (title, kind), found in grouped(used, lambda row: (reading.of_model(row), row.kind)).items():
        if len({places[id(row)][0] for row in found}) < 2:
            continue  # no curve; the table has the numbers
        series = []
        for (contestant, pattern), same in grouped(found, lambda row: (row.contestant, reading.pattern(row))).items():
            points = [Point(*places[id(row)], f"{row.case}: {number(places[id(row)][1])}") for row in same]
            points.sort(key=lambda point: point.x)
            curve = pattern is None and len({point.x for point in points}) == len(points)
            name = contestant if pattern is None else f"{contestant}, {pattern}"
            series.append(Series(name, points, line=curve, hollow=kind == "bound"))
        axis = Axis("pruned weights, %", False, number)
        charts.append(Plot(file_name("perplexity", title, kind), title, axis, _PERPLEXITY, series))
    remarks = []
    if left_out := sum("perplexity" in row.metrics and not reading.perplexity(row) for row in rows):
        remarks.append(f"Left out: {left_out} perplexities that are not finite.")
    return Content(charts, numbers=_quality(used, "Perplexity and sparsity"), remarks=remarks)


def frontier(rows: Sequence[Row]) -> Content:
    """Perplexity over speed, with the line of those that nothing beats. Only what ran the same case is compared."""
    charts, used = [], []
    for (benchmark, device, kind, case), found in grouped(rows, lambda row: (*reading.place(row), row.case)).items():
        by_tokens = any(positive(row.tokens_per_s) for row in found)
        known = []
        for row in found:
            speed, quality = positive(row.tokens_per_s if by_tokens else row.speedup), reading.perplexity(row)
            if speed is not None and quality is not None:
                known.append((row, speed, quality))
        if len(known) < 2:
            continue
        used += [row for row, _, _ in known]
        unit, text = ("tokens/s", number) if by_tokens else (f"times as fast as {found[0].baseline}", ratio)
        series = [
            Series(row.contestant, [Point(x, y, f"{text(x)}, perplexity {number(y)}")], hollow=kind == "bound")
            for row, x, y in known
        ]
        line = Guide("Pareto frontier", _steps(pareto_frontier((x, y) for _, x, y in known)))
        name, title = file_name("frontier", benchmark, case, device, kind), f"{benchmark}: {case}, on {device}"
        axis = Axis(f"{unit}, log scale (more is better)", True, text)
        charts.append(Plot(name, title, axis, _PERPLEXITY, series, [line]))
    return Content(charts, numbers=_quality(used, "Perplexity and speed"))


def _steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The edge of what the points of a frontier beat: nothing between two of them was reached."""
    corners = [(slow, worse) for (slow, _), (_, worse) in pairwise(points)]
    return sorted([*points, *corners])


def roofline(rows: Sequence[Row]) -> Content:
    """TFLOP/s over FLOP/byte; measured points are filled, bounds hollow, and the device's peaks are the roof."""
    places = {id(row): place for row in rows if (place := reading.intensity_and_rate(row))}
    used = [row for row in rows if id(row) in places]
    charts = []
    for device, found in grouped(used, reading.device).items():
        series = []
        for (benchmark, contestant, kind), same in grouped(
            found, lambda row: (row.benchmark, row.contestant, row.kind)
        ).items():
            points = []
            for row in same:
                x, y = places[id(row)]
                points.append(Point(x, y, f"{row.case}: {number(y)} TFLOP/s at {number(x)} FLOP/byte"))
            series.append(Series(f"{benchmark}: {contestant}", points, hollow=kind == "bound"))
        scale = Scale.around([places[id(row)][0] for row in found], log=True)
        across = Axis("arithmetic intensity, FLOP/byte, log scale", True, number)
        up, roofs = Axis("TFLOP/s, log scale", True, number), _roofs(found, scale.low, scale.high)
        charts.append(Plot(file_name("roofline", device), device, across, up, series, roofs))
    cells = []
    for row in used:
        rates = (or_none(row.gb_per_s, number), or_none(row.roofline_share, percent))
        cells.append((*reading.name(row), *map(number, places[id(row)]), *rates))
    columns = (*reading.NAME, "FLOP/byte", "TFLOP/s", "GB/s", "of roofline")
    return Content(charts, numbers=Table("Roofline", columns, cells, used))


def _roofs(rows: Sequence[Row], low: float, high: float) -> list[Guide]:
    """min(memory's peak * intensity, peak of the dtype), for each dtype that the rows name; of a CPU, whose peaks are
    measured in each run, the highest.
    """
    found: dict[str, reading.Peaks] = {}
    for row in rows:
        peak = reading.peaks(row)
        if peak is not None and (peak.dtype not in found or found[peak.dtype].tflop_per_s < peak.tflop_per_s):
            found[peak.dtype] = peak
    guides = []
    for dtype, peak in found.items():
        ridge = min(max(1e3 * peak.tflop_per_s / peak.gb_per_s, low), high)
        points = [(x, min(peak.gb_per_s * x / 1e3, peak.tflop_per_s)) for x in dict.fromkeys((low, ridge, high))]
        name = f"roof, {dtype}: {number(peak.gb_per_s)} GB/s, {number(peak.tflop_per_s)} TFLOP/s"
        guides.append(Guide(name, points))
    return guides


def _quality(rows: Sequence[Row], caption: str) -> Table:
    cells = [
        (
            *reading.name(row),
            or_none(reading.sparsity(row), percent),
            or_none(reading.perplexity(row), number),
            or_none(row.tokens_per_s, number),
            or_none(row.speedup, ratio),
        )
        for row in rows
    ]
    return Table(caption, (*reading.NAME, "sparsity", "perplexity", "tokens/s", "speed-up"), cells, rows)
