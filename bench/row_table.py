"""What a run prints: a line for each case as it ends, and a table for each benchmark."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trisparse.bench.rows import Row
from trisparse.bench.runner import Listener

_WIDE = 200


class Progress(Listener):
    """One line on standard error for each case and each error."""

    def case(self, benchmark: str, case: str, rows: Sequence[Row]) -> None:
        print(f"{benchmark}: {case}: {_line(rows)}", file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        print(f"error: {text}", file=sys.stderr, flush=True)


def _line(rows: Sequence[Row]) -> str:
    if not rows:
        return "nothing measured"
    parts = []
    for row in rows:
        if row.seconds:
            parts.append(f"{row.contestant} {duration(row.seconds['median'])}")
        elif row.tokens_per_s:
            parts.append(f"{row.contestant} {row.tokens_per_s:.4g} tokens/s")
        else:
            parts.append(row.contestant)
    return ", ".join(parts)


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each benchmark and kind, with the columns that any of its rows has."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.benchmark, row.kind), []).append(row)
    return [_table(name, kind, own) for (name, kind), own in groups.items()]


def print_tables(rows: Sequence[Row]) -> None:
    """Print them."""
    for table in tables(rows):
        print_table(table)


def print_table(table: Table) -> None:
    """Print it at the terminal's width, into a file as wide as it is."""
    console = Console() if sys.stdout.isatty() else Console(width=_WIDE)
    console.print(table)


def _table(name: str, kind: str, rows: Sequence[Row]) -> Table:
    title = f"{name} on {rows[0].device}"
    if kind == "bound":  # of a GPU that need not be there
        title = f"{name} on {rows[0].parameters.get('gpu', rows[0].device)} (bounds, not measured)"
    cells = [_cells(row) for row in rows]
    metrics = dict.fromkeys(key for row in rows for key in row.metrics)
    headings = [key for key in _COLUMNS if any(key in own for own in cells)] + list(metrics)
    table = Table(title=title, title_justify="left")
    table.add_column("case and contestant", overflow="fold", min_width=24)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    previous = ""
    for row, own in zip(rows, cells, strict=True):
        if row.case != previous:
            table.add_section()
            table.add_row(escape(row.case))
            previous = row.case
        numbers = own | {key: f"{value:.4g}" for key, value in row.metrics.items()}
        table.add_row("  " + escape(row.contestant), *(numbers.get(key, "") for key in headings))
    return table


_COLUMNS = ("min", "median", "p90", "speed-up", "GB/s", "TFLOP/s", "tokens/s", "of roofline")


def _cells(row: Row) -> dict[str, str]:
    cells = {key: duration(row.seconds[key]) for key in ("min", "median", "p90") if row.seconds}
    for heading, value, shape in (
        ("speed-up", row.speedup, "{:.2f}x"),
        ("GB/s", row.gb_per_s, "{:.3g}"),
        ("TFLOP/s", row.tflop_per_s, "{:.3g}"),
        ("tokens/s", row.tokens_per_s, "{:.4g}"),
        ("of roofline", row.roofline_share, "{:.0%}"),
    ):
        if value is not None:
            cells[heading] = shape.format(value)
    return cells


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} µs"
