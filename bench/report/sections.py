"""The sections of the report, from rows to charts and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean

from trisparse.bench.report import reading
from trisparse.bench.report.charts import (
    MUTED,
    Axis,
    Bar,
    Bars,
    Guide,
    Plot,
    Point,
    Scale,
    Series,
    pareto_frontier,
)
from trisparse.bench.report.content import Content, Section, Table, file_name
from trisparse.bench.report.numbers import number, percent, ratio, seconds, signed, size
from trisparse.bench.report.reading import PAPERS, grouped
from trisparse.bench.rows import Row

_NONE = "–"


def _or_none(value: float | None, text: Callable[[float], str]) -> str:
    return _NONE if value is None else text(value)


def _bars(
    rows: Iterable[Row], value: Callable[[Row], float | None], *, skip_baseline: bool = False
) -> list[tuple[str, list[Bar]]]:
    """Bars by case; a contestant has one colour in all of them, and baselines are muted."""
    colors: dict[str, int] = {}
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        height = value(row)
        if height is None or (skip_baseline and row.contestant == row.baseline):
            continue
        color = MUTED if row.contestant == row.baseline else colors.setdefault(row.contestant, len(colors))
        groups.setdefault(row.case, []).append(Bar(row.contestant, height, color))
    return list(groups.items())


def _same_place(row: Row) -> tuple[str, str, str]:
    return row.benchmark, reading.device(row), row.kind


def _numbers(rows: Sequence[Row], caption: str) -> Table:
    """Times and rates of rows."""
    cells = [
        (
            row.benchmark,
            row.case,
            row.contestant,
            _kind(row),
            *(_or_none(row.seconds.get(key), seconds) for key in ("min", "median", "p90")),
            _or_none(row.speedup, ratio),
            _or_none(row.tokens_per_s, number),
            _or_none(row.gb_per_s, number),
            _or_none(row.tflop_per_s, number),
            _or_none(row.roofline_share, percent),
        )
        for row in rows
    ]
    columns = ("benchmark", "case", "contestant", "kind", "min", "median", "p90", "speed-up", "tokens/s", "GB/s")
    return Table(caption, (*columns, "TFLOP/s", "of roofline"), cells, 4, rows)


def _kind(row: Row) -> str:
    return "bound" if row.kind == "bound" else "measured"


def speed_up(rows: Sequence[Row]) -> Content:
    """Bars against each case's baseline, and the means over the cases."""
    groups = grouped([row for row in rows if not row.benchmark.startswith(PAPERS)], _same_place)
    charts, used, glance = [], [], []
    for (benchmark, device, kind), found in groups.items():
        timed = [row for row in found if reading.positive(row.speedup) and row.contestant != row.baseline]
        if not timed:
            continue
        baselines = list(dict.fromkeys(row.baseline or "?" for row in timed))
        against = baselines[0] if len(baselines) == 1 else "each case's baseline"
        charts.append(
            Bars(
                file_name("speed-up", benchmark, device, "bound" if kind == "bound" else ""),
                f"{benchmark} on {device}",
                f"times as fast as {against}, log scale",
                _bars(found, lambda row: reading.positive(row.speedup), skip_baseline=True),
                ratio,
                reference=1.0,
                bound=kind == "bound",
            )
        )
        used += [row for row in found if row.seconds or row.speedup is not None]
        for contestant, of_one in grouped(timed, lambda row: row.contestant).items():
            values = [row.speedup for row in of_one if row.speedup]
            means = (geometric_mean(values), min(values), max(values))
            about = (benchmark, contestant, against, device, "bound" if kind == "bound" else "measured")
            glance.append((*about, str(len(values)), *map(ratio, means)))
    columns = ("benchmark", "contestant", "against", "on", "kind", "cases", "geometric mean", "least", "most")
    shown = [Table("Speed-up over all cases", columns, glance, 5)] if glance else []
    return Content(charts, shown, _numbers(used, "Times and speed-ups") if used else None)


