"""The command bench report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trisparse.cli.options import bench


@bench.command()
def report(
    rows: Annotated[
        list[Path] | None,
        typer.Argument(help="Files of rows (.jsonl), or folders of them; default bench/results/runs."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for index.html and the PNGs.")] = Path("bench-report"),
    dirty: Annotated[bool, typer.Option("--dirty", help="Report bench/results/dirty, rows of changed code.")] = False,
    png: Annotated[bool, typer.Option(help="Write each chart as a PNG, too; needs matplotlib.")] = True,
) -> None:
    """Show the newest row of each benchmark's cases on one HTML page that opens without a network."""
    from trisparse.bench.report.page import write_report
    from trisparse.bench.rows import newest, read_rows

    if rows and dirty:
        raise ValueError("--dirty is for bench/results/dirty: leave it out where files or folders are named")
    files = [file for path in rows or [_default(dirty)] for file in _row_files(path)]
    written = write_report(newest(read_rows(*files)), out, png=png)
    more = f" and {len(written) - 1} PNGs" if png else ""
    print(f"wrote {written[0]}{more}")


def _default(dirty: bool) -> Path:
    """Where the runner puts rows."""
    from trisparse.bench.rows import RESULTS
    from trisparse.bench.runner import OUTSIDE
    from trisparse.env import checkout

    root = checkout()
    return OUTSIDE if root is None else root / RESULTS / ("dirty" if dirty else "runs")


def _row_files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise ValueError(f"there are no rows at {path}: run trisparse bench run first, or name files of rows")
        return [path]
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{path} holds no rows (*.jsonl): run trisparse bench run first, or name files of rows")
    return files
