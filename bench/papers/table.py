"""A paper's table: which cell belongs in which place, and the numbers that the paper has there.

    @paper_table("perp-table-1", "retraining methods by sparsity", models=("facebook/opt-2.7b",), metric="perplexity")
    def table_1(model: str, scale: Scale) -> Layout: ...

registers the table here and as the benchmark ``papers/perp-table-1``. The published numbers stand in
``published/PAPER.json``, by table, model, row and column.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from trisparse.bench.papers.cell import Cell
from trisparse.bench.papers.scale import Scale
from trisparse.bench.papers.store import CellStore

Place = tuple[str, str]  # row, column
Plot = Literal["lines", "dots", "matrix"]
Statistic = Literal["mean", "deviation"]

# Importing these registers their tables.
_MODULES = (
    "trisparse.bench.papers.perp_ablations",
    "trisparse.bench.papers.perp_criteria",
    "trisparse.bench.papers.perp_freezing",
    "trisparse.bench.papers.perp_retraining",
    "trisparse.bench.papers.perp_vision",
    "trisparse.bench.papers.pruner_zero_pruning",
    "trisparse.bench.papers.pruner_zero_search",
    "trisparse.bench.papers.pruner_zero_time",
)


@dataclass(frozen=True)
class Entry:
    """One number of a table.

    Attributes:
        cells: it is the mean over them, such as one for each seed.
        metric: of the cells.
        minus: cells whose mean is subtracted, for a table of differences.
        factor: it is multiplied by, such as 100 for per cent.
        statistic: "mean", or "deviation" for the standard deviation of the population over the cells instead.
    """

    cells: tuple[Cell, ...]
    metric: str = "perplexity"
    minus: tuple[Cell, ...] = ()
    factor: float = 1.0
    statistic: Statistic = "mean"

    def value(self, store: CellStore) -> float | None:
        """The number, or None where a cell is not measured yet, or found it undefined (NaN)."""
        own, subtracted = self._numbers(self.cells, store), self._numbers(self.minus, store)
        if own is None or subtracted is None:
            return None
        if self.statistic == "deviation":
            return self.factor * statistics.pstdev(own)
        difference = statistics.mean(own) - (statistics.mean(subtracted) if subtracted else 0.0)
        return None if math.isnan(difference) else self.factor * difference

    def deviation(self, store: CellStore) -> float | None:
        """Standard deviation over the cells, where there are several and all are measured."""
        own = self._numbers(self.cells, store)
        if own is None or len(own) < 2 or self.statistic == "deviation":
            return None
        return self.factor * statistics.stdev(own)

    def _numbers(self, cells: tuple[Cell, ...], store: CellStore) -> list[float] | None:
        known = [number for cell in cells if (number := store.metrics(cell).get(self.metric)) is not None]
        return known if len(known) == len(cells) else None


def entry(
    *cells: Cell,
    metric: str = "perplexity",
    minus: tuple[Cell, ...] = (),
    factor: float = 1.0,
    statistic: Statistic = "mean",
) -> Entry:
    """An :class:`Entry` of ``cells``."""
    return Entry(cells, metric, minus, factor, statistic)


@dataclass(frozen=True)
class Layout:
    """A table for one model at one scale.

    Attributes:
        entries: by (row, column), in the order of the table; labels are those of the published numbers.
        dense: the model before pruning, to relate perplexities to; None where that means nothing.
        notes: what a reader has to know: rows that the model cannot have, settings that the paper does not give.
        model: what was measured, if not the language model that was asked for.
        settings: how, if not as the scale says.
        other_task: what is measured in place of the paper's task, if it is another one; no difference is taken then.
    """

    entries: Mapping[Place, Entry]
    dense: Entry | None = None
    notes: tuple[str, ...] = ()
    model: str = ""
    settings: str = ""
    other_task: str = ""

    def every(self) -> Iterator[Entry]:
        """All entries, the dense one first."""
        if self.dense is not None:
            yield self.dense
        yield from self.entries.values()


@dataclass(frozen=True)
class PaperTable:
    """A registered table.

    Attributes:
        name: "perp-table-1".
        about: one line of help.
        models: of the paper; the first is what other models are set beside.
        run_on: models that the paper's scale runs it on where none is named; by default those of the paper.
        metric: what the numbers are, with their unit.
        layout: gives the cells of a model at a scale.
        plot: how it is drawn.
        log: whether the axis of the numbers is logarithmic.
    """

    name: str
    about: str
    models: tuple[str, ...]
    metric: str
    layout: Callable[[str, Scale], Layout]
    plot: Plot = "lines"
    log: bool = True
    run_on: tuple[str, ...] = ()

    def models_at(self, scale: Scale) -> tuple[str, ...]:
        """The models to run it on where none is named."""
        return (self.run_on or self.models) if scale.models else ("smollm2",)

    @property
    def paper(self) -> str:
        """ "perp" or "pruner-zero"."""
        return self.name.rsplit("-", 2)[0]

    @property
    def title(self) -> str:
        """ "PERP, Table 1"."""
        kind, number = self.name.rsplit("-", 2)[1:]
        return f"{published_paper(self.paper)['name']}, {kind.capitalize()} {number}"

    def published(self, model: str) -> Published | None:
        """The paper's numbers for ``model``, for the first of :attr:`models` if it has none, or None: a figure."""
        found = published_paper(self.paper)["tables"].get(self.name.removeprefix(f"{self.paper}-"))
        if found is None or not self.models:
            return None
        named = paper_name(model)
        whose = named if named in self.models else self.models[0]
        numbers = found["models"][whose]
        values = {(row, column): value for row, of in numbers["rows"].items() for column, value in of.items()}
        same = whose == named or found.get("any_model", False)
        return Published(whose, same, values, numbers.get("dense"))


