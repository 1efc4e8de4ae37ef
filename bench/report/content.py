"""What a section of the report holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trisparse.bench.report.charts import Chart
from trisparse.bench.rows import Row


@dataclass(frozen=True)
class Table:
    """Cells of text; the first ``text`` columns are words, the others numbers. ``rows`` name each line's row."""

    caption: str
    columns: Sequence[str]
    cells: Sequence[Sequence[str]]
    text: int
    rows: Sequence[Row] = ()


@dataclass(frozen=True)
class Content:
    """Charts, tables that are shown, a table of all numbers, and remarks. Nothing of it where there are no rows."""

    charts: Sequence[Chart] = ()
    shown: Sequence[Table] = ()
    numbers: Table | None = None
    remarks: Sequence[str] = field(default=())

    @property
    def rows(self) -> list[Row]:
        """The rows that went into it."""
        return [row for table in (*self.shown, *([self.numbers] if self.numbers else [])) for row in table.rows]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        key: anchor, and the first word of its PNGs' names.
        title, lead: heading, and a line on how to read it.
        missing: the line that stands where no row belongs here.
        build: from the rows to the content.
    """

    key: str
    title: str
    lead: str
    missing: str
    build: Callable[[Sequence[Row]], Content]


def file_name(*parts: str) -> str:
    """The parts as the name of a file: ``speed-up-select-cpu``."""
    return "-".join(re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-.") for part in parts if part)