def tokens(rows: Sequence[Row]) -> Content:
    """Bars of whole models' tokens/s, one chart for each of prefill, decode and training."""
    used = [row for row in rows if reading.positive(row.tokens_per_s) and reading.whole_model(row)]
    charts = [
        Bars(
            file_name("tokens", benchmark, phase, device, "bound" if kind == "bound" else ""),
            f"{phase}, {benchmark} on {device}",
            "tokens/s",
            _bars(found, lambda row: reading.positive(row.tokens_per_s)),
            number,
            bound=kind == "bound",
        )
        for (benchmark, device, kind, phase), found in grouped(
            used, lambda row: (*_same_place(row), reading.phase(row))
        ).items()
    ]
    return Content(charts, (), _numbers(used, "Tokens per second") if used else None)


def perplexity(rows: Sequence[Row]) -> Content:
    """Curves over sparsity; N:M patterns are points beside the curve of their method."""
    used = [row for row in rows if reading.perplexity(row) and reading.sparsity(row) is not None]
    charts = []
    for (benchmark, model, kind), found in grouped(
        used, lambda row: (row.benchmark, reading.model(row), row.kind)
    ).items():
        if len({reading.sparsity(row) for row in found}) < 2:
            continue  # no curve; the table has the numbers
        series = []
        for (contestant, pattern), of_one in grouped(
            found, lambda row: (row.contestant, reading.pattern(row))
        ).items():
            points = [
                Point(
                    100 * (reading.sparsity(row) or 0),
                    reading.perplexity(row) or 1,
                    f"{row.case}: perplexity {number(reading.perplexity(row) or 1)}",
                )
                for row in of_one
            ]
            points.sort(key=lambda point: point.x)
            single = len({point.x for point in points}) == len(points)  # one value for each sparsity: a curve
            name = contestant if pattern is None else f"{contestant}, {pattern}"
            series.append(Series(name, points, line=pattern is None and single, hollow=kind == "bound"))
        charts.append(
            Plot(
                file_name("perplexity", benchmark, model or "", "bound" if kind == "bound" else ""),
                benchmark if model is None else f"{benchmark}, {model}",
                Axis("pruned weights, %", False, number),
                Axis("perplexity, log scale (less is better)", True, number),
                series,
            )
        )
    left_out = sum("perplexity" in row.metrics and not reading.perplexity(row) for row in rows)
    remarks = [f"{left_out} perplexities that are not finite are left out."] if left_out else []
    return Content(charts, (), _quality_table(used, "Perplexity and sparsity") if used else None, remarks)


def _quality_table(rows: Sequence[Row], caption: str) -> Table:
    cells = [
        (
            row.benchmark,
            row.case,
            row.contestant,
            _kind(row),
            _or_none(reading.sparsity(row), percent),
            _or_none(reading.perplexity(row), number),
            _or_none(row.tokens_per_s, number),
            _or_none(row.speedup, ratio),
        )
        for row in rows
    ]
    columns = ("benchmark", "case", "contestant", "kind", "sparsity", "perplexity", "tokens/s", "speed-up")
    return Table(caption, columns, cells, 4, rows)


def frontier(rows: Sequence[Row]) -> Content:
    """Perplexity over speed, with the line of those that nothing beats. Only what ran the same case is compared."""
    both = [row for row in rows if reading.perplexity(row) and reading.speed(row)]
    charts, used = [], []
    for (benchmark, device, kind, case), found in grouped(both, lambda row: (*_same_place(row), row.case)).items():
        if len(found) < 2:
            continue
        used += found
        by_tokens = all(reading.positive(row.tokens_per_s) for row in found)
        unit, text = ("tokens/s", number) if by_tokens else ("speed-up", ratio)
        speed = reading.speed if by_tokens else lambda row: reading.positive(row.speedup)
        points = [(row.contestant, speed(row), reading.perplexity(row)) for row in found]
        known = [(name, x, y) for name, x, y in points if x is not None and y is not None]
        charts.append(
            Plot(
                file_name("frontier", benchmark, case, device, "bound" if kind == "bound" else ""),
                f"{case}, {benchmark} on {device}",
                Axis(f"{unit} (more is better)", False, text),
                Axis("perplexity, log scale (less is better)", True, number),
                [
                    Series(name, [Point(x, y, f"{text(x)}, perplexity {number(y)}")], hollow=kind == "bound")
                    for name, x, y in known
                ],
                [Guide("Pareto frontier", pareto_frontier((x, y) for _, x, y in known))],
            )
        )
    return Content(charts, (), _quality_table(used, "Perplexity and speed") if used else None)


