"""A tiny language model with sharpened weights, so that metrics differ in the perplexity they leave."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trisparse.sparsity.search import SearchSettings, search

VOCABULARY = 96


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def make_tokens(rows, length, seed):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def run_search(out, **options):
    """A search of the tiny model; settings and arguments of ``search`` by name."""
    arguments = {name: options.pop(name) for name in ("workers", "time_limit", "include", "windows") if name in options}
    settings = SearchSettings(**{"population": 8, "iterations": 6, "top": 3, **options})
    return search(
        make_model(),
        make_tokens(4, 64, seed=1),
        make_tokens(6, 128, seed=2),
        out=out,
        settings=settings,
        samples=4,
        seq_len=64,
        **{"windows": 6, "dtype": torch.float32, "progress": False, **arguments},
    )


@pytest.fixture
def model():
    """The tiny model."""
    return make_model()


@pytest.fixture
def searching():
    """Function that runs a search of the tiny model into a folder."""
    return run_search
