"""The commands of bench that run registered benchmarks and compare what they recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trisparse.cli.options import AsJson, bench, command_line, show

_DTYPES = ("float32", "bfloat16", "float16")


@bench.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the benchmarks that `run` knows."""
    from trisparse.bench.registry import benchmarks

    known = {name: item.about for name, item in benchmarks().items()}
    width = max(map(len, known), default=0)
    show(known, "\n".join(f"{name:{width}}  {about}" for name, about in known.items()), as_json)


@bench.command()
def run(
    names: Annotated[
        list[str], typer.Argument(help="Names of `trisparse bench list`; `papers/` is all that begin so.")
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes and few repeats.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; default cuda where there is one and the benchmark measures it.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the benchmark's.")] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face id, folder or smollm2; default: its own.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed calls of each contestant; default: its own.")] = None,
    only: Annotated[str, typer.Option(help="Run the cases alone whose name contains this.")] = "",
    scale: Annotated[str | None, typer.Option(help="Of papers' tables: tiny, small or paper; default small.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the rows; default bench/results/runs, or dirty.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check, time and record benchmarks; exit code 1 if a contestant is wrong or a benchmark fails.

    --dtype, --model, --repeats and --scale are for the benchmarks that read them, and an error for others.
    """
    from dataclasses import asdict

    import torch

    from trisparse.bench.registry import Options
    from trisparse.bench.row_table import Progress, print_tables
    from trisparse.bench.runner import chosen
    from trisparse.bench.runner import run as run_benchmarks

    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    compute = None if dtype is None else getattr(torch, dtype)
    options = Options(quick, where, compute, model, repeats, only, scale or "small")
    flags: dict[str, object] = {
        "--quick": quick,
        "--device": device,
        "--dtype": dtype,
        "--model": model,
        "--repeats": repeats,
    }
    flags |= {"--only": only or None, "--scale": scale, "--out": out}
    command = command_line("bench", "run", *names, flags=flags)
    outcome = run_benchmarks(chosen(names, device), options, command=command, out=out, listener=Progress())
    if as_json:
        content = {"rows": [asdict(row) for row in outcome.rows], "errors": outcome.errors}
        print(json.dumps(content | {"files": list(map(str, outcome.files))}, indent=2))
    else:
        print_tables(outcome.rows)
        for file in outcome.files:
            print(f"rows appended to {file}")
    if outcome.errors:
        raise typer.Exit(1)


@bench.command()
def compare(
    before: Annotated[str, typer.Argument(help="A .jsonl file, a folder of them, a run id or a commit.")],
    after: Annotated[str, typer.Argument(help="Another one.")],
    fail_above: Annotated[
        float | None, typer.Option(help="Exit code 1 if anything is slower by more than this, and not by noise.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ratio of the times of each case and contestant that two sets of rows share."""
    from dataclasses import asdict

    from trisparse.bench.compare import as_table, find_rows
    from trisparse.bench.compare import compare as changes_of
    from trisparse.bench.row_table import print_table

    changes = changes_of(find_rows(before), find_rows(after))
    if as_json:
        print(json.dumps({"changes": [asdict(change) for change in changes]}, indent=2))
    else:
        print_table(as_table(changes))
    if fail_above is not None and any(change.ratio > fail_above and not change.noise for change in changes):
        raise typer.Exit(1)
