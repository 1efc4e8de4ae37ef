"""Every paper's table as a benchmark ``papers/NAME``: a row for each number, with the published one beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trisparse.bench.papers.cell import Session
from trisparse.bench.papers.render import write
from trisparse.bench.papers.run import Comparison, cells_file, papers_folder, run_tables
from trisparse.bench.papers.scale import find_scale
from trisparse.bench.papers.store import CellStore
from trisparse.bench.papers.table import Entry, PaperTable, paper_tables
from trisparse.bench.registry import Measured, Options, Origin, Run, benchmark


def measured(found: Comparison) -> Iterator[Measured]:
    """A row for each number of a table, with the published one where it is of the same model and task.

    Shares and accuracies are in [0, 1], perplexities as they are. Where and when is that of the cells.
    """
    same = found.published is not None and found.published.same_model and found.comparable
    for place, one in found.layout.entries.items():
        value, theirs = found.ours[place], found.theirs(place)
        if value is None:
            continue
        name = "accuracy" if one.metric.endswith("accuracy") else one.metric
        metrics = {f"{name}_difference" if one.minus else name: value / one.factor}
        if same and theirs is not None:
            metrics["published"] = theirs / one.factor
        parameters: dict[str, Any] = {
            "table": found.table.name,
            "row": place[0],
            "column": place[1],
            "model": found.model,
            "scale": found.scale.name,
        }
        yield Measured(", ".join(place), parameters, {"ours": metrics}, origin=origin(found, one))


def origin(found: Comparison, one: Entry) -> Origin:
    """Where and when the last of a number's cells was measured.

    It counts as dirty where any of them does; ``commits`` are named where they are of several.
    """
    records = [found.records[cell.key] for cell in (*one.cells, *one.minus)]
    last = max(records, key=lambda record: record.time)
    environment = dict(last.environment)
    if any(record.environment.get("dirty") for record in records):
        environment["dirty"] = True
    commits = sorted({str(record.environment.get("commit")) for record in records})
    if len(commits) > 1:
        environment["commits"] = commits
    return Origin(last.device, last.time.replace("Z", "+00:00"), environment)


def _run(table: PaperTable) -> Run:
    def run(options: Options) -> Iterator[Measured]:
        scale = find_scale("tiny" if options.quick else options.scale)
        # In a folder of their own: all other files of lines there are rows.
        folder = papers_folder(None if options.out is None else options.out / "papers")
        store = CellStore(cells_file(folder, table.paper))
        session = Session(options.device, keep_copies=scale.keep_copies)
        for model in (options.model,) if options.model else table.models_at(scale):
            for found in run_tables([table], model, scale, store, session):
                if found.fresh:  # else the table is written, by the command that measured it
                    write(found, folder, options.command, picture=False)
                yield from (row for row in measured(found) if options.wants(row.name))

    return run


for _table in paper_tables().values():
    _about = f"{_table.title}: {_table.about}"
    benchmark(f"papers/{_table.name}", _about, devices=("cpu", "cuda"), takes=("model", "scale"))(_run(_table))
