# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
# ruff: noqa: SIM108 (the forms that Triton compiles)
"""Gluon kernels of the 2:4 product on sparse tensor cores; the operation and its format are in kernels/linear24.py.

y = x W^T is computed as (W x^T)^T, since the sparse operand of mma.sp is the left one. W's tile of 16 rows and 32
columns is one 16-byte load a lane, straight from global memory into the registers of the mma; a tile of x goes
through shared memory by cp.async, and from there by ldmatrix. What mma.sp wants of a warp is held in tensors
[k-warp, row tile of 16, token tile of 8, lane of 32, register of 4], so that one call of the inline assembly per
(row tile, token tile) takes the four registers of each operand of its lane.

The warps of a CTA are K_WARPS x ROW_WARPS x TOKEN_WARPS: those along k take every K_WARPS-th unit of 64 columns and
are added up at the end. U = A x^T of LoRA rides in the same loop on dense tensor cores, from the same tile of x; its
token tiles are dealt over all the row warps, so that a CTA forms U once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

UNIT: gl.constexpr = gl.constexpr(64)  # columns that one metadata word a lane serves: two steps of 32
NO_META: gl.constexpr = gl.constexpr(0x44444444)  # places 0 and 1 in every group: valid beside zero values


def _sparse(dtype: str, selector: int) -> str:
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}.f32 "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$12,$13,$14,$15}}, $16, 0x{selector};"
    )


def _dense(dtype: str) -> str:
    """Two steps of 16 columns: $4.. and $8.. are the left operands, $12.. the right ones, $16.. the sum so far."""
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {{$0,$1,$2,$3}}, "
    first = "{$4,$5,$6,$7}, {$12,$13}, {$16,$17,$18,$19};"
    second = "{$8,$9,$10,$11}, {$14,$15}, {$0,$1,$2,$3};"
    return f"{mma}{first} {mma}{second}"


SPARSE_FP16_0 = gl.constexpr(_sparse("f16", 0))
SPARSE_FP16_1 = gl.constexpr(_sparse("f16", 1))
SPARSE_BF16_0 = gl.constexpr(_sparse("bf16", 0))
SPARSE_BF16_1 = gl.constexpr(_sparse("bf16", 1))
DENSE_FP16 = gl.constexpr(_dense("f16"))
DENSE_BF16 = gl.constexpr(_dense("bf16"))
SPARSE_REGISTERS = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r")
DENSE_REGISTERS = gl.constexpr("=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f")


@gluon.constexpr_function
def _bits(n):
    return range(n.bit_length() - 1)


@gluon.constexpr_function
def _fragments(k_warps, row_warps, token_warps):
    """Accumulators, weights and metadata: [k-warps, row tiles, token tiles, 32, 4]."""
    return gl.BlockedLayout([1, 1, 1, 1, 4], [1, 1, 1, 32, 1], [k_warps, row_warps, token_warps, 1, 1], [4, 3, 2, 1, 0])


@gluon.constexpr_function
def _x_words(tokens, k_warps, row_warps, token_warps):
    """[tokens, 32 * k_warps] int32, pairs of x, as the mma wants them: lane (g, t) holds pairs 4r + t of token g."""
    tiles = tokens // 8
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    warps = [[8 << i if token_warps <= tiles or 2 << i <= tiles else 0, 0] for i in _bits(token_warps)]
    warps += [[0, 0] for _ in _bits(row_warps)] + [[0, 32 << i] for i in _bits(k_warps)]
    registers = [[0, 4], [0, 8], [0, 16]]
    registers += [[8 * token_warps << i, 0] for i in _bits(max(tiles // token_warps, 1))]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [tokens, 32 * k_warps])


@gluon.constexpr_function
def _lora_words(rank, k_warps, other_warps):
    """[rank, 32 * k_warps] int32, pairs of LoRA's A, as the dense mma wants its left operand."""
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    warps = [[0, 0] for _ in _bits(other_warps)] + [[0, 32 << i] for i in _bits(k_warps)]
    registers = [[8, 0], [0, 4], [0, 8], [0, 16]] + [[16 << i, 0] for i in _bits(rank // 16)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rank, 32 * k_warps])


@gluon.constexpr_function
def _copy(columns, warps):
    """[rows, columns] of 2-byte elements, 16 bytes a thread along the columns."""
    lanes = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def _along(layout, dim):
    """The layout of one dimension of five, to be expanded along the others."""
    for other in (4, 3, 2, 1, 0):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.constexpr_function
def _stores(rows, tokens, wide, warps):
    """[rows, tokens] with `wide` neighbouring rows a thread: y is [tokens, rows] in memory."""
    lanes = min(rows // wide, 32)
    return gl.BlockedLayout([wide, 1], [lanes, 32 // lanes], [1, warps], [0, 1])


@gluon.jit
def _units(words, TILES: gl.constexpr, K_WARPS: gl.constexpr, layout: gl.constexpr):
    """Words of a tile of x -> its two steps of 32 columns, each [k-warps, 1, token tiles, 32, 4]."""
    b = words.reshape([TILES, 8, K_WARPS, 2, 4, 4]).permute([2, 0, 1, 5, 4, 3])
    first, second = gl.split(b.reshape([K_WARPS, 1, TILES, 32, 4, 2]))
    return (
        gl.convert_layout(first, layout, assert_trivial=True),
        gl.convert_layout(second, layout, assert_trivial=True),
    )


@gluon.jit
def _rows_by_tokens(acc, ROWS: gl.constexpr, TOKENS: gl.constexpr):
    """Accumulators [k-warps, row tiles, token tiles, 32, 4] -> [rows, tokens], added up over the k-warps."""
    s = gl.sum(acc, 0) if acc.shape[0] > 1 else acc.reshape([ROWS // 16, TOKENS // 8, 32, 4])
    return s.reshape([ROWS // 16, TOKENS // 8, 8, 4, 2, 2]).permute([0, 4, 2, 1, 3, 5]).reshape([ROWS, TOKENS])


@gluon.jit
def _load_step(tile, unit, units, step: gl.constexpr, live, TAIL: gl.constexpr):
    """Weights of one of a unit's two steps; zero past the last unit, and nothing is read if not live."""
    mask = live
    if TAIL:
        mask = mask & (unit < units)[:, :, :, :, None]
    return gl.load(tile + (unit * 256 + step * 128)[:, :, :, :, None], mask=mask, other=0)


@gluon.jit
def _load_meta(tile, unit, units, live, TAIL: gl.constexpr):
    """Metadata of a unit, valid past the last one, too."""
    mask = live
    if TAIL:
        mask = mask & (unit < units)
    return gl.load(tile + unit * 32, mask=mask, other=NO_META)


@gluon.jit
def linear24_kernel(
    values_ptr,  # [rows / 16, cols / 32, 32, 4] int32, pairs of weights in fragment order
    meta_ptr,  # [rows / 16, cols / 64, 32] int32, metadata in fragment order
    x_ptr,  # [tokens, cols]
    bias_ptr,  # [rows] if HAS_BIAS
    lora_a_ptr,  # [rank, cols] if RANK
    lora_b_ptr,  # [rows, rank] if RANK
    y_ptr,  # [tokens, rows]; or fp32 [SPLITS, tokens, rows] to be added up if SPLITS > 1
    tokens,
    rows,
    cols,
    rank,
    scale,  # of LoRA
    ROWS: gl.constexpr,  # of W, of a CTA
    TOKENS: gl.constexpr,
    RANK: gl.constexpr,  # 0, or rank rounded up to a power of two from 16
    K_WARPS: gl.constexpr,
    ROW_WARPS: gl.constexpr,
    TOKEN_WARPS: gl.constexpr,
    SPLITS: gl.constexpr,
    STAGES: gl.constexpr,  # tiles of x in flight
    HAS_BIAS: gl.constexpr,
    TAIL: gl.constexpr,  # cols is not a multiple of a stage's columns
):
    WARPS: gl.constexpr = K_WARPS * ROW_WARPS * TOKEN_WARPS
    COLS: gl.constexpr = UNIT * K_WARPS  # of one stage
    ROW_TILES: gl.constexpr = ROWS // 16
    TILES: gl.constexpr = TOKENS // 8
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    BF16: gl.constexpr = dtype == gl.bfloat16
    SPARSE_0: gl.constexpr = SPARSE_BF16_0 if BF16 else SPARSE_FP16_0
    SPARSE_1: gl.constexpr = SPARSE_BF16_1 if BF16 else SPARSE_FP16_1
    DENSE: gl.constexpr = DENSE_BF16 if BF16 else DENSE_FP16
    L: gl.constexpr = _fragments(K_WARPS, ROW_WARPS, TOKEN_WARPS)
    X: gl.constexpr = _x_words(TOKENS, K_WARPS, ROW_WARPS, TOKEN_WARPS)
    COPY: gl.constexpr = _copy(COLS, WARPS)
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])  # 16-byte chunks: ldmatrix without conflicts
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])  # the same bytes as pairs

    # W: 16-byte loads; past the last row the last tile is computed again, and dropped at the store
    units = cols // UNIT
    kw = gl.arange(0, K_WARPS, _along(L, 0))[:, None, None, None]
    i = gl.arange(0, ROW_TILES, _along(L, 1))[None, :, None, None]
    lane = gl.arange(0, 32, _along(L, 3))[None, None, None, :]
    r = gl.arange(0, 4, _along(L, 4))[None, None, None, None, :]
    tile = gl.minimum(gl.program_id(1) * ROW_TILES + i, rows // 16 - 1)
    values_tile = values_ptr + (tile * (cols * 4) + lane * 4)[:, :, :, :, None] + r
    meta_tile = meta_ptr + (tile * (cols // 2) + lane)  # without the registers: one load for the four

    # x: past the last token the last one is computed again, and dropped at the store
    stages = gl.cdiv(units, K_WARPS)
    start = gl.program_id(2) * stages // SPLITS
    stop = (gl.program_id(2) + 1) * stages // SPLITS
    token = gl.program_id(0) * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(1, COPY))
    token = gl.minimum(token, tokens - 1).to(gl.int64)
    column = gl.arange(0, COLS, gl.SliceLayout(0, COPY))[None, :]
    x_tile = x_ptr + token[:, None] * cols + column
    x_shared = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, COLS], SWIZZLED)
    x_words = x_shared._reinterpret(gl.int32, [STAGES, TOKENS, COLS // 2], WORDS)
    acc = gl.zeros([K_WARPS, ROW_TILES, TILES, 32, 4], gl.float32, L)

    if RANK:
        LU: gl.constexpr = _fragments(K_WARPS, 1, ROW_WARPS * TOKEN_WARPS)
        XU: gl.constexpr = _x_words(TOKENS, K_WARPS, 1, ROW_WARPS * TOKEN_WARPS)
        AU: gl.constexpr = _lora_words(RANK, K_WARPS, ROW_WARPS * TOKEN_WARPS)
        lora_row = gl.arange(0, RANK, gl.SliceLayout(1, COPY))[:, None]
        lora_tile = lora_a_ptr + lora_row * cols + column
        lora_shared = gl.allocate_shared_memory(dtype, [STAGES, RANK, COLS], SWIZZLED)
        lora_words = lora_shared._reinterpret(gl.int32, [STAGES, RANK, COLS // 2], WORDS)
        u = gl.zeros([K_WARPS, RANK // 16, TILES, 32, 4], gl.float32, LU)

    for stage in gl.static_range(STAGES - 1):
        live = (start + stage) * COLS + column < gl.minimum(stop * COLS, cols)
        async_copy.async_load(x_shared.index(stage), x_tile + (start + stage) * COLS, mask=live)
        if RANK:
            lora_live = live & (lora_row < rank)
            async_copy.async_load(lora_shared.index(stage), lora_tile + (start + stage) * COLS, mask=lora_live)
        async_copy.commit_group()
    unit = start * K_WARPS + kw
    first = _load_step(values_tile, unit, units, 0, start < stop, TAIL)
    meta = _load_meta(meta_tile, unit, units, start < stop, TAIL)
    if K_WARPS > 1:
        second = _load_step(values_tile, unit, units, 1, start < stop, TAIL)

    for stage in range(start, stop):
        async_copy.wait_group(STAGES - 2)
        ahead = stage + STAGES - 1
        slot = (ahead - start) % STAGES
        live = ahead * COLS + column < gl.minimum(stop * COLS, cols)
        async_copy.async_load(x_shared.index(slot), x_tile + ahead * COLS, mask=live)
        if RANK:
            async_copy.async_load(lora_shared.index(slot), lora_tile + ahead * COLS, mask=live & (lora_row < rank))
        async_copy.commit_group()

        slot = (stage - start) % STAGES
        a0, m = first, meta[:, :, :, :, None]
        if K_WARPS > 1:
            a1 = second
        else:  # the second step is loaded when its stage comes: 16 registers fewer, and still half a stage ahead
            a1 = _load_step(values_tile, stage + kw, units, 1, True, False)
        unit = (stage + 1) * K_WARPS + kw
        first = _load_step(values_tile, unit, units, 0, stage + 1 < stop, TAIL)
        meta = _load_meta(meta_tile, unit, units, stage + 1 < stop, TAIL)
        if K_WARPS > 1:
            second = _load_step(values_tile, unit, units, 1, stage + 1 < stop, TAIL)
        b0, b1 = _units(x_words.index(slot).load(X), TILES, K_WARPS, L)
        acc = gl.inline_asm_elementwise(SPARSE_0, SPARSE_REGISTERS, [a0, b0, acc, m], gl.float32, True, 4)
        acc = gl.inline_asm_elementwise(SPARSE_1, SPARSE_REGISTERS, [a1, b1, acc, m], gl.float32, True, 4)
        if RANK:
            b0, b1 = _units(x_words.index(slot).load(XU), TILES, K_WARPS, LU)
            w = lora_words.index(slot).load(AU).reshape([RANK // 16, 2, 8, K_WARPS, 2, 2, 2, 4])
            w = w.permute([3, 0, 2, 7, 6, 1, 5, 4]).reshape([K_WARPS, RANK // 16, 1, 32, 4, 2, 2])
            w0, w1 = gl.split(w)
            w00, w01 = gl.split(w0)
            w10, w11 = gl.split(w1)
            w00 = gl.convert_layout(w00, LU, assert_trivial=True)
            w01 = gl.convert_layout(w01, LU, assert_trivial=True)
            w10 = gl.convert_layout(w10, LU, assert_trivial=True)
            w11 = gl.convert_layout(w11, LU, assert_trivial=True)
            u = gl.inline_asm_elementwise(DENSE, DENSE_REGISTERS, [w00, w01, b0, u], gl.float32, True, 4)
            u = gl.inline_asm_elementwise(DENSE, DENSE_REGISTERS, [w10, w11, b1, u], gl.float32, True, 4)
    async_copy.wait_group(0)
    y = _rows_by_tokens(acc, ROWS, TOKENS)

    if RANK:
        # s B U: U in two halves of the dtype's precision, so that rounding it costs nothing beside that of y
        M: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [ROW_WARPS * K_WARPS, TOKEN_WARPS], [16, 8])
        B: gl.constexpr = gl.DotOperandLayout(0, M, 2)
        ub = gl.convert_layout(_rows_by_tokens(u, RANK, TOKENS), gl.DotOperandLayout(1, M, 2)) * scale
        high = ub.to(dtype)
        low = (ub - high.to(gl.float32)).to(dtype)
        LB: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (RANK // 8), RANK // 8], [WARPS, 1], [1, 0])
        b_row = gl.program_id(1) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LB))[:, None]
        b_col = gl.arange(0, RANK, gl.SliceLayout(0, LB))[None, :]
        lb = gl.load(lora_b_ptr + b_row * rank + b_col, mask=(b_row < rows) & (b_col < rank), other=0.0)
        lb = gl.convert_layout(lb, B)
        y = gl.convert_layout(y, M)
        y = mma_v2(lb, low, y)
        y = mma_v2(lb, high, y)

    WIDE: gl.constexpr = 4 if SPLITS > 1 else 8  # elements in 16 bytes
    S: gl.constexpr = _stores(ROWS, TOKENS, WIDE, WARPS)
    row = gl.program_id(1) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S))
    if HAS_BIAS and SPLITS == 1:
        bias = gl.load(bias_ptr + row, mask=row < rows, other=0.0).to(gl.float32)
        y = gl.convert_layout(y, S) + bias[:, None]
        y = y.to(y_ptr.dtype.element_ty)
    else:
        y = gl.convert_layout(y.to(y_ptr.dtype.element_ty), S)
    n = gl.program_id(0) * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(0, S))[None, :]
    target = y_ptr + (gl.program_id(2) * tokens + n).to(gl.int64) * rows + row[:, None]
    gl.store(target, y, mask=(row[:, None] < rows) & (n < tokens))


@triton.jit
def add_splits_kernel(
    partial_ptr,  # [SPLITS, tokens * rows] fp32
    bias_ptr,  # [rows] if HAS_BIAS
    y_ptr,  # [tokens * rows]
    size,  # tokens * rows
    rows,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + split * size.to(tl.int64) + i, mask=i < size, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + i % rows, mask=i < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=i < size)
