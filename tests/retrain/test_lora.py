"""The mask_lora layer against the plain formula and PEFT's protocol; tests/kernels has the formula itself."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from trisparse.retrain.lora import MaskLoraLinear, mask_lora_modules
from trisparse.sparsity.mask import Mask, MaskError, attach, check_masks, mask_of
from trisparse.sparsity.pattern import NM, Unstructured


def wrapped(kind=nn.Linear, masked=True, bias=True, seed=0, **options):
    torch.manual_seed(seed)
    layer = Conv1D(6, 8) if kind is Conv1D else nn.Linear(8, 6, bias=bias)
    if masked:
        keep = torch.rand(6, 8) > 0.5
        attach(layer, "weight", Mask.from_matrix(keep, layer.weight.shape, Unstructured(0.5),
                                                 transposed=kind is Conv1D))  # fmt: skip
    model = nn.Sequential(layer)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False, **options)
    return layer, get_peft_model(model, mask_lora_modules(config))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("masked", [True, False])
def test_layer_and_merge_equal_the_formula(kind, masked):
    layer, peft = wrapped(kind, masked)
    wrapper = peft.base_model.model[0]
    assert isinstance(wrapper, MaskLoraLinear)
    assert not any("packed" in key for key in peft.state_dict())
    keep = mask_of(layer).dense() if masked else torch.ones_like(layer.weight, dtype=torch.bool)
    delta = 2.0 * wrapper.lora_B["default"].weight @ wrapper.lora_A["default"].weight
    delta = delta.t() if kind is Conv1D else delta
    effective = layer.weight + keep * delta
    x = torch.randn(3, 5, 8)
    want = x @ (effective if kind is Conv1D else effective.t()) + layer.bias
    before = peft(x)
    torch.testing.assert_close(before, want)
    torch.testing.assert_close(wrapper.get_delta_weight("default"), keep * delta)
    assert wrapper.supports_lora_conversion() != masked

    weight = layer.weight.detach().clone()
    peft.merge_adapter()
    torch.testing.assert_close(peft(x), before)
    peft.unmerge_adapter()
    torch.testing.assert_close(layer.weight, weight)
    with peft.disable_adapter():
        torch.testing.assert_close(peft(x), nn.Sequential(layer)(x))
    merged = peft.merge_and_unload(safe_merge=True)
    assert merged[0] is layer
    torch.testing.assert_close(layer.weight, effective)
    if masked:
        assert mask_of(layer) is not None
        assert (layer.weight[~keep] == 0).all()
        check_masks(merged)


def test_adapters_add_up_under_the_one_mask():
    layer, peft = wrapped()
    wrapper = peft.base_model.model[0]
    peft.add_adapter("other", mask_lora_modules(LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)))
    peft.base_model.set_adapter(["default", "other"])
    x = torch.randn(4, 8)
    delta = wrapper.get_delta_weight("default") + wrapper.get_delta_weight("other")
    torch.testing.assert_close(peft(x), nn.functional.linear(x, layer.weight + delta, layer.bias))


def test_safe_merge_refuses_nan_and_keeps_the_weight():
    layer, peft = wrapped()
    weight = layer.weight.detach().clone()
    peft.base_model.model[0].lora_B["default"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        peft.merge_and_unload(safe_merge=True)
    assert torch.equal(layer.weight, weight)


def test_bf16_weights():
    layer, peft = wrapped()
    x = torch.randn(4, 8)
    want = peft(x)
    peft.base_model.model[0].base_layer.bfloat16()
    assert peft(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(peft(x.bfloat16()).float(), want, rtol=0.03, atol=0.05)
    peft.merge_and_unload()
    assert layer.weight.dtype == torch.bfloat16
    check_masks(nn.Sequential(layer))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_unsupported_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        wrapped(**options)


def test_rslora_and_unsupported_starts():
    _, peft = wrapped(use_rslora=True)
    assert peft.base_model.model[0].scaling["default"] == pytest.approx(4 / 2**0.5)
    config = mask_lora_modules(LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="init_lora_weights"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    with pytest.raises(ValueError, match="adapter_names"):
        peft.base_model.model[0](torch.randn(1, 8), adapter_names=["default"])


def test_a_pruned_weight_that_is_not_zero_is_refused():
    layer = nn.Linear(4, 2)
    keep = torch.tensor([[True, True, False, False]] * 2)
    attach(layer, "weight", Mask.from_matrix(keep, layer.weight.shape, NM(2, 4)))
    layer.weight.data[0, 3] = 1
    with pytest.raises(MaskError, match="not zero"):
        get_peft_model(nn.Sequential(layer), mask_lora_modules(LoraConfig(target_modules=["0"])))
