"""The parameter groups of PERP (section 3): biases, norms, the output head, and LoRA on the pruned layers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import masks

GROUPS = ("biases", "norms", "head", "lora")

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
        lora: modules; every pruned nn.Linear, Conv1D and SparseLinear but the head.
        not_covered: pruned parameters that LoRA does not reach, each with the reason.
    """

    biases: tuple[str, ...]
    norms: tuple[str, ...]
    head: tuple[str, ...]
    lora: tuple[str, ...]
    not_covered: tuple[str, ...]


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation layer with parameters of its own."""
    params = list(module.parameters(recurse=False))
    if isinstance(module, _TORCH_NORMS):
        return bool(params)
    if _NORM_NAME.search(type(module).__name__) is None:
        return False
    return isinstance(getattr(module, "weight", None), nn.Parameter) and all(param.ndim == 1 for param in params)


def takes_lora(module: nn.Module) -> bool:
    """Whether LoRA can stand in for ``module``: nn.Linear, Conv1D or SparseLinear with the forward of that class.

    A subclass with another forward computes something else, and a MultiheadAttention reads the weight of its
    ``out_proj`` without calling it.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    kinds = (nn.Linear, Conv1D, SparseLinear)
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
            not_covered.append(f"{param}: {type(module).__name__} [{shape}] is neither nn.Linear nor Conv1D")
        elif places[id(module.weight)] > 1:
            not_covered.append(f"{param}: the weight is shared between {places[id(module.weight)]} layers")
        else:
            lora.append(name)
    covered_head = (head,) if head is not None and takes_lora(modules[head]) else ()
    return ParameterGroups(biases, norms, covered_head, tuple(lora), tuple(not_covered))
