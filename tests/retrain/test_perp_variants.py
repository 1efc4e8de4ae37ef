"""Groups, presets and LoRA variants end to end: what trains, what is reported, and what the saved file holds."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from trisparse.retrain.effective_sparsity import effective_sparsity
from trisparse.retrain.groups import PRESETS, parameter_groups, trainable_parameters
from trisparse.retrain.loop import mean_loss
from trisparse.retrain.lora_layer import VARIANTS
from trisparse.retrain.perp import PERPConfig, retrain
from trisparse.retrain.sparse_lora_config import load_adapters
from trisparse.sparsity.checkpoint import load, save
from trisparse.sparsity.compression import compress
from trisparse.sparsity.mask import attach, check_masks, masks, masks_sha256
from trisparse.sparsity.sparsify import sparsify

SUBSETS = [subset for size in range(1, 5) for subset in itertools.combinations(PRESETS["perp"], size)]


def saved_zeros(folder, model):
    """Pruned weights that are not zero in the file that ``save_pretrained`` wrote."""
    held = load_file(folder / "model.safetensors")
    return sum(int(held[name][~mask.dense()].count_nonzero()) for name, mask in masks(model).items())


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_every_variant_that_merges_keeps_the_zeros_in_the_file(build, tokens, run, tmp_path, kind, variant):
    model = build(kind)
    digest = masks_sha256(model)
    before = {name: model.get_parameter(name).detach().clone() for name in masks(model)}
    report = run(model, tokens, variant=variant, steps=25, learning_rate=3e-2)
    assert report.last_loss < 0.95 * report.first_loss
    assert all(not torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert masks_sha256(model) == digest
    assert report.effective_sparsity == 0.5
    assert report.peft_model is None
    model.save_pretrained(tmp_path / "transformers")
    assert saved_zeros(tmp_path / "transformers", model) == 0
    save(model, tmp_path / "ours")
    loaded = load(tmp_path / "ours")
    check_masks(loaded)
    assert masks_sha256(loaded) == digest
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_every_variant_on_compressed_layers(build, tokens, run, variant):
    dense, compressed = build("llama"), build("llama")
    compress(compressed, prefer="memory")
    wanted, report = (run(model, tokens, variant=variant) for model in (dense, compressed))
    assert report.losses == pytest.approx(wanted.losses, rel=1e-4)
    assert report.trainable == wanted.trainable
    for name, mask in masks(compressed).items():
        layer = compressed.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(layer.weight, dense.get_parameter(name), rtol=1e-3, atol=1e-5)
        assert int(layer.weight[~mask.dense()].count_nonzero()) == 0


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("kind", "mode"), [("llama-tied", False), ("opt", True)])
def test_lora_is_not_merged(build, tokens, run, snapshot, assert_same, tmp_path, kind, mode, compressed):
    model = build(kind)
    if compressed:
        compress(model, prefer="memory")
    fresh, before = copy.deepcopy(model.train(mode)), snapshot(model)
    own = {id(module) for module in model.modules()}
    with pytest.raises(ValueError, match=r"variant='lora' cannot be merged.*merge=False.*lora_prune"):
        run(model, tokens, variant="lora")
    assert_same(model, before)

    report = run(model, tokens, variant="lora", merge=False, steps=10, gradient_checkpointing=True)
    assert report.last_loss < report.first_loss
    peft = report.peft_model
    assert peft.get_base_model() is model
    assert not report.untied_head
    check_masks(model)
    rank, layers = 4, masks(model)
    kept = sum(mask.kept for mask in layers.values()) + sum(rank * sum(mask.shape) for mask in layers.values())
    total = sum(mask.shape.numel() for mask in layers.values())
    assert report.effective_sparsity == pytest.approx(1 - kept / total)
    assert report.effective_sparsity == effective_sparsity(model).total
    assert f"{1 - kept / total:.2%}" in str(report)
    assert "peft_model" not in report.to_dict()
    assert model.is_activation_checkpointing is False
    assert [module.training for module in model.modules() if id(module) in own] == before["training"]
    assert {module.training for module in peft.modules()} == {mode}
    assert model.config.to_dict() == before["config"]
    # it trains on: nothing under the adapters asks for a gradient
    peft(tokens, labels=tokens).loss.backward()
    graded = {name for name, param in model.named_parameters() if param.grad is not None}
    assert any("lora_" in name for name in graded)
    assert not any("base_layer.weight" in name or "embed" in name for name in graded)

    peft.save_pretrained(tmp_path, save_embedding_layers=False)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("base_layer.weight" in name or "embed" in name for name in held)
    loaded = load_adapters(fresh, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(tokens).logits, peft.eval()(tokens).logits)


def test_lora_of_whole_rows_is_merged(tokens, run, build):
    model = build("llama")
    sparsify(model, "50% rows", "magnitude", progress=False)
    report = run(model, tokens, variant="lora", groups=("lora",), steps=20, learning_rate=3e-2)
    kept = sum(mask.kept // mask.cols + mask.cols for mask in masks(model).values())
    assert report.trainable == {"lora": 4 * kept}
    check_masks(model)
    assert report.last_loss < report.first_loss


def test_the_loss_after_lora_prune_is_that_of_the_merged_model(build, tokens, run, quick):
    model = build("llama")
    config = quick(variant="lora_prune", steps=20, learning_rate=5e-2)
    report = retrain(model, tokens, config, validation=tokens[:4], progress=False)
    assert report.validation_loss[1] == pytest.approx(mean_loss(model, tokens[:4], 4, None), rel=1e-5)
    # before the merge it was another, without which this test would show nothing
    model = build("llama")
    peft = retrain(model, tokens, quick(**{**vars(config), "merge": False}), progress=False).peft_model
    assert mean_loss(peft, tokens[:4], 4, None) < 0.999 * report.validation_loss[1]


def test_merge_false_of_a_bf16_model_computes_without_autocast(build, tokens, run):
    model = build("opt").bfloat16()
    report = run(model, tokens, dtype="auto", merge=False)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    assert report.peft_model(tokens).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("groups", SUBSETS, ids="+".join)
def test_every_combination_of_groups(build, tokens, run, groups):
    model = build("opt")
    counted = trainable_parameters(model, parameter_groups(model), groups, rank=4)
    report = run(model, tokens, groups=groups, steps=1)
    assert report.trainable == counted
    assert list(report.trainable) == list(groups)
    assert all(count > 0 for count in counted.values())


@pytest.mark.parametrize(("preset", "groups"), PRESETS.items())
def test_presets(build, tokens, run, preset, groups):
    assert PERPConfig(preset).groups == groups
    assert set(run(build("opt"), tokens, groups=preset, steps=1).trainable) == set(groups)


def test_presets_nest():
    order = ["biases", "norms", "linear-probing", "perp"]
    for smaller, larger in itertools.pairwise(order):
        assert set(PRESETS[smaller]) < set(PRESETS[larger])
    assert PERPConfig().groups == PRESETS["perp"]
    assert PERPConfig(["lora", "norms", "norms"]).groups == ("norms", "lora")


def test_a_missing_group_is_named(build, tokens, run):
    report = run(build("llama"), tokens, groups="perp", steps=1)
    assert report.missing == ["biases"]
    assert "missing" in str(report)
    assert "biases: the model has none" in str(report)
    assert report.to_dict()["missing"] == ["biases"]
    with pytest.raises(ValueError, match=r"nothing to train in groups=\('biases',\); it has norms, head, lora"):
        run(build("llama"), tokens, groups="biases")
    assert run(build("opt"), tokens, groups="perp", steps=1).missing == []


def test_targets_choose_the_layers_of_lora(build, tokens, run, snapshot, assert_same):
    model = build("llama")
    before = snapshot(model)
    report = run(model, tokens, groups="perp", targets=["q_proj", "model.layers.1.mlp*"], steps=2)
    state = model.state_dict()
    changed = {name for name in masks(model) if not torch.equal(state[name], before["state"][name])}
    mlp = {f"model.layers.1.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    assert changed == mlp | {f"model.layers.{block}.self_attn.q_proj.weight" for block in (0, 1)}
    assert report.not_covered == ["9 pruned layers: not among targets"]
    assert report.trainable["lora"] == 4 * (2 * (16 + 16) + 3 * (16 + 24))

    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="targets: 'qproj' matches none of the 14 layers that take LoRA"):
        run(model, tokens, targets=("q_proj", "qproj"))
    assert_same(model, before)


def test_conv1d_mask_lora_and_head_use_our_layers(build, tokens, run):
    model = build("gpt2")
    assert any(isinstance(module, Conv1D) for module in model.modules())
    layers = run(model, tokens, merge=False, variant="scale_lora").peft_model
    variants = {name: layer.variant["default"] for name, layer in layers.named_modules() if hasattr(layer, "variant")}
    assert variants.pop("base_model.model.lm_head") == "lora"
    assert set(variants.values()) == {"scale_lora"}
    assert len(variants) == 8


def test_a_pruned_head_is_not_merged_by_lora(build, tokens, run):
    model = build("llama")
    first = next(iter(masks(model).values()))
    head = model.get_output_embeddings()
    keep = torch.rand(head.weight.shape) > 0.5
    attach(head, "weight", type(first).from_matrix(keep, head.weight.shape, first.pattern))
    with pytest.raises(ValueError, match="fill the zeros of lm_head"):
        run(model, tokens, groups=("head",), variant="lora")
