"""``trisparse retrain --form vision``: an image classifier on a folder of images, pruned here or before."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from trisparse.cli.config_file import section_of
from trisparse.cli.options import show, typed_command
from trisparse.cli.retrain_job import COMMON, Job, used_settings, with_groups

_PROCESSOR_FILE = "preprocessor_config.json"
_SCHEDULE = {
    "name": "str",
    "peak": "float",
    "original_epochs": "int",
    "milestones": "Sequence[int]",
    "gamma": "float",
    "rates": "Sequence[float]",
    "warmup_ratio": "float",
    "change": "float",
}
_IMAGES = {"image_size": "int", "mean": "Sequence[float]", "std": "Sequence[float]", "augment": "bool"}
_PRUNING = {"sparsity": "str | float", "include": "str | Sequence[str]", "exclude": "str | Sequence[str]"}


def section() -> dict[str, Any]:
    """What a YAML file of this form may hold."""
    from trisparse.retrain.vision import VisionConfig

    own = {**section_of(VisionConfig), "schedule": _SCHEDULE}
    return {**own, **COMMON, "validation": "str | None", "dense": "str", **_IMAGES, **_PRUNING}


def run(job: Job) -> None:
    """Retrain the classifier ``job.model``, or print what that would take."""
    from trisparse.retrain.groups import GROUPS, VISION_PRESETS
    from trisparse.retrain.plans import vision_plan
    from trisparse.retrain.processes import check_launcher, is_main_process
    from trisparse.retrain.schedule import pruning_change
    from trisparse.retrain.vision import VisionConfig, retrain_vision
    from trisparse.sparsity.checkpoint import save
    from trisparse.sparsity.mask import masks
    from trisparse.sparsity.pattern import parse_pattern
    from trisparse.sparsity.sparsify import sparsify

    settings = with_groups(job.settings, VISION_PRESETS, GROUPS)
    images = {name: settings.pop(name) for name in _IMAGES if name in settings}
    pruning = {name: settings.pop(name, None) for name in _PRUNING}
    dense, planned = settings.pop("dense", None), settings.pop("schedule", None)
    options = VisionConfig(**settings)
    if dense is not None and pruning["sparsity"] is not None:
        raise ValueError("dense is the model before pruning: leave it out where sparsity prunes the model here")
    pattern = None if pruning["sparsity"] is None else parse_pattern(pruning["sparsity"])
    if pattern is None and (pruning["include"] or pruning["exclude"]):
        raise ValueError("include and exclude need sparsity: they say which weights are pruned here")
    change = (planned or {}).get("change")
    # what is wrong with the schedule is said before anything is read
    told = pattern is not None or dense is not None
    schedule_of(planned, options.epochs, change=1.0 if told and change is None else change)
    check_launcher()
    if job.dry_run and job.data is None:
        raise ValueError("the dry run of vision needs --data: its number of images makes the steps")
    job.check()

    model, recipe = load_classifier(job.model)
    if pattern is not None and masks(model):
        raise ValueError(f"{job.model} is pruned already, and pruning anew may bring weights back: leave sparsity out")
    processor = _processor(job.model)
    transform = _transform(model, processor, images)
    assert job.data is not None
    train = _images(job.data, "train", transform)
    # a random part of an image is for training alone
    plain = dataclasses.replace(transform, augment=False)
    held_out = None if job.validation is None else _images(job.validation, "validation", plain)
    model.to(job.where())
    if pattern is not None:
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        include = pruning["include"] or "*"  # all but biases and norms, as in the paper (Appendix A.2)
        sparsify(model, pattern, "magnitude", include=include, exclude=pruning["exclude"], progress=False)
        change = pruning_change(before, model) if change is None else change
    elif dense is not None and change is None:
        change = pruning_change(load_classifier(dense)[0].to(job.where()), model)
    schedule = schedule_of(planned, options.epochs, change=change)
    options = dataclasses.replace(options, **({} if schedule is None else {"schedule": schedule}))
    if job.dry_run:
        plan = vision_plan(model, train, options)
        if is_main_process():
            show(plan.to_dict(), str(plan), job.as_json)
        return
    report = retrain_vision(model, train, options, validation=held_out)
    if not is_main_process():
        return
    content = report.to_dict()
    used = used_settings(options, dropped=() if "lora" in content["trainable"] else ("variant", "rank", "alpha"))
    used["schedule"] = f"{type(options.schedule).__name__} from {options.schedule.at(0, 1):g}"
    step = {key: content[key] for key in ("steps", "trainable_share", "recalibrated", "accuracy", "seconds")}
    record = {"step": "vision", "data": job.data, "validation": job.validation, **used, "change": change, **step}
    record["command"] = typed_command()
    if pattern is not None:
        recipe = [*recipe, {"step": "prune", "pattern": str(pattern), "method": "magnitude"}]
    assert job.out is not None
    save(model, job.out, recipe=[*recipe, record])
    if processor:
        (job.out / _PROCESSOR_FILE).write_text(json.dumps(processor, indent=2) + "\n")
    job.finished(content, str(report))


def load_classifier(model: str) -> tuple[Any, list[dict[str, Any]]]:
    """An image classifier and its recipe so far: a checkpoint of ours with its masks, or any of transformers'.

    Raises:
        ValueError: the model is none.
    """
    from transformers import AutoModelForImageClassification

    from trisparse.sparsity.checkpoint import is_checkpoint, load, read_info
    from trisparse.sparsity.progress import quiet_transformers

    if is_checkpoint(model):
        loaded, recipe = load(model), read_info(model)["recipe"]
    else:
        with quiet_transformers():
            dense = AutoModelForImageClassification.from_pretrained(model, trust_remote_code=False)
            loaded, recipe = dense.eval(), []
    if getattr(loaded, "main_input_name", None) != "pixel_values":
        raise ValueError(f"{model} is a {type(loaded).__name__} and no image classifier: leave --form vision out")
    return loaded, recipe


def _processor(model: str) -> dict[str, Any]:
    """The config of the model's image processor, or an empty one where it has none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return dict(ImageProcessingMixin.get_image_processor_dict(model)[0])
    except OSError:
        return {}


