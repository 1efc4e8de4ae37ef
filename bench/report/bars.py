"""The sections of bars: speed-up, tokens/s and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean

from trisparse.bench.report import reading
from trisparse.bench.report.charts import MUTED, Bar, Bars
from trisparse.bench.report.content import Content, Table, file_name
from trisparse.bench.report.numbers import number, or_none, percent, ratio, seconds, size
from trisparse.bench.report.reading import PAPERS, grouped, positive
from trisparse.bench.rows import Row

Group = tuple[str, Sequence[Bar]]


def speed_up(rows: Sequence[Row]) -> Content:
    """Bars against each case's baseline, under those of the geometric means over all cases."""
    groups = grouped([row for row in rows if not row.benchmark.startswith(PAPERS)], reading.place)
    charts, used = [], []
    for (benchmark, device, kind), found in groups.items():
        timed = [row for row in found if positive(row.speedup) and row.contestant != row.baseline]
        if not timed:
            continue
        used += [row for row in found if row.seconds or row.speedup is not None]
        baselines = {row.baseline for row in timed}
        against = timed[0].baseline if len(baselines) == 1 else "the case's baseline"
        charts.append(
            Bars(
                file_name("speed-up", benchmark, device, kind),
                f"{benchmark} on {device}",
                f"times as fast as {against}, log scale",
                [*_means(timed), *_by_case(timed, lambda row: row.speedup)],
                ratio,
                reference=1.0,
                bound=kind == "bound",
            )
        )
    return Content(charts, numbers=_times(used, "Times and speed-ups"))


def _means(rows: Sequence[Row]) -> list[Group]:
    """The geometric mean of each contestant's speed-ups, and how many cases it has; nothing for a single case."""
    cases = {row.case for row in rows}
    if len(cases) < 2:
        return []
    bars = []
    for color, (name, found) in enumerate(grouped(rows, lambda row: row.contestant).items()):
        label = name if len(found) == len(cases) else f"{name} ({len(found)} of them)"
        bars.append(Bar(label, geometric_mean([row.speedup for row in found if row.speedup]), color))
    return [(f"Geometric mean of {len(cases)} cases", bars)]


def tokens(rows: Sequence[Row]) -> Content:
    """Bars of whole models' tokens/s, one chart for each of prefill, decode and training."""
    used = [row for row in rows if positive(row.tokens_per_s) and reading.whole_model(row)]
    groups = grouped(used, lambda row: (*reading.place(row), reading.phase(row)))
    charts = [
        Bars(
            file_name("tokens", benchmark, phase, device, kind),
            f"{phase.capitalize()}, {benchmark} on {device}",
            "tokens/s",
            _by_case(found, lambda row: row.tokens_per_s),
            number,
            bound=kind == "bound",
        )
        for (benchmark, device, kind, phase), found in groups.items()
    ]
    return Content(charts, numbers=_times(used, "Tokens per second"))


_MEMORY = {"peak_bytes": "peak memory", "model_bytes": "the model's bytes"}


def memory(rows: Sequence[Row]) -> Content:
    """Bars of the peak and of the model's own bytes."""
    charts: list[Bars] = []
    used = [row for row in rows if any(positive(row.metrics.get(key)) for key in _MEMORY)]
    for key, title in _MEMORY.items():

        def held(row: Row, key: str = key) -> float | None:
            return positive(row.metrics.get(key))

        for (benchmark, device, kind), found in grouped(filter(held, used), reading.place).items():
            charts.append(
                Bars(
                    file_name("memory", key.removesuffix("_bytes"), benchmark, device, kind),
                    f"{title.capitalize()}, {benchmark} on {device}",
                    title,
                    _by_case(found, held),
                    size,
                    bound=kind == "bound",
                )
            )
    cells = [(*reading.name(row), *(or_none(positive(row.metrics.get(key)), size) for key in _MEMORY)) for row in used]
    return Content(charts, numbers=Table("Memory", (*reading.NAME, *_MEMORY.values()), cells, used))


def _by_case(rows: Iterable[Row], value: Callable[[Row], float | None]) -> list[Group]:
    """Bars by case; a contestant has one colour in all of them, and a baseline is muted."""
    colors: dict[str, int] = {}
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        color = MUTED if row.contestant == row.baseline else colors.setdefault(row.contestant, len(colors))
        groups.setdefault(row.case, []).append(Bar(row.contestant, value(row) or 0.0, color))
    return list(groups.items())


def _times(rows: Sequence[Row], caption: str) -> Table:
    cells = [
        (
            *reading.name(row),
            *(or_none(row.seconds.get(key), seconds) for key in ("min", "median", "p90")),
            or_none(row.speedup, ratio),
            or_none(row.tokens_per_s, number),
            or_none(row.gb_per_s, number),
            or_none(row.tflop_per_s, number),
            or_none(row.roofline_share, percent),
        )
        for row in rows
    ]
    rates = ("speed-up", "tokens/s", "GB/s", "TFLOP/s", "of roofline")
    return Table(caption, (*reading.NAME, "min", "median", "p90", *rates), cells, rows)
