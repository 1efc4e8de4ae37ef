"""Which parameters belong to which group, by architecture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trisparse.retrain.groups import is_norm, parameter_groups, takes_lora
from trisparse.sparsity.mask import Mask, attach
from trisparse.sparsity.pattern import NM

BLOCK = "model.layers.0."


def of_block(names, prefix):
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def test_llama_has_no_biases(build):
    groups = parameter_groups(build("llama-tied"))
    assert groups.biases == ()
    assert of_block(groups.norms, BLOCK) == ["input_layernorm", "post_attention_layernorm"]
    assert groups.norms[-1] == "model.norm"
    assert groups.head == ("lm_head",)
    assert len(groups.lora) == 14
    assert groups.not_covered == ()


def test_opt_biases_leave_out_those_of_norms(build):
    groups = parameter_groups(build("opt"))
    assert of_block(groups.biases, "model.decoder.layers.0.") == [
        "self_attn.k_proj.bias", "self_attn.v_proj.bias", "self_attn.q_proj.bias", "self_attn.out_proj.bias",
        "fc1.bias", "fc2.bias",
    ]  # fmt: skip
    assert of_block(groups.norms, "model.decoder.layers.0.") == ["self_attn_layer_norm", "final_layer_norm"]


@pytest.mark.parametrize(
    ("kind", "norms"),
    [
        ("qwen3", ["self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"]),
        (
            "gemma3",
            ["self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm",
             "pre_feedforward_layernorm", "post_feedforward_layernorm"],
        ),
    ],
)  # fmt: skip
def test_norms_of_models_with_their_own_classes(build, kind, norms):
    assert of_block(parameter_groups(build(kind)).norms, BLOCK) == norms


def test_gpt2_conv1d_is_covered(build):
    groups = parameter_groups(build("gpt2"))
    assert of_block(groups.lora, "transformer.h.0.") == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def test_what_lora_does_not_reach_is_named(build):
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    shape = experts.gate_up_proj.shape
    keep = torch.tensor([True, True, False, False]).repeat(shape.numel() // 4).view(-1, shape[-1])
    attach(experts, "gate_up_proj", Mask.from_matrix(keep, shape, NM(2, 4)))
    groups = parameter_groups(model)
    assert [line.split(":")[0] for line in groups.not_covered] == ["model.layers.0.mlp.experts.gate_up_proj"]
    assert "2x48x16" in groups.not_covered[0]


def test_a_shared_weight_is_not_covered(build):
    model = build("llama")
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    groups = parameter_groups(model)
    assert len(groups.not_covered) == 2
    assert "shared between 2 layers" in groups.not_covered[0]
    assert "model.layers.0.mlp.up_proj" not in groups.lora


def test_kinds_of_layers():
    for norm in (nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)):
        assert is_norm(norm)
    assert not is_norm(nn.LayerNorm(4, elementwise_affine=False))
    assert not is_norm(nn.Linear(4, 4))

    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert takes_lora(nn.Linear(4, 4))
    assert not takes_lora(Doubling(4, 4))
    assert not takes_lora(nn.MultiheadAttention(4, 2).out_proj)
    assert not takes_lora(nn.Conv1d(4, 4, 1))


def test_a_model_without_head():
    assert parameter_groups(nn.Sequential(nn.Linear(4, 4))).head == ()
