"""Every LoRA variant on dense layers against its formula: linear and convolution, whole rows pruned or weights."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from trisparse.retrain.effective_sparsity import effective_sparsity
from trisparse.retrain.lora import MaskLoraConv2d, MaskLoraLinear, fills_zeros, mask_lora_modules
from trisparse.retrain.lora_layer import VARIANTS
from trisparse.retrain.sparse_lora_config import load_adapters, sparse_lora_modules
from trisparse.sparsity.mask import Mask, MaskError, attach, check_masks, mask_of
from trisparse.sparsity.pattern import NM, Rows, Unstructured

RANK, SCALE = 2, 3.0
KINDS = {
    "linear": lambda: nn.Linear(8, 12),
    "conv1d": lambda: Conv1D(12, 8),
    "conv2d": lambda: nn.Conv2d(2, 12, 2, stride=2, padding=1),
    "grouped": lambda: nn.Conv2d(4, 12, (1, 4), groups=2, dilation=2, padding=3, padding_mode="circular"),
}


def layer_of(kind, pattern=Unstructured(0.5), dtype=torch.float64):  # noqa: B008
    torch.manual_seed(0)
    layer = KINDS[kind]()
    nn.init.normal_(layer.bias)
    layer = layer.to(dtype)
    cols = layer.weight.numel() // 12
    score = torch.rand(12, cols)
    if pattern is not None:
        keep = score > 0.5
        if isinstance(pattern, Rows):
            keep = (score[:, :1] > 0.5).expand(12, cols)
        attach(layer, "weight", Mask.from_matrix(keep, layer.weight.shape, pattern, transposed=kind == "conv1d"))
    return layer


def wrapped(kind, variant, pattern=Unstructured(0.5), start=False, dtype=torch.float64):  # noqa: B008
    layer = layer_of(kind, pattern, dtype)
    config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=["0"], init_lora_weights=start)
    peft = get_peft_model(nn.Sequential(layer), sparse_lora_modules(config, variant))
    return layer, peft, peft.base_model.model[0]


def inputs_of(kind, dtype=torch.float64):
    shape = {"linear": (3, 5, 8), "conv1d": (3, 5, 8), "conv2d": (3, 2, 5, 6), "grouped": (3, 4, 5, 6)}[kind]
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def with_weight(layer, weight, x):
    """The layer's own product with another weight, in its stored layout."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return (
        F.linear(x, weight.t(), layer.bias) if isinstance(layer, Conv1D) else layer._conv_forward(x, weight, layer.bias)
    )


