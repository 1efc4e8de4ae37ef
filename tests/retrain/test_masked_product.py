"""The product of a compressed layer with LoRA under its mask: gradients, torch's rules, and what stays in memory."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from trisparse.bench.peak_memory import peak_bytes
from trisparse.kernels import masked_lora
from trisparse.retrain import masked_product as product_module
from trisparse.retrain.lora_layer import VARIANTS
from trisparse.retrain.masked_product import masked_product
from trisparse.sparsity.pattern import NM, Unstructured

PATTERNS = [NM(2, 4), NM(4, 8), Unstructured(0.5)]


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,)])
@pytest.mark.parametrize("scales", [False, True])
def test_each_gradient_alone(lora, needed, scales):
    """Each may be wanted without the others: a frozen bias, or the first layer, whose input has no gradient."""
    base = lora.sparse(Unstructured(0.5))
    base.bias.requires_grad_(False)
    leaves = [torch.randn(n, m, dtype=torch.float64) for n, m in ((5, 32), (lora.rank, 32), (24, lora.rank))] + [
        base.bias
    ]
    for place in needed:
        leaves[place].requires_grad_(True)
    x, a, b, bias = leaves
    wanted = [leaves[place] for place in needed]
    y = masked_product(x, base, a, b, scales=scales)
    variant = "scale_lora" if scales else "mask_lora"
    want = lora.formula(variant, x, base.weight, base.mask.matrix(), bias, a, b, scale=1.0)
    for mine, theirs in zip(torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(want.sum(), wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("scales", [False, True])
def test_the_operation_is_registered_as_torch_asks(lora, pattern, scales):
    base = lora.sparse(pattern, dtype=torch.float32)
    x, a, b = torch.randn(5, 32), torch.randn(lora.rank, 32), torch.randn(24, lora.rank)
    held = (base.values, base.positions, base.row_offsets, base.tile_offsets, base.format, base.layout)
    shape = (24, 32, base.n, base.m)
    with_grad = [tensor.requires_grad_(True) for tensor in (x, a, b)]
    torch.library.opcheck(
        torch.ops.trisparse.sparse_linear_masked_product.default,
        (with_grad[0], *held, *shape, base.bias, *with_grad[1:], scales),
    )


def _stack_peak(lora, layers, variant, pattern, size=256):
    base = nn.Sequential(*(lora.sparse(pattern, rows=size, cols=size, dtype=torch.float32) for _ in range(layers)))
    peft = get_peft_model(base, lora.config(variant, targets=[str(i) for i in range(layers)]))
    x = torch.randn(4, size, requires_grad=True)
    leaves = [x, *(param for param in peft.parameters() if param.requires_grad)]

    def step():
        return torch.autograd.grad(peft(x).sum(), leaves)

    step()
    return peak_bytes(step)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_dense_weight_outlives_its_product(lora, variant, pattern, monkeypatch):
    """One dense weight at a time: more layers cost their activations and gradients, and no weight more."""
    monkeypatch.setitem(product_module._CHUNK, "cpu", 1 << 12)
    dense = 4 * 256**2
    per_layer = (_stack_peak(lora, 6, variant, pattern) - _stack_peak(lora, 2, variant, pattern)) / 4
    assert per_layer < 0.15 * dense


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_little_is_in_memory_beside_the_dense_weight(lora, pattern, scales, monkeypatch):
    monkeypatch.setitem(product_module._CHUNK, "cpu", 1 << 14)
    monkeypatch.setitem(masked_lora._TILE_BYTES, "cpu", 1 << 16)
    monkeypatch.setattr(masked_lora, "_BLOCK_ELEMENTS", 1 << 12)
    size = 512
    base = lora.sparse(pattern, rows=size, cols=size, dtype=torch.float32)
    x, a, b = (torch.randn(shape, requires_grad=True) for shape in ((4, size), (4, size), (size, 4)))

    def step():
        return torch.autograd.grad(masked_product(x, base, a, b, scales=scales).sum(), (x, a, b))

    step()
    assert peak_bytes(step) < 1.6 * 4 * size**2


@pytest.mark.parametrize("variant", ["mask_lora", "scale_lora"])
def test_what_autograd_keeps_is_the_layer_itself(lora, variant):
    base, peft, _ = lora.wrapped(variant, Unstructured(0.5), dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        peft(torch.randn(5, 32))
    assert kept
    assert not any(tensor.shape[-2:] in ((24, 32), (32, 24)) for tensor in kept)
    assert any(tensor.data_ptr() == base.values.data_ptr() for tensor in kept)
