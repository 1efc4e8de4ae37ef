"""Measure the cells of tables, those that are not in the store yet, and set them beside the published numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trisparse.bench.models import model_label
from trisparse.bench.papers.cell import Cell, Session, device_name, machine_name
from trisparse.bench.papers.scale import Scale
from trisparse.bench.papers.store import CellStore, Record
from trisparse.bench.papers.table import Layout, PaperTable, Place, Published
from trisparse.bench.rows import RESULTS
from trisparse.bench.runner import OUTSIDE
from trisparse.env import checkout, environment

# Called before each cell with how many are done, how many there are, and the cell.
Progress = Callable[[int, int, Cell], None]


@dataclass(frozen=True)
class Comparison:
    """A table's numbers: ours, the paper's and what lies between.

    Attributes:
        table, layout, model, scale: what was measured; the model by its label.
        ours: by (row, column); None where a cell is not measured yet.
        deviations: over the seeds, where there are several.
        dense: of the model before pruning.
        published: the paper's, or None for a figure.
        records: of every cell that the numbers come from.
        fresh: how many of them were measured for it, and not read.
    """

    table: PaperTable
    layout: Layout
    model: str
    scale: Scale
    ours: dict[Place, float | None]
    deviations: dict[Place, float | None]
    dense: float | None
    published: Published | None
    records: dict[str, Record]
    fresh: int = 0

    def theirs(self, place: Place) -> float | None:
        """The paper's number there, or None."""
        return None if self.published is None else self.published.values.get(place)

    @property
    def comparable(self) -> bool:
        """Whether our numbers and the paper's are of the same task; of the same model is another question."""
        return self.published is not None and not self.layout.other_task

    def difference(self, place: Place) -> float | None:
        """Ours minus theirs; None where either is missing, or the task is another."""
        ours, theirs = self.ours.get(place), self.theirs(place)
        return None if ours is None or theirs is None or not self.comparable else ours - theirs

    @property
    def rows(self) -> list[str]:
        """Labels of the rows, in order."""
        return list(dict.fromkeys(row for row, _ in self.layout.entries))

    @property
    def columns(self) -> list[str]:
        """Labels of the columns, in order."""
        return list(dict.fromkeys(column for _, column in self.layout.entries))

    @property
    def seconds(self) -> float:
        """Wall time that its cells took, whenever they were measured."""
        return sum(record.seconds for record in self.records.values())


def papers_folder(out: Path | None = None) -> Path:
    """Where tables and cells go.

    That is ``out``, or bench/results/papers of the checkout, or of one with changed files bench/results/dirty/papers,
    which git ignores; ./bench-results/papers where there is no checkout.
    """
    if out is not None:
        return out
    root = checkout()
    if root is None:
        return OUTSIDE / "papers"
    return root / RESULTS / ("dirty/papers" if environment()["dirty"] else "papers")


def cells_file(folder: Path, paper: str) -> Path:
    """The store of one paper's cells in ``folder``."""
    return folder / f"cells-{paper}.jsonl"


def run_tables(
    tables: Sequence[PaperTable],
    model: str,
    scale: Scale,
    store: CellStore,
    session: Session,
    *,
    again: bool = False,
    progress: Progress | None = None,
) -> Iterator[Comparison]:
    """Measure and yield each of ``tables``, as soon as it is complete.

    Args:
        tables: to fill.
        model: ``smollm2``, a folder or a Hugging Face id.
        scale: how much of the paper.
        store: what is in it is not measured again, unless ``again``.
        session: where to run.
        again: measure every cell anew, once.
        progress: called before each cell.
    """
    scale = replace(scale, machine=machine_name(session.device))
    layouts = [table.layout(model, scale) for table in tables]
    wanted: dict[str, set[str]] = {}
    for layout in layouts:
        for one in layout.every():
            for cell in (*one.cells, *one.minus):
                wanted.setdefault(cell.key, set()).add(one.metric)
    fresh: set[str] = set()
    for table, layout in zip(tables, layouts, strict=True):
        cells = {cell.key: cell for one in layout.every() for cell in (*one.cells, *one.minus)}
        missing = [
            cell
            for key, cell in cells.items()
            if key not in fresh and (again or not wanted[key] <= store.metrics(cell).keys())
        ]
        for done, cell in enumerate(sorted(missing, key=lambda cell: cell.order)):
            if progress is not None:
                progress(done, len(missing), cell)
            # What another table asked for is measured along, so that its numbers are of the same run.
            names = frozenset(wanted[cell.key] | store.metrics(cell).keys())
            start = time.perf_counter()
            metrics = cell.measure(names, session)
            if lacking := wanted[cell.key] - metrics.keys():
                raise ValueError(f"a cell of {table.name} has no {', '.join(sorted(lacking))}: {cell.spec}")
            store.add(cell, metrics, time.perf_counter() - start, device_name(session.device))
            fresh.add(cell.key)
        yield replace(compare(table, layout, model, scale, store), fresh=len(missing))


def compare(table: PaperTable, layout: Layout, model: str, scale: Scale, store: CellStore) -> Comparison:
    """``table`` from what ``store`` has."""
    cells = {cell.key: cell for one in layout.every() for cell in (*one.cells, *one.minus)}
    records = {key: record for key, cell in cells.items() if (record := store.record(cell)) is not None}
    return Comparison(
        table,
        layout,
        layout.model or model_label(model),
        scale,
        {place: one.value(store) for place, one in layout.entries.items()},
        {place: one.deviation(store) for place, one in layout.entries.items()},
        None if layout.dense is None else layout.dense.value(store),
        table.published(model),
        records,
    )


def settings(scale: Scale) -> dict[str, Any]:
    """What ``scale`` says of texts and steps, for the head of a table."""
    return {name: value for name, value in vars(scale).items() if name not in ("keep_copies", "machine", "models")}
