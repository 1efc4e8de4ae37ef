"""The command retrain."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from trisparse.cli.options import AsJson, Folder, SeqLen, app, load_model, show

Config = Annotated[
    Path | None, typer.Option(help="YAML file of settings (PERPConfig's fields); options given here win over it.")
]


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _rate(text: str | None) -> float | str | None:
    if text is None or text == "grid":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"learning_rate must be a number above 0 or 'grid', got {text!r}") from None


@app.command()
def retrain(
    folder: Folder,
    data: Annotated[str | None, typer.Option(help="Text to train on; see 'trisparse eval --help'.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the result, or an earlier result to replace.")
    ] = None,
    config: Config = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would train, memory and steps; stop.")] = False,
    groups: Annotated[
        str | None,
        typer.Option(help="perp, linear-probing, norms, biases, full; or with commas: biases,norms,head,lora."),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="mask_lora, scale_lora, lora_prune, lora.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA adapters.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scaling of the LoRA adapters is alpha / rank.")] = None,
    targets: Annotated[str | None, typer.Option(help="Layers that get a LoRA: shell patterns, with commas.")] = None,
    merge: Annotated[
        bool | None, typer.Option("--merge/--no-merge", help="Merge the adapters, or save them alone (PEFT's folder).")
    ] = None,
    learning_rate: Annotated[str | None, typer.Option(help="Peak of AdamW's, or 'grid': tries several.")] = None,
    learning_rates: Annotated[str | None, typer.Option(help="The grid, with commas.")] = None,
    grid_steps: Annotated[int | None, typer.Option(help="Steps with each rate of the grid.")] = None,
    validation: Annotated[str | None, typer.Option(help="Held-out text, for the loss before and after.")] = None,
    validation_windows: Annotated[int, typer.Option(help="Windows of it.")] = 100,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per forward pass, on each device.")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Forward passes per step.")] = None,
    seq_len: SeqLen = None,
    warmup_ratio: Annotated[float | None, typer.Option(help="Share of the steps in which the rate rises.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Clipping of the gradient; 0 turns it off.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory, slower.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for checkpoints.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    save_total_limit: Annotated[int | None, typer.Option(help="Checkpoints that stay: the last 2, by default.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume/--no-resume", help="Go on from the last checkpoint in --output-dir.")
    ] = None,
    guard_every: Annotated[int | None, typer.Option(help="Check the masks after every so many steps.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Dense model to distil from: an id or a folder.")] = None,
    distillation_weight: Annotated[float | None, typer.Option(help="The teacher's share of the loss.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature of the distillation.")] = None,
    report_to: Annotated[str | None, typer.Option(help="wandb, tensorboard or others of Trainer's.")] = None,
    sharding: Annotated[
        str | None, typer.Option(help="Of several processes: none (DDP), or fsdp (each holds its part of the weights).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default the process's GPU, if any.")] = None,
    as_json: AsJson = False,
) -> None:
    """Retrain a pruned model the PERP way: under 1% of the parameters of a large model, every zero kept.

    Under torchrun or accelerate launch, several processes train together and the first one saves.
    """
    import torch

    from trisparse.cli.config_file import read_settings
    from trisparse.retrain.estimate import retraining_plan
    from trisparse.retrain.groups import PRESETS
    from trisparse.retrain.perp import PERPConfig
    from trisparse.retrain.perp import retrain as perp
    from trisparse.retrain.processes import chosen_sharding, is_main_process, leave, local_device
    from trisparse.sparsity.checkpoint import check_output, read_info, save
    from trisparse.sparsity.data import token_windows
    from trisparse.sparsity.text import load_text

    rates = _words(learning_rates)
    given: dict[str, Any] = {
        "groups": groups if groups in PRESETS else _words(groups),
        "variant": variant,
        "rank": rank,
        "alpha": alpha,
        "targets": _words(targets),
        "merge": merge,
        "learning_rate": _rate(learning_rate),
        "learning_rates": None if rates is None else tuple(_rate(rate) for rate in rates),
        "grid_steps": grid_steps,
        "steps": steps,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "seq_len": seq_len,
        "warmup_ratio": warmup_ratio,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "gradient_checkpointing": gradient_checkpointing,
        "dtype": dtype,
        "seed": seed,
        "output_dir": output_dir,
        "save_steps": save_steps,
        "save_total_limit": save_total_limit,
        "resume": resume,
        "guard_every": guard_every,
        "distillation_weight": distillation_weight,
        "temperature": temperature,
        "report_to": _words(report_to),
        "sharding": sharding,
    }
    settings = {} if config is None else read_settings(config, PERPConfig)
    options = PERPConfig(**settings | {name: value for name, value in given.items() if value is not None})
    options = dataclasses.replace(options, sharding=chosen_sharding(options.sharding))
    read_info(folder)
    where = local_device() if device is None else torch.device(device)
    if options.sharding == "fsdp":
        if device is not None:
            raise ValueError(f"--device {device} has no effect with sharding='fsdp': each process takes its own GPU")
        where = torch.device("cpu")  # the parts go to the GPU, which may not hold all
    if not dry_run and (data is None or out is None):
        raise ValueError("retrain needs --data and --out (only --dry-run does without them)")
    if out is not None:
        check_output(out)
    text = None if dry_run or data is None else load_text(data, split="train")
    held_out = None if dry_run or validation is None else load_text(validation, split="validation")
    loaded, tokenizer, recipe = load_model(str(folder))
    loaded.to(where)
    dense = None if teacher is None else load_model(teacher)[0].to(where)
    if dry_run:
        plan = retraining_plan(loaded, options, teacher=dense, validation=validation)
        if is_main_process():
            show(plan.to_dict(), str(plan), as_json)
        return
    if held_out is not None:
        held_out = token_windows(held_out, tokenizer=tokenizer, seq_len=options.seq_len, samples=validation_windows)
    report = perp(loaded, text, options, tokenizer=tokenizer, validation=held_out, teacher=dense)
    content = report.to_dict()
    used = {k: v for k, v in dataclasses.asdict(options).items() if k not in ("output_dir", "report_to", "resume")}
    step = {k: content[k] for k in ("learning_rate", "batch", "tokens", "trainable_share", "seconds")}
    step |= {k: content[k] for k in ("first_loss", "last_loss", "validation_loss")}
    record = {"step": "retrain", "data": data, "validation": validation, "teacher": teacher, **used, **step}
    if is_main_process():
        assert out is not None
        if report.peft_model is None:
            save(loaded, out, tokenizer=tokenizer, recipe=[*recipe, record])
        else:
            report.peft_model.save_pretrained(str(out), save_embedding_layers=False)
        show(content | {"out": str(out)}, f"{report}\nsaved to {out}", as_json)
    leave()