@dataclass(frozen=True)
class Published:
    """A table's numbers in the paper.

    Attributes:
        model: of which they are.
        same_model: whether it is the one that was asked for.
        values: by (row, column).
        dense: of the model before pruning, where the table gives it.
    """

    model: str
    same_model: bool
    values: dict[Place, float] = field(default_factory=dict)
    dense: float | None = None


# Copies that need no licence to be accepted, by who publishes them, and whose the weights are.
_COPIES = {"NousResearch/Llama-2-": "meta-llama/Llama-2-"}


def paper_name(model: str) -> str:
    """What the papers' tables call ``model``: the original of which it is a copy, or itself."""
    for copy, original in _COPIES.items():
        if model.startswith(copy):
            return original + model.removeprefix(copy)
    return model


_TABLES: dict[str, PaperTable] = {}


def paper_table(
    name: str,
    about: str,
    *,
    models: tuple[str, ...],
    metric: str,
    plot: Plot = "lines",
    log: bool = True,
    run_on: tuple[str, ...] = (),
) -> Callable[[Callable[[str, Scale], Layout]], Callable[[str, Scale], Layout]]:
    """Register the decorated layout as table ``name``.

    Raises:
        ValueError: the name is taken.
    """

    def register(layout: Callable[[str, Scale], Layout]) -> Callable[[str, Scale], Layout]:
        if name in _TABLES:
            raise ValueError(f"table {name!r} is registered twice")
        _TABLES[name] = PaperTable(name, about, models, metric, layout, plot, log, run_on)
        return layout

    return register


def paper_tables() -> dict[str, PaperTable]:
    """All tables by name, in the order of their numbers."""
    for module in _MODULES:
        import_module(module)
    return {name: _TABLES[name] for name in sorted(_TABLES, key=_number)}


def find_tables(names: tuple[str, ...] | list[str]) -> list[PaperTable]:
    """The tables of ``names``: "perp-table-1", or "perp" for all of a paper.

    Raises:
        ValueError: a name that is neither, and what there is.
    """
    tables = paper_tables()
    found: dict[str, PaperTable] = {}
    for name in names:
        chosen = [table for table in tables.values() if name in (table.name, table.paper)]
        if not chosen:
            raise ValueError(f"no table {name!r}: there are {', '.join(tables)}, and all of a paper by its name")
        found |= {table.name: table for table in chosen}
    return list(found.values())


@cache
def published_paper(paper: str) -> dict[str, Any]:
    """``published/PAPER.json``: the paper's name and source, and its tables' numbers."""
    content: dict[str, Any] = json.loads((Path(__file__).parent / "published" / f"{paper}.json").read_text("utf-8"))
    return content


def _number(name: str) -> tuple[str, str, int, str]:
    paper, kind, number = name.rsplit("-", 2)
    digits = number.rstrip("abc")  # the panels of a figure
    return paper, kind, int(digits), number
