"""PERP on convolutions: LoRA of the pruned layers of an image classifier, trained by SGD and merged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trisparse.bench.studies import digits as bench
from trisparse.retrain import vision
from trisparse.retrain.layer_adapters import LayerAdapters
from trisparse.retrain.loop import RetrainError
from trisparse.retrain.lora import MaskLoraConv2d
from trisparse.retrain.schedule import Linear
from trisparse.retrain.vision import VisionConfig, accuracy, retrain_vision
from trisparse.sparsity.mask import check_masks, detach, masks, masks_sha256
from trisparse.sparsity.sparsify import sparsify

QUICK = {"schedule": Linear(0.02), "epochs": 1, "batch_size": 64, "rank": 4, "alpha": 4}


@pytest.fixture(scope="module")
def pruned(trained_resnet):
    return bench.prune(trained_resnet, "90%")


@pytest.mark.parametrize("variant", ["lora_prune", "mask_lora", "scale_lora"])
def test_every_variant_trains_the_convolutions_and_keeps_the_zeros(pruned, digits, variant):
    model, digest = copy.deepcopy(pruned), masks_sha256(pruned)
    modules = [(name, id(module)) for name, module in model.named_modules()]
    flags = [param.requires_grad for param in model.parameters()]
    config = VisionConfig("perp", variant=variant, **QUICK)
    report = retrain_vision(model, digits[0], config, validation=digits[1], progress=False)
    assert report.accuracy[1] > report.accuracy[0] + 0.2
    assert report.accuracy[1] == accuracy(model, digits[1])
    check_masks(model)
    assert masks_sha256(model) == digest
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert [param.requires_grad for param in model.parameters()] == flags
    before, after = pruned.state_dict(), model.state_dict()
    convolutions = [name for name in masks(model) if "convolution" in name]
    assert len(convolutions) > 4
    assert all(not torch.equal(before[name], after[name]) for name in convolutions)
    sizes = [masks(model)[name].shape for name in convolutions]
    assert report.trainable["lora"] == 4 * sum(shape[0] + shape[1:].numel() for shape in sizes)
    assert list(report.trainable) == ["biases", "norms", "head", "lora"]


def test_lora_alone_leaves_the_rest_as_it_was(pruned, digits):
    model = copy.deepcopy(pruned)
    retrain_vision(model, digits[0], VisionConfig(("lora",), recalibrate=False, **QUICK), progress=False)
    before = dict(pruned.named_parameters())
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in masks(model) if "classifier" not in name}


def test_whole_filters_take_plain_lora_of_the_kept_ones(pruned, digits):
    model = copy.deepcopy(pruned)
    for module in model.modules():
        detach(module)
    sparsify(model, "25% rows", "magnitude", include="*convolution*", progress=False)
    kept = sum(4 * (mask.kept // mask.cols + mask.cols) for mask in masks(model).values())
    config = VisionConfig(("lora",), variant="lora", **QUICK)
    report = retrain_vision(model, digits[0], config, progress=False)
    assert report.trainable == {"lora": kept}
    check_masks(model)
    gone = [name for name, mask in masks(model).items() if not mask.matrix().all()]
    assert gone
    assert all(not model.get_parameter(name)[~masks(model)[name].dense()].any() for name in gone)


@pytest.mark.parametrize("moment", ["train", "recalibrate"])
def test_a_failure_gives_the_same_bits_back(pruned, digits, monkeypatch, moment):
    model = copy.deepcopy(pruned)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(name, id(module)) for name, module in model.named_modules()]
    real = getattr(vision, moment)

    def fails(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(vision, moment, fails)
    with pytest.raises(KeyboardInterrupt):
        retrain_vision(model, digits[0], VisionConfig("perp", **QUICK), progress=False)
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_factor_that_is_not_finite_is_not_merged():
    layer = nn.Conv2d(2, 4, 3)
    model = nn.Sequential(layer)
    weight = layer.weight.detach().clone()
    adapters = LayerAdapters(model, ["0"], "mask_lora", 2, 2.0)
    assert isinstance(model[0], MaskLoraConv2d)
    adapters.parameters["0.lora_B"].data.fill_(float("nan"))
    with pytest.raises(RetrainError, match=r"0\.lora_B is not finite"):
        adapters.merge()
    adapters.discard()
    assert model[0] is layer
    assert torch.equal(layer.weight, weight)


def test_wrong_input(pruned, digits):
    with pytest.raises(ValueError, match=r"variant must be one of lora, .* got 'dora'"):
        VisionConfig("perp", variant="dora")
    with pytest.raises(ValueError, match="rank must be an integer of at least 1, got 0"):
        VisionConfig("perp", rank=0)
    with pytest.raises(ValueError, match="alpha must be above 0"):
        VisionConfig("perp", alpha=0)
    with pytest.raises(ValueError, match=r"variant='lora' cannot be merged.*convolution"):
        retrain_vision(copy.deepcopy(pruned), digits[0], VisionConfig("perp", variant="lora"), progress=False)
    dense = copy.deepcopy(pruned)
    for module in dense.modules():
        detach(module)
    with pytest.raises(ValueError, match=r"asks for lora, which the model has nothing of; it has .*head, full"):
        retrain_vision(dense, digits[0], VisionConfig("perp"), progress=False)


def test_what_lora_does_not_reach_is_named(digits):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv1d(8, 8, 3), nn.Conv2d(1, 4, 3)
            self.head = nn.Linear(8 + 4, 10)

        def forward(self, images):
            return self.head(torch.cat([self.first(images[:, 0]).mean(-1), self.second(images).mean((-1, -2))], 1))

    torch.manual_seed(0)
    model = Pooled()
    sparsify(model, "50%", "magnitude", include=["first", "second"], progress=False)
    report = retrain_vision(model, digits[0], VisionConfig(("head", "lora"), **QUICK), progress=False)
    assert report.not_covered == ["first.weight: Conv1d [8x8x3] is no nn.Linear, Conv1D or Conv2d"]
    assert report.trainable["lora"] == 4 * (4 + 9)
    assert "not covered" in str(report)
    assert "Conv1d [8x8x3] is no nn.Linear" in str(report)
