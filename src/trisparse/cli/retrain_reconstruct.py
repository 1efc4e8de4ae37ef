"""``trisparse retrain --form reconstruct``: each block of a pruned model fitted to the dense one's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trisparse.cli.config_file import section_of
from trisparse.cli.options import check_pruned, load_model, show, typed_command
from trisparse.cli.retrain_job import COMMON, RECOVER, Job, used_settings, with_groups


def section() -> dict[str, Any]:
    """What a YAML file of this form may hold."""
    from trisparse.retrain.reconstruct import ReconstructConfig

    return {**section_of(ReconstructConfig), **COMMON, **RECOVER, "dense": "str"}


def run(job: Job) -> None:
    """Reconstruct ``job.model``, or print what that would take."""
    from trisparse.retrain.groups import GROUPS, RECONSTRUCT_PRESETS
    from trisparse.retrain.plans import reconstruction_plan
    from trisparse.retrain.processes import process_count
    from trisparse.retrain.reconstruct import ReconstructConfig, reconstruct
    from trisparse.sparsity.checkpoint import save
    from trisparse.sparsity.text import load_text

    settings = with_groups(job.settings, RECONSTRUCT_PRESETS, GROUPS)
    dense = settings.pop("dense", None)
    options = ReconstructConfig(**settings)
    if process_count() > 1:
        raise ValueError(f"reconstruct runs in one process, got {process_count()}: start it without a launcher")
    if dense is None and not job.dry_run:
        raise ValueError("reconstruct needs --dense: the model before pruning")
    check_pruned(job.model, recover=job.recover_masks)
    job.check()
    text = None if job.dry_run or job.data is None else load_text(job.data, split="calibration")
    model, tokenizer, recipe = load_model(job.model, recover=job.recover_masks)
    model.to(job.where())
    if job.dry_run:
        plan = reconstruction_plan(model, options)
        show(plan.to_dict(), str(plan), job.as_json)
        return
    source = Path(dense) if Path(dense).is_dir() else load_model(dense)[0]
    report = reconstruct(model, source, text, options, tokenizer=tokenizer)
    content = report.to_dict()
    record = {
        "step": "reconstruct",
        "data": job.data,
        "dense": dense,
        **used_settings(options, dropped=() if "lora" in options.groups else ("rank", "alpha")),
        **{key: content[key] for key in ("error_before", "error_after", "trainable", "seconds")},
        "command": typed_command(),
    }
    assert job.out is not None
    save(model, job.out, tokenizer=tokenizer, recipe=[*recipe, record])
    job.finished(content, str(report))
