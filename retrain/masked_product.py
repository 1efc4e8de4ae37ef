"""A SparseLinear with LoRA under its mask: the dense weight exists only while a product runs, never between.

    mask_lora    y = x (W + M ⊙ B A)ᵀ + b
    scale_lora   y = x (W ⊙ B A)ᵀ + b

x [tokens, in], W [out, in] compressed with its mask M, b [out], A [rank, in], B [out, rank] -> y [tokens, out].
The forward decompresses W and forgets it, the backward decompresses it once more: what autograd keeps is the
buffers of the layer (no copy) and x. The products and gradients themselves are those of kernels/masked_lora.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trisparse.kernels.compressed import CompressedWeight
from trisparse.kernels.linear24 import unpack24
from trisparse.kernels.masked_lora import FACTOR_GRADIENTS, PRODUCT, mask_lora, scale_lora
from trisparse.kernels.operation import Operation
from trisparse.sparsity.linear import SparseLinear

# Weights that are decompressed at a time: what that needs besides its result is several times as large.
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}


def masked_product(x: Tensor, layer: SparseLinear, a: Tensor, b: Tensor, *, scales: bool = False) -> Tensor:
    """x (W + M ⊙ B A)ᵀ + b, or with ``scales`` x (W ⊙ B A)ᵀ + b; differentiable in x, A, B and the bias.

    Args:
        x: [..., in] in the dtype to compute in, that of ``layer.values`` or autocast's.
        layer: the compressed layer. If its plan keeps the dense weight, that is read instead.
        a, b: [rank, in] and [out, rank] of a float dtype, any LoRA scaling included.

    Returns:
        [..., out] in x's dtype.

    Raises:
        ValueError: a shape that does not fit.
    """
    rows, cols = layer.out_features, layer.in_features
    if x.dim() == 0 or x.shape[-1] != cols:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be {cols}, the inputs of the layer")
    if a.dim() != 2 or a.shape[0] == 0 or a.shape[1] != cols:
        raise ValueError(f"a has shape {tuple(a.shape)}; it must be (rank, {cols}) with a rank of at least 1")
    if tuple(b.shape) != (rows, a.shape[0]):
        raise ValueError(f"b has shape {tuple(b.shape)}; it must be {(rows, a.shape[0])}, (out, rank)")
    if layer.dense is not None:
        if scales:
            return scale_lora(x, layer.dense, a, b, layer.bias)
        return mask_lora(x, layer.dense, layer.compressed().packed, a, b, layer.bias)
    y = _FORWARD(
        x.reshape(-1, cols),
        layer.values,
        layer.positions,
        layer.row_offsets,
        layer.tile_offsets,
        layer.format,
        layer.layout,
        rows,
        cols,
        layer.n,
        layer.m,
        layer.bias,
        a,
        b,
        scales,
    )
    return y.view(*x.shape[:-1], rows)


def _compressed(
    values: Tensor, positions: Tensor, row_offsets: Tensor | None, tile_offsets: Tensor | None,
    format: str, layout: str, rows: int, cols: int, n: int, m: int,
) -> CompressedWeight:  # fmt: skip
    if layout == "fragments":
        values, positions = unpack24(values, positions)
    if format == "bitmask":
        n = m = 0
    return CompressedWeight(format, (rows, cols), n, m, values, positions, row_offsets, tile_offsets)


def _spans(weight: CompressedWeight) -> list[slice]:
    rows, cols = weight.shape
    step = max(1, _CHUNK.get(weight.values.device.type, 1 << 24) // max(1, cols))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def decompress(weight: CompressedWeight) -> Tensor:
    """The dense weight [rows, cols], made some rows at a time so that little else is in memory beside it."""
    dense = weight.values.new_empty(weight.shape)
    for span in _spans(weight):
        dense[span] = weight.part(span.start, span.stop).decompress()
    return dense


def _forward(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    row_offsets: Tensor | None,
    tile_offsets: Tensor | None,
    format: str,
    layout: str,
    rows: int,
    cols: int,
    n: int,
    m: int,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scales: bool,
) -> Tensor:
    weight = _compressed(values, positions, row_offsets, tile_offsets, format, layout, rows, cols, n, m)
    return PRODUCT(x, decompress(weight), None if scales else weight.packed, b, a, bias, False)


def _backward(
    dy: Tensor,
    x: Tensor | None,
    values: Tensor,
    positions: Tensor,
    row_offsets: Tensor | None,
    tile_offsets: Tensor | None,
    format: str,
    layout: str,
    rows: int,
    cols: int,
    n: int,
    m: int,
    a: Tensor,
    b: Tensor,
    scales: bool,
    with_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [tokens, in], dA, dB); what is not wanted (dx, or the factors without ``x``) is empty."""
    dx, da, db = _backward_result(
        dy, x, values, positions, row_offsets, tile_offsets, format, layout, rows, cols, n, m, a, b, scales, with_dx
    )
    weight = _compressed(values, positions, row_offsets, tile_offsets, format, layout, rows, cols, n, m)
    packed = None if scales else weight.packed
    dense = decompress(weight) if with_dx or scales else None
    if with_dx and dense is not None:
        dx = PRODUCT(dy, dense, packed, b, a, None, True)
    if x is not None:
        db, da = FACTOR_GRADIENTS(dy, x, dense if scales else None, packed, b, a)
    return dx, da, db


def _backward_result(
    dy: Tensor, x: Tensor | None, values: Tensor, positions: Tensor, row_offsets: Tensor | None,
    tile_offsets: Tensor | None, format: str, layout: str, rows: int, cols: int, n: int, m: int, a: Tensor, b: Tensor,
    scales: bool, with_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = dy.new_empty((dy.shape[0], cols) if with_dx else (0,))
    if x is None:
        return dx, a.new_empty(0), b.new_empty(0)
    return dx, a.new_empty(a.shape), b.new_empty(b.shape)


_FORWARD = Operation(
    "sparse_linear_masked_product",
    _forward,
    lambda x, values, positions, row_offsets, tile_offsets, format, layout, rows, cols, n, m, bias, a, b, scales: (
        x.new_empty(x.shape[0], rows)
    ),
    reads_back=True,  # row offsets, where the weight is decompressed by chunks
)
_BACKWARD = Operation("sparse_linear_masked_product_backward", _backward, _backward_result, reads_back=True)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, positions, row_offsets, tile_offsets, format, layout, rows, cols, n, m, bias, a, b, ctx.scales = inputs
    ctx.static = format, layout, rows, cols, n, m
    ctx.bias_dtype = None if bias is None else bias.dtype
    kept_x = x if a.requires_grad or b.requires_grad else None  # only the factors' gradients read it
    ctx.save_for_backward(kept_x, values, positions, row_offsets, tile_offsets, a, b)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, positions, row_offsets, tile_offsets, a, b = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = da = db = dbias = None
    factors = needs[12] or needs[13]
    if needs[0] or factors:
        format, layout, rows, cols, n, m = ctx.static
        dx, da, db = _BACKWARD(
            dy, x if factors else None, values, positions, row_offsets, tile_offsets, format, layout, rows, cols, n, m,
            a, b, ctx.scales, needs[0],
        )  # fmt: skip
    if needs[11]:
        dbias = dy.sum(0, dtype=ctx.bias_dtype)
    none = (None,) * 10
    return (dx if needs[0] else None, *none, dbias, da if needs[12] else None, db if needs[13] else None, None)


_FORWARD.register_autograd(_gradients, _save)
