"""The mask_lora layer against hand-computed values, the plain formula and PEFT's protocol."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from trisparse.retrain import lora
from trisparse.retrain.lora import MaskLoraLinear, mask_lora, mask_lora_modules, mask_lora_ref
from trisparse.sparsity.mask import Mask, MaskError, attach, check_masks, mask_of
from trisparse.sparsity.pattern import NM, Unstructured


def problem(p=12, q=8, rank=3, tokens=5, dtype=torch.float64, transposed=False, seed=0):
    """x, weight, left, right, keep, bias; the weight is zero where pruned."""
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(p, q, generator=g) > 0.5
    weight = torch.randn(p, q, generator=g, dtype=dtype) * keep
    left, right = torch.randn(p, rank, generator=g, dtype=dtype), torch.randn(rank, q, generator=g, dtype=dtype)
    x = torch.randn(2, tokens, p if transposed else q, generator=g, dtype=dtype)
    bias = torch.randn(q if transposed else p, generator=g, dtype=dtype)
    return x, weight, left, right, keep, bias


def outputs_and_grads(function, x, weight, left, right, keep, bias, **kwargs):
    leaves = [t.clone().requires_grad_() for t in (x, left, right, bias)]
    y = function(leaves[0], weight, leaves[1], leaves[2], keep, leaves[3], **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def ours(x, weight, left, right, keep, bias, **kwargs):
    return mask_lora(x, weight, left, right, ~keep, bias, **kwargs)


def test_hand_computed_forward_and_gradient():
    # 2 outputs, 4 inputs, rank 1, 2:4 kept positions
    weight = torch.tensor([[1.0, 0, 2, 0], [0, 3, 0, 4]])
    keep = weight != 0
    left = torch.tensor([[1.0], [2.0]], requires_grad=True)
    right = torch.tensor([[1.0, 10, 100, 1000]], requires_grad=True)
    x = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 2]], requires_grad=True)
    y = mask_lora(x, weight, left, right, ~keep)
    # effective weight [[1+1, 0, 2+100, 0], [0, 3+20, 0, 4+2000]]
    assert y.tolist() == [[104.0, 2027.0], [2.0, 4008.0]]
    y.backward(torch.tensor([[1.0, 0], [0, 1]]))
    assert x.grad.tolist() == [[2.0, 0, 102, 0], [0, 23, 0, 2004]]
    # dyᵀx = [[1, 1, 1, 1], [1, 0, 0, 2]], masked [[1, 0, 1, 0], [0, 0, 0, 2]]
    assert left.grad.tolist() == [[101.0], [2000.0]]
    assert right.grad.tolist() == [[1.0, 0, 1, 4]]


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(transposed):
    x, weight, left, right, keep, bias = problem(transposed=transposed)
    leaves = [t.requires_grad_() for t in (x, left, right, bias)]
    assert torch.autograd.gradcheck(
        lambda x, left, right, b: mask_lora(x, weight, left, right, ~keep, b, transposed=transposed), leaves
    )


@pytest.mark.parametrize("chunk", [1, 8, 40, 95, 96, 97])  # of 96 elements: rows of 8, a ragged rest, all
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_formula_at_every_chunk_boundary(monkeypatch, chunk, transposed):
    monkeypatch.setitem(lora._CHUNK_ELEMENTS, "cpu", chunk)
    case = problem(transposed=transposed)
    for got, want in zip(
        outputs_and_grads(ours, *case, transposed=transposed),
        outputs_and_grads(mask_lora_ref, *case, transposed=transposed), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_error_at_most_twice_that_of_torch(autocast, transposed):
    case64 = problem(96, 64, 4, 40, transposed=transposed)
    exact = outputs_and_grads(mask_lora_ref, *case64, transposed=transposed)
    case = [t.float() if t.is_floating_point() else t for t in case64]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = outputs_and_grads(ours, *case, transposed=transposed)
        torchs = outputs_and_grads(mask_lora_ref, *case, transposed=transposed)
    assert got[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert all(grad.dtype == torch.float32 for grad in got[1:])
    for name, mine, other, want in zip(("y", "x", "left", "right", "bias"), got, torchs, exact, strict=True):
        error, bar = (mine.double() - want).norm(), (other.double() - want).norm()
        assert error <= 2 * bar, name


def test_a_bf16_update_below_half_a_unit_is_not_lost():
    # bf16 has 1 + 2^-7 after 1. W rounds to 1, and so would 1 + update; their exact sum is nearer to 1 + 2^-7.
    weight, update = torch.tensor([[1 + 2**-8 - 2**-10]]), torch.tensor([[2**-9]])
    with torch.autocast("cpu", torch.bfloat16):
        y = mask_lora(torch.ones(1, 1), weight, update, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool))
    assert float(y) == float((weight + update).bfloat16()) != float(weight.bfloat16() + update.bfloat16())


def test_nan_factors_leave_pruned_weights_zero():
    _, weight, left, right, keep, _ = problem()
    left[0, 0] = float("nan")
    zero_ = lora._Zeros(~keep, 4)
    assert (lora._effective(weight, left, right, zero_, torch.float32)[~keep] == 0).all()


def test_saves_neither_the_update_nor_the_effective_weight():
    x, weight, left, right, keep, _ = problem(64, 64, 2, 4)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t) or t, lambda t: t):
        mask_lora(x.requires_grad_(), weight, left.requires_grad_(), right, ~keep)
    large = [t for t in sizes if t.numel() == weight.numel()]
    assert {t.data_ptr() for t in large if t.is_floating_point()} == {weight.data_ptr()}


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
    assert not any("pruned" in key for key in peft.state_dict())
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
