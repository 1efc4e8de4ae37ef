"""LoRA under a mask, and LoRA that scales the weight: neither B A nor the gradient of the weight is ever in memory.

    mask_lora    y = x (W + M ⊙ s·B A)ᵀ + b
    scale_lora   y = x (W ⊙ B A)ᵀ + b

x [..., in], W [out, in] frozen and zero where pruned, M [out, in] its mask as packed bits, A [rank, in] and
B [out, rank] train, b [out]. A merge of either loses no zero. Source: PERP (Zimmer et al. 2023,
https://arxiv.org/abs/2312.15230, section 3.2).

With E the effective weight, dx = dy E, and with G = M ⊙ dyᵀx (or W ⊙ dyᵀx), dA = s Bᵀ G and dB = s G Aᵀ. Every
product forms E by tiles, and the gradients form G by tiles, each reduced into dA and dB at once.

A weight may be stored transposed, [in, out], as transformers' Conv1D does. Two operations on the stored layout
[p, q] therefore make all of the above, with the update ``left @ right``: B A for a linear, Aᵀ Bᵀ for a Conv1D.

- product: x Eᵀ + b, or x E + b;
- factor gradients: G rightᵀ and leftᵀ G of G = M ⊙ uᵀv, for u [tokens, p] and v [tokens, q].
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from trisparse.kernels.bitmask import unpack_bits, unpack_bits_ref
from trisparse.kernels.launch import by_kernel
from trisparse.kernels.operation import Operation
from trisparse.kernels.score import DTYPES, check_inner, check_weight

# Bytes of one tile: large enough for a matrix product to run at full speed, and on a GPU (fp64 only) for its launches
# not to show. On the CPU a tile is made by blocks of so many elements, which stay in the caches from step to step.
_TILE_BYTES = {"cpu": 2**23, "cuda": 2**27}
_BLOCK_ELEMENTS = 2**19

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def mask_lora_ref(
    x: Tensor, weight: Tensor, packed: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *,
    scale: float = 1.0, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """The specification of `mask_lora`, in plain autograd."""
    update = scale * (b @ a)
    keep = unpack_bits_ref(packed, weight.shape[1])
    effective = weight + keep * (update.t() if transposed else update)
    return torch.nn.functional.linear(x, effective.t() if transposed else effective, bias)


def scale_lora_ref(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """The specification of `scale_lora`, in plain autograd."""
    factor = b @ a
    effective = weight * (factor.t() if transposed else factor)
    return torch.nn.functional.linear(x, effective.t() if transposed else effective, bias)


def mask_lora(
    x: Tensor, weight: Tensor, packed: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *,
    scale: float = 1.0, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """x (W + M ⊙ s·B A)ᵀ + b, differentiable in x, a, b and bias.

    Args:
        x: [..., in]. Under autocast it is cast to autocast's dtype, otherwise to the dtype of ``weight``.
        weight: [out, in], or [in, out] if ``transposed``, of a float dtype, the inner dimension contiguous; zero where
            pruned. It gets no gradient.
        packed: the mask of ``weight`` as it is stored, uint8 [rows, ceil(cols/8)] (kernels/bitmask.py), 1 = kept.
        a: [rank, in], of a float dtype.
        b: [out, rank].
        bias: [out].
        scale: s, alpha / rank as a rule.
        transposed: whether ``weight`` is stored as [in, out].

    Returns:
        [..., out] in the dtype that ``x`` was cast to.

    Raises:
        ValueError: a wrong shape, dtype, stride or device, rank 0, or a weight that asks for a gradient.
    """
    check_weight(weight, "weight")
    shape = (weight.shape[0], -(-weight.shape[1] // 8))
    if packed.dtype != torch.uint8 or tuple(packed.shape) != shape:
        raise ValueError(
            f"packed is {packed.dtype} {tuple(packed.shape)}; for this weight it must be torch.uint8 {shape}"
        )
    check_inner(packed, "packed")
    return _apply(x, weight, packed, a, b if scale == 1.0 else b * scale, bias, transposed)


def scale_lora(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """x (W ⊙ B A)ᵀ + b, differentiable in x, a, b and bias; arguments and errors as of `mask_lora`."""
    check_weight(weight, "weight")
    return _apply(x, weight, None, a, b, bias, transposed)


def _apply(
    x: Tensor, weight: Tensor, packed: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    _check(x, weight, packed, a, b, bias, transposed)
    x = x.to(_compute_dtype(x, weight))
    left, right = (a.t(), b.t()) if transposed else (b, a)
    y = PRODUCT(x.reshape(-1, x.shape[-1]), weight, packed, left, right, bias, transposed)
    return y.view(*x.shape[:-1], y.shape[-1])


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    device = x.device.type
    if (
        device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    ):  # autocast leaves fp64 alone
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _check(
    x: Tensor, weight: Tensor, packed: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None, transposed: bool
) -> None:
    outputs, inputs = weight.shape[::-1] if transposed else weight.shape
    if x.dtype not in DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; allowed are {', '.join(map(str, DTYPES))}")
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be {inputs}, the inputs of weight")
    if a.dim() != 2 or a.shape[0] == 0 or a.shape[1] != inputs:
        raise ValueError(f"a has shape {tuple(a.shape)}; it must be (rank, {inputs}) with a rank of at least 1")
    if tuple(b.shape) != (outputs, a.shape[0]):
        raise ValueError(f"b has shape {tuple(b.shape)}; it must be {(outputs, a.shape[0])}, (out, rank)")
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({outputs},)")
    for name, tensor in (("x", x), ("packed", packed), ("a", a), ("b", b), ("bias", bias)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on the weight's device, {weight.device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight asks for a gradient, and is frozen here; set weight.requires_grad_(False)")


def _product(
    x: Tensor, weight: Tensor, packed: Tensor | None, left: Tensor, right: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    y = _product_result(x, weight, packed, left, right, bias, transposed)
    if by_kernel(x) and torch.float64 not in (x.dtype, weight.dtype):
        from trisparse.kernels.masked_lora_triton import product_triton

        product_triton(x, weight, packed, left, right, bias, y, transposed)
        return y
    every = slice(None)
    # Autocast is still on in here, and would cast the fp32 sum.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        tiles = _Tiles(weight, packed, left, right, x.dtype)
        for span in tiles.spans(1 if transposed else 0):
            tile = tiles.effective(every, span) if transposed else tiles.effective(span, every).t()
            if bias is None:
                torch.mm(x, tile, out=y[:, span])
            else:
                torch.addmm(bias[span].to(x.dtype), x, tile, out=y[:, span])
    return y


def _product_result(
    x: Tensor, weight: Tensor, packed: Tensor | None, left: Tensor, right: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 0])


def _factor_gradients(
    u: Tensor, v: Tensor, weight: Tensor | None, packed: Tensor | None, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """G rightᵀ [p, rank] and leftᵀ G [rank, q] of G = M ⊙ uᵀv, or W ⊙ uᵀv where ``weight`` is given."""
    dleft, dright = _factor_gradients_result(u, v, weight, packed, left, right)
    if by_kernel(u) and u.dtype != torch.float64:
        from trisparse.kernels.masked_lora_triton import factor_gradients_triton

        factor_gradients_triton(u, v, weight, packed, left, right, dleft, dright)
        return dleft, dright
    dright.zero_()
    with torch.no_grad(), torch.autocast(u.device.type, enabled=False):
        narrow_left, narrow_right_t = left.to(u.dtype).t(), right.to(u.dtype).t()
        tiles = _Tiles(weight, packed, left, right, u.dtype)
        for rows in tiles.spans(0):
            gradient = tiles.gradient(u, v, rows)
            dleft[rows] = gradient @ narrow_right_t
            dright += narrow_left[:, rows] @ gradient
    return dleft, dright


def _factor_gradients_result(
    u: Tensor, v: Tensor, weight: Tensor | None, packed: Tensor | None, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    return left.new_empty(left.shape), right.new_empty(right.shape)


PRODUCT = Operation("masked_lora_product", _product, _product_result)
FACTOR_GRADIENTS = Operation("masked_lora_factor_gradients", _factor_gradients, _factor_gradients_result)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, packed, left, right, bias, ctx.transposed = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, packed, left, right)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, packed, left, right = ctx.saved_tensors
    dx = dleft = dright = dbias = None
    if ctx.needs_input_grad[0]:
        dx = PRODUCT(dy, weight, packed, left, right, None, not ctx.transposed)
    if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
        u, v = (x, dy) if ctx.transposed else (dy, x)
        dleft, dright = FACTOR_GRADIENTS(u, v, weight if packed is None else None, packed, left, right)
    if ctx.needs_input_grad[5]:
        dbias = dy.sum(0, dtype=ctx.bias_dtype)
    return dx, None, None, dleft, dright, dbias, None


PRODUCT.register_autograd(_backward, _save)


def effective_weight(weight: Tensor, packed: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """W + M ⊙ (left right), or W ⊙ (left right) without ``packed``, [p, q] as a whole, for a merge.

    left is [p, rank] and right [rank, q]; the sum is formed in fp32 or better and rounded once to the dtype of
    ``weight``. A pruned weight of `mask_lora` is exactly zero, also where the factors hold a NaN.
    """
    out = torch.empty_like(weight)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        tiles = _Tiles(weight, packed, left, right, weight.dtype)
        for rows in tiles.spans(0):
            out[rows] = tiles.effective(rows, slice(None))
    return out


class _Tiles:
    """Tiles of E and of G, some rows or some columns at a time, each made by blocks of rows.

    A tile lives in a buffer that the next one uses again, and so does what a block needs: memory fresh from the system
    costs as much as the work.
    """

    def __init__(
        self, weight: Tensor | None, packed: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype
    ) -> None:
        self.weight, self.packed, self.dtype = weight, packed, dtype
        self.shape = (left.shape[0], right.shape[1])
        self.wide = torch.promote_types(left.dtype if weight is None else weight.dtype, torch.float32)
        self.left, self.right = left.to(self.wide), right.to(self.wide)
        self.device = left.device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def spans(self, dim: int) -> list[slice]:
        """The rows (0) or columns (1) by tiles; a tile starts at a whole byte of a packed mask."""
        elements = _TILE_BYTES.get(self.device.type, 2**27) // self.dtype.itemsize
        step = max(1, elements // max(1, 8 * self.shape[1 - dim])) * 8
        return [slice(start, min(start + step, self.shape[dim])) for start in range(0, self.shape[dim], step)]

    def effective(self, rows: slice, cols: slice) -> Tensor:
        """E[rows, cols]; the sum is formed in fp32 or better and rounded once.

        An update below half a unit of a bf16 weight would otherwise be lost.
        """
        assert self.weight is not None
        weight, left, right = self.weight[rows, cols], self.left[rows], self.right[:, cols]
        bits = None if self.packed is None else self._bits(rows, cols)
        tile = self._buffer("tile", weight.shape[0], weight.shape[1], self.dtype)
        for block in _blocks(weight):
            part, out = weight[block], tile[block]
            wide = out if self.dtype == self.wide else self._buffer("wide", part.shape[0], part.shape[1], self.wide)
            if bits is None:
                torch.mm(left[block], right, out=wide).mul_(part)
            else:  # W + M ⊙ (left right) = M ⊙ (W + left right), as a pruned weight is zero
                torch.addmm(part.to(self.wide), left[block], right, out=wide)
            if wide is not out:
                out.copy_(wide)
            if bits is not None:
                self._zero_pruned(out, bits[block])
        return tile

    def gradient(self, u: Tensor, v: Tensor, rows: slice) -> Tensor:
        """G[rows] = M ⊙ uᵀv, or W ⊙ uᵀv without a mask."""
        tile = self._buffer("tile", rows.stop - rows.start, self.shape[1], self.dtype)
        torch.mm(u[:, rows].t(), v, out=tile)
        if self.packed is None:
            assert self.weight is not None
            return tile.mul_(self.weight[rows])
        bits = self._bits(rows, slice(None))
        for block in _blocks(tile):
            self._zero_pruned(tile[block], bits[block])
        return tile

    def _buffer(self, name: str, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """[rows, cols], contiguous, in the memory that the last one of this name had if that is large enough."""
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < rows * cols:
            buffer = self._buffers[name, dtype] = torch.empty(rows * cols, dtype=dtype, device=self.device)
        return buffer[: rows * cols].view(rows, cols)

    def _bits(self, rows: slice, cols: slice) -> Tensor:
        """The bytes of the mask of a tile, whose first column is the first bit of a byte."""
        assert self.packed is not None
        return self.packed[rows, (cols.start or 0) // 8 : None if cols.stop is None else -(-cols.stop // 8)]

    def _zero_pruned(self, block: Tensor, bits: Tensor) -> None:
        """Set a block to exactly zero where pruned, also over NaN and Inf."""
        if block.device.type != "cpu":
            block.masked_fill_(~unpack_bits(bits, block.shape[1]), 0)
            return
        # masked_fill_ and a product with a bool tensor are scalar loops on the CPU, ten times slower than this.
        integer = _INTEGER[block.element_size()]
        keep = self._buffer("mask", bits.numel(), 8, integer)
        torch.index_select(_byte_masks(integer), 0, bits.reshape(-1).to(torch.int32), out=keep)
        block.view(integer).bitwise_and_(keep.view(block.shape[0], -1)[:, : block.shape[1]])


def _blocks(tile: Tensor) -> list[slice]:
    """The rows of a tile by blocks."""
    rows, cols = tile.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, cols)) if tile.device.type == "cpu" else max(1, rows)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@cache
def _byte_masks(integer: torch.dtype) -> Tensor:
    """[256, 8] integers: for each byte of a packed mask its 8 weights, all ones where kept."""
    return -(torch.arange(256)[:, None] >> torch.arange(8) & 1).to(integer)
