"""The command retrain: its options, and which form of retraining they are for."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from trisparse.cli.options import AsJson, app

FORMS = ("perp", "cycles", "reconstruct", "vision")

_perp = partial(typer.Option, rich_help_panel="perp, and cycles for each of their retrainings")
_trained = partial(typer.Option, rich_help_panel="what trains, and how")
_cycles = partial(typer.Option, rich_help_panel="--form cycles")
_reconstruct = partial(typer.Option, rich_help_panel="--form reconstruct")
_vision = partial(typer.Option, rich_help_panel="--form vision")

_NOT_SETTINGS = ("model", "form", "config", "dry_run", "as_json")


@app.command()
def retrain(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A checkpoint that trisparse wrote; for cycles and vision, any model's id or folder.")
    ],
    form: Annotated[str | None, typer.Option(help=f"{', '.join(FORMS)}; by default perp.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Text to train on, see 'trisparse eval --help'; or a folder of images[:SPLIT].")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the result, or an earlier result to replace.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings, as in docs/; options given here win over it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would train, memory and steps; stop.")] = False,
    validation: Annotated[
        str | None, typer.Option(help="Held-out data, like --data, to measure before and after.")
    ] = None,
    validation_windows: Annotated[int | None, typer.Option(help="Windows of a held-out text; 100.")] = None,
    recover_masks: Annotated[
        bool | None,
        typer.Option(
            "--recover-masks/--no-recover-masks",
            help="Take the masks of a dense model that others pruned from its zeros (not for vision).",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default the process's GPU, if any.")] = None,
    groups: Annotated[
        str | None,
        _trained(
            help="A preset, each with those before it: biases, norms, linear-probing (not for reconstruct), perp; or "
            "full. Or groups with commas: biases,norms,head,lora; only:norms is that group alone."
        ),
    ] = None,
    variant: Annotated[str | None, _trained(help="mask_lora, scale_lora, lora_prune, lora.")] = None,
    rank: Annotated[int | None, _trained(help="Rank of the LoRA adapters.")] = None,
    alpha: Annotated[float | None, _trained(help="Scaling of the LoRA adapters is alpha / rank.")] = None,
    targets: Annotated[
        str | None,
        _trained(help="Layers that get a LoRA: shell patterns, with commas. For reconstruct: dense or sparse."),
    ] = None,
    learning_rate: Annotated[
        str | None, _trained(help="Peak of AdamW's; for perp and cycles also 'grid': tries several.")
    ] = None,
    steps: Annotated[str | None, _trained(help="Optimizer steps; of each cycle, of each block.")] = None,
    batch_size: Annotated[int | None, _trained(help="Sequences or images per forward pass, on each device.")] = None,
    seq_len: Annotated[int | None, _trained(help="Tokens per sequence.")] = None,
    warmup_ratio: Annotated[float | None, _trained(help="Share of the steps in which the rate rises.")] = None,
    weight_decay: Annotated[float | None, _trained(help="AdamW's, or SGD's.")] = None,
    max_grad_norm: Annotated[float | None, _trained(help="Clipping of the gradient; 0 turns it off.")] = None,
    dtype: Annotated[str | None, _trained(help="auto, fp32, bf16 or fp16.")] = None,
    seed: Annotated[int | None, _trained(help="Seed of every random choice.")] = None,
    merge: Annotated[
        bool | None, _perp("--merge/--no-merge", help="Merge the adapters, or save them alone (PEFT's folder).")
    ] = None,
    learning_rates: Annotated[str | None, _perp(help="The grid, with commas.")] = None,
    grid_steps: Annotated[int | None, _perp(help="Steps with each rate of the grid.")] = None,
    gradient_accumulation: Annotated[int | None, _perp(help="Forward passes per step.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, _perp("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory, slower.")
    ] = None,
    output_dir: Annotated[str | None, _perp(help="Folder for checkpoints.")] = None,
    save_steps: Annotated[int | None, _perp(help="Steps between checkpoints.")] = None,
    save_total_limit: Annotated[int | None, _perp(help="Checkpoints that stay: the last 2, by default.")] = None,
    resume: Annotated[
        bool | None,
        _perp(
            "--resume/--no-resume",
            help="Go on from the last checkpoint in --output-dir; start anew where there is none yet.",
        ),
    ] = None,
    guard_every: Annotated[int | None, _perp(help="Check the masks after every so many steps.")] = None,
    teacher: Annotated[str | None, _perp(help="Dense model to distil from: an id or a folder.")] = None,
    distillation_weight: Annotated[float | None, _perp(help="The teacher's share of the loss.")] = None,
    temperature: Annotated[float | None, _perp(help="Temperature of the distillation.")] = None,
    report_to: Annotated[str | None, _perp(help="wandb, tensorboard or others of Trainer's, with commas.")] = None,
    sharding: Annotated[
        str | None, _perp(help="Of several processes: none (DDP), or fsdp (each holds its part of the weights).")
    ] = None,
    sparsity: Annotated[
        str | None, _cycles(help="What the cycles reach, as for 'trisparse prune'. For vision: prune first.")
    ] = None,
    cycles: Annotated[int | None, _cycles(help="How often to prune and retrain.")] = None,
    schedule: Annotated[
        str | None,
        _cycles(
            help="Of the sparsity: geometric, linear, cubic. For vision, of the learning rate: Linear, FT, LRW, SLR, "
            "CLR, LLR, ALLR."
        ),
    ] = None,
    method: Annotated[str | None, _cycles(help="How to prune, as for 'trisparse prune'.")] = None,
    calibration: Annotated[str | None, _cycles(help="Calibration text; by default --data.")] = None,
    samples: Annotated[int | None, _cycles(help="Calibration sequences; also of reconstruct.")] = None,
    propagate: Annotated[str | None, _cycles(help="block, dense or linear.")] = None,
    include: Annotated[str | None, _cycles(help="Weights to prune: shell patterns, with commas.")] = None,
    exclude: Annotated[str | None, _cycles(help="Weights to leave out: shell patterns, with commas.")] = None,
    freezing: Annotated[
        str | None, _cycles(help="freeze or unfreeze the pruned layers one after the other in each cycle.")
    ] = None,
    freezing_start: Annotated[str | None, _cycles(help="From which end: input or output.")] = None,
    freezing_stages: Annotated[int | None, _cycles(help="In how many stages.")] = None,
    allow_collapse: Annotated[
        bool | None, _cycles("--allow-collapse/--no-allow-collapse", help="Go on where a layer is wholly pruned.")
    ] = None,
    dense: Annotated[
        str | None,
        _reconstruct(help="The model before pruning: a folder, of which a block is read at a time, or an id."),
    ] = None,
    epochs: Annotated[int | None, _vision(help="Passes over the images.")] = None,
    peak: Annotated[
        float | None, _vision(help="Highest learning rate: of Linear, or of the training of the dense model.")
    ] = None,
    original_epochs: Annotated[int | None, _vision(help="Epochs of the training of the dense model.")] = None,
    milestones: Annotated[
        str | None, _vision(help="Epochs at which its rate fell by --gamma; else linear to 0.")
    ] = None,
    gamma: Annotated[float | None, _vision(help="Factor at each of them; 0.1.")] = None,
    rates: Annotated[str | None, _vision(help="All its rates, evenly spaced, instead of --peak.")] = None,
    change: Annotated[
        float | None, _vision(help="For ALLR: how much pruning changed, if neither --dense nor --sparsity can tell.")
    ] = None,
    momentum: Annotated[float | None, _vision(help="SGD's.")] = None,
    nesterov: Annotated[bool | None, _vision("--nesterov/--no-nesterov", help="Nesterov's momentum.")] = None,
    recalibrate: Annotated[
        bool | None, _vision("--recalibrate/--no-recalibrate", help="Measure the batch norms anew at the end.")
    ] = None,
    image_size: Annotated[
        int | None, _vision(help="Height and width; by default as the model's image processor says, else 224.")
    ] = None,
    mean: Annotated[str | None, _vision(help="Mean of each channel, with commas; as the processor says.")] = None,
    std: Annotated[str | None, _vision(help="Standard deviation of each; as the processor says.")] = None,
    augment: Annotated[
        bool | None, _vision("--augment/--no-augment", help="Random crops and flips to train on.")
    ] = None,
    num_workers: Annotated[int | None, _vision(help="Processes that load images.")] = None,
    as_json: AsJson = False,
) -> None:
    """Retrain a pruned model and keep every zero.

    perp trains under 1% of the parameters of a large language model. cycles prunes and retrains in turns. reconstruct
    fits each block to the dense one. vision is for image classifiers. Under torchrun or accelerate launch, several
    processes train together (perp, cycles and vision) and the first one saves.
    """
    given = {name: value for name, value in context.params.items() if value is not None and name not in _NOT_SETTINGS}
    if given.get("resume"):  # one command for the first launch of a job and for the next
        given["resume"] = "auto"
    try:
        _retrain(model, form, config, given, dry_run=dry_run, as_json=as_json)
    except ValueError as error:
        from trisparse.cli.retrain_job import as_options

        if spelled := as_options(str(error), set(context.params)):
            error.add_note(f"as options: {spelled}")
        raise


def _retrain(
    model: str, form: str | None, config: Path | None, given: dict[str, Any], *, dry_run: bool, as_json: bool
) -> None:
    from trisparse.cli.config_file import place_of, read_settings, read_yaml, with_options
    from trisparse.cli.retrain_job import Job
    from trisparse.retrain.processes import leave

    if form is None:
        form = "perp" if config is None else read_yaml(config).get("form", "perp")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    section = _of(form).section()
    for name in given:
        if place_of(name, section) is None:
            others = [other for other in FORMS if place_of(name, _of(other).section()) is not None]
            raise ValueError(f"--{name.replace('_', '-')} is for --form {' or '.join(others)}, not for {form}")
    settings = {} if config is None else read_settings(config, {"form": "str", **section})
    settings.pop("form", None)
    job = Job.of(model, with_options(settings, given.items(), section), dry_run=dry_run, as_json=as_json)
    _of(form).run(job)
    leave()


def _of(form: str) -> Any:
    """The module of ``form``: ``section()`` says what its YAML file may hold, ``run(job)`` does it."""
    return import_module(f"trisparse.cli.retrain_{form}")
