"""The comparison of PERP with full retraining, on a tiny model, and its count of revived weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from trisparse.bench.studies.perp_quality import compare, retrained, revived_in_the_file
from trisparse.sparsity.mask import masks
from trisparse.sparsity.sparsify import sparsify

OPTIONS = {
    "steps": 8,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "seq_len": 16,
    "dtype": "fp32",
    "learning_rates": (1e-7, 1e-2),
    "grid_steps": 4,
    "warmup_ratio": 0.25,
}


@pytest.fixture
def pruned():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for param in model.parameters():
        if param.ndim > 1:
            nn.init.normal_(param, std=0.3)
    sparsify(model, "50%", "magnitude", progress=False)
    return model


@pytest.fixture(scope="module")
def data():
    tokens = torch.randint(0, 48, (24, 16), generator=torch.Generator().manual_seed(1))
    return {"train": tokens[:12], "validation": tokens[12:18], "test": tokens[18:]}


def test_the_rate_is_found_by_the_grid(pruned, data):
    before = {name: value.clone() for name, value in pruned.state_dict().items()}
    own, row = retrained(pruned, data, OPTIONS | {"groups": ("full",)})
    assert row["learning_rate"] == 1e-2
    assert row["grid"]["1e-07"] - row["grid"]["0.01"] > 0.01
    assert row["validation_loss"][1] < row["grid"]["0.01"]  # 8 steps against 4
    assert row["trainable_share"] == 1.0
    assert not torch.equal(own.lm_head.weight, pruned.lm_head.weight)
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())


def test_the_table(pruned, data):
    result = compare(pruned, data, OPTIONS, check_steps=2)
    rows = list(result["rows"].values())
    assert [row["revived"] for row in rows] == [0, 0]
    assert all(1 < row["perplexity"] < result["before"] for row in rows)
    assert result["ratio"] == rows[1]["perplexity"] / rows[0]["perplexity"]
    assert result["revived"] == {"lora_prune": 0, "mask_lora": 0, "scale_lora": 0}


def test_a_revived_weight_is_counted(pruned):
    kept = {name: mask.dense() for name, mask in masks(pruned).items()}
    first = next(iter(kept))
    kept[first] = kept[first].clone()
    kept[first][0, kept[first][0].nonzero()[0]] = False  # as if this one had been pruned
    assert revived_in_the_file(pruned, kept) == 1
    kept["missing"] = kept[first]
    with pytest.raises(RuntimeError, match="lacks"):
        revived_in_the_file(pruned, kept)
