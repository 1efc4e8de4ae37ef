"""A linear layer with a compressed weight, and optionally a low-rank adapter beside it (LoRA).

    y = x W^T + bias + scale (x A^T) B^T

x [..., cols], W [rows, cols] compressed (kernels/compressed.py), bias [rows], A [rank, cols], B [rows, rank]
-> y [..., rows]. W is decompressed a tile at a time and never exists as a whole. The gradients, W having none:

    dx = dy W + scale (dy B) A,   dA = scale (dy B)^T x,   dB = scale dy^T (x A^T),   dbias = sum of dy over tokens

dy B comes with dx from one kernel, x A^T is kept from the forward. Every sum has a fixed order: the same input gives
the same bits. On the CPU, a weight of up to `_WHOLE` weights is dense while its product runs, which is torch's own: y has
the bits that a dense layer gives, so that greedy generation gives the same tokens. Of a larger one, and in the
backward, `_CHUNK` weights are dense at a time. Source of the adapter: Hu et al. 2022, https://arxiv.org/abs/2106.09685,
section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trisparse.kernels.compressed import CompressedWeight
from trisparse.kernels.launch import by_kernel, target
from trisparse.kernels.linear_config import Config, config, key
from trisparse.kernels.operation import Operation
from trisparse.kernels.tuned import tuned

Lora = tuple[Tensor, Tensor, float]

MAX_RANK = 128
_CHUNK = 1 << 20  # weights that the CPU route decompresses at a time
_WHOLE = 1 << 26  # up to here, all of a layer's: 128 MiB of bf16. A product by parts is summed in another order.
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def linear_ref(x: Tensor, weight: CompressedWeight, bias: Tensor | None = None, lora: Lora | None = None) -> Tensor:
    """The specification of `linear`: torch's own operations on the dense weight."""
    _check(x, weight, bias, lora)
    y = F.linear(x, weight.decompress(), bias)
    if lora is not None:
        a, b, scale = lora
        y = y + scale * F.linear(F.linear(x, a), b)
    return y


def linear(
    x: Tensor,
    weight: CompressedWeight,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    *,
    conv1d: bool = False,
) -> Tensor:
    """y = x W^T + bias + scale (x A^T) B^T; differentiable in x, bias, A and B.

    Args:
        x: [..., cols] of the weight's dtype: bf16, fp16 or fp32, on the CPU also fp64.
        weight: W [rows, cols], compressed.
        bias: [rows], or None.
        lora: (A [rank, cols], B [rows, rank], scale) with 1 <= rank <= 128, or None.
        conv1d: on the CPU, the bits of transformers' Conv1D, which multiplies by the weight [cols, rows], in place of
            those of F.linear.

    Returns:
        y [..., rows] in x's dtype, summed in fp32 (fp64 for fp64).

    Raises:
        ValueError: a shape, dtype, device or rank that does not fit, or a weight that asks for a gradient.
    """
    _check(x, weight, bias, lora)
    rows, cols = weight.shape
    a, b, scale = lora if lora is not None else (None, None, 0.0)
    y, _ = _LINEAR(
        x.reshape(-1, cols),
        weight.values,
        weight.meta,
        weight.row_offsets,
        weight.tile_offsets,
        weight.format,
        cols,
        weight.n,
        weight.m,
        bias,
        a,
        b,
        float(scale),
        conv1d,
    )
    return y.reshape(*x.shape[:-1], rows)


def linear_backward(dy: Tensor, weight: CompressedWeight, lora: Lora | None = None) -> tuple[Tensor, Tensor]:
    """What `linear` passes back to x: (dx [tokens, cols], dy B [tokens, rank]) of dy [tokens, rows].

    dx = dy W + scale (dy B) A. Without ``lora`` the rank is 0.
    """
    a, b, scale = lora if lora is not None else (None, None, 0.0)
    w = weight
    return _LINEAR_BACKWARD(
        dy, w.values, w.meta, w.row_offsets, w.tile_offsets, w.format, w.shape[1], w.n, w.m, a, b, float(scale)
    )


def _check(x: Tensor, weight: CompressedWeight, bias: Tensor | None, lora: Lora | None) -> None:
    rows, cols = weight.shape
    dtype = weight.values.dtype
    if weight.values.requires_grad:
        raise ValueError("weight.values requires a gradient; a compressed weight has none")
    if x.dim() < 1 or x.shape[-1] != cols:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be the weight's {cols} columns")
    tensors = [("x", x, tuple(x.shape)), ("bias", bias, (rows,))]
    if lora is not None:
        a, b, scale = lora
        rank = a.shape[0] if a.dim() == 2 else 0
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"A has shape {tuple(a.shape)}; it must be (rank, {cols}) with a rank in 1..{MAX_RANK}")
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise ValueError(f"scale is {scale!r}; it must be a number")
        tensors += [("A", a, (rank, cols)), ("B", b, (rows, rank))]
    for name, tensor, shape in tensors:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be the weight's, {dtype}")
        if tensor.device != weight.values.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on the weight's device, {weight.values.device}")


