"""The sections of the report in their order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite

from trisparse.bench.report import reading
from trisparse.bench.report.bars import memory, speed_up, tokens
from trisparse.bench.report.content import Content, Section, Table
from trisparse.bench.report.numbers import number, or_none, signed
from trisparse.bench.report.plots import frontier, perplexity, roofline
from trisparse.bench.report.reading import PAPERS, grouped
from trisparse.bench.rows import Row


def papers(rows: Sequence[Row]) -> Content:
    """Ours beside the published numbers, a table for each of the paper's."""
    tables = []
    groups = grouped([row for row in rows if row.benchmark.startswith(PAPERS)], lambda row: row.benchmark)
    for benchmark in sorted(groups, key=_natural):
        cells = []
        for row in groups[benchmark]:
            what, ours = _measured(row)
            theirs = reading.finite(row.metrics.get("published"))
            difference = None if ours is None or theirs is None or not isfinite(ours) else ours - theirs
            numbers = (or_none(ours, number), or_none(theirs, number), or_none(difference, signed))
            at = (str(row.parameters.get("row", row.case)), str(row.parameters.get("column", row.contestant)))
            what_ran = ", ".join(str(row.parameters[key]) for key in ("model", "scale") if key in row.parameters)
            cells.append((*at, what_ran, what, *numbers))
        columns = ("row", "column", "model and scale", "number", "ours", "published", "difference")
        tables.append(Table(benchmark.removeprefix(PAPERS), columns, cells, groups[benchmark]))
    return Content(shown=tables)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts table 2 before table 10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _measured(row: Row) -> tuple[str, float | None]:
    """The number of the table: perplexity or accuracy, or else the first that is not the published one."""
    names: list[str] = [name for name in ("perplexity", "accuracy") if name in row.metrics]
    names += [name for name in row.metrics if name != "published"]
    return (names[0], row.metrics[names[0]]) if names else ("–", None)


def other(rows: Sequence[Row]) -> Content:
    """What no section above shows."""
    shown = {id(row) for section in SECTIONS for row in section.build(rows).rows}
    left = [row for row in rows if id(row) not in shown]
    cells = [(*reading.name(row), ", ".join(f"{key} {value}" for key, value in _all(row).items())) for row in left]
    return Content(numbers=Table("All other rows", (*reading.NAME, "numbers"), cells, left))


def _all(row: Row) -> dict[str, str]:
    """Every number of a row."""
    found = {f"{key} seconds": value for key, value in row.seconds.items()}
    rates = {"speed-up": row.speedup, "tokens/s": row.tokens_per_s, "GB/s": row.gb_per_s, "TFLOP/s": row.tflop_per_s}
    found |= {key: value for key, value in rates.items() if value is not None}
    found |= row.metrics
    return {key: number(value) if isinstance(value, int | float) else str(value) for key, value in found.items()}


SECTIONS = (
    Section(
        "speed-up",
        "Speed-up",
        "Each case's contestants against its baseline, at 1×: a bar to the right is faster, one to the left slower. "
        "What gives another result than the reference is never timed.",
        "No row has a speed-up: trisparse bench run select linear prune",
        speed_up,
    ),
    Section(
        "tokens",
        "Tokens per second",
        "Whole models; the baseline is gray.",
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
        "Contestants of one case. The line is the edge of what was reached: no other is faster and better at once.",
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
        "Rate over arithmetic intensity. Filled points were measured; hollow points are bounds, counted or computed, "
        "not measured. A CPU's roof is measured in the same run, and what stays in its caches may exceed it.",
        "No row has an arithmetic intensity and a rate: trisparse bench run linear roofline",
        roofline,
    ),
    Section(
        "papers",
        "The papers' tables",
        "Ours beside the published numbers, which stand only where the paper's model ran.",
        "No row is of a paper's table: trisparse bench run papers/",
        papers,
    ),
)
OTHER = Section("other", "Other numbers", "Rows that no section above shows.", "", other)
