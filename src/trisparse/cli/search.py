"""The commands metrics, search and search-report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trisparse.cli.options import AsJson, Data, Model, Seed, app, load_model, show


@app.command()
def metrics(
    operations: Annotated[bool, typer.Option("--operations", help="List what an expression may use instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the pruning metrics, or the operations to write one with."""
    from trisparse.sparsity.metric.listing import list_metrics, list_operations

    rows, table = list_operations() if operations else list_metrics()
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    Console().print(table)


@app.command()
def search(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the log and the best metric; an earlier search there goes on.")],
    eval_data: Annotated[str | None, typer.Option(help="What perplexity is measured on, if not --data.")] = None,
    iterations: Annotated[int, typer.Option(help="Rounds of offspring.")] = 300,
    population: Annotated[int, typer.Option(help="Random metrics at the start.")] = 50,
    batch: Annotated[int | None, typer.Option(help="Offspring a round; with --workers ray also the actors.")] = None,
    strategy: Annotated[str, typer.Option(help="evolution or random.")] = "evolution",
    workers: Annotated[str, typer.Option(help="local, or ray (the cluster at $RAY_ADDRESS, or here).")] = "local",
    sparsity: Annotated[str, typer.Option(help="Share of each row that is pruned.")] = "50%",
    calibration_samples: Annotated[int, typer.Option(help="Calibration sequences, for X and G.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence and window.")] = 512,
    eval_windows: Annotated[int, typer.Option(help="Windows that perplexity is measured on.")] = 16,
    start_from: Annotated[str, typer.Option(help="Known metrics to start with, by name, comma between them.")] = "",
    operations: Annotated[str, typer.Option(help="published, or extended.")] = "published",
    mutation: Annotated[str, typer.Option(help="one-node or each-node.")] = "one-node",
    numbers: Annotated[float, typer.Option(help="Share of leaves that are numbers.")] = 0.0,
    race: Annotated[bool, typer.Option(help="Stop a metric that is surely not among the best.")] = True,
    time_limit: Annotated[float | None, typer.Option(help="Minutes after which no round begins; resumable.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Search the metric that prunes a model best (Pruner-Zero). Stopped, it goes on with the same command."""
    from trisparse.sparsity.search import SearchSettings
    from trisparse.sparsity.search import search as run_search
    from trisparse.sparsity.search.workers import default_batch
    from trisparse.sparsity.text import load_text

    settings = SearchSettings(
        population=population,
        iterations=iterations,
        batch=default_batch(workers) if batch is None else batch,
        strategy=strategy,  # type: ignore[arg-type]  # checked, as the two below
        sparsity=sparsity,
        mutation=mutation,  # type: ignore[arg-type]
        operations=operations,  # type: ignore[arg-type]
        numbers=numbers,
        start_from=tuple(name.strip() for name in start_from.split(",") if name.strip()),
        race=race,
        seed=seed,
    )
    calibration = load_text(data, split="calibration")
    evaluation = load_text(eval_data or data, split="validation")
    loaded, tokenizer, _ = load_model(model)
    result = run_search(
        loaded,
        calibration,
        evaluation,
        out=out,
        settings=settings,
        tokenizer=tokenizer,
        samples=calibration_samples,
        seq_len=seq_len,
        windows=eval_windows,
        workers=workers,  # type: ignore[arg-type]  # checked by search
        time_limit=None if time_limit is None else 60 * time_limit,
        name=model,
        progress=not as_json,
    )
    show(result.to_dict(), str(result), as_json)


@app.command("search-report")
def search_report(
    log: Annotated[Path, typer.Argument(help="log.jsonl of a search.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md and its figures.")],
    baseline: Annotated[Path | None, typer.Option(help="Log of a random search, to compare the convergence.")] = None,
    model: Annotated[str | None, typer.Option(help="Measure the sensitivity of the best metric on this model.")] = None,
    data: Annotated[str | None, typer.Option(help="With --model: calibration and evaluation data.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="What perplexity is measured on, if not --data.")] = None,
) -> None:
    """Show what a search found: convergence, best metrics, operations, and with --model their sensitivity.

    The sensitivity is kept in OUT/sensitivity.json, and drawn again from there without --model.
    """
    from trisparse.sparsity.search.analysis import read_history
    from trisparse.sparsity.search.report import write_report
    from trisparse.sparsity.search.sensitivity import metrics_to_compare, sensitivity
    from trisparse.sparsity.text import load_text

    history = read_history(log)
    measured = out / "sensitivity.json"
    if model is not None:
        if data is None:
            raise typer.BadParameter("--model needs --data, the text to calibrate and measure on")
        calibration = load_text(data, split="calibration")
        evaluation = load_text(eval_data or data, split="test" if eval_data is None else "validation")
        loaded, tokenizer, _ = load_model(model)
        windows, seq_len = history.header["data"]["windows"]
        found = sensitivity(
            loaded,
            metrics_to_compare(history),
            calibration,
            evaluation,
            tokenizer=tokenizer,
            seq_len=seq_len,
            windows=windows,
            include=history.header["model"]["targets"],
        )
        out.mkdir(parents=True, exist_ok=True)
        measured.write_text(json.dumps(found, indent=1) + "\n")
    results = json.loads(measured.read_text()) if measured.is_file() else None
    page = write_report(
        history, out, baseline=None if baseline is None else read_history(baseline), sensitivity=results
    )
    print(f"wrote {page}")
