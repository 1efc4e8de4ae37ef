# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of kernels/masked_lora.py.

`product_kernel` computes yᵀ = E xᵀ + b: a tile of E is formed in registers from a tile of W, the small product of the
factors and the mask's bits, and is the first operand of the tensor cores where it is.

`factor_gradients_kernel`: a program owns some tiles of G = M ⊙ uᵀv in one row. For each it sums over all tokens in
registers, masks, and multiplies by the factors. What belongs to the row (dleft) stays in registers and is a partial of
its own; what belongs to a column (dright) is added to a partial that a chain of neighbouring programs shares, each in
its turn, so that far fewer partials are written. A program waits only for one of a lower index, which was started
before it, and only at its first tile, as from then on the chain runs staggered. `sum_parts_kernel` then adds the
partials in a fixed order: two runs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from trisparse.kernels.launch import launch, target
from trisparse.kernels.score_triton import widen

# Streaming multiprocessors and, in microseconds, a 128x128 tile of G per token on one of them (bf16 tensor cores) and a
# byte written or read: A100 (312 TFLOP/s, 2039 GB/s), H100 (989 TFLOP/s, 3350 GB/s).
_DEVICES = {80: (108, 2 * 128 * 128 * 108 / 312e6, 1 / 2039e3), 90: (132, 2 * 128 * 128 * 132 / 989e6, 1 / 3350e3)}
# Of a turn in a chain: a flag seen, a partial read and written, and a flag set, all in the L2 cache. An assumption.
_TURN_US = 2.0


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a b in fp32. WIDEN where interpreted: the interpreter would multiply the bits of bf16 numbers as integers."""
    if WIDEN:
        return tl.dot(widen(a), widen(b), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """x in dtype, rounded to nearest. WIDEN where interpreted: the interpreter would cut bf16 off."""
    if WIDEN and dtype == tl.bfloat16 and x.dtype != tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def expand_rows(packed, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Bytes [ROWS, COLS/8], whose bits run along a row -> bool [ROWS, COLS]."""
    bits = packed[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]
    return (tl.reshape(bits, [ROWS, COLS]) & 1) != 0


