"""What the tests of the demo and the benchmarks share."""

import string

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trisparse.bench import demo
from trisparse.bench.studies import pruned_smollm2
from trisparse.retrain.perp import PERPConfig


@pytest.fixture
def tiny_smollm2(monkeypatch):
    """A two-block Llama over characters in the place of SmolLM2; the scale of the demo that fits it."""
    scale = demo.DemoScale(
        seq_len=32,
        calibration=4,
        test=4,
        retrain=PERPConfig(steps=2, batch_size=2, gradient_accumulation=1, seq_len=32, learning_rate=1e-3),
    )
    characters = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: i for i, c in enumerate(string.printable, start=3)}
    words = Tokenizer(models.WordLevel(characters, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

    def make():
        torch.manual_seed(0)
        config = LlamaConfig(**shape, vocab_size=128, max_position_embeddings=64, tie_word_embeddings=True)
        return LlamaForCausalLM(config).eval(), tokenizer

    monkeypatch.setattr(demo, "load_smollm2", make)
    monkeypatch.setattr(pruned_smollm2, "load_smollm2", make)
    monkeypatch.setattr(pruned_smollm2, "FULL", scale)
    return scale
