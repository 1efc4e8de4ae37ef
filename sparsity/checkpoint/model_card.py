"""README.md of a checkpoint, as Hugging Face shows it: what was pruned, how, and how to load it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from torch import nn

from trisparse.sparsity.mask import masks

CARD_FILE = "README.md"

_PACKAGES = ("trisparse", "torch", "transformers")


def model_card(model: nn.Module, name: str, *, recipe: Sequence[Mapping[str, Any]] = (), form: str) -> str:
    """The text of the card; ``recipe`` and ``form`` are those of :func:`trisparse.save`."""
    found = masks(model)
    by_pattern: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for mask in found.values():
        counts = by_pattern[str(mask.pattern)]
        counts[0] += 1
        counts[1] += mask.shape.numel()
        counts[2] += mask.kept
    lines = ["---", "library_name: transformers", "tags:", "- trisparse", "- sparsity", "- pruning", "---", ""]
    lines += [f"# {name}", "", f"A pruned {type(model).__name__}, written by trisparse {version('trisparse')}.", ""]
    lines += ["## Sparsity", "", "| pattern | weights | parameters | kept | sparsity |", "|---|--:|--:|--:|--:|"]
    for pattern, (count, size, kept) in sorted(by_pattern.items()):
        lines.append(f"| {pattern} | {count} | {size:,} | {kept:,} | {1 - kept / max(size, 1):.2%} |")
    total = sum(parameter.numel() for parameter in model.parameters())
    lines += ["", _how_stored(form), ""] if total else [""]
    measured = [
        (step.get("validation") or step.get("data"), step["perplexity"])
        for step in recipe
        if _is_number(step.get("perplexity"))
    ]
    if measured:
        lines += ["## Perplexity", ""]
        lines += [f"- {value:.3f}" + (f" on {data}" if data else "") for data, value in measured] + [""]
    if recipe:
        lines += ["## Recipe", ""]
        for number, step in enumerate(recipe, start=1):
            lines += [f"{number}. {_one_step(step)}"]
        commands = [str(step["command"]) for step in recipe if step.get("command")]
        if commands:
            lines += ["", "```sh", *commands, "```"]
        lines += [""]
    lines += ["## Load", "", "```python", *_loading(model, form), "```", ""]
    lines += ["Versions: " + ", ".join(f"{package} {version(package)}" for package in _PACKAGES) + ".", ""]
    return "\n".join(lines)


def _how_stored(form: str) -> str:
    if form == "dense":
        return "The weights are stored dense: every tool that reads safetensors opens them. The masks are beside them."
    return "Pruned weights are stored compressed, by their kept values (format `trisparse-v1`)."


def _loading(model: nn.Module, form: str) -> list[str]:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return ["import trisparse", "", "model = trisparse.load(FOLDER, into=EMPTY_MODEL)"]
    kind = type(model).__name__
    lines = ["import trisparse", f"from transformers import {kind}", ""]
    if form == "compressed":
        lines.append(f"model = {kind}.from_pretrained(FOLDER)  # compressed layers")
    lines.append("model = trisparse.load(FOLDER)  # dense layers with their masks, to prune further or retrain")
    return lines


def _one_step(step: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in step.items() if key not in ("step", "command") and value is not None}
    name = str(step.get("step", "step"))
    return name + "".join(f", {key} {_short(value)}" for key, value in shown.items())


def _short(value: Any) -> str:
    text = (
        value
        if isinstance(value, str)
        else f"{value:.6g}"
        if isinstance(value, float)
        else json.dumps(value, default=str)
    )
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
