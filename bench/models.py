"""The causal language model that a benchmark runs on."""

from __future__ import annotations

from typing import Any

from trisparse.bench.smollm2 import load_smollm2


def load_causal_lm(model: str | None) -> tuple[Any, Any]:
    """A model in fp32 and eval mode, and its tokenizer.

    Args:
        model: a Hugging Face id or a folder; None and ``smollm2`` are SmolLM2-135M.
    """
    if model in (None, "smollm2"):
        return load_smollm2()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return loaded, AutoTokenizer.from_pretrained(model)


def model_label(model: str | None) -> str:
    """How rows call the model: the last part of its name, which has no path of the machine."""
    return "SmolLM2-135M" if model in (None, "smollm2") else str(model).rstrip("/").rpartition("/")[2]
