"""What the tests of the demo and the benchmarks share: a tiny SmolLM2, a machine without clocks or peaks of its own."""

import string

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trisparse.bench import demo
from trisparse.bench.runner import Machine
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


class CountedTimer:
    """Takes its seconds from a list, and calls what it times."""

    warm_up = 1

    def __init__(self, seconds):
        self.seconds = iter(seconds)

    def __call__(self, call):
        call()
        return next(self.seconds)


class FixedPeaks:
    source = "given"

    def __init__(self, bytes_per_s, flops_per_s):
        self.given = (bytes_per_s, flops_per_s)

    def bytes_per_s(self):
        return self.given[0]

    def flops_per_s(self, dtype):
        return self.given[1].get(dtype)


@pytest.fixture
def machine():
    """``machine(seconds)``: a CPU whose calls take these seconds; 100 bytes/s, 1000 fp32 FLOP/s, commit abcdef0123."""

    def make(seconds=(1.0,) * 1000, *, dirty=False):
        environment = {"commit": "abcdef0123", "dirty": dirty, "cpu": {"model": "given"}}
        peaks = FixedPeaks(100.0, {"float32": 1000.0})
        return Machine(torch.device("cpu"), "cpu", CountedTimer(seconds), peaks, environment)

    return make
