"""``trisparse retrain``: PERP on a pruned language model."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from trisparse.cli.config_file import section_of
from trisparse.cli.options import check_pruned, load_model, show, typed_command
from trisparse.cli.retrain_job import COMMON, HELD_OUT, RECOVER, Job, unused, used_settings, with_groups


def section() -> dict[str, Any]:
    """What a YAML file of this form may hold."""
    from trisparse.retrain.perp import PERPConfig

    return {**section_of(PERPConfig), **COMMON, **RECOVER, **HELD_OUT, "teacher": "str | None"}


def perp_config(settings: dict[str, Any]) -> Any:
    """The PERPConfig of ``settings``."""
    from trisparse.retrain.groups import GROUPS, PRESETS
    from trisparse.retrain.perp import PERPConfig

    return PERPConfig(**with_groups(settings, PRESETS, GROUPS))


def with_sharding(options: Any, job: Job) -> tuple[Any, Any]:
    """``options`` with the sharding that the launcher chose, and the device that the whole model is put on.

    Raises:
        ValueError: the launcher asks for what is not supported, or a device was given for parts that choose their own.
    """
    import torch

    from trisparse.retrain.processes import chosen_sharding

    options = dataclasses.replace(options, sharding=chosen_sharding(options.sharding))
    if options.sharding == "none":
        return options, job.where()
    if job.device is not None:
        raise ValueError(f"device={job.device} has no effect with sharding='fsdp': each process takes its own GPU")
    return options, torch.device("cpu")  # the parts go to the GPU, which may not hold all


def tell_resume(options: Any) -> None:
    """Say on standard error that a run which may go on has nothing to go on from: its folder may be a slip."""
    from trisparse.retrain.cycles_journal import JOURNAL
    from trisparse.retrain.processes import is_main_process
    from trisparse.retrain.run_folder import checkpoints

    folder = Path(str(options.output_dir))
    if options.resume == "auto" and is_main_process() and not checkpoints(folder) and not (folder / JOURNAL).is_file():
        print(f"no complete checkpoint in {folder} yet: starting anew", file=sys.stderr)


def run(job: Job) -> None:
    """Retrain ``job.model``, or print what that would take."""
    from trisparse.retrain.adapter_folder import save_adapters
    from trisparse.retrain.estimate import retraining_plan
    from trisparse.retrain.perp import retrain
    from trisparse.retrain.processes import is_main_process
    from trisparse.sparsity.checkpoint import save
    from trisparse.sparsity.data import token_windows
    from trisparse.sparsity.perplexity import perplexity_of
    from trisparse.sparsity.text import load_text

    settings = dict(job.settings)
    teacher = settings.pop("teacher", None)
    options = perp_config(settings)
    options, where = with_sharding(options, job)
    check_pruned(job.model, recover=job.recover_masks)
    job.check(options.output_dir, options.report_to)
    if job.recover_masks and not options.merge:
        raise ValueError("--no-merge needs a base with masks: 'trisparse export --to trisparse' recovers them first")
    tell_resume(options)
    text = None if job.dry_run or job.data is None else load_text(job.data, split="train")
    held_out = None if job.dry_run or job.validation is None else load_text(job.validation, split="validation")
    model, tokenizer, recipe = load_model(job.model, recover=job.recover_masks)
    model.to(where)
    dense = None if teacher is None else load_model(teacher)[0].to(where)
    if job.dry_run:
        plan = retraining_plan(model, options, teacher=dense, validation=job.validation)
        if is_main_process():
            show(plan.to_dict(), str(plan), job.as_json)
        return
    if held_out is not None:
        held_out = token_windows(held_out, tokenizer=tokenizer, seq_len=options.seq_len, samples=job.validation_windows)
    report = retrain(model, text, options, tokenizer=tokenizer, validation=held_out, teacher=dense)
    if not is_main_process():
        return
    content = report.to_dict()
    record = {
        "step": "retrain",
        "data": job.data,
        "validation": job.validation,
        "teacher": teacher,
        **used_settings(options, dropped=unused(options, teacher=teacher is not None)),
        **{key: content[key] for key in ("learning_rate", "batch", "tokens", "trainable_share", "seconds")},
        **{key: content[key] for key in ("first_loss", "last_loss", "validation_loss")},
        "perplexity": None if report.validation_loss is None else perplexity_of(report.validation_loss[1]),
        "command": typed_command(),
    }
    assert job.out is not None
    if report.peft_model is None:
        save(model, job.out, tokenizer=tokenizer, recipe=[*recipe, record])
    else:
        save_adapters(report.peft_model, job.out, base=job.model, tokenizer=tokenizer, recipe=[*recipe, record])
    job.finished(content, str(report))
