"""The parameter groups of PERP for image classifiers (section 3.1), nested from BN-Recalibrate to everything."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trisparse.retrain.groups import GROUPS, VISION_PRESETS, group_names, is_norm, parameter_groups
from trisparse.sparsity.modes import evaluating

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class VisionGroups:
    """Names of the parameters that train, each under the first of the groups asked for that holds it.

    Attributes:
        trained: parameter names by group; none under "lora", whose parameters come with the adapters.
        missing: groups of a preset that the model has nothing of.
        head: name of the classifier, or None.
        classes: how many logits it gives.
        lora: names of the layers that get a LoRA, if "lora" is asked for: the pruned ones but the head.
        not_covered: pruned parameters that no LoRA reaches then, with the reason.
    """

    trained: dict[str, tuple[str, ...]]
    missing: tuple[str, ...]
    head: str | None
    classes: int
    lora: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {name: model.get_parameter(name) for names in self.trained.values() for name in names}


def vision_groups(model: nn.Module, groups: str | tuple[str, ...], images: Tensor) -> VisionGroups:
    """The parameters of ``model`` that ``groups`` trains.

    Biases are those outside the norms, norms the scales and shifts of the normalisation layers, and the head is the
    linear layer that gives the logits, found by running ``images`` [batch, channels, height, width] in eval mode.

    Args:
        model: maps pixel values to logits [batch, classes].
        groups: a name in ``VISION_PRESETS``, or names in ``GROUPS``.
        images: any of the data.

    Raises:
        ValueError: the model gives no logits, or has nothing of a group that was asked for by name.
    """
    head, classes = classifier(model, images)
    in_norms = {param for name, module in model.named_modules() if is_norm(module) for param in _inside(name, module)}
    every = [name for name, _ in model.named_parameters()]
    members = {
        "biases": [n for n in every if n not in in_norms and (n.split(".")[-1] == "bias" or n.endswith("_bias"))],
        "norms": [n for n in every if n in in_norms],
        "head": [] if head is None else [n for n in every if n in _inside(head, model.get_submodule(head))],
        "lora": [],
        "full": every,
    }
    pruned = parameter_groups(model)
    lora = tuple(name for name in pruned.lora if name != head)
    preset = isinstance(groups, str)
    wanted = group_names(groups, VISION_PRESETS)
    missing = tuple(group for group in wanted if not (lora if group == "lora" else members[group]))
    if missing and (not preset or wanted[-1] in missing):
        has = ", ".join(group for group in GROUPS if (lora if group == "lora" else members[group]))
        raise ValueError(f"groups asks for {', '.join(missing)}, which the model has nothing of; it has {has}")
    trained: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for group in wanted:
        if group not in missing:
            trained[group] = tuple(name for name in members[group] if name not in taken)
            taken.update(trained[group])
    if "lora" not in trained:
        return VisionGroups(trained, missing, head, classes)
    return VisionGroups(trained, missing, head, classes, lora, pruned.not_covered)


def classifier(model: nn.Module, images: Tensor) -> tuple[str | None, int]:
    """Name of the linear layer that gives the logits, or None, and their number.

    It is the last layer with weights that a forward calls, for transformers' and torch's classifiers have no name or
    method in common that would tell. None where its output is something else, such as a map that is pooled.

    Raises:
        ValueError: the model gives no logits [batch, classes].
    """
    called: list[tuple[str, int]] = []
    with ExitStack() as hooks, evaluating(model), torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, _LAYERS):

                def note(_: nn.Module, __: object, output: object, name: str = name) -> None:
                    called.append((name, output.numel() if isinstance(output, Tensor) else 0))

                hooks.callback(module.register_forward_hook(note).remove)
        logits = logits_of(model(images.to(next(model.parameters()).device)))
    head = called[-1][0] if called and called[-1][1] == logits.numel() else None
    return head, logits.shape[1]


def logits_of(output: object) -> Tensor:
    """The logits [batch, classes] in what a classifier returns: a tensor, an object that has them, or a tuple.

    Raises:
        ValueError: none of these.
    """
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) and output else output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError(f"model must give logits [batch, classes], got {_described(logits)}")
    return logits


def _described(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _inside(prefix: str, module: nn.Module) -> list[str]:
    return [f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters(recurse=False)]
