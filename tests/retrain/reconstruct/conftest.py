"""A dense and a pruned tiny model, and a short reconstruction of the one by the other."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from trisparse.retrain.reconstruct import ReconstructConfig, reconstruct
from trisparse.sparsity.sparsify import sparsify

QUICK = {
    "rank": 4, "alpha": 8, "learning_rate": 1e-2, "steps": 20, "batch_size": 2, "samples": 8, "seq_len": 16,
    "dtype": "fp32",
}  # fmt: skip
_SMALL = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def _config(**changes):
    return ReconstructConfig(**{**QUICK, **changes})


def _pair(kind="llama", pattern="50%"):
    """A dense model and the same one pruned."""
    torch.manual_seed(0)
    if kind == "llama":
        settings = transformers.LlamaConfig(**_SMALL, intermediate_size=24, max_position_embeddings=32)
    elif kind == "gpt2":
        settings = transformers.GPT2Config(
            vocab_size=48, n_embd=16, n_layer=3, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
        )
    else:
        settings = transformers.OPTConfig(
            **_SMALL, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.1
        )
    dense = transformers.AutoModelForCausalLM.from_config(settings)
    for param in dense.parameters():  # weights that matter: at their start, the residual is nearly all of a block
        param.data.mul_(4) if param.ndim > 1 else None
    model = copy.deepcopy(dense).train()
    sparsify(model, pattern, "magnitude", progress=False)
    return dense, model


def _run(model, dense, data, **changes):
    return reconstruct(model, dense, data, _config(**changes), progress=False)


def _state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def config():
    """``config(**changes)``: the settings of a short reconstruction."""
    return _config


@pytest.fixture
def pair():
    """``pair(kind, pattern)``: a dense tiny model and the same one pruned by magnitude."""
    return _pair


@pytest.fixture
def run():
    """``run(model, dense, data, **changes)``: reconstruct with the short settings."""
    return _run


@pytest.fixture
def state():
    """``state(model)``: a copy of all its tensors."""
    return _state
