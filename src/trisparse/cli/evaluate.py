"""The command eval: perplexity on a text, accuracy on tasks."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from trisparse.cli.options import AsJson, Model, Seed, app, load_model, show


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text for the perplexity: pydoc, wikitext2, c4 (with :SPLIT), a .txt/.jsonl/.parquet file, or a "
            "dataset id."
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window; windows do not overlap.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Read only so many tokens.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, with commas; zero-shot stands for the seven of Wanda and PERP."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Of each task, ask only so many questions.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question; else the task's own.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of task files (YAML) of your own; they are code that is run.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Of a task, questions in one forward.")] = 8,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let a task run metrics of the hub, or code that a model wrote.")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a model on a text, its accuracy on tasks, or both."""
    if data is None and tasks is None:
        raise ValueError("nothing to measure: pass --data for the perplexity, --tasks for the accuracy on tasks")
    text = None
    if data is not None:
        from trisparse.sparsity.text import load_text

        text = load_text(data, split="test")
    loaded, tokenizer, _ = load_model(model)
    result: dict[str, Any] = {"model": model, "trisparse": version("trisparse")}
    lines = []
    if data is not None:
        from trisparse.sparsity.perplexity import perplexity
        from trisparse.sparsity.progress import counting_bar
        from trisparse.sparsity.provenance import provenance

        with counting_bar("perplexity") as progress:
            value = perplexity(
                loaded, text, tokenizer=tokenizer, seq_len=seq_len, max_tokens=max_tokens, progress=progress
            )
        result |= provenance(loaded)
        result |= {"data": data, "seq_len": seq_len, "max_tokens": max_tokens, "perplexity": value}
        lines.append(f"perplexity {value:.3f}")
    if tasks is not None:
        from trisparse.sparsity.zero_shot import zero_shot

        report = zero_shot(
            loaded,
            tokenizer,
            tasks,
            limit=limit,
            num_fewshot=num_fewshot,
            include_path=include_path,
            batch_size=batch_size,
            seed=seed,
            trust_remote_code=trust_remote_code,
            progress=not as_json,
        )
        result["zero_shot"] = report.to_dict()
        lines.append(str(report))
    show(result, "\n".join(lines), as_json)
