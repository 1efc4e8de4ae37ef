import json

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trisparse.sparsity.checkpoint import save
from trisparse.sparsity.compression import compress, decompress
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import MaskError, check_masks, masks, masks_sha256
from trisparse.sparsity.sparsify import sparsify


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRISPARSE_CACHE", str(tmp_path))


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_every_language_model_there_and_back(language_model, tokens, pattern):
    sparsify(language_model, pattern, progress=False)
    dense, digest, found = logits(language_model, tokens), masks_sha256(language_model), masks(language_model)
    before = {name: tensor.clone() for name, tensor in language_model.state_dict().items()}
    report = compress(language_model)
    assert [layer.name for layer in report.layers] == list(found)
    assert masks_sha256(language_model) == digest
    check_masks(language_model)
    torch.testing.assert_close(logits(language_model, tokens), dense)
    compressed = sum(isinstance(module, SparseLinear) for module in language_model.modules())
    assert compressed == sum(not layer.note for layer in report.layers) > 0
    assert report.bytes < 0.75 * report.dense_bytes or any(layer.note for layer in report.layers)
    assert decompress(language_model) == compressed
    after = language_model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert masks_sha256(language_model) == digest


def test_generates_the_same_tokens(model_named, tokens):
    model = model_named("llama")
    sparsify(model, "2:4", progress=False)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **options)
    compress(model)
    assert torch.equal(model.generate(tokens, **options), expected)


def test_fused_experts_and_convolutions_stay_dense(model_named):
    for name, kind in (("mixtral", "MixtralExperts"), ("resnet", "Conv2d")):
        model = model_named(name)
        sparsify(model, "50%", progress=False)
        assert f"a {kind} has no compressed form" in {layer.note for layer in compress(model).layers}


def test_layers_that_must_stay_say_why():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    model[1].weight = model[0].weight
    sparsify(model, "2:4", progress=False)
    model[2].register_forward_hook(lambda *_: None)
    notes = {layer.name: layer.note for layer in compress(model).layers}
    assert "shared" in notes["0.weight"]
    assert "hooks" in notes["2.weight"]
    assert notes["3.weight"] == ""
    assert isinstance(model[3], SparseLinear)
    low = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    sparsify(low, "1%", include="*.weight", progress=False)
    assert compress(low).layers[0].note == "the compressed form is not smaller at 2%"
    assert isinstance(low[0], nn.Linear)


def test_compressing_twice_reports_the_same_layers():
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    sparsify(model, "2:4", progress=False)
    first, second = compress(model), compress(model)
    assert second.bytes == first.bytes
    assert [layer.backend for layer in second.layers] == ["compressed"] * 2
    assert compress(model, tune=True, tokens=(1,), prefer="memory").layers[0].times.keys() == {1}
    assert model[0].prefer == "memory"


def test_report_shows_bytes_backends_and_times():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    sparsify(model, "2:4", progress=False)
    report = compress(model, tune=True, tokens=(1, 16))
    assert {layer.backend for layer in report.layers} == {"compressed"}
    assert report.layers[0].times.keys() == {1, 16}
    assert report.layers[0].chosen == {1: "compressed", 16: "compressed"}
    assert report.bytes == 2 * (64 * 64 * 2 + 64 * 64 // 8)
    text = str(report)
    assert "16 tok, us (dense)" in text
    assert "on cpu a layer is dense while it is multiplied" in text
    assert json.loads(report.to_json())["bytes"] == report.bytes


def test_lazy_tuning_waits_for_the_first_use():
    model = nn.Sequential(nn.Linear(64, 64))
    sparsify(model, "2:4", include="*", progress=False)
    report = compress(model, tune="lazy")
    assert report.layers[0].times == {}
    assert model[0].tune_for == "speed"
    model(torch.randn(2, 64))
    assert compress(model).layers[0].backend == "compressed"
    assert model[0].tune_for is None


def test_wrong_inputs(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(ValueError, match="model has no masks"):
        compress(model)
    sparsify(model, "2:4", progress=False)
    with pytest.raises(ValueError, match="prefer must be"):
        compress(model, prefer="size")
    with pytest.raises(ValueError, match="tune must be"):
        compress(model, tune="later")
    model[1].weight.data[:] = 1
    with pytest.raises(MaskError, match=r"1\.weight: 128 pruned weights are not zero"):
        compress(model)
    assert isinstance(model[0], nn.Linear)
    sparsify(model, "2:4", progress=False)
    compress(model)
    with pytest.raises(ValueError, match="model is compressed: decompress"):
        sparsify(model, "2:4", progress=False)
    alone = nn.Linear(16, 16)
    sparsify(alone, "2:4", include="weight", progress=False)
    with pytest.raises(ValueError, match=r"use SparseLinear\.from_dense"):
        compress(alone)
