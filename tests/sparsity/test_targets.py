import pytest
import torch
from torch import nn

from trisparse.sparsity.targets import find_targets

BLOCK_WEIGHTS = {  # weights to prune in each block
    "opt": 6,
    "llama": 7,
    "mistral": 7,
    "mixtral": 6,
    "gpt-oss": 6,
    "gpt2": 4,
    "gpt-neox": 4,
    "qwen3": 7,
    "gemma3": 7,
}


@pytest.mark.parametrize(("name", "count"), BLOCK_WEIGHTS.items())
def test_finds_every_weight_of_every_block_and_nothing_else(model_named, name, count):
    model = model_named(name)
    targets = find_targets(model)
    assert len(targets.blocks) == 3
    assert [sum(t.block == b for t in targets.found) for b in range(3)] == [count] * 3
    assert all(t.name.startswith(targets.blocks[t.block].name + ".") for t in targets.found)
    listed = sum(t.weight.numel() for t in targets.found)
    skipped = [s for s in targets.skipped if not s.reason.startswith("tied to")]
    assert listed + sum(torch.Size(s.shape).numel() for s in skipped) == model.num_parameters()


def test_says_why_the_rest_is_left_out(model_named):
    reasons = {s.name: s.reason for s in find_targets(model_named("llama")).skipped}
    assert reasons == {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "output head",
        "(7 biases and norms)": "1-D parameters",
    }
    tied = {s.name: s.reason for s in find_targets(model_named("llama-tied")).skipped}
    assert tied["lm_head.weight"] == "tied to model.embed_tokens.weight"
    router = {s.name: s.reason for s in find_targets(model_named("mixtral")).skipped}
    assert "MixtralTopKRouter" in router["model.layers.0.mlp.gate.weight"]


def test_layouts(model_named):
    gpt2 = {t.name: t for t in find_targets(model_named("gpt2")).found}
    up = gpt2["transformer.h.0.mlp.c_fc.weight"]
    assert (up.transposed, up.cols, tuple(up.matrix().shape)) == (True, 32, (128, 32))
    mixtral = {t.name: t for t in find_targets(model_named("mixtral")).found}
    down = mixtral["model.layers.0.mlp.experts.down_proj"]
    assert (down.transposed, down.parts, tuple(down.matrix().shape)) == (False, 4, (4 * 32, 48))
    gpt_oss = {t.name: t for t in find_targets(model_named("gpt-oss")).found}
    gate_up = gpt_oss["model.layers.0.mlp.experts.gate_up_proj"]
    assert (gate_up.transposed, gate_up.parts, tuple(gate_up.matrix().shape)) == (True, 4, (4 * 96, 32))


def test_resnet_stages_are_blocks(model_named):
    targets = find_targets(model_named("resnet"))
    assert [block.name for block in targets.blocks] == ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]
    assert all(t.weight.ndim == 4 for t in targets.found)
    reasons = {s.name: s.reason for s in targets.skipped}
    assert reasons["resnet.embedder.embedder.convolution.weight"] == "outside the repeated blocks"
    assert reasons["classifier.1.weight"] == "outside the repeated blocks"


def test_undeclared_expert_layout_follows_the_hidden_size():
    class Experts(nn.Module):
        def __init__(self, up, down):
            super().__init__()
            self.num_experts, self.hidden_size = 2, 8
            self.gate_up_proj = nn.Parameter(torch.rand(up))
            self.down_proj = nn.Parameter(torch.rand(down))

    stored_in_out = find_targets(Experts((2, 8, 12), (2, 6, 8))).found
    assert [(t.transposed, t.cols) for t in stored_in_out] == [(True, 8), (True, 6)]
    stored_out_in = find_targets(Experts((2, 12, 8), (2, 8, 6))).found
    assert [(t.transposed, t.cols) for t in stored_out_in] == [(False, 8), (False, 6)]
    square = find_targets(Experts((2, 8, 8), (2, 8, 6)))
    assert [s.reason for s in square.skipped] == ["fused experts whose layout is unknown"]


def test_any_module_works_and_a_tied_weight_counts_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Conv1d(2, 2, 3))
    model[2].weight = model[0].weight
    targets = find_targets(model)
    assert [t.name for t in targets.found] == ["0.weight", "3.weight"]
    assert any(s.name == "2.weight" and s.reason == "tied to 0.weight" for s in targets.skipped)


def test_include_replaces_the_default_and_exclude_takes_away(model_named):
    model = model_named("llama")
    head = find_targets(model, include="lm_head")
    assert [t.name for t in head.found] == ["lm_head.weight"]
    attention = find_targets(model, include=["*.q_proj", "*.k_proj.weight"], exclude="model.layers.1")
    assert [t.name for t in attention.found] == [
        f"model.layers.{b}.self_attn.{p}_proj.weight" for b in (0, 2) for p in "qk"
    ]


def test_wrong_patterns_are_named(model_named):
    model = model_named("llama")
    with pytest.raises(ValueError, match=r"include matches no parameter: \*\.c_fc"):
        find_targets(model, include=["*.q_proj", "*.c_fc"])
    with pytest.raises(ValueError, match="exclude matches no parameter: nothing"):
        find_targets(model, exclude="nothing")
    with pytest.raises(ValueError, match="no weight to prune"):
        find_targets(model, exclude="model.layers")
    with pytest.raises(ValueError, match="no weight to prune among include"):
        find_targets(model, include="model.norm")


def test_a_model_without_weights_or_data_is_refused(model_named):
    with pytest.raises(ValueError, match="no weight to prune"):
        find_targets(nn.LayerNorm(4))
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"meta device \(weight"):
        find_targets(model)


def test_integer_weights_are_skipped_with_their_dtype():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    model = nn.Sequential(nn.Linear(4, 4), layer)
    assert {s.name: s.reason for s in find_targets(model).skipped}["1.weight"] == "dtype torch.uint8 cannot be pruned"
