"""PERP on a compressed model: it trains, and stays compressed with the very same masks."""

from __future__ import annotations

import pytest
import torch

import trisparse
from trisparse.retrain.groups import parameter_groups
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import masks_sha256


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "opt", "gpt2"])
def test_retrain_on_a_compressed_model(build, tokens, run, kind):
    """All groups train, the perplexity falls, and the model is still compressed, with the very same masks."""
    model = build(kind)
    names = list(trisparse.masks(model))
    total = sum(param.numel() for param in model.parameters())
    trisparse.compress(model, prefer="memory")
    digest = masks_sha256(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    assert {f"{name}.weight" for name in layers} == set(names)
    positions = {name: layer.positions.clone() for name, layer in layers.items()}
    values = {name: layer.values.clone() for name, layer in layers.items()}
    before = trisparse.perplexity(model, tokens, seq_len=16)
    report = run(model, tokens, steps=20, learning_rate=3e-2)
    assert report.total_parameters == total
    assert report.not_covered == []
    assert report.trainable["lora"] == sum(4 * (layer.in_features + layer.out_features) for layer in layers.values())
    assert set(report.trainable) == {"biases", "norms", "head", "lora"}
    assert (report.trainable["biases"] > 0) == (kind in ("opt", "gpt2"))
    assert trisparse.perplexity(model, tokens, seq_len=16) < 0.95 * before
    assert masks_sha256(model) == digest
    for name, layer in layers.items():
        assert model.get_submodule(name) is layer
        assert torch.equal(layer.positions, positions[name])
        assert not torch.equal(layer.values, values[name])
    trisparse.check_masks(model)


@pytest.mark.parametrize("options", [{"groups": ("lora",), "gradient_checkpointing": True}, {"dtype": "bf16"}])
def test_retrained_compressed_equals_retrained_dense(build, tokens, run, options):
    dense, compressed = build("llama"), build("llama")
    trisparse.compress(compressed, prefer="memory")
    losses = [run(model, tokens, **options).losses for model in (dense, compressed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if "dtype" not in options else 1e-2)
    trisparse.decompress(compressed)
    if "dtype" not in options:
        for name, param in dense.named_parameters():
            torch.testing.assert_close(compressed.get_parameter(name), param, rtol=1e-4, atol=1e-5)


def test_a_failed_retraining_leaves_the_compressed_model(build, tokens, run, monkeypatch):
    model = build("opt")
    trisparse.compress(model, prefer="memory")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [(name, id(module)) for name, module in model.named_modules()]
    monkeypatch.setattr("trisparse.retrain.adapters.Adapted.first_not_finite", lambda self: "a weight")
    with pytest.raises(trisparse.RetrainError):
        run(model, tokens)
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_grouping_does_not_decompress(build, monkeypatch):
    def refuse(self):
        raise AssertionError("decompressed")

    model = build("llama")
    trisparse.compress(model, prefer="memory")
    monkeypatch.setattr(SparseLinear, "weight", property(refuse))
    assert len(parameter_groups(model).lora) == 14
