"""The causal language model that a benchmark runs on."""

from __future__ import annotations

from typing import Any

import torch

from trisparse.bench.smollm2 import load_smollm2
from trisparse.sparsity.progress import quiet_transformers


def load_causal_lm(model: str | None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model in ``dtype`` and eval mode, and its tokenizer.

    Args:
        model: a Hugging Face id or a folder; None and ``smollm2`` are SmolLM2-135M.
    """
    if model in (None, "smollm2"):
        return load_smollm2(dtype=dtype)
    from transformers import AutoModelForCausalLM

    from trisparse.sparsity.checkpoint.tokenizer import load_tokenizer

    name: Any = model
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    return loaded.eval(), load_tokenizer(name)


def model_label(model: str | None) -> str:
    """How rows call the model: the last part of its name, which has no path of the machine."""
    return "SmolLM2-135M" if model in (None, "smollm2") else str(model).rstrip("/").rpartition("/")[2]