def _transform(model: Any, processor: dict[str, Any], given: dict[str, Any]) -> Any:
    from trisparse.retrain.images import ImageTransform

    if processor.get("do_flip_channel_order"):
        raise ValueError(
            "the model's image processor flips the channels (do_flip_channel_order), which is not done here"
        )
    factor = processor.get("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255) or not processor.get("do_rescale", True):
        raise ValueError("the model's image processor does not scale pixels to [0, 1] (do_rescale, rescale_factor)")
    size = processor.get("size")
    if processor.get("do_center_crop", True) and processor.get("crop_size") is not None:
        size = processor["crop_size"]  # what is left of the larger image that was resized
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", True):
        channels = getattr(model.config, "num_channels", 3)
        mean, std = [0.0] * channels, [1.0] * channels
    said = {"size": size, "mean": mean, "std": std}
    wanted = {"size" if name == "image_size" else name: value for name, value in given.items()}
    found = {**{name: value for name, value in said.items() if value is not None}, **wanted}
    transform = ImageTransform(**found)
    channels = getattr(model.config, "num_channels", 3)
    if channels != len(transform.mean):
        raise ValueError(
            f"the model takes images of {channels} channels, and mean and std have {len(transform.mean)} values: give "
            "--mean and --std"
        )
    return transform


def _images(spec: str, split: str, transform: Any) -> Any:
    """The images of FOLDER or FOLDER:SPLIT."""
    from trisparse.retrain.images import Images

    folder, separator, named = spec.rpartition(":")
    if separator and not Path(spec).is_dir():
        return Images.from_folder(folder, transform, split=named)
    return Images.from_folder(spec, transform, split=split)


def schedule_of(settings: dict[str, Any] | None, epochs: int, *, change: float | None) -> Any:
    """The learning-rate schedule that ``settings`` describe, or None without any.

    Args:
        settings: by the names of the YAML file. ``peak`` or ``rates``, ``original_epochs``, ``milestones`` and
            ``gamma`` describe the training of the dense model, but for Linear, which has a peak of its own.
        epochs: of the retraining.
        change: by how much pruning changed the weights, for ALLR.

    Raises:
        ValueError: names what is missing, or what the schedule does not take.
    """
    from trisparse.retrain.schedule import ALLR, CLR, FT, LLR, LRW, SLR, Linear

    if settings is None:
        return None
    own = {key: value for key, value in settings.items() if value is not None}
    name = own.pop("name", "Linear")
    kinds = {"linear": Linear, "ft": FT, "lrw": LRW, "slr": SLR, "clr": CLR, "llr": LLR, "allr": ALLR}
    kind = kinds.get(str(name).lower())
    if kind is None:
        raise ValueError(f"schedule must be one of {', '.join(k.__name__ for k in kinds.values())}, got {name!r}")
    taken = {"peak", "original_epochs", "milestones", "gamma", "rates"} if kind is not Linear else {"peak"}
    taken |= set() if kind in (FT, LRW) else {"warmup_ratio"}
    taken |= {"change"} if kind is ALLR else set()
    if unknown := sorted(own.keys() - taken):
        raise ValueError(f"schedule {kind.__name__} takes no {unknown[0]}, it takes {', '.join(sorted(taken))}")
    warmup = {key: own[key] for key in ("warmup_ratio",) if key in own}
    if kind is Linear:
        return Linear(own.get("peak", 0.1), **{"warmup_ratio": 0.0, **warmup})
    original = _original(own, kind.__name__)
    if kind is ALLR:
        if change is None:
            raise ValueError(
                "schedule ALLR needs to know what pruning changed: give --dense, the model before it, or --sparsity to "
                "prune here"
            )
        return ALLR(original, change, epochs, **warmup)
    return LRW(original, epochs) if kind is LRW else kind(original, **warmup)


def _original(own: dict[str, Any], name: str) -> Any:
    """The training of the dense model."""
    from trisparse.retrain.schedule import Original

    length = own.get("original_epochs")
    if length is None or ("peak" in own) == ("rates" in own):
        raise ValueError(
            f"schedule {name} goes by the training of the dense model: give --original-epochs and --peak (or --rates)"
        )
    if "rates" in own:
        if "milestones" in own or "gamma" in own:
            raise ValueError("rates are all the rates: leave milestones and gamma out")
        return Original(own["rates"], length)
    if "milestones" in own:
        return Original.stepped(own["peak"], length, own["milestones"], own.get("gamma", 0.1))
    if "gamma" in own:
        raise ValueError("gamma needs milestones: at which epochs does the rate fall?")
    return Original.linear(own["peak"], length)
