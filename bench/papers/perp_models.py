"""PERP's models, and what its tables have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trisparse.bench.models import model_label
from trisparse.bench.papers.language import LanguageCell, Pruning, Retraining, Texts
from trisparse.bench.papers.scale import Scale
from trisparse.bench.papers.table import Entry, Layout, Place, entry, paper_name, published_paper
from trisparse.bench.smollm2 import smollm2_path
from trisparse.retrain.groups import PRESETS, parameter_groups
from trisparse.sparsity.progress import quiet_transformers

OPT_1B, OPT_3B, OPT_7B, OPT_13B, OPT_30B, OPT_66B = (
    f"facebook/opt-{size}" for size in ("1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
)
LLAMA_7B, LLAMA_13B, LLAMA_70B = (f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b"))
MISTRAL, MIXTRAL = "mistralai/Mistral-7B-v0.1", "mistralai/Mixtral-8x7B-v0.1"

PERPLEXITY = "perplexity"
TRAINABLE = "% trainable"


def has_biases(model: str) -> bool:
    """Whether ``model`` has biases outside its norms: OPT has, Llama-like models have not. Loads no weights."""
    if paper_name(model).startswith(("facebook/opt-", "meta-llama/Llama-2-", "mistralai/")):
        return model.startswith("facebook/opt-")
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_transformers(), torch.device("meta"):
        config = AutoConfig.from_pretrained(smollm2_path() if model == "smollm2" else model)
        return bool(parameter_groups(AutoModelForCausalLM.from_config(config)).biases)


def lora_targets(model: str) -> tuple[str, ...] | None:
    """Layers that get a LoRA, None for every pruned one.

    The paper's "% trainable" say where it is: on queries and values of OPT, on every pruned layer of the others.
    """
    return ("q_proj", "v_proj") if model.startswith("facebook/opt-") else None


def perp(scale: Scale, model: str, **options: Any) -> Retraining:
    """PERP: everything but the weights themselves."""
    return Retraining.of(scale, groups_of(model, PRESETS["perp"]), **{"targets": lora_targets(model), **options})


def groups_of(model: str, groups: Sequence[str]) -> tuple[str, ...]:
    """``groups`` without biases where ``model`` has none: what trains is the same, and so is the cell's key then."""
    return tuple(groups) if has_biases(model) else tuple(group for group in groups if group != "biases")


def cell(
    scale: Scale, model: str, method: str, pattern: str, retraining: Retraining | None = None, **pruning: Any
) -> LanguageCell:
    """``model`` pruned to ``pattern`` by ``method``, and retrained if that is given."""
    return LanguageCell(model, Texts.of(scale, model), Pruning.of(scale, method, pattern, **pruning), retraining)


def dense(scale: Scale, model: str, metric: str = PERPLEXITY, factor: float = 1.0) -> Entry:
    """The model before pruning."""
    return entry(LanguageCell(model, Texts.of(scale, model)), metric=metric, factor=factor)


def shown(table: str, model: str, entries: dict[Place, Entry], **options: Any) -> Layout:
    """The layout of ``entries``; of one of the paper's models only those that the paper has."""
    models = published_paper("perp")["tables"][table]["models"]
    if (named := paper_name(model)) in models:
        rows = models[named]["rows"]
        entries = {(row, column): one for (row, column), one in entries.items() if column in rows.get(row, ())}
    return Layout(entries, **options)


def columns_of(table: str) -> set[str]:
    """Columns that ``table`` has for any model."""
    models = published_paper("perp")["tables"][table]["models"].values()
    return {column for numbers in models for row in numbers["rows"].values() for column in row}


def no_biases(model: str) -> tuple[str, ...]:
    """The note that rows of biases are left out, where they are."""
    return (
        ()
        if has_biases(model)
        else (f"{model_label(model)} has no biases: the rows that would show what they add are left out.",)
    )
