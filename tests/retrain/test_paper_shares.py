"""The paper's "% trainable", counted on models without weights: Tables 1 and 13."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from trisparse.retrain.groups import PRESETS, parameter_groups, trainable_parameters


def opt(hidden, layers, heads):
    with torch.device("meta"):
        config = transformers.OPTConfig(
            hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
            word_embed_proj_dim=hidden, max_position_embeddings=2048, vocab_size=50272,
        )  # fmt: skip
        return transformers.OPTForCausalLM(config)


def counted(model, targets, rank=16):
    """Parameters of each group, with LoRA on the linears of the blocks that match ``targets``."""
    groups = parameter_groups(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups = replace(groups, lora=tuple(name for name in linears if name not in groups.head)).only(targets)
    return trainable_parameters(model, groups, PRESETS["perp"], rank)


@pytest.mark.parametrize(
    ("shape", "shares", "default"),
    [
        ((2560, 32, 32), {"biases": "0.03%", "norms": "0.04%", "linear-probing": "0.07%", "perp": "0.27%"}, "0.96%"),
        ((7168, 48, 56), {"biases": "0.01%", "norms": "0.01%", "linear-probing": "0.02%", "perp": "0.09%"}, "0.35%"),
    ],
    ids=["OPT-2.7B", "OPT-30B"],
)
def test_table_1_has_lora_on_queries_and_values(shape, shares, default):
    model = opt(*shape)
    total = sum(param.numel() for param in model.parameters())
    counts = counted(model, ("q_proj", "v_proj"))
    assert {preset: f"{sum(counts[group] for group in PRESETS[preset]) / total:.2%}" for preset in shares} == shares
    assert f"{sum(counted(model, None).values()) / total:.2%}" == default


def test_table_13_has_the_rank_64_on_queries_and_values_or_32_on_all_of_attention():
    model = opt(5120, 40, 40)
    total = sum(param.numel() for param in model.parameters())
    counts = counted(model, None)
    assert f"{counts['lora'] / total:.2%}" == "0.46%"  # what the default trains
    lora = counted(model, ("q_proj", "v_proj"), rank=64)["lora"]
    assert counted(model, "self_attn.*", rank=32)["lora"] == lora
    shares = {
        ("biases",): "0.01%", ("norms",): "0.01%", ("head",): "0.01%", ("lora",): "0.41%",
        ("biases", "norms"): "0.02%", ("biases", "head"): "0.02%", ("biases", "lora"): "0.42%",
        ("norms", "head"): "0.01%", ("norms", "lora"): "0.41%", ("head", "lora"): "0.41%",
        ("biases", "norms", "head"): "0.03%", ("biases", "norms", "lora"): "0.43%",
        ("biases", "head", "lora"): "0.43%", ("norms", "head", "lora"): "0.42%",
        ("biases", "norms", "head", "lora"): "0.43%",
    }  # fmt: skip
    counts["lora"] = lora  # the head's rank is still 16: with 64 it would have 0.03%

    def share(groups):  # all 15 rows fit if the factors count as parameters of the model, too; else the last has 0.44%
        trained = sum(counts[group] for group in groups)
        return trained / (total + sum(counts[group] for group in ("head", "lora") if group in groups))

    assert {groups: f"{share(groups):.2%}" for groups in shares} == shares
