"""The commands prune and inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trisparse.cli.options import (
    AsJson,
    Folder,
    Model,
    Out,
    RecoverMasks,
    Seed,
    SeqLen,
    app,
    load_model,
    local_models,
    locate_model,
    show,
    typed_command,
)


@app.command()
def prune(
    model: Model,
    out: Out,
    sparsity: Annotated[
        str, typer.Option(help="50%, '50% balanced', '50% layer', '50% global', '50% rows' or N:M such as 2:4.")
    ] = "2:4",
    method: Annotated[
        str, typer.Option(help="auto, sparsegpt, a metric's name, an expression or a JSON file: 'trisparse metrics'.")
    ] = "auto",
    data: Annotated[str | None, typer.Option(help="Calibration data; see 'trisparse eval --help'.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seq_len: SeqLen = None,
    sampling: Annotated[
        str, typer.Option(help="windows of the joined text, or documents: a place in random long rows, as Wanda on C4.")
    ] = "windows",
    include: Annotated[list[str] | None, typer.Option(help="Weights to prune (shell pattern; repeatable).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Weights to leave out (shell pattern; repeatable).")] = None,
    propagate: Annotated[str, typer.Option(help="block, dense or linear.")] = "block",
    allocation: Annotated[
        str | None,
        typer.Option(
            help="How the sparsity is spread over the layers: uniform, uniform+, global, erk, lamp, owl or with "
            "parameters owl:M=5,lambda=0.08, or a YAML/JSON file of name patterns and sparsities."
        ),
    ] = None,
    gradients: Annotated[
        Path | None, typer.Option(help="File of gradient norms for a metric that reads G; else measured, then cached.")
    ] = None,
    update: Annotated[
        str | None, typer.Option(help="Update the kept weights (OBS): sequential or iterative; sparsegpt always does.")
    ] = None,
    damping: Annotated[float, typer.Option(help="Of the update's Hessians, a share of their mean diagonal.")] = 0.01,
    dtype: Annotated[str, typer.Option(help="Of calibration: auto (bf16 where it is fast), fp32 or bf16.")] = "auto",
    stream: Annotated[
        bool, typer.Option(help="Hold one block at a time, from disk to disk; the same command goes on after a crash.")
    ] = False,
    hidden_states: Annotated[
        str, typer.Option(help="With --stream: memory or disk, where calibration keeps what flows between the blocks.")
    ] = "memory",
    recover: RecoverMasks = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Prune a model and save it with its masks. Under torchrun, the processes share the calibration data."""
    import torch

    from trisparse.sparsity.checkpoint import check_output, save
    from trisparse.sparsity.distributed import launched_processes, own_device
    from trisparse.sparsity.text import load_text

    check_output(out, sources=local_models(model))
    if hidden_states != "memory" and not stream:
        raise ValueError("--hidden-states needs --stream")
    if recover and stream:
        raise ValueError("--recover-masks does not go with --stream: 'trisparse export --to trisparse' does it first")
    dtypes = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
    text = None if data is None else load_text(data, split="calibration")
    with launched_processes() as processes:
        options: dict[str, Any] = {
            "include": include,
            "exclude": exclude,
            "samples": samples,
            "seq_len": seq_len,
            "seed": seed,
            "sampling": sampling,
            "propagate": propagate,
            "gradients": gradients,
            "allocation": allocation,
            "dtype": dtypes[dtype],
            "update": update,
            "damping": damping,
            "distributed": processes.count > 1,
            "progress": processes.is_first,
        }
        if stream:
            from trisparse.sparsity.hardware import free_memory_at_once
            from trisparse.sparsity.streaming.stream import stream_sparsify

            free_memory_at_once()
            folder, tokenizer = locate_model(model)
            record = {"data": data, "command": typed_command()}
            options |= {"hidden_states": hidden_states, "recipe": record, "tokenizer": tokenizer}
            report = stream_sparsify(folder, out, sparsity, method, text, **options)
        else:
            from trisparse.sparsity.sparsify import sparsify

            loaded, tokenizer, recipe = load_model(model, recover=recover)
            if processes.count > 1:
                loaded.to(own_device())
            report = sparsify(loaded, sparsity, method, text, tokenizer=tokenizer, **options)
        content = report.to_dict()
        if not processes.is_first:
            return
        if not stream:
            done = ("pattern", "method", "allocation", "propagate", "update", "samples", "tokens", "sparsity")
            step: dict[str, Any] = {"step": "prune", "data": data, "seed": seed}
            step |= {key: content[key] for key in (*done, "seconds")}
            if report.update is not None:
                step |= {"damping": damping}
            if data is not None and sampling != "windows":
                step |= {"sampling": sampling}
            if dtype != "auto":
                step |= {"dtype": dtype}
            step["command"] = typed_command()
            save(loaded, out, tokenizer=tokenizer, recipe=[*recipe, step])
    show(content | {"out": str(out)}, f"{report}\nsaved to {out}", as_json)


@app.command()
def inspect(folder: Folder, as_json: AsJson = False) -> None:
    """Show and check the masks of a checkpoint: loads it, verifies the hash and that every pruned weight is zero.

    Of a folder that others wrote, show the pattern of the zeros of each weight.
    """
    from trisparse.sparsity.checkpoint import ADAPTERS_FILE, is_checkpoint, load, read_info
    from trisparse.sparsity.report import describe_masks

    if folder.is_dir() and not is_checkpoint(folder) and not (folder / ADAPTERS_FILE).is_file():
        _inspect_foreign(folder, as_json)
        return

    info = read_info(folder)
    model = load(folder)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    text = (
        f"{describe_masks(model)}\nmasks verified, sha256 {info['masks_sha256']}\n{size / 2**20:,.1f} MiB in the folder"
    )
    for step in info["recipe"]:
        text += "\n" + ", ".join(f"{k} {v}" for k, v in step.items() if v is not None)
    show({**info, "verified": True, "bytes": size}, text, as_json)


def _inspect_foreign(folder: Path, as_json: bool) -> None:
    from trisparse.sparsity.foreign.compressed_tensors import sparse_format
    from trisparse.sparsity.foreign.survey import describe_survey, survey

    named = sparse_format(folder)
    rows = survey(folder)
    if named is not None:
        note = f"compressed-tensors {named}: every command takes the folder, with these masks"
    else:
        note = "a dense checkpoint, which has no masks: --recover-masks takes them from its zeros"
    content = {"format": named or "dense", "weights": [row.to_dict() for row in rows]}
    show(content, f"{describe_survey(rows)}\n{note}", as_json)
