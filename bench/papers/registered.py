"""Every paper's table as a benchmark ``papers/NAME``: a row for each number, with the published one beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trisparse.bench.papers.cell import Session
from trisparse.bench.papers.render import write
from trisparse.bench.papers.run import Comparison, cells_file, papers_folder, run_tables
from trisparse.bench.papers.scale import find_scale
from trisparse.bench.papers.store import CellStore
from trisparse.bench.papers.table import PaperTable, paper_tables
from trisparse.bench.registry import Measured, Options, Run, benchmark


def measured(found: Comparison) -> Iterator[Measured]:
    """A row for each number of a table, with the published one where it is of the same model and task.

    Shares and accuracies are in [0, 1], perplexities as they are.
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
        yield Measured(", ".join(place), parameters, {"ours": metrics})


def _run(table: PaperTable) -> Run:
    def run(options: Options) -> Iterator[Measured]:
        scale = find_scale("tiny" if options.quick else options.scale)
        folder = papers_folder()
        store = CellStore(cells_file(folder, table.paper))
        session = Session(options.device, keep_copies=scale.keep_copies)
        for model in (options.model,) if options.model else table.models_at(scale):
            for found in run_tables([table], model, scale, store, session):
                command = f"trisparse bench run papers/{table.name} --model {model} --scale {scale.name}"
                write(found, folder, command, picture=False)
                yield from (row for row in measured(found) if options.wants(row.name))

    return run


for _table in paper_tables().values():
    benchmark(f"papers/{_table.name}", f"{_table.title}: {_table.about}")(_run(_table))
