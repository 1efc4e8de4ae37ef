"""The comparison of PERP with full retraining, on a tiny model, and its count of revived weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from trisparse.bench.perp_quality import best_of_grid, compare, revived_in_the_file
from trisparse.retrain.loop import RetrainError
from trisparse.sparsity.mask import masks
from trisparse.sparsity.sparsify import sparsify

OPTIONS = {"steps": 6, "batch_size": 2, "gradient_accumulation": 1, "seq_len": 16, "dtype": "fp32"}


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


def test_the_rate_with_the_lowest_validation_loss_is_taken(pruned, data):
    seen = {}
    best, row = best_of_grid(pruned, data, OPTIONS | {"groups": ("full",)}, (1e-7, 1e-2), seen.__setitem__)
    assert row["learning_rate"] == min(seen, key=seen.get) == 1e-2
    assert row["validation_loss"] == {"1e-07": seen[1e-7], "0.01": seen[1e-2]}
    assert seen[1e-7] - seen[1e-2] > 0.01
    assert row["trainable_share"] == 1.0
    assert best is not pruned


def test_rates_that_diverge_are_left_out(pruned, data):
    options = OPTIONS | {"groups": ("full",), "max_grad_norm": 0}
    _, row = best_of_grid(pruned, data, options, (1e-2, 1e30), lambda *_: None)
    assert row["learning_rate"] == 1e-2
    assert row["validation_loss"]["1e+30"] is None
    with pytest.raises(RetrainError, match="no learning rate"):
        best_of_grid(pruned, data, options, (1e30,), lambda *_: None)


def test_the_table(pruned, data):
    result = compare(pruned, data, OPTIONS, (1e-2,), check_steps=2)
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