def effective(layer, wrapper, variant, pattern):
    """(what the layer multiplies with, what a merge leaves), by the formulas."""
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    mask = mask_of(layer)
    keep = torch.ones_like(layer.weight, dtype=torch.bool) if mask is None else mask.dense()
    if isinstance(pattern, Rows):
        b = torch.zeros(12, RANK, dtype=b.dtype).index_copy(0, wrapper.rows, b)
    update = (b @ a).t() if isinstance(layer, Conv1D) else (b @ a).view_as(layer.weight)
    if variant == "scale_lora" and mask is not None:
        return (layer.weight * update,) * 2
    masked = layer.weight + SCALE * keep * update
    return (masked if variant == "mask_lora" else layer.weight + SCALE * update), masked


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Rows(0.5), None], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_gradients_and_merge_equal_the_formula(variant, kind, pattern):
    layer, peft, wrapper = wrapped(kind, variant, pattern)
    x = inputs_of(kind).requires_grad_()
    factors = [wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight]
    forward, merged = effective(layer, wrapper, variant, pattern)
    want = with_weight(layer, forward, x)
    got = peft(x)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    for mine, theirs in zip(
        torch.autograd.grad(got, [x, *factors], dy), torch.autograd.grad(want, [x, *factors], dy), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    added = forward if variant == "lora" else merged
    torch.testing.assert_close(layer.weight + wrapper.get_delta_weight("default"), added)

    before = layer.weight.detach().clone()
    if variant == "lora" and isinstance(pattern, Unstructured):
        assert fills_zeros(layer)
        with pytest.raises(ValueError, match=r"fill the zeros of a weight pruned to 50%.*lora_prune"):
            peft.merge_and_unload()
        assert torch.equal(layer.weight, before)
        return
    peft.merge_adapter()
    assert torch.equal(layer.weight, before) is False
    torch.testing.assert_close(peft(x), with_weight(layer, merged, x))
    peft.unmerge_adapter()
    assert torch.equal(layer.weight, before)  # the very same bits
    torch.testing.assert_close(peft(x), want)
    with peft.disable_adapter():
        torch.testing.assert_close(peft(x), layer(x))
    assert peft.merge_and_unload(safe_merge=True)[0] is layer
    torch.testing.assert_close(layer.weight, merged)
    if pattern is not None:
        check_masks(nn.Sequential(layer))


def two_layers(config, patterns):
    """(the layers, the model under adapters)."""
    layers = [layer_of("linear", pattern) for pattern in patterns]
    return layers, get_peft_model(nn.Sequential(*layers), config)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("first", [None, Rows(0.5)], ids=str)
def test_a_layer_that_refuses_to_merge_stops_those_before_it(merge, first):
    options = LoraConfig(r=RANK, target_modules=["0", "1"], init_lora_weights=False)
    config = sparse_lora_modules(options, "lora")
    layers, peft = two_layers(config, [first, Unstructured(0.5)])
    _, mergeable = two_layers(config, [first, Rows(0.5)])  # the same config on another model
    for model in (peft, copy.deepcopy(peft)):
        before = [module.base_layer.weight.clone() for module in model.base_model.model]
        with pytest.raises(ValueError, match=r"fill the zeros of 1 pruned layers, such as 1, so no layer is merged"):
            getattr(model, merge)()
        adapted = list(model.base_model.model)
        assert not any(layer.merged for layer in adapted)
        assert all(torch.equal(layer.base_layer.weight, weight) for layer, weight in zip(adapted, before, strict=True))
    getattr(mergeable, merge)()

    # another adapter that can be merged is not held back, nor is what stays when the one that refuses is deleted
    peft.add_adapter("other", sparse_lora_modules(options, "lora_prune"))
    peft.merge_adapter(["other"])
    assert all(layer.merged_adapters == ["other"] for layer in peft.base_model.model)
    peft.unmerge_adapter()
    peft.delete_adapter("default")
    peft.set_adapter("other")
    peft.merge_and_unload()
    check_masks(nn.Sequential(*layers))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("start", [True, "gaussian"])
def test_every_start_leaves_the_layer_as_it_was(kind, variant, start):
    layer, peft, _ = wrapped(kind, variant, start=start)
    torch.testing.assert_close(peft(inputs_of(kind)), layer(inputs_of(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_of_whole_rows_b_has_the_kept_ones_alone(kind):
    layer, peft, wrapper = wrapped(kind, "mask_lora", Rows(0.5))
    kept = int((layer.weight.reshape(8, 12).t() if kind == "conv1d" else layer.weight.view(12, -1)).any(1).sum())
    assert 0 < kept < 12
    assert wrapper.lora_B["default"].weight.shape == (kept, RANK)
    assert wrapper.out_features == kept
    parameters = RANK * (layer.weight.numel() // 12 + kept)
    assert sum(param.numel() for param in peft.parameters() if param.requires_grad) == parameters
    assert not wrapper.supports_lora_conversion()
    mask = mask_of(layer)
    assert effective_sparsity(peft).total == pytest.approx(1 - (mask.kept + parameters) / layer.weight.numel())
    assert not fills_zeros(layer)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Rows(0.5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_come_back_from_a_folder(variant, kind, pattern, tmp_path):
    _, peft, _ = wrapped(kind, variant, pattern)
    want = peft(inputs_of(kind))
    peft.save_pretrained(tmp_path)
    loaded = load_adapters(nn.Sequential(layer_of(kind, pattern)), tmp_path)
    assert isinstance(loaded, PeftModel)
    torch.testing.assert_close(loaded(inputs_of(kind)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_bf16_weights_and_autocast(variant, kind):
    layer, peft, wrapper = wrapped(kind, variant, dtype=torch.float32)
    x = inputs_of(kind, torch.float32)
    want = peft(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = peft(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.15)
    wrapper.base_layer.bfloat16()
    got = peft(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.15)
    peft.merge_and_unload()
    assert layer.weight.dtype == torch.bfloat16
    check_masks(nn.Sequential(layer))


def test_kinds_of_layers_and_default_variant():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 2, 1))
    peft = get_peft_model(model, mask_lora_modules(LoraConfig(target_modules=["0", "1"])))
    kinds = [type(layer) for layer in peft.base_model.model]
    assert kinds == [MaskLoraLinear, MaskLoraConv2d]
    layer = layer_of("linear")
    peft = get_peft_model(nn.Sequential(layer), mask_lora_modules(LoraConfig(target_modules=["0"])))
    assert peft.base_model.model[0].variant == {"default": "mask_lora"}


def test_wrong_input():
    with pytest.raises(ValueError, match=r"variant must be one of lora, .* got 'prune'"):
        wrapped("linear", "prune")
    config = LoraConfig(r=1, rank_pattern={"0": 0}, target_modules=["0"])
    with pytest.raises(ValueError, match="positive"):
        get_peft_model(nn.Sequential(layer_of("conv2d")), sparse_lora_modules(config, "lora"))
    _, peft, _ = wrapped("conv2d", "scale_lora")
    peft.add_adapter("other", sparse_lora_modules(LoraConfig(r=2, target_modules=["0"]), "scale_lora"))
    peft.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="only one can be used at a time"):
        peft(inputs_of("conv2d"))
    _, peft, wrapper = wrapped("conv2d", "lora_prune", dtype=torch.float32)
    before = wrapper.base_layer.weight.detach().clone()
    wrapper.lora_B["default"].weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        peft.merge_and_unload(safe_merge=True)
    assert torch.equal(wrapper.base_layer.weight, before)
    layer = layer_of("conv2d")
    layer.weight.data.fill_(1)
    with pytest.raises(MaskError, match="not zero"):
        get_peft_model(nn.Sequential(layer), mask_lora_modules(LoraConfig(target_modules=["0"])))


def test_a_mask_that_says_rows_but_is_not_of_rows_is_taken_as_it_is():
    layer = nn.Linear(4, 2)
    keep = torch.tensor([[True, True, False, False], [False] * 4])
    attach(layer, "weight", Mask.from_matrix(keep, layer.weight.shape, Rows(0.5)))
    assert fills_zeros(layer)
    other = nn.Linear(4, 2)
    attach(other, "weight", Mask.from_matrix(keep, other.weight.shape, NM(2, 4)))
    assert fills_zeros(other)
    assert not fills_zeros(nn.Linear(4, 2))