def _run(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    row_offsets: Tensor | None,
    tile_offsets: Tensor | None,
    format: str,
    cols: int,
    n: int,
    m: int,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    conv1d: bool,
) -> tuple[Tensor, Tensor]:
    """x [tokens, cols] -> y [tokens, rows], x A^T [tokens, rank] (rank 0 without an adapter)."""
    weight = CompressedWeight(format, (meta.shape[0], cols), n, m, values, meta, row_offsets, tile_offsets)
    y, low = _empty(x, meta.shape[0], a)
    lora = None if a is None or b is None else (a, b, scale)
    if by_kernel(x):
        _by_kernel(x, weight, bias, lora, y, low, backward=False)
        return y, low
    with torch.autocast(x.device.type, enabled=False):
        if lora is not None:
            torch.mm(x, lora[0].T, out=low)
        if meta.shape[0] * cols <= _WHOLE:
            y = _product(x, _whole(weight), bias, conv1d)
            if lora is not None:
                y.add_(F.linear(low, lora[1]), alpha=scale)
            return y, low
        for start, stop, dense in _chunks(weight):
            part = y[:, start:stop]
            part.copy_(F.linear(x, dense, None if bias is None else bias[start:stop]))
            if lora is not None:
                part.add_(F.linear(low, lora[1][start:stop]), alpha=scale)
    return y, low


def _product(x: Tensor, dense: Tensor, bias: Tensor | None, conv1d: bool) -> Tensor:
    if not conv1d:
        return F.linear(x, dense, bias)
    inner_first = dense.t().contiguous()
    return x @ inner_first if bias is None else torch.addmm(bias, x, inner_first)


def _whole(weight: CompressedWeight) -> Tensor:
    """The dense weight, made chunk by chunk: decompressing takes some 16 bytes a weight in between."""
    dense = weight.values.new_empty(weight.shape)
    for start, stop, part in _chunks(weight):
        dense[start:stop] = part
    return dense


def _run_backward(
    dy: Tensor,
    values: Tensor,
    meta: Tensor,
    row_offsets: Tensor | None,
    tile_offsets: Tensor | None,
    format: str,
    cols: int,
    n: int,
    m: int,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dy [tokens, rows] -> dx [tokens, cols], dy B [tokens, rank] (rank 0 without an adapter)."""
    weight = CompressedWeight(format, (meta.shape[0], cols), n, m, values, meta, row_offsets, tile_offsets)
    dx, low = _empty(dy, cols, a)
    lora = None if a is None or b is None else (a, b, scale)
    if by_kernel(dy):
        _by_kernel(dy, weight, None, lora, dx, low, backward=True)
        return dx, low
    # Chunks of rows add up, so that half precision would round at each; its sum takes 4 bytes a number of dx besides.
    wide = torch.promote_types(dy.dtype, torch.float32)
    total = dx.zero_() if dx.dtype == wide else torch.zeros_like(dx, dtype=wide)
    with torch.autocast(dy.device.type, enabled=False):
        for start, stop, dense in _chunks(weight):
            total.addmm_(dy[:, start:stop].to(wide), dense.to(wide))
        if lora is not None:
            torch.mm(dy, lora[1], out=low)
            total.addmm_(low.to(wide), lora[0].to(wide), alpha=scale)
    return dx if total is dx else dx.copy_(total), low


def _empty(x: Tensor, outer: int, a: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], outer), x.new_empty(x.shape[0], 0 if a is None else a.shape[0])


def _chunks(weight: CompressedWeight) -> Any:
    """(start, stop, dense rows start to stop), in order."""
    rows, cols = weight.shape
    step = max(1, _CHUNK // max(1, cols))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield start, stop, weight.part(start, stop).decompress()


def _by_kernel(
    x: Tensor,
    weight: CompressedWeight,
    bias: Tensor | None,
    lora: Lora | None,
    y: Tensor,
    low: Tensor,
    backward: bool,
) -> None:
    from trisparse.kernels.linear_triton import product_triton  # Triton is there on Linux only

    if x.dtype not in _KERNEL_DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; the kernel takes {_KERNEL_DTYPES}")
    cc, rank = target(x), low.shape[1]
    case: dict[str, Any] = {"format": weight.format, "rank": rank, "backward": backward}
    found = tuned(x, "linear", key(weight.shape, x.dtype, x.shape[0], **case))
    how = config(weight.shape, x.dtype, cc, x.shape[0], **case) if found is None else Config(**found)
    x = x if x.stride(1) == 1 else x.contiguous()
    product_triton(x, weight, bias if bias is None else bias.contiguous(), lora, y, low, how, backward)


_LINEAR = Operation(
    "linear",
    _run,
    lambda x, values, meta, row_offsets, tile_offsets, format, cols, n, m, bias, a, b, scale, conv1d: _empty(
        x, meta.shape[0], a
    ),
)
_LINEAR_BACKWARD = Operation(
    "linear_backward",
    _run_backward,
    lambda dy, values, meta, row_offsets, tile_offsets, format, cols, n, m, a, b, scale: _empty(dy, cols, a),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, values, meta, row_offsets, tile_offsets, format, cols, n, m, _, a, b, scale, _ = inputs
    low = output[1]
    ctx.mark_non_differentiable(low)
    ctx.static = format, cols, n, m
    ctx.scale = scale
    # x is kept only for dA, x A^T only for dB.
    kept_x = x if a is not None and a.requires_grad else None
    kept_low = low if b is not None and b.requires_grad else None
    ctx.save_for_backward(kept_x, kept_low, values, meta, row_offsets, tile_offsets, a, b)


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, low, values, meta, row_offsets, tile_offsets, a, b = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = dbias = da = db = dy_b = None
    if needs[0]:
        format, cols, n, m = ctx.static
        dx, dy_b = _LINEAR_BACKWARD(dy, values, meta, row_offsets, tile_offsets, format, cols, n, m, a, b, ctx.scale)
    if needs[9]:
        dbias = dy.sum(0)
    if needs[10]:
        dy_b = dy @ b if dy_b is None else dy_b
        da = (dy_b.T @ x) * ctx.scale
    if needs[11]:
        db = (dy.T @ low) * ctx.scale
    return dx, None, None, None, None, None, None, None, None, dbias, da, db, None, None


_LINEAR.register_autograd(_backward, _save)