@triton.jit
def expand_cols(packed, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Bytes [ROWS/8, COLS], whose bits run along a column -> bool [ROWS, COLS]."""
    bits = packed[:, None, :] >> tl.arange(0, 8).to(tl.uint8)[None, :, None]
    return (tl.reshape(bits, [ROWS, COLS]) & 1) != 0


@triton.jit(do_not_specialize=["tokens"])  # one kernel for 1, 16 and 17 tokens
def product_kernel(
    x_ptr,  # [tokens, k]
    w_ptr,  # [m, k] by its strides
    packed_ptr,  # uint8 [m, ceil(k/8)], or [k, ceil(m/8)] where ALONG_M
    left_ptr,  # [m, rank] by its strides
    right_ptr,  # [rank, k] by its strides
    bias_ptr,  # [m]
    y_ptr,  # [tokens, m], contiguous
    tokens, m, k, rank,
    stride_xt, stride_wm, stride_wk, stride_packed, stride_lm, stride_lr, stride_rr, stride_rk,
    MASKED: tl.constexpr,
    ALONG_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share a tile row of W, which then comes from the L2 cache.
    token_blocks = tl.cdiv(tokens, BLOCK_T)
    o_t = (tl.program_id(0) % token_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    block_m = (tl.program_id(0) // token_blocks).to(tl.int64)
    o_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = tl.arange(0, RANK)
    m_m, m_t = o_m < m, o_t < tokens
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    p_left = left_ptr + o_m[:, None] * stride_lm + o_r[None, :] * stride_lr
    left = narrow(tl.load(p_left, mask=m_m[:, None] & (o_r < rank)[None, :], other=0.0), dtype, WIDEN)
    acc = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    for start in range(0, k, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < k
        p_right = right_ptr + o_r[:, None] * stride_rr + o_k[None, :].to(tl.int64) * stride_rk
        right = narrow(tl.load(p_right, mask=(o_r < rank)[:, None] & m_k[None, :], other=0.0), dtype, WIDEN)
        m_w = m_m[:, None] & m_k[None, :]
        w = tl.load(w_ptr + o_m[:, None] * stride_wm + o_k[None, :].to(tl.int64) * stride_wk, mask=m_w, other=0.0)
        update = dot(left, right, PRECISION, WIDEN)
        if MASKED:
            if ALONG_M:
                o_byte = block_m * (BLOCK_M // 8) + tl.arange(0, BLOCK_M // 8)
                p_packed = packed_ptr + o_k[None, :].to(tl.int64) * stride_packed + o_byte[:, None]
                packed = tl.load(p_packed, mask=m_k[None, :] & (o_byte < tl.cdiv(m, 8))[:, None], other=0)
                keep = expand_cols(packed, BLOCK_M, BLOCK_K)
            else:
                o_byte = start // 8 + tl.arange(0, BLOCK_K // 8)
                p_packed = packed_ptr + o_m[:, None] * stride_packed + o_byte[None, :]
                packed = tl.load(p_packed, mask=m_m[:, None] & (o_byte < tl.cdiv(k, 8))[None, :], other=0)
                keep = expand_rows(packed, BLOCK_M, BLOCK_K)
            # W is zero where pruned, and E must be, too, whatever the factors hold.
            effective = tl.where(keep, w.to(tl.float32) + update, 0.0)
        else:
            effective = w.to(tl.float32) * update
        p_x = x_ptr + o_t[:, None] * stride_xt + o_k[None, :]
        x = tl.load(p_x, mask=m_t[:, None] & m_k[None, :], other=0.0)
        acc += dot(narrow(effective, dtype, WIDEN), tl.trans(x), PRECISION, WIDEN)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o_m, mask=m_m, other=0.0).to(tl.float32)[:, None]
    p_y = y_ptr + o_t[:, None] * m + o_m[None, :]
    tl.store(p_y, narrow(tl.trans(acc), dtype, WIDEN), mask=m_t[:, None] & m_m[None, :])


@triton.jit(do_not_specialize=["tokens"])  # one kernel for 1, 16 and 17 tokens
def factor_gradients_kernel(
    u_ptr,  # [tokens, p]
    v_ptr,  # [tokens, q]
    w_ptr,  # [p, q], where the gradient is scaled by it
    packed_ptr,  # uint8 [p, ceil(q/8)], where it is masked
    left_ptr,  # [p, rank] by its strides
    right_ptr,  # [rank, q] by its strides
    dleft_ptr,  # fp32 [programs along q, p, rank]
    dright_ptr,  # fp32 [chains, rank, q]
    turns_ptr,  # int32 [chains, tiles along q], zero: the place in the chain of whom it is the turn of
    tokens, p, q, rank, tiles_q, chain,
    stride_ut, stride_vt, stride_w, stride_packed, stride_lp, stride_lr, stride_rr, stride_rq,
    MASKED: tl.constexpr,
    CHAINED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    part, turn = row // chain, (row % chain).to(tl.int32)
    blocks_q = tl.cdiv(q, BLOCK_Q)
    o_r = tl.arange(0, RANK)
    m_r = o_r < rank
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    o_p = row * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < p
    # The first operand of a product is held by every warp that shares its rows: G where the rank is large, the
    # factors where it is small.
    dleft = tl.zeros([BLOCK_P, RANK], tl.float32) if RANK > 16 else tl.zeros([RANK, BLOCK_P], tl.float32)
    for block_q in range(col * tiles_q, tl.minimum((col + 1) * tiles_q, blocks_q)):
        o_q = block_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
        m_q = o_q < q
        acc = tl.zeros([BLOCK_P, BLOCK_Q], tl.float32)
        for start in range(0, tokens, BLOCK_T):
            o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
            m_t = o_t < tokens
            u = tl.load(u_ptr + o_t[:, None] * stride_ut + o_p[None, :], mask=m_t[:, None] & m_p[None, :], other=0.0)
            v = tl.load(v_ptr + o_t[:, None] * stride_vt + o_q[None, :], mask=m_t[:, None] & m_q[None, :], other=0.0)
            acc += dot(tl.trans(u), v, PRECISION, WIDEN)
        if MASKED:
            o_byte = block_q * (BLOCK_Q // 8) + tl.arange(0, BLOCK_Q // 8)
            p_packed = packed_ptr + o_p[:, None] * stride_packed + o_byte[None, :]
            packed = tl.load(p_packed, mask=m_p[:, None] & (o_byte < tl.cdiv(q, 8))[None, :], other=0)
            acc = tl.where(expand_rows(packed, BLOCK_P, BLOCK_Q), acc, 0.0)
        else:
            p_w = w_ptr + o_p[:, None] * stride_w + o_q[None, :]
            acc *= tl.load(p_w, mask=m_p[:, None] & m_q[None, :], other=0.0).to(tl.float32)
        gradient = narrow(acc, dtype, WIDEN)
        p_right = right_ptr + o_q[None, :] * stride_rq + o_r[:, None] * stride_rr
        right = narrow(tl.load(p_right, mask=m_r[:, None] & m_q[None, :], other=0.0), dtype, WIDEN)
        # left is read again for every tile: kept, it would take registers from the sum over the tokens.
        if RANK > 16:
            p_left = left_ptr + o_p[:, None] * stride_lp + o_r[None, :] * stride_lr
            left = narrow(tl.load(p_left, mask=m_p[:, None] & m_r[None, :], other=0.0), dtype, WIDEN)
            dleft += dot(gradient, tl.trans(right), PRECISION, WIDEN)
            dright = tl.trans(dot(tl.trans(gradient), left, PRECISION, WIDEN))
        else:
            p_left = left_ptr + o_p[None, :] * stride_lp + o_r[:, None] * stride_lr
            left_t = narrow(tl.load(p_left, mask=m_r[:, None] & m_p[None, :], other=0.0), dtype, WIDEN)
            dleft += dot(right, tl.trans(gradient), PRECISION, WIDEN)
            dright = dot(left_t, gradient, PRECISION, WIDEN)
        p_dright = dright_ptr + (part * rank + o_r[:, None]) * q + o_q[None, :]
        m_right = m_r[:, None] & m_q[None, :]
        if CHAINED:
            p_turn = turns_ptr + part * blocks_q + block_q
            while tl.atomic_cas(p_turn, turn, turn, sem="acquire", scope="gpu") != turn:
                pass
            tl.debug_barrier()
            # From the L2 cache: another processor wrote it.
            dright += tl.load(p_dright, mask=m_right & (turn > 0), other=0.0, cache_modifier=".cg")
        tl.store(p_dright, dright, mask=m_right)
        if CHAINED:
            tl.debug_barrier()
            tl.atomic_xchg(p_turn, turn + 1, sem="release", scope="gpu")
    if RANK > 16:
        p_dleft = dleft_ptr + (col * p + o_p[:, None]) * rank + o_r[None, :]
        tl.store(p_dleft, dleft, mask=m_p[:, None] & m_r[None, :])
    else:
        p_dleft = dleft_ptr + (col * p + o_p[None, :]) * rank + o_r[:, None]
        tl.store(p_dleft, dleft, mask=m_r[:, None] & m_p[None, :])


@triton.jit
def sum_parts_kernel(
    parts_ptr,  # fp32 [parts, size]
    out_ptr,  # [size]
    size, parts,
    WIDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + part * size + o, mask=o < size, other=0.0)
    tl.store(out_ptr + o, narrow(total, out_ptr.dtype.element_ty, WIDEN), mask=o < size)


@dataclass(frozen=True)
class Config:
    """Tiles of one kernel: outputs by tokens (or rows by columns of G), and the step of the sum."""

    outer: int
    inner: int
    step: int
    num_warps: int
    num_stages: int


def product_config(dtype: torch.dtype, tokens: int, rank: int) -> Config:
    """Tiles of `product_kernel`, so that no register is spilled."""
    if dtype == torch.float32:  # exact products, in the cores for fp32
        return Config(64, 64, 32, 4, 2)
    if tokens <= 32:
        return Config(64, 32, 64, 4, 3) if rank <= 16 else Config(64, 32, 32, 4 if rank <= 64 else 8, 3)
    if rank <= 64:
        return Config(128, 128, 64 if rank <= 16 else 32, 8, 3)
    return Config(64, 128, 32, 8, 3)


def factor_gradients_config(dtype: torch.dtype, rank: int) -> Config:
    """Tiles of `factor_gradients_kernel`, so that no register is spilled."""
    if dtype == torch.float32:
        return Config(32, 32, 32, 4, 2)
    if rank > 64:
        return Config(32, 64, 32, 8, 2)
    if rank > 16:
        return Config(32 if rank > 32 else 64, 128, 32, 8, 2)
    return Config(128, 128, 32, 8, 3)


@cache
def schedule(p: int, q: int, tokens: int, rank: int, cc: int, config: Config) -> tuple[int, int]:
    """Tiles along q of one program of `factor_gradients_kernel`, and how many programs along p share a partial.

    More tiles leave fewer partials, and too many leave processors without work; a longer chain starts later. The time
    is estimated as the sum of what the tensor cores and the partials' bytes take at the peaks of the device and of the
    turns of a chain. Of what is within a tenth of the least, the one that leaves the fewest bytes.
    """
    processors, tile_us, byte_us = _DEVICES[90 if cc >= 90 else 80]
    rows, cols = -(-p // config.outer), -(-q // config.inner)
    tile_us *= tokens * config.outer * config.inner / 128**2
    choices = []
    for chains in {-(-rows // chain) for chain in range(1, rows + 1)}:
        for tiles in range(1, cols + 1):
            chain, programs_q = -(-rows // chains), -(-cols // tiles)
            waves = -(-rows * programs_q // processors)
            # Each is written once and read once to sum, and by the next of its chain.
            partials = 4 * rank * ((3 if chain > 1 else 2) * chains * q + 2 * programs_q * p)
            us = waves * tiles * tile_us + partials * byte_us + (chain - 1) * _TURN_US
            choices.append((us, partials, tiles, chain))
    least = min(choices)[0]
    _, _, tiles, chain = min((choice for choice in choices if choice[0] <= 1.1 * least), key=lambda choice: choice[1])
    return tiles, chain


def product_triton(
    x: Tensor, weight: Tensor, packed: Tensor | None, left: Tensor, right: Tensor, bias: Tensor | None, y: Tensor,
    transposed: bool,
) -> None:  # fmt: skip
    """y = x Eᵀ + b, or x E + b if ``transposed``."""
    x, weight = _inner_contiguous(x), weight.detach()
    if transposed:
        weight, left, right = weight.t(), right.t(), left.t()
    (m, k), rank = weight.shape, left.shape[1]
    config = product_config(x.dtype, x.shape[0], rank)
    launch(
        product_kernel,
        (-(-x.shape[0] // config.inner) * -(-m // config.outer),),
        x, weight, x if packed is None else packed, left.detach(), right.detach(), x if bias is None else bias.detach(),
        y, x.shape[0], m, k, rank,
        x.stride(0), *weight.stride(), 0 if packed is None else packed.stride(0), *left.stride(), *right.stride(),
        MASKED=packed is not None, ALONG_M=transposed, HAS_BIAS=bias is not None,
        PRECISION="ieee", WIDEN=_interpreted(), RANK=_padded(rank),
        BLOCK_M=config.outer, BLOCK_T=config.inner, BLOCK_K=config.step,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def factor_gradients_triton(
    u: Tensor, v: Tensor, weight: Tensor | None, packed: Tensor | None, left: Tensor, right: Tensor, dleft: Tensor,
    dright: Tensor,
) -> None:  # fmt: skip
    """dleft [p, rank] and dright [rank, q] (both contiguous) from u [tokens, p] and v [tokens, q]."""
    u, v = _inner_contiguous(u), _inner_contiguous(v)
    (tokens, p), q, rank = u.shape, v.shape[1], left.shape[1]
    cc = target(u)
    config = factor_gradients_config(u.dtype, rank)
    tiles_q, chain = schedule(p, q, tokens, rank, cc, config)
    grid = (-(-p // config.outer), -(-q // (config.inner * tiles_q)))
    chains = -(-grid[0] // chain)
    left_parts = u.new_empty(grid[1], p, rank, dtype=torch.float32)
    right_parts = u.new_empty(chains, rank, q, dtype=torch.float32)
    turns = u.new_zeros(chains, -(-q // config.inner), dtype=torch.int32)
    launch(
        factor_gradients_kernel,
        grid,
        u, v, u if weight is None else weight.detach(), u if packed is None else packed, left.detach(), right.detach(),
        left_parts, right_parts, turns, tokens, p, q, rank, tiles_q, chain,
        u.stride(0), v.stride(0), 0 if weight is None else weight.stride(0), 0 if packed is None else packed.stride(0),
        *left.stride(), *right.stride(),
        MASKED=packed is not None, CHAINED=chain > 1, PRECISION="ieee", WIDEN=_interpreted(), RANK=_padded(rank),
        BLOCK_P=config.outer, BLOCK_Q=config.inner, BLOCK_T=config.step,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    for parts, out in ((left_parts, dleft), (right_parts, dright)):
        size = out.numel()
        launch(sum_parts_kernel, (-(-size // 512),), parts, out, size, parts.shape[0], WIDEN=_interpreted(), BLOCK=512)


def _inner_contiguous(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def _padded(rank: int) -> int:
    """The rank as the tensor cores take it."""
    return max(16, 1 << (rank - 1).bit_length())
