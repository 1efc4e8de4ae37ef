"""The command bench papers: the papers' tables, ours beside theirs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from trisparse.cli.options import AsJson, bench, command_line


@bench.command()
def papers(
    tables: Annotated[
        list[str] | None,
        typer.Argument(help="Tables such as perp-table-1, or perp for all of a paper; none lists them."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Hugging Face id, folder or smollm2 (repeatable); at scale paper each table's own by default."
        ),
    ] = None,
    scale: Annotated[str, typer.Option(help="tiny, small (SmolLM2 on two cores) or paper.")] = "small",
    out: Annotated[Path | None, typer.Option(help="Folder for tables and measured cells.")] = None,
    resume: Annotated[bool, typer.Option(help="Reuse the cells that are in the folder; else measure all anew.")] = True,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default cuda where there is one.")] = None,
    images: Annotated[str, typer.Option(help="Of the vision figures: digits, or a folder of ImageNet.")] = "digits",
    picture: Annotated[bool, typer.Option(help="Draw each table (extra 'plot').")] = True,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Run nothing: list TABLE MODEL, this model where the paper has it, else the paper's own up to its "
            "size (7B where its name has none).",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run tables of the papers, and set them beside the published numbers: Markdown, JSON and a picture each.

    A run that was killed goes on where it was, and tables share what they have in common.
    """
    import torch

    from trisparse.bench.papers.cell import Cell, Session
    from trisparse.bench.papers.plan import plan as plan_of
    from trisparse.bench.papers.render import as_json as table_json
    from trisparse.bench.papers.render import markdown, write
    from trisparse.bench.papers.run import cells_file, papers_folder, run_tables
    from trisparse.bench.papers.scale import find_scale
    from trisparse.bench.papers.store import CellStore
    from trisparse.bench.papers.table import find_tables, paper_tables

    if plan is not None:
        planned, left_out = plan_of(find_tables(tables) if tables else list(paper_tables().values()), plan)
        if left_out:
            print(f"left out, all of their models are larger: {', '.join(left_out)}", file=sys.stderr)
        lines = "\n".join(f"{one.table} {one.model}" for one in planned)
        print(json.dumps([one._asdict() for one in planned]) if as_json else lines)
        return
    if not tables:
        known = paper_tables().values()
        if as_json:
            print(json.dumps([{"name": table.name, "title": table.title, "about": table.about} for table in known]))
        else:
            print("\n".join(f"{table.name:24} {table.about}" for table in known))
        return
    chosen, size = find_tables(tables), replace(find_scale(scale), images=images)
    folder = papers_folder(out)
    flags: dict[str, object] = {"--scale": scale, "--out": out, "--no-resume": not resume, "--device": device}
    flags |= {"--images": None if images == "digits" else images, "--no-picture": not picture}
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    session = Session(where, keep_copies=size.keep_copies)

    def tell(done: int, missing: int, cell: Cell) -> None:
        print(f"  cell {done + 1} of {missing}: {_brief(cell.spec)}", file=sys.stderr, flush=True)

    results = []
    for name in model or dict.fromkeys(name for table in chosen for name in table.models_at(size)):
        of_model = [table for table in chosen if model or name in table.models_at(size)]
        for paper in dict.fromkeys(table.paper for table in of_model):
            store = CellStore(cells_file(folder, paper))
            those = [table for table in of_model if table.paper == paper]
            for found in run_tables(those, name, size, store, session, again=not resume, progress=tell):
                command = command_line("bench", "papers", found.table.name, flags={"--model": name, **flags})
                files = write(found, folder, command, picture=picture)
                results.append(table_json(found, command))
                if not as_json:
                    print(markdown(found, command))
                    print(f"wrote {', '.join(map(str, files))}\n", flush=True)
    if as_json:
        print(json.dumps(results, indent=2))


def _brief(spec: dict[str, Any]) -> str:
    """A cell in one line: its model and what is done to it."""
    parts = [str(spec.get("model", spec["kind"]))]
    pruning, retraining = spec.get("pruning"), spec.get("retraining")
    if pruning:
        parts.append(f"{pruning['method']} {pruning['pattern']}")
    parts += [
        f"{name} {spec[name]}" for name in ("sparsity", "pattern", "cycles", "freezing", "groups") if spec.get(name)
    ]
    if retraining:
        parts.append(f"{'+'.join(retraining['groups'])} {retraining['steps']} steps")
    return ", ".join(parts)
