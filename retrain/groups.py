"""The parameter groups of PERP (section 3): biases, norms, the output head, LoRA on the pruned layers, or everything.

Presets nest as in section 3.1, where each method also trains what the simpler ones train. A group by itself, such as
``("norms",)``, is one of the ablation of Table 13.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from trisparse.retrain.lora import factor_sizes
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import masks

GROUPS = ("biases", "norms", "head", "lora", "full")

PRESETS: dict[str, tuple[str, ...]] = {
    "biases": ("biases",),
    "norms": ("biases", "norms"),
    "linear-probing": ("biases", "norms", "head"),
    "perp": ("biases", "norms", "head", "lora"),
    "full": ("full",),
}

VISION_PRESETS: dict[str, tuple[str, ...]] = {"bn-recalibrate": (), **PRESETS}
"""Those of image classifiers: the first has no gradient at all."""

RECONSTRUCT_PRESETS: dict[str, tuple[str, ...]] = {
    "biases": ("biases",),
    "norms": ("biases", "norms"),
    "perp": ("biases", "norms", "lora"),
    "full": ("full",),
}
"""Those of the blocks of a model, which have no output head."""

_TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
# transformers defines a norm per model: LlamaRMSNorm, Gemma3RMSNorm, T5LayerNorm, Qwen3NextRMSNormGated, ...
_NORM_NAME = re.compile(r"Norm(Gated|1d|2d)?$")


@dataclass(frozen=True)
class ParameterGroups:
    """What each group holds in one model.

    Attributes:
        biases: parameters; every bias that is not a norm's.
        norms: modules; LayerNorm, RMSNorm, BatchNorm, GroupNorm and the models' own kinds.
        head: the output head's module, or none.
        lora: modules; every pruned nn.Linear, Conv1D, Conv2d and SparseLinear but the head.
        not_covered: pruned parameters that LoRA does not reach, each with the reason.
        full: parameters; all of them, each once.
    """

    biases: tuple[str, ...]
    norms: tuple[str, ...]
    head: tuple[str, ...]
    lora: tuple[str, ...]
    not_covered: tuple[str, ...]
    full: tuple[str, ...] = ()

    def only(self, targets: str | Sequence[str] | None) -> ParameterGroups:
        """The same with LoRA on the layers that match ``targets`` alone, shell-style patterns; None is all.

        Raises:
            ValueError: a pattern that matches no pruned layer.
        """
        if targets is None:
            return self
        patterns = [targets] if isinstance(targets, str) else list(targets)
        chosen = tuple(name for name in self.lora if any(_matches(name, pattern) for pattern in patterns))
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in self.lora):
                raise ValueError(f"targets: {pattern!r} matches none of the {len(self.lora)} layers that take LoRA")
        left = len(self.lora) - len(chosen)
        left_out = (f"{left} pruned layers: not among targets",) if left else ()
        return replace(self, lora=chosen, not_covered=(*self.not_covered, *left_out))


def _matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` matches a module's name, its end after a dot, or a module that it is in."""
    parts = name.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    starts = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(fnmatchcase(part, pattern) for part in (*ends, *starts))


def group_names(
    groups: str | Sequence[str],
    presets: Mapping[str, tuple[str, ...]] = PRESETS,
    allowed: Sequence[str] = GROUPS,
) -> tuple[str, ...]:
    """The groups that one of ``presets`` names, or those of a sequence in the order of ``allowed``, each once.

    Raises:
        ValueError: an unknown preset or group, none at all, or "full" beside others, all of which it holds.
    """
    if isinstance(groups, str) and presets:
        if groups in presets:
            return presets[groups]
        if groups in VISION_PRESETS and groups not in PRESETS:
            raise ValueError(
                f"groups={groups!r} is for image classifiers: retrain_vision(model, data, VisionConfig({groups!r}))"
            )
        raise ValueError(
            f"groups must be one of {', '.join(presets)}, or a sequence of {', '.join(allowed)}, got {groups!r}"
        )
    if isinstance(groups, str) or not groups or set(groups) - set(allowed):
        raise ValueError(f"groups must be one or more of {', '.join(allowed)}, got {groups!r}")
    if "full" in groups and len(set(groups)) > 1:
        raise ValueError(f"groups must be 'full' alone, which holds the others, got {groups!r}")
    return tuple(group for group in allowed if group in groups)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation layer with parameters of its own."""
    params = list(module.parameters(recurse=False))
    if isinstance(module, _TORCH_NORMS):
        return bool(params)
    if _NORM_NAME.search(type(module).__name__) is None:
        return False
    return isinstance(getattr(module, "weight", None), nn.Parameter) and all(param.ndim == 1 for param in params)


def takes_lora(module: nn.Module) -> bool:
    """Whether LoRA can stand in for ``module``: nn.Linear, Conv1D, Conv2d or SparseLinear with that class's forward.

    A subclass with another forward computes something else, and a MultiheadAttention reads the weight of its
    ``out_proj`` without calling it.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    kinds = (nn.Linear, Conv1D, nn.Conv2d, SparseLinear)
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def head_of(model: nn.Module) -> str | None:
    """Name of the output head (the output embedding), or None."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None:
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """The names of each group's members in ``model``, in the order of ``named_modules``."""
    modules = dict(model.named_modules())
    norms = tuple(name for name, module in modules.items() if is_norm(module))
    inside_norms = {f"{name}." for name in norms}
    biases = tuple(
        name
        for name, _ in model.named_parameters()
        if (name.rpartition(".")[2] == "bias" or name.endswith("_bias"))
        and f"{name.rpartition('.')[0]}." not in inside_norms
    )
    head = head_of(model)
    places = Counter(id(param) for _, param in model.named_parameters(remove_duplicate=False))
    lora, not_covered = [], []
    for param in masks(model):
        name, _, attribute = param.rpartition(".")
        module = modules[name]
        if name == head:
            continue
        if isinstance(module, SparseLinear):  # reading its weight would decompress it
            lora.append(name)
        elif attribute != "weight" or not takes_lora(module):
            shape = "x".join(map(str, model.get_parameter(param).shape))
            not_covered.append(f"{param}: {type(module).__name__} [{shape}] is no nn.Linear, Conv1D or Conv2d")
        elif places[id(module.weight)] > 1:
            not_covered.append(f"{param}: the weight is shared between {places[id(module.weight)]} layers")
        else:
            lora.append(name)
    covered_head = (head,) if head is not None and takes_lora(modules[head]) else ()
    every = tuple(name for name, _ in model.named_parameters())
    return ParameterGroups(biases, norms, covered_head, tuple(lora), tuple(not_covered), every)


def trainable_parameters(model: nn.Module, groups: ParameterGroups, wanted: Sequence[str], rank: int) -> dict[str, int]:
    """Parameters that train, for each of the groups ``wanted``; those of LoRA and of the head are the factors'.

    The paper's "% trainable" is their sum over the parameters of the model (Table 13 counts the factors among these,
    which makes one of its rows 0.01% less). Nothing is wrapped or allocated, so the model may be on the meta device.
    """

    def factors(names: tuple[str, ...]) -> int:
        return rank * sum(sum(factor_sizes(model.get_submodule(name))) for name in names)

    counted = {
        "biases": lambda: sum(model.get_parameter(name).numel() for name in groups.biases),
        "norms": lambda: sum(p.numel() for name in groups.norms for p in model.get_submodule(name).parameters()),
        "head": lambda: factors(groups.head),
        "lora": lambda: factors(groups.lora),
        "full": lambda: sum(model.get_parameter(name).numel() for name in groups.full),
    }
    return {group: counted[group]() for group in wanted}
