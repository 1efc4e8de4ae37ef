"""Plain LoRA in few passes against its formula."""

from __future__ import annotations

import pytest
import torch

from trisparse.kernels.lora import lora, lora_ref


def inputs(dtype, *, bias=True, transposed=False):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weight = normal(24, 12).t() if transposed else normal(12, 24)
    return normal(40, 24), weight, normal(3, 24), normal(12, 3), normal(12) if bias else None


def results(function, tensors, scale, wanted):
    leaves = [None if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    x, weight, a, b, bias = leaves
    y = function(x, weight, a, b, bias, scale)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None and t.requires_grad], upstream)


@pytest.mark.parametrize("wanted", [(0, 2, 3), (2, 3), (3,), (2,), (0,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_gradient_in_fp64(wanted, transposed, bias):
    tensors = inputs(torch.float64, bias=bias, transposed=transposed)
    wanted = wanted if bias else tuple(i for i in wanted if i < 4)
    found, expected = (results(function, tensors, 1.7, wanted) for function in (lora, lora_ref))
    for value, want in zip(found, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_torch(dtype):
    tensors = inputs(dtype)
    wide = tuple(t.double() for t in tensors)
    found, usual, exact = (
        results(function, given, 1.7, (0, 2, 3, 4))
        for function, given in ((lora, tensors), (lora_ref, tensors), (lora_ref, wide))
    )
    for value, other, want in zip(found, usual, exact, strict=True):
        assert value.dtype == other.dtype
        assert (value - want).abs().max() <= 2 * (other - want).abs().max() + 1e-6


def test_autocast_and_fp32_factors():
    tensors = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(lora, tensors, 1.7, (0, 2, 3, 4))
    exact = results(lora_ref, tuple(t.double() for t in tensors), 1.7, (0, 2, 3, 4))
    assert found[0].dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in found[1:])
    for value, want in zip(found, exact, strict=True):
        assert (value - want).abs().max() <= 0.03 * want.abs().max()
