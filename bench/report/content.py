"""What a section of the report holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trisparse.bench.report.charts import Chart
from trisparse.bench.rows import Row


@dataclass(frozen=True)
class Table:
    """Lines of text cells, and of each line the row that it shows. The first four columns are words, others numbers."""

    caption: str
    columns: Sequence[str]
    cells: Sequence[Sequence[str]]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Content:
    """Charts, tables in their stead, a table of all numbers, and remarks; without any line where there are no rows."""

    charts: Sequence[Chart] = ()
    shown: Sequence[Table] = ()
    numbers: Table | None = None
    remarks: Sequence[str] = ()

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
    """The parts as the name of a file, ``speed-up-select-cpu``; the kind only where it is "bound"."""
    words = (re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-.") for part in parts if part != "measurement")
    return "-".join(filter(None, words))