def memory(rows: Sequence[Row]) -> Content:
    """Bars of the peak and of the model's own bytes."""
    names = {"peak_bytes": "peak memory", "model_bytes": "the model's weights"}
    used = [row for row in rows if any(reading.positive(row.metrics.get(key)) for key in names)]
    charts = []
    for key, title in names.items():
        having = [row for row in used if reading.positive(row.metrics.get(key))]
        for (benchmark, device, kind), found in grouped(having, _same_place).items():
            charts.append(
                Bars(
                    file_name("memory", key.removesuffix("_bytes"), benchmark, device),
                    f"{title.capitalize()}, {benchmark} on {device}",
                    f"{title}, from zero",
                    _bars(found, lambda row, key=key: reading.positive(row.metrics.get(key))),  # type: ignore[misc]
                    size,
                    bound=kind == "bound",
                )
            )
    cells = [
        (row.benchmark, row.case, row.contestant, _kind(row))
        + tuple(_or_none(reading.positive(row.metrics.get(key)), size) for key in names)
        for row in used
    ]
    columns = ("benchmark", "case", "contestant", "kind", *names.values())
    return Content(charts, (), Table("Memory", columns, cells, 4, used) if used else None)


def roofline(rows: Sequence[Row]) -> Content:
    """TFLOP/s over FLOP/byte; measured points are filled, bounds hollow, and the device's peaks are the roof."""
    used = [row for row in rows if reading.intensity_and_rate(row)]
    charts = []
    for device, found in grouped(used, reading.device).items():
        series = []
        for (benchmark, contestant, kind), of_one in grouped(
            found, lambda row: (row.benchmark, row.contestant, row.kind)
        ).items():
            places = [(row.case, *(reading.intensity_and_rate(row) or (1, 1))) for row in of_one]
            points = [
                Point(x, y, f"{case}: {number(y)} TFLOP/s at {number(x)} FLOP/byte") for case, x, y in places
            ]
            series.append(Series(f"{benchmark}: {contestant}", points, hollow=kind == "bound"))
        scale = Scale.around([point.x for one in series for point in one.points], log=True)
        charts.append(
            Plot(
                file_name("roofline", device),
                device,
                Axis("arithmetic intensity, FLOP/byte, log scale", True, number),
                Axis("TFLOP/s, log scale", True, number),
                series,
                _roofs(found, scale.low, scale.high),
            )
        )
    cells = []
    for row in used:
        x, y = reading.intensity_and_rate(row) or (1, 1)
        about = (row.benchmark, row.case, row.contestant, _kind(row))
        cells.append((*about, number(x), number(y), _or_none(row.gb_per_s, number), _or_none(row.roofline_share, percent)))
    columns = ("benchmark", "case", "contestant", "kind", "FLOP/byte", "TFLOP/s", "GB/s", "of roofline")
    return Content(charts, (), Table("Roofline", columns, cells, 4, used) if used else None)


def _roofs(rows: Sequence[Row], low: float, high: float) -> list[Guide]:
    """min(memory's peak * intensity, peak in the dtype) for each pair of peaks that the rows name."""
    found = {}
    for row in rows:
        known = reading.peaks(row)
        if len(known) == 2:
            found[known["gb_per_s"] / 1e3, known["tflop_per_s"]] = None
    guides = []
    for memory_peak, peak in found:
        ridge = min(max(peak / memory_peak, low), high)
        points = [(x, min(memory_peak * x, peak)) for x in dict.fromkeys((low, ridge, high))]
        guides.append(Guide(f"peak: {number(memory_peak * 1e3)} GB/s, {number(peak)} TFLOP/s", points))
    return guides


