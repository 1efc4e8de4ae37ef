"""The command export: a checkpoint in the form that other tools, or this one, read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trisparse.cli.options import AsJson, Out, RecoverMasks, app, show, typed_command

FORMS = ("dense", "semi-structured", "trisparse")


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(help="A checkpoint of trisparse, of compressed-tensors up to 0.14, or a dense one.")
    ],
    out: Out,
    to: Annotated[str, typer.Option(help=f"{', '.join(FORMS)}.")],
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; by default that of the files.")] = None,
    recover: RecoverMasks = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in another form: dense safetensors for every tool, torch's 2:4 tensors, or a trisparse one."""
    import torch

    from trisparse.sparsity.checkpoint import check_output
    from trisparse.sparsity.foreign.export import export_dense, export_trisparse, load_any
    from trisparse.sparsity.mask import masks

    dtypes = {None: None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if to == "compressed-tensors":
        raise ValueError(
            "compressed-tensors is not written: its releases since 0.15 have no sparse formats any more, and vLLM "
            "refuses a config with a sparsity_config. '--to dense' opens in every tool, and '--to trisparse' is small"
        )
    if to not in FORMS:
        raise ValueError(f"to must be one of {', '.join(FORMS)}, got {to!r}")
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of fp32, fp16, bf16, got {dtype!r}")
    check_output(out, sources=[folder])
    model, recipe = load_any(folder, dtype=dtypes[dtype], recover=recover)
    if recover:
        recipe[-1]["command"] = typed_command()
    content: dict[str, Any] = {"folder": str(folder), "to": to, "out": str(out), "masks": len(masks(model))}
    lines = []
    if to == "dense":
        export_dense(model, out, folder)
    elif to == "semi-structured":
        from trisparse.sparsity.foreign.semi_structured import save_semi_structured

        content["dense"] = save_semi_structured(model, out, source=folder)
        lines = [f"{name} stays dense: {reason}" for name, reason in content["dense"].items()]
    else:
        if not masks(model):
            raise ValueError(f"{folder} has no masks: --recover-masks takes them from its zeros")
        export_trisparse(model, out, folder, recipe)
    content["bytes"] = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    lines.append(f"{content['bytes'] / 2**20:,.1f} MiB in {out}")
    show(content, "\n".join(lines), as_json)
