"""Effective sparsity: adapters that stay beside a pruned weight count as parameters that are kept."""

from __future__ import annotations

from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import nn

from trisparse.sparsity.mask import masks


@dataclass(frozen=True)
class EffectiveSparsity:
    """Sparsity with adapters counted as parameters that are kept.

    Attributes:
        layers: of each pruned parameter, by its name without PEFT's ``base_layer``.
        total: of all of them together.
    """

    layers: dict[str, float]
    total: float


def effective_sparsity(model: nn.Module) -> EffectiveSparsity:
    """1 - (kept weights + parameters of adapters that are not merged) / weights, of the pruned parameters of ``model``.

    PERP, section 3.1: adapters that stay separate "decrease the overall sparsity slightly, which we account for in our
    reporting".

    Raises:
        ValueError: the model has no masks.
    """
    adapters: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            held = [f for factors in (module.lora_A, module.lora_B) for key, f in factors.items()
                    if key not in module.merged_adapters]  # fmt: skip
            path = f"{name}.base_layer.weight" if name else "base_layer.weight"
            adapters[path] = sum(param.numel() for factor in held for param in factor.parameters())
    found = masks(model)
    if not found:
        raise ValueError("model has no masks: prune it with sparsify, or load a pruned one")
    kept = {name: mask.kept + adapters.get(name, 0) for name, mask in found.items()}
    layers = {name.replace("base_layer.", ""): 1 - kept[name] / mask.shape.numel() for name, mask in found.items()}
    return EffectiveSparsity(layers, 1 - sum(kept.values()) / sum(mask.shape.numel() for mask in found.values()))
