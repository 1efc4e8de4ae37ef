"""``trisparse retrain --form cycles``: prune and retrain in turns."""

from __future__ import annotations

from typing import Any

from trisparse.cli.config_file import section_of
from trisparse.cli.options import load_model, show, typed_command
from trisparse.cli.retrain_job import COMMON, HELD_OUT, RECOVER, Job, unused, used_settings
from trisparse.cli.retrain_perp import perp_config, tell_resume, with_sharding


def section() -> dict[str, Any]:
    """What a YAML file of this form may hold: CyclesConfig's fields, PERPConfig's below ``retraining``."""
    from trisparse.retrain.cycles import CyclesConfig
    from trisparse.retrain.freezing import GradualFreezing
    from trisparse.retrain.perp import PERPConfig

    nested = {
        "method": "str",
        "teacher": "str | None",
        "retraining": section_of(PERPConfig),
        "freezing": section_of(GradualFreezing),
    }
    own = {"sparsity": "str | float", "calibration": "str"}
    return {**section_of(CyclesConfig), **nested, **COMMON, **RECOVER, **HELD_OUT, **own}


def run(job: Job) -> None:
    """Prune and retrain ``job.model`` in cycles, or print what that would take."""
    from trisparse.retrain.cycles import CyclesConfig, prune_cycles
    from trisparse.retrain.freezing import GradualFreezing
    from trisparse.retrain.plans import cycles_plan
    from trisparse.retrain.processes import is_main_process
    from trisparse.sparsity.checkpoint import save
    from trisparse.sparsity.data import token_windows
    from trisparse.sparsity.pattern import parse_pattern
    from trisparse.sparsity.text import load_text

    settings = dict(job.settings)
    target, calibration = settings.pop("sparsity", None), settings.pop("calibration", None)
    teacher = settings.pop("teacher", None)
    if target is None:
        raise ValueError("cycles needs --sparsity: what should they reach?")
    pattern = parse_pattern(target)
    settings["retraining"] = perp_config(settings.get("retraining", {}))
    if "freezing" in settings:
        settings["freezing"] = GradualFreezing(**settings["freezing"])
    settings["retraining"], where = with_sharding(settings["retraining"], job)
    options = CyclesConfig(**settings)
    own = options.retraining
    job.check(own.output_dir, own.report_to)
    tell_resume(own)
    text = None if job.dry_run or job.data is None else load_text(job.data, split="train")
    calibrated = None if job.dry_run or calibration is None else load_text(calibration, split="calibration")
    held_out = None if job.dry_run or job.validation is None else load_text(job.validation, split="validation")
    model, tokenizer, recipe = load_model(job.model, recover=job.recover_masks)
    model.to(where)
    dense = None if teacher is None else load_model(teacher)[0].to(where)
    if job.dry_run:
        plan = cycles_plan(model, pattern, options, teacher=dense, validation=job.validation)
        if is_main_process():
            show(plan.to_dict(), str(plan), job.as_json)
        return
    if calibrated is not None:
        calibrated = token_windows(
            calibrated, tokenizer=tokenizer, seq_len=own.seq_len, samples=options.samples, seed=own.seed
        )
    if held_out is not None:
        held_out = token_windows(held_out, tokenizer=tokenizer, seq_len=own.seq_len, samples=job.validation_windows)
    report = prune_cycles(
        model, pattern, text, options, tokenizer=tokenizer, calibration=calibrated, validation=held_out, teacher=dense
    )
    if not is_main_process():
        return
    content = report.to_dict()
    used = used_settings(options, dropped=() if report.method != "magnitude" else ("samples", "propagate"))
    used["retraining"] = used_settings(own, dropped=unused(own, teacher=teacher is not None))
    record = {
        "step": "cycles",
        "data": job.data,
        "calibration": calibration,
        "validation": job.validation,
        "teacher": teacher,
        **used,
        **{key: content[key] for key in ("target", "method", "sparsity", "perplexity_before", "perplexity", "seconds")},
        "patterns": [cycle.pattern for cycle in report.cycles],
        "command": typed_command(),
    }
    assert job.out is not None
    save(model, job.out, tokenizer=tokenizer, recipe=[*recipe, record])
    job.finished(content, str(report))
