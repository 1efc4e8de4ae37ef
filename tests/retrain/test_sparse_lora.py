"""LoRA on compressed layers against the plain dense formula, and merges that keep the mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import trisparse
from trisparse.retrain.effective_sparsity import effective_sparsity
from trisparse.retrain.lora_layer import VARIANTS
from trisparse.retrain.sparse_lora import SparseLoraLinear
from trisparse.sparsity.backends import Plan
from trisparse.sparsity.mask import check_masks, masks_sha256
from trisparse.sparsity.pattern import NM, Unstructured

MERGEABLE = VARIANTS[1:]
PATTERNS = [NM(2, 4), NM(4, 8), Unstructured(0.5)]


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_equal_the_dense_formula(lora, variant, pattern, kind):
    base, peft, wrapper = lora.wrapped(variant, pattern, kind=kind)
    assert isinstance(wrapper, SparseLoraLinear)
    base.bias.requires_grad_(True)
    a, b = lora.factors(wrapper)
    x = torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True)
    leaves = [x, a, b, base.bias]
    dy = torch.randn(3, 5, 24, dtype=torch.float64)
    y = peft(x)
    want = lora.formula(variant, x, base.weight, base.mask.matrix(), base.bias, a, b)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(y, leaves, dy)
    for mine, theirs in zip(got, torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(lora, variant, pattern):
    base, _, wrapper = lora.wrapped(variant, pattern, rows=8, cols=16, rank=2)
    base.bias.requires_grad_(True)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    parameters = [wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight, base.bias]
    assert torch.autograd.gradcheck(lambda x, *_: wrapper(x), (x, *parameters))


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_as_one_graph(lora, variant):
    _, peft, wrapper = lora.wrapped(variant, dtype=torch.float32)
    x = torch.randn(5, 32)
    want = peft(x)
    want_grads = torch.autograd.grad(want.sum(), lora.factors(wrapper))
    y = torch.compile(peft, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, want)
    for mine, theirs in zip(torch.autograd.grad(y.sum(), lora.factors(wrapper)), want_grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("variant", MERGEABLE)
def test_a_merge_keeps_the_mask_and_rounds_once(lora, variant, pattern, dtype):
    base, peft, wrapper = lora.wrapped(variant, pattern, dtype=dtype, kind=Conv1D)
    model = peft.base_model.model
    a, b = lora.factors(wrapper)
    assert a.dtype == b.dtype == torch.float32
    original, keep, values = base.weight.clone(), base.mask.matrix(), base.values.clone()
    digest = masks_sha256(nn.Sequential(base))
    x = torch.randn(5, 32, dtype=dtype)
    masked = "mask_lora" if variant == "lora_prune" else variant
    unmerged = peft(x)
    before = lora.formula(masked, x.double(), original.double(), keep, base.bias.double(), a.double(), b.double())
    wide = (
        original.double() + keep * lora.scale * (b @ a).double()
        if masked == "mask_lora"
        else original * (b @ a).double()
    )

    peft.merge_adapter()
    assert wrapper.merged
    assert masks_sha256(nn.Sequential(base)) == digest
    assert (base.weight[~keep] == 0).all()
    # rounded once: within one unit in the last place of the exact sum
    step = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 8 * torch.finfo(dtype).eps
    assert ((base.weight.double() - wide).abs() <= step * wide.abs().clamp_min(0.1)).all()
    torch.testing.assert_close(peft(x).double(), before, rtol=step * 8, atol=step * 8)
    if variant != "lora_prune":  # which trains without the mask
        torch.testing.assert_close(peft(x), unmerged, rtol=step * 8, atol=step * 8)

    peft.unmerge_adapter()
    assert torch.equal(base.values, values)
    assert not wrapper.merged

    merged = peft.merge_and_unload(safe_merge=True)
    assert merged is model
    assert merged[0] is base
    assert masks_sha256(merged) == digest
    check_masks(merged)
    torch.testing.assert_close(merged(x).double(), before, rtol=step * 8, atol=step * 8)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_a_merge_of_plain_lora_is_refused_and_says_what_to_do(lora, pattern):
    base, peft, wrapper = lora.wrapped("lora", pattern)
    values = base.values.clone()
    x = torch.randn(5, 32, dtype=torch.float64)
    before = peft(x)
    share = effective_sparsity(wrapper).total
    for merge in (peft.merge_adapter, peft.merge_and_unload):
        with pytest.raises(ValueError, match=rf"stay separate.*{share:.2%}.*lora_prune, mask_lora, scale_lora"):
            merge()
    assert torch.equal(base.values, values)
    assert torch.equal(peft(x), before)
    assert peft.unload()[0] is base


def test_safe_merge_refuses_nan_and_keeps_the_weight(lora):
    base, peft, wrapper = lora.wrapped("mask_lora")
    values = base.values.clone()
    lora.factors(wrapper)[1].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        peft.merge_and_unload(safe_merge=True)
    assert torch.equal(base.values, values)
    assert not wrapper.merged


@pytest.mark.parametrize("variant", VARIANTS)
def test_delta_weight_is_what_the_adapter_adds(lora, variant):
    base, _, wrapper = lora.wrapped(variant, Unstructured(0.5))
    a, b = lora.factors(wrapper)
    original = base.weight.clone()
    delta = wrapper.get_delta_weight("default")
    want = (b @ a - 1) * original if variant == "scale_lora" else lora.scale * (b @ a)
    keep = 1 if variant == "lora" else base.mask.matrix()
    torch.testing.assert_close(delta, want * keep, rtol=1e-12, atol=1e-12)
    assert wrapper.supports_lora_conversion() == (variant == "lora")
    if variant != "lora":
        wrapper.merge()
        torch.testing.assert_close(base.weight, original + delta, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(wrapper.get_delta_weight("default"), delta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["lora", "lora_prune", "mask_lora"])
def test_several_adapters_add_up_and_merge_together(lora, variant):
    base, peft, wrapper = lora.wrapped(variant, Unstructured(0.5))
    peft.add_adapter("other", lora.config(variant, rank=3, lora_alpha=1))
    peft.base_model.set_adapter(["default", "other"])
    x = torch.randn(5, 32, dtype=torch.float64)
    deltas = [s * b @ a for s, (a, b) in ((lora.scale, lora.factors(wrapper)), (1 / 3, lora.factors(wrapper, "other")))]
    update = sum(deltas)
    masked = update * base.mask.matrix()
    want = F.linear(x, base.weight + (masked if variant == "mask_lora" else update), base.bias)
    torch.testing.assert_close(peft(x), want, rtol=1e-12, atol=1e-12)
    with peft.disable_adapter():
        torch.testing.assert_close(peft(x), base(x))
    if variant != "lora":
        original, values = base.weight.clone(), base.values.clone()
        wrapper.merge(adapter_names=["default"])
        with pytest.warns(UserWarning, match="additionally merging"):
            wrapper.merge(adapter_names=["other"])
        torch.testing.assert_close(base.weight, original + masked, rtol=1e-12, atol=1e-12)
        with peft.disable_adapter():  # unmerges
            torch.testing.assert_close(peft(x), F.linear(x, original, base.bias), rtol=1e-12, atol=1e-12)
        assert torch.equal(base.values, values)
    peft.delete_adapter("other")
    assert wrapper.variant == {"default": variant}


def test_ranks_beyond_the_kernel_run_as_separate_products(lora):
    base, peft, wrapper = lora.wrapped("lora", rank=100)
    peft.add_adapter("other", lora.config("lora", rank=100))
    peft.base_model.set_adapter(["default", "other"])
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    update = sum(lora.scale * b @ a for a, b in (lora.factors(wrapper), lora.factors(wrapper, "other")))
    want = F.linear(x, base.weight + update, base.bias)
    y = peft(x)
    torch.testing.assert_close(y, want)
    leaves, dy = [x, *lora.factors(wrapper)], torch.randn_like(y)
    wants = torch.autograd.grad(want, leaves, dy)
    for mine, theirs in zip(torch.autograd.grad(y, leaves, dy), wants, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_half_precision_and_autocast(lora, variant, pattern):
    _, exact, _ = lora.wrapped(variant, pattern, dtype=torch.float32)
    x = torch.randn(5, 32)
    want = exact(x)
    loss = torch.autograd.grad(want.sum(), [p for p in exact.parameters() if p.requires_grad])

    _, half, wrapper = lora.wrapped(variant, pattern, dtype=torch.bfloat16)
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert half(x).dtype == torch.bfloat16  # as MaskLoraLinear: the weight decides
    _, mixed, mixed_wrapper = lora.wrapped(variant, pattern, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z = mixed(x)
    assert z.dtype == torch.bfloat16
    for model, out, layer in ((half, y, wrapper), (mixed, z, mixed_wrapper)):
        trained = [param for param in model.parameters() if param.requires_grad]
        for param, mine, exactly in zip(trained, torch.autograd.grad(out.float().sum(), trained), loss, strict=True):
            assert param.dtype == mine.dtype == torch.float32
            assert (mine - exactly).norm() < 0.05 * exactly.norm()
        assert layer.lora_A["default"].weight.dtype == torch.float32
        assert (out.float() - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize(
    ("plan", "dtype"),
    [
        (Plan("fragments", ((None, "compressed"),)), torch.bfloat16),
        (Plan("rows", ((None, "dense"),)), torch.float32),
    ],
    ids=["fragments", "dense"],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_plan_of_the_layer_gives_the_same(lora, variant, plan, dtype):
    """The order of the sparse tensor cores, and a dense copy beside the compressed weight."""
    base, peft, wrapper = lora.wrapped(variant, rows=32, cols=64, dtype=dtype)
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    leaves = [x, *lora.factors(wrapper)]
    want = peft(x)
    wants = torch.autograd.grad(want.sum(), leaves)
    base.adopt(plan)
    y = peft(x)
    torch.testing.assert_close(y, want)
    for mine, theirs in zip(torch.autograd.grad(y.sum(), leaves), wants, strict=True):
        torch.testing.assert_close(mine, theirs)
    if variant != "lora":
        values = base.compressed().values.clone()
        wrapper.merge()
        assert base.plan == plan
        wrapper.unmerge()
        assert torch.equal(base.compressed().values, values)


def test_scale_lora_starts_as_the_layer_and_takes_one_adapter(lora):
    base, peft, wrapper = lora.wrapped("scale_lora", start=True)
    a, b = lora.factors(wrapper)
    assert (a == lora.rank**-0.5).all()
    assert (b == lora.rank**-0.5).all()
    x = torch.randn(5, 32, dtype=torch.float64)
    torch.testing.assert_close(peft(x), base(x), rtol=1e-6, atol=1e-6)  # the factors are in fp32
    peft.add_adapter("other", lora.config("scale_lora", start="gaussian"))
    a, b = lora.factors(wrapper, "other")
    assert torch.equal(b @ a, torch.ones(24, 32, dtype=b.dtype))
    assert torch.linalg.matrix_rank(a) == lora.rank  # so that the ranks can grow apart
    peft.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="only one"):
        peft(x)


def test_other_variants_start_as_the_layer(lora):
    for variant in ("lora", "lora_prune", "mask_lora"):
        base, peft, _ = lora.wrapped(variant, start=True)
        x = torch.randn(5, 32, dtype=torch.float64)
        torch.testing.assert_close(peft(x), base(x), rtol=1e-12, atol=1e-12)


def test_effective_sparsity_counts_adapters(lora):
    base, peft, wrapper = lora.wrapped("lora_prune", rank=2)
    assert effective_sparsity(nn.Sequential(base)).layers == {"0.weight": 0.5}
    with_adapter = 1 - (12 * 32 + 2 * (24 + 32)) / (24 * 32)
    found = effective_sparsity(peft)
    assert found.layers == {"base_model.model.0.weight": pytest.approx(with_adapter)}
    assert found.total == pytest.approx(with_adapter)
    wrapper.merge()
    assert effective_sparsity(peft).total == 0.5
    with pytest.raises(ValueError, match="no masks"):
        effective_sparsity(nn.Linear(2, 2))
    assert trisparse.effective_sparsity is effective_sparsity


def test_rslora_scales_by_the_root(lora):
    _, _, wrapper = lora.wrapped("mask_lora", options={"use_rslora": True})
    assert wrapper.scaling["default"] == pytest.approx(lora.scale * lora.rank / lora.rank**0.5)
    assert "trisparse.SparseLoraLinear" in repr(wrapper).replace("trisparse.retrain", "trisparse")
