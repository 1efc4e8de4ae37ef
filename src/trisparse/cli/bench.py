"""The commands env, demo and those of bench."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trisparse.cli.options import AsJson, app, bench, load_model, show


@app.command()
def env(as_json: AsJson = False) -> None:
    """Print versions, device and CPU features: what a bug report needs."""
    from trisparse.env import environment

    found = environment()
    show(found, "\n".join(f"{key}: {_plain(value)}" for key, value in found.items()), as_json)


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
    show({"rows": rows, "cols": cols, "kernels": [asdict(row) for row in found]}, table(found), as_json)
    if any(row.problems() for row in found):
        raise typer.Exit(1)


@bench.command()
def tune(
    model: Annotated[str | None, typer.Option(help="Tune the layers of this pruned model.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="OUTxIN of a layer (repeatable); default Llama-2-7B's.")
    ] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="Its pattern (repeatable); default 2:4, 4:8, 50%.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    tokens: Annotated[
        list[int] | None, typer.Option(help="Token count (repeatable); default 1, 2, 4, ... 4096.")
    ] = None,
    rank: Annotated[
        list[int] | None, typer.Option(help="Rank of an adapter beside it (repeatable); default 0.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default cuda where there is one.")] = None,
    launches: Annotated[bool, typer.Option(help="First find the fastest launch configuration of every kernel.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Measure what was measured before, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure which backend runs compressed layers fastest on this device; compress() reads what it finds."""
    import torch

    from trisparse.bench.tune import LLAMA_2_7B, PATTERNS, as_table, layers_of, random_layers, tune_layers
    from trisparse.bench.tune_launches import tune_launches
    from trisparse.sparsity.tuning import TOKENS

    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype!r}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if model is not None:
        if shape or pattern:
            raise ValueError("--model has its own shapes and patterns: leave --shape and --pattern out")
        layers = list(layers_of(load_model(model)[0].to(where)))
    else:
        shapes = [_shape(text) for text in shape or ()] or LLAMA_2_7B
        layers = list(random_layers(shapes, pattern or PATTERNS, getattr(torch, dtype), where))
    if not layers:
        raise ValueError(f"{model} has no pruned linear layers: prune it first")
    how: dict[str, Any] = {"tokens": tokens or TOKENS, "ranks": rank or (0,)}
    found = tune_launches(layers, again=again, **how) if launches and where.type == "cuda" else []
    # Times of backends that were measured with other launch configurations no longer hold.
    result = {"launches": found, **tune_layers(layers, again=again or bool(found), **how)}
    show(result, as_table(result), as_json)


def _shape(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    if not (rows.isdecimal() and cols.isdecimal() and int(rows) and int(cols)):
        raise ValueError(f"shape must be OUTxIN such as 4096x11008, got {text!r}")
    return int(rows), int(cols)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)
