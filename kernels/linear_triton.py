# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, no-redef"
"""Triton kernels of a linear layer with a compressed weight; the operation is in kernels/linear.py.

One kernel computes both products, with the weight decompressed tile by tile on chip:

    forward:   y  [tokens, rows] = x  W^T + bias + scale (x A^T) B^T      contracts over W's columns
    backward:  dx [tokens, cols] = dy W          + scale (dy B) A         contracts over W's rows

With many tokens the low-rank product rides in the same loop: its first factor's tile meets the tile of x (or dy)
that is there anyway, and one small product follows at the end. With few tokens the contraction is cut in parts, which
write fp32 partial sums; `reduce_kernel` adds them in order, so that the result does not depend on what runs when. An
adapter adds no launch to these two, and x is not read from memory again: x A^T is summed by programs of the same grid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trisparse.kernels.compressed import CompressedWeight
from trisparse.kernels.decompress_triton import dense_tile
from trisparse.kernels.launch import launch
from trisparse.kernels.linear_config import Config


@triton.jit
def _factor(ptr, r, i, rank, size, stride_r, stride_i):
    """The tile [rank, i] of a low-rank factor, 0 outside of it."""
    mask = (r < rank)[:, None] & (i < size)[None, :]
    return tl.load(ptr + r[:, None] * stride_r + i[None, :] * stride_i, mask=mask, other=0.0)


# One compiled kernel serves every number of tokens that takes the same tile, 1 and multiples of 16 among them.
@triton.jit(do_not_specialize=["tokens"])
def product_kernel(
    x_ptr,  # [tokens, inner], rows stride_x apart: x, or dy with BACKWARD
    values_ptr,  # the tensors of W [rows, cols]
    meta_ptr,
    row_offset_ptr,
    tile_offset_ptr,
    bias_ptr,  # [outer] or None
    first_ptr,  # the low-rank factor at the contraction, [rank, inner], or None
    second_ptr,  # the other low-rank factor, [rank, outer]
    y_ptr,  # [tokens, outer]; PARTIAL: fp32 [splits, tokens, width], the rank's columns behind the outer ones
    low_ptr,  # [tokens, rank]: x A^T or dy B; None without LORA
    scale,
    tokens,
    rows,
    cols,
    rank,
    stride_x,
    stride_fr,  # strides of the factors, along rank and along inner or outer
    stride_fi,
    stride_sr,
    stride_so,
    splits,  # parts of the contraction
    width,  # outer + rank and padding, so that rows of partial sums are aligned
    FORMAT: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    WORDS: tl.constexpr,
    BACKWARD: tl.constexpr,
    TAIL: tl.constexpr,  # whether the rows are no multiple of INNER, for BACKWARD
    LORA: tl.constexpr,
    TOKENS: tl.constexpr,  # the tile is TOKENS x OUTER, INNER at a time
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    RANK: tl.constexpr,  # a power of two from the rank up; of no use with PARTIAL
    LOW: tl.constexpr,  # columns of x A^T or dy B in a program of their own
    PARTIAL: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of the output, or its partial sum over one part of the contraction.

    PARTIAL leaves the low-rank product's second half to `reduce_kernel`, and its first half to programs of their
    own, the last ones: with few tokens every program would read more of the factor than of the weight.
    """
    if BACKWARD:
        outer, inner = cols, rows
    else:
        outer, inner = rows, cols
    tiles_t, tiles_o = tl.cdiv(tokens, TOKENS), tl.cdiv(outer, OUTER)
    program = tl.program_id(0)
    split = program // (tiles_t * tiles_o)
    tile = program % (tiles_t * tiles_o)
    # Programs that run together share tiles of x and of W: GROUP tiles of tokens by as many of the output.
    group = tile // (GROUP * tiles_o) * GROUP
    height = tl.minimum(tiles_t - group, GROUP)
    tile_t = group + tile % (GROUP * tiles_o) % height
    tile_o = tile % (GROUP * tiles_o) // height
    if PARTIAL and LORA:
        only_low = split >= splits
        low_tile = (program - splits * tiles_t * tiles_o) // tiles_t
        if only_low:
            split = low_tile % splits
            tile_t = program % tiles_t
    else:
        only_low: tl.constexpr = False
    part = tl.cdiv(tl.cdiv(inner, INNER), splits) * INNER
    begin = split * part
    end = tl.minimum(begin + part, inner)

    t = (tile_t * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    o = tile_o * OUTER + tl.arange(0, OUTER)
    partial = y_ptr + (split.to(tl.int64) * tokens + t)[:, None] * width
    if only_low:
        # Names of their own: what both branches assign must have one shape, and RANK may be above LOW.
        part_r = low_tile // splits * LOW + tl.arange(0, LOW)
        part_low = tl.zeros([TOKENS, LOW], tl.float32)
        for start in range(begin, end, INNER):
            i = start + tl.arange(0, INNER)
            x_mask = (t < tokens)[:, None] & (i < inner)[None, :]
            x = tl.load(x_ptr + t[:, None] * stride_x + i[None, :], mask=x_mask, other=0.0)
            f = _factor(first_ptr, part_r, i, rank, inner, stride_fr, stride_fi)
            part_low = tl.dot(x, tl.trans(f), part_low, input_precision="ieee")
        tl.store(partial + outer + part_r[None, :], part_low, mask=(t < tokens)[:, None] & (part_r < rank)[None, :])
    else:
        r = tl.arange(0, RANK)
        low_mask = (t < tokens)[:, None] & (r < rank)[None, :]
        low = tl.zeros([TOKENS, RANK], tl.float32)
        acc = tl.zeros([TOKENS, OUTER], tl.float32)
        for start in range(begin, end, INNER):
            i = start + tl.arange(0, INNER)
            x_mask = (t < tokens)[:, None] & (i < inner)[None, :]
            x = tl.load(x_ptr + t[:, None] * stride_x + i[None, :], mask=x_mask, other=0.0)
            # Rows beyond the last are read as the last: what they give is never stored, or zero.
            if BACKWARD:
                row = tl.minimum(i, rows - 1).to(tl.int64)
                w = dense_tile(
                    values_ptr, meta_ptr, row_offset_ptr, tile_offset_ptr, row, tile_o * OUTER, cols,
                    FORMAT, N, M, WORDS, INNER, OUTER,
                )  # fmt: skip
                if TAIL:  # dy is 0 there, but the last row may hold an Inf
                    w = tl.where((i < inner)[:, None], w, tl.zeros_like(w))
            else:
                row = tl.minimum(o, rows - 1).to(tl.int64)
                w = dense_tile(
                    values_ptr, meta_ptr, row_offset_ptr, tile_offset_ptr, row, start, cols,
                    FORMAT, N, M, WORDS, OUTER, INNER,
                )  # fmt: skip
                w = tl.trans(w)
            acc = tl.dot(x, w, acc, input_precision="ieee")
            if LORA and not PARTIAL:
                f = _factor(first_ptr, r, i, rank, inner, stride_fr, stride_fi)
                low = tl.dot(x, tl.trans(f), low, input_precision="ieee")
        y_mask = (t < tokens)[:, None] & (o < outer)[None, :]
        if PARTIAL:
            tl.store(partial + o[None, :], acc, mask=y_mask)
        else:
            if LORA:
                s = _factor(second_ptr, r, o, rank, outer, stride_sr, stride_so)
                acc += scale * tl.dot(low.to(s.dtype), s, input_precision="ieee")
                if tile_o == 0:
                    at = low_ptr + t[:, None] * rank + r[None, :]
                    tl.store(at, low.to(low_ptr.dtype.element_ty), mask=low_mask)
            if bias_ptr is not None:
                acc += tl.load(bias_ptr + o, mask=o < outer, other=0.0).to(tl.float32)[None, :]
            tl.store(y_ptr + t[:, None] * outer + o[None, :], acc.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=["tokens"])
def reduce_kernel(
    partial_ptr,  # fp32 [splits, tokens, width]
    bias_ptr,  # [outer] or None
    second_ptr,  # a low-rank factor [rank, outer], or None
    y_ptr,  # [tokens, outer]
    low_ptr,  # [tokens, rank], or None
    scale,
    tokens,
    outer,
    rank,
    stride_sr,
    stride_so,
    splits,
    width,
    LORA: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTER: tl.constexpr,
    LOW: tl.constexpr,
):
    """The sum of the partial sums, in order, the low-rank product's second half, and the bias."""
    tiles_t = tl.cdiv(tokens, TOKENS)
    t = (tl.program_id(0) % tiles_t * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    tile_o = tl.program_id(0) // tiles_t
    o = tile_o * OUTER + tl.arange(0, OUTER)
    y_mask = (t < tokens)[:, None] & (o < outer)[None, :]
    total = tl.zeros([TOKENS, OUTER], tl.float32)
    if LORA:
        for start in range(0, rank, LOW):
            r = start + tl.arange(0, LOW)
            low_mask = (t < tokens)[:, None] & (r < rank)[None, :]
            low = tl.zeros([TOKENS, LOW], tl.float32)
            for split in range(splits):
                at = partial_ptr + (split * tokens + t)[:, None] * width + outer
                low += tl.load(at + r[None, :], mask=low_mask, other=0.0)
            s = _factor(second_ptr, r, o, rank, outer, stride_sr, stride_so)
            total = tl.dot(low.to(s.dtype), s, total, input_precision="ieee")
            if tile_o == 0:
                at = low_ptr + t[:, None] * rank + r[None, :]
                tl.store(at, low.to(low_ptr.dtype.element_ty), mask=low_mask)
        total *= scale
    for split in range(splits):
        at = partial_ptr + (split * tokens + t)[:, None] * width
        total += tl.load(at + o[None, :], mask=y_mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + o, mask=o < outer, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + t[:, None] * outer + o[None, :], total.to(y_ptr.dtype.element_ty), mask=y_mask)


def product_triton(
    x: Tensor,
    weight: CompressedWeight,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor, float] | None,
    y: Tensor,
    low: Tensor,
    config: Config,
    backward: bool,
) -> None:
    """x [tokens, inner] -> y [tokens, outer] and low [tokens, rank], both contiguous; see `product_kernel`."""
    tokens, (rows, cols) = x.shape[0], weight.shape
    outer, rank = y.shape[1], low.shape[1]
    a, b, scale = lora if lora is not None else (None, None, 0.0)
    strides = (0, 0, 0, 0)
    if a is not None and b is not None:
        strides = (a.stride(0), a.stride(1), b.stride(1), b.stride(0))
    first, second = a, b
    if backward:
        first, second, strides = b, a, (*strides[2:], *strides[:2])
    tiles_t = triton.cdiv(tokens, config.tokens)
    programs = tiles_t * triton.cdiv(outer, config.outer) * config.splits
    out, kept_low = y, low if rank else None
    padded = low_tile = 16  # the least that tl.dot takes: a wider low_tile spills
    width = triton.cdiv(outer + rank, 16) * 16
    if config.partial:
        out = x.new_empty(config.splits, tokens, width, dtype=torch.float32)
        programs += tiles_t * config.splits * triton.cdiv(rank, low_tile)
    else:
        padded = max(16, triton.next_power_of_2(rank))
    launch(
        product_kernel,
        (programs,),
        x,
        weight.values,
        weight.meta,
        weight.row_offsets,
        weight.tile_offsets,
        bias,
        first,
        second,
        out,
        kept_low,
        scale,
        tokens,
        rows,
        cols,
        rank,
        x.stride(0),
        *strides,
        config.splits,
        width,
        FORMAT=weight.format,
        N=weight.n,
        M=weight.m,
        WORDS=cols % 32 == 0 and weight.meta.storage_offset() % 4 == 0,
        BACKWARD=backward,
        TAIL=backward and rows % config.inner != 0,
        LORA=lora is not None,
        TOKENS=config.tokens,
        OUTER=config.outer,
        INNER=config.inner,
        RANK=padded,
        LOW=low_tile,
        PARTIAL=config.partial,
        GROUP=8,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if config.partial:
        launch(
            reduce_kernel,
            (triton.cdiv(tokens, 16) * triton.cdiv(outer, 64),),
            out,
            bias,
            second,
            y,
            kept_low,
            scale,
            tokens,
            outer,
            rank,
            *strides[2:],
            config.splits,
            width,
            LORA=lora is not None,
            TOKENS=16,
            OUTER=64,
            LOW=low_tile,
        )