def papers(rows: Sequence[Row]) -> Content:
    """Ours beside the published numbers."""
    tables = []
    for benchmark, found in grouped([row for row in rows if row.benchmark.startswith(PAPERS)], lambda r: r.benchmark).items():
        cells, lines = [], []
        for row in found:
            what, ours = _measured(row)
            theirs = reading.finite(row.metrics.get("published"))
            difference = None if ours is None or theirs is None else ours - theirs
            numbers = (_or_none(ours, number), _or_none(theirs, number), _or_none(difference, signed))
            cells.append((row.case, row.contestant, reading.model(row) or _NONE, what, *numbers))
            lines.append(row)
        columns = ("case", "contestant", "model", "what", "ours", "published", "difference")
        tables.append(Table(benchmark.removeprefix(PAPERS), columns, cells, 4, lines))
    return Content((), tables)


def _measured(row: Row) -> tuple[str, float | None]:
    """The number of the table: perplexity or accuracy, or else the first that is not the published one."""
    names = [name for name in ("perplexity", "accuracy") if name in row.metrics]
    names += [name for name in row.metrics if name != "published"]
    return (names[0], reading.finite(row.metrics[names[0]])) if names else (_NONE, None)


def other(rows: Sequence[Row]) -> Content:
    """What no section above shows."""
    shown = {id(row) for section in SECTIONS for row in section.build(rows).rows}
    left = [row for row in rows if id(row) not in shown]
    cells = [
        (row.benchmark, row.case, row.contestant, _kind(row), ", ".join(f"{k} {_any(v)}" for k, v in _all(row).items()))
        for row in left
    ]
    columns = ("benchmark", "case", "contestant", "kind", "numbers")
    return Content((), (), Table("All other rows", columns, cells, 5, left) if left else None)


def _all(row: Row) -> dict[str, object]:
    times = {f"{name} seconds": value for name, value in row.seconds.items()}
    rates = {"tokens/s": row.tokens_per_s, "GB/s": row.gb_per_s, "TFLOP/s": row.tflop_per_s}
    return {**times, **{name: value for name, value in rates.items() if value is not None}, **row.metrics}


def _any(value: object) -> str:
    return number(value) if isinstance(value, int | float) else str(value)


SECTIONS = (
    Section(
        "speed-up",
        "Speed-up",
        "Each case's contestants against its baseline, at 1×: to the right is faster. Every contestant gave the "
        "reference's result before it was timed.",
        "No row has a speed-up: trisparse bench run select linear prune",
        speed_up,
    ),
    Section(
        "tokens",
        "Tokens per second",
        "Whole models, dense (gray) and in each sparse form.",
        "No row has tokens/s: trisparse bench run tokens",
        tokens,
    ),
    Section(
        "perplexity",
        "Perplexity and sparsity",
        "What pruning costs, by method. Less is better.",
        "No row has a sparsity and a perplexity: trisparse bench run prune",
        perplexity,
    ),
    Section(
        "frontier",
        "Perplexity and speed",
        "Only contestants of one case are compared. The line joins those that no other beats in both.",
        "No case has two contestants with a perplexity and a speed: trisparse bench run prune tokens",
        frontier,
    ),
    Section(
        "memory",
        "Memory",
        "Peak while it ran, and the bytes of the model itself.",
        "No row has peak_bytes or model_bytes: trisparse bench run tokens prune",
        memory,
    ),
    Section(
        "roofline",
        "Roofline",
        "Rate over arithmetic intensity. Filled points were measured. Hollow points are bounds, counted or computed, "
        "not measured: no run can be faster than they are.",
        "No row has an arithmetic intensity and a rate: trisparse bench run linear roofline",
        roofline,
    ),
    Section(
        "papers",
        "The papers' tables",
        "Ours beside the published numbers, which are those of the paper's own models and data.",
        "No row is of a paper's table: trisparse bench run papers/",
        papers,
    ),
)
OTHER = Section("other", "Other numbers", "Rows that no section above shows.", "", other)
