"""A frozen linear layer with a low-rank update beside it, in as few passes over its activations as it takes.

    y = x Wᵀ + b + s (x Aᵀ) Bᵀ

x [tokens, in], W [out, in], A [rank, in], B [out, rank], b [out]. With h = x Aᵀ and k = dy B: dx = dy W + s k A,
dA = s kᵀ x, dB = s dyᵀ h. Both sums are made by adding the thin product into the large one, so neither a second y nor
a second dx is ever in memory. Source: LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_ref(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The specification of `lora`, in plain autograd."""
    return torch.nn.functional.linear(x, weight, bias) + scale * (x @ a.t()) @ b.t()


def lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """x Wᵀ + b + s (x Aᵀ) Bᵀ, differentiable once in all tensors.

    Args:
        x: [tokens, in]. Under autocast all products are in its dtype, otherwise in the dtype of ``weight``.
        weight: [out, in], of any strides.
        a: [rank, in], of any float dtype.
        b: [out, rank].
        bias: [out].
        scale: s, alpha / rank as a rule.

    Returns:
        [tokens, out] in the dtype of the products.
    """
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    y: Tensor = _Lora.apply(x.to(dtype), weight.to(dtype), a, b, bias, scale)  # type: ignore[no-untyped-call]
    return y


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # it would cast fp64 factors
            down, up = a.to(x.dtype), b.to(x.dtype)
            hidden = x @ down.t()
            y = x @ weight.t() if bias is None else torch.addmm(bias.to(x.dtype), x, weight.t())
            y.addmm_(hidden, up.t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, hidden)
        ctx.scale, ctx.bias_dtype = scale, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, hidden = ctx.saved_tensors
        of_x, of_weight, of_a, of_b, of_bias, _ = ctx.needs_input_grad
        dx = dweight = da = db = dbias = None
        with torch.autocast(x.device.type, enabled=False):
            dhidden = dy @ b.to(dy.dtype) if of_x or of_a else dy.new_empty(0)
            if of_x:
                dx = (dy @ weight).addmm_(dhidden, a.to(dy.dtype), alpha=ctx.scale)
            if of_weight:
                dweight = dy.t() @ x
            # the small factor on the left: the other way round takes twice as long on a CPU
            if of_a:
                da = (dhidden.t() @ x).mul_(ctx.scale).to(a.dtype)
            if of_b:
                db = (hidden.t() @ dy).mul_(ctx.scale).t().to(b.dtype)
            if of_bias:
                dbias = dy.sum(0, dtype=ctx.bias_dtype)
        return dx, dweight, da, db, dbias, None
