"""A model of Llama-2-7B's shape, the shapes of a model's layers, and a model pruned and counted."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from trisparse.bench.smollm2 import smollm2_path
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.pattern import parse_pattern
from trisparse.sparsity.progress import quiet_transformers
from trisparse.sparsity.sparsify import sparsify

LLAMA_2_7B_LAYERS = 32


def llama_2_7b(dtype: torch.dtype, device: torch.device, layers: int = LLAMA_2_7B_LAYERS) -> Any:
    """A model of Llama-2-7B's shape, made on ``device`` with random weights, of its first ``layers`` blocks."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def layer_shapes(model: str) -> tuple[tuple[int, int], ...]:
    """(out, in) of each kind of linear layer of a causal language model, without its head; reads the config only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_transformers(), torch.device("meta"):
        made = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(smollm2_path() if model == "smollm2" else model)
        )
    head = made.get_output_embeddings()
    layers = [layer for layer in made.modules() if isinstance(layer, nn.Linear) and layer is not head]
    if not layers:
        raise ValueError(f"model {model!r} has no linear layers besides its head")
    return tuple(dict.fromkeys((layer.out_features, layer.in_features) for layer in layers))


def pruned(model: Any, pattern: str) -> Any:
    """A copy of ``model`` with all its linear layers but the head pruned to ``pattern`` by magnitude."""
    own = copy.deepcopy(model)
    sparsify(own, parse_pattern(pattern), "magnitude", progress=False)
    return own


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, each tensor once, and of every copy that a compressed layer holds."""
    compressed = [module for module in model.modules() if isinstance(module, SparseLinear)]
    counted = {id(buffer) for layer in compressed for buffer in layer.buffers()}
    others = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers()) if id(t) not in counted}
    return sum(others.values()) + sum(layer.nbytes for layer in compressed)
