# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005, SIM108 (the forms that Triton compiles)
"""Triton kernel of row selection; the operation and its reference are in kernels/select.py.

One program holds the scores of one row in registers, as CHUNKS tensors of CHUNK columns (so that a width
such as 11008 is padded to 11264 and not to 16384), and looks for a threshold t with count(score >= t) = k.
It keeps a bracket

    count(score >= lo) >= k > count(score >= hi)

The first guesses come from the row's mean, as if its weights were normal; the next interpolate the counts;
after eight, every third halves the bracket in the order-preserving integer keys of fp32, so that the search
always ends: when count(score >= lo) = k, or when no float lies between lo and hi, and then all that are left
are ties at lo, of which the first columns are kept. About seven counts do for rows of 4096
(docs/kernels.md).
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trisparse.kernels.bitmask_triton import merge_bits
from trisparse.kernels.launch import launch, target
from trisparse.kernels.score_triton import max_or_nan, widen

MAX_HELD = 32768  # columns whose scores fit the registers of one program; wider rows are read again for each count


@triton.jit
def _key(value):
    """fp32 -> int32 in the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key, SHIFT: tl.constexpr, LOWEST: tl.constexpr):
    """The inverse of `_key(value) >> SHIFT`; keys at or below LOWEST, that of -Inf, give -Inf."""
    bits = key << SHIFT
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(key <= LOWEST, float("-inf"), value)


@triton.jit
def _score(w_ptr, x_ptr, i, cols, HAS_X: tl.constexpr, ABSOLUTE: tl.constexpr, EXACT: tl.constexpr):
    """(weights, scores) of the columns i; EXACT: all of them exist."""
    if EXACT:
        w = tl.load(w_ptr + i)
    else:
        w = tl.load(w_ptr + i, mask=i < cols, other=0.0)
    s = widen(w)
    if ABSOLUTE:
        s = tl.abs(s)
    if HAS_X:
        if EXACT:
            s = s * tl.load(x_ptr + i)
        else:
            s = s * tl.load(x_ptr + i, mask=i < cols, other=0.0)
    return w, s


@triton.jit
def _count(s, t):
    """How many of the scores reach t; a NaN, which stands for a column that does not exist, does not."""
    n = (s[0] >= t).to(tl.int32)
    for c in tl.static_range(1, len(s)):
        n += (s[c] >= t).to(tl.int32)
    return tl.sum(n, 0)


@triton.jit
def _count_again(w_ptr, x_ptr, t, cols, HAS_X: tl.constexpr, ABSOLUTE: tl.constexpr, CHUNK: tl.constexpr):
    """The same for a row that is too wide to be held."""
    i = tl.arange(0, CHUNK)
    n = tl.zeros([CHUNK], tl.int32)
    for start in range(0, cols, CHUNK):
        _, s = _score(w_ptr, x_ptr, start + i, cols, HAS_X, ABSOLUTE, False)
        n += ((s >= t) & (start + i < cols)).to(tl.int32)
    return tl.sum(n, 0)


@triton.jit
def _last_tie(s, i, low, high, need, before):
    """(column of the need-th tie or -1, ties up to here): ties are the scores in [low, high) of a chunk."""
    tied = ((s >= low) & ~(s >= high)).to(tl.int32)
    rank = before + tl.cumsum(tied, 0)
    cut = tl.max(tl.where((tied != 0) & (rank == need), i, -1), 0)
    return cut, before + tl.sum(tied, 0)


@triton.jit
def _emit(
    w_ptr, mask_ptr, packed_ptr, w, s, i, cols, low, high, cut,
    EXACT: tl.constexpr, CHUNK: tl.constexpr, ZERO: tl.constexpr, MASK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write one chunk: kept are the scores from `high` on, and those from `low` on up to the column `cut`."""
    keep = (s >= high) | ((s >= low) & (i <= cut))
    if not EXACT:
        keep = keep & (i < cols)
    if ZERO:
        tl.store(w_ptr + i, tl.where(keep, w, 0.0).to(w.dtype), mask=i < cols)
    if MASK:
        tl.store(mask_ptr + i, keep.to(tl.uint8), mask=i < cols)
    if PACKED:
        b = tl.min(i, 0) // 8 + tl.arange(0, CHUNK // 8)
        byte = merge_bits(keep.to(tl.int32), CHUNK, 1, 8).to(tl.uint8)
        tl.store(packed_ptr + b, byte, mask=b < tl.cdiv(cols, 8))


@triton.jit
def select_rows_kernel(
    w_ptr,  # [rows, cols], rows stride_w apart; zeroed in place if ZERO
    x_ptr,  # [cols] fp32 if HAS_X
    least_ptr,  # [1] fp32 if HAS_X: the least of x; when it is not negative, nor is any |W| * X
    mask_ptr,  # [rows, cols] bytes 0 and 1 if MASK
    packed_ptr,  # [rows, ceil(cols / 8)] bits if PACKED
    nan_ptr,  # [1] int32, set when a score is a NaN
    cols,
    k,
    guess,  # the k-th score of a normal row, over the mean score
    slope,  # by how much it falls, over the mean, for each further column kept, over cols
    stride_w,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HELD: tl.constexpr,
    SHIFT: tl.constexpr,
    LOWEST: tl.constexpr,
    HAS_X: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ZERO: tl.constexpr,
    MASK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """One row. All chunks but the last are full."""
    row = tl.program_id(0).to(tl.int64)
    w_ptr += row * stride_w
    mask_ptr += row * cols
    packed_ptr += row * tl.cdiv(cols, 8)
    i = tl.arange(0, CHUNK)
    # The greatest score (NaN if any is) and the mean.
    if HELD:
        s = ()
        for c in tl.static_range(CHUNKS):
            _, s_c = _score(w_ptr, x_ptr, c * CHUNK + i, cols, HAS_X, ABSOLUTE, c < CHUNKS - 1)
            s = s + (s_c,)
        greatest, total = s[0], s[0]
        if CHUNKS == 1:
            greatest = tl.where(i < cols, greatest, float("-inf"))
        for c in tl.static_range(1, CHUNKS):
            total += s[c]
            if c < CHUNKS - 1:
                greatest = max_or_nan(greatest, s[c])
            else:
                greatest = max_or_nan(greatest, tl.where(c * CHUNK + i < cols, s[c], float("-inf")))
        last = tl.where((CHUNKS - 1) * CHUNK + i < cols, s[CHUNKS - 1], float("nan"))
        s = s[: CHUNKS - 1] + (last,)
    else:
        greatest = tl.full([CHUNK], float("-inf"), tl.float32)
        total = tl.zeros([CHUNK], tl.float32)
        for start in range(0, cols, CHUNK):
            _, s_c = _score(w_ptr, x_ptr, start + i, cols, HAS_X, ABSOLUTE, False)
            total += s_c
            greatest = max_or_nan(greatest, tl.where(start + i < cols, s_c, float("-inf")))
    top = tl.reduce(greatest, 0, max_or_nan) + 0.0  # -0 becomes +0, so that no score reaches the key after it
    mean = tl.sum(total, 0) / cols
    if top != top:
        tl.store(nan_ptr, 1)
    low = LOWEST
    if HAS_X and ABSOLUTE:
        low = tl.where(tl.load(least_ptr) >= 0, 0, LOWEST)
    high = (_key(top) >> SHIFT) + 1  # beyond +Inf this is a NaN, which nothing reaches
    n_low, n_high = cols, 0
    if k == 0:
        low, n_low = high, 0
    t = mean * guess
    step = 0
    middle = (low >> 1) + (high >> 1) + (low & high & 1)  # without overflow
    # A NaN row ends at once; its mask is never seen.
    while (n_low != k) & (middle != low) & (top == top):
        if (step >= 8) & (step % 3 == 2):
            q = middle
        else:
            q = tl.minimum(tl.maximum(_key(t) >> SHIFT, low + 1), high - 1)
        at = _value(q, SHIFT, LOWEST)
        if HELD:
            n = _count(s, at)
        else:
            n = _count_again(w_ptr, x_ptr, at, cols, HAS_X, ABSOLUTE, CHUNK)
        enough = n >= k
        low, n_low = tl.where(enough, q, low), tl.where(enough, n, n_low)
        high, n_high = tl.where(enough, high, q), tl.where(enough, n_high, n)
        step += 1
        if (step <= 3) & ((n_high == 0) | (n_low == cols)):
            # One side of the bracket is still far: follow the normal density, and a little beyond.
            miss = (n - k + 0.5) / cols
            beyond = tl.where(miss > 0, 0.01, -0.01)
            t = at + mean * slope * (miss * (1.0 + 0.2 * step) + beyond)
        else:
            share = (n_low - k + 0.5) / (n_low - n_high)
            from_, to = _value(low, SHIFT, LOWEST), _value(high, SHIFT, LOWEST)
            t = from_ + (to - from_) * tl.minimum(tl.maximum(share, 0.02), 0.98)
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
    cut = -1
    t_low = _value(low, SHIFT, LOWEST)
    t_high = t_low
    if n_low != k:
        t_high = _value(high, SHIFT, LOWEST)
        need, before = k - n_high, 0
        if HELD:
            for c in tl.static_range(CHUNKS):
                found, before = _last_tie(s[c], c * CHUNK + i, t_low, t_high, need, before)
                cut = tl.maximum(cut, found)
        else:
            for start in range(0, cols, CHUNK):
                _, s_c = _score(w_ptr, x_ptr, start + i, cols, HAS_X, ABSOLUTE, False)
                s_c = tl.where(start + i < cols, s_c, float("nan"))
                found, before = _last_tie(s_c, start + i, t_low, t_high, need, before)
                cut = tl.maximum(cut, found)
    if HELD:
        for c in tl.static_range(CHUNKS):
            # The weights are read again, from the cache: kept, they would take half as many registers as the
            # scores.
            w_c, _ = _score(w_ptr, x_ptr, c * CHUNK + i, cols, False, False, c < CHUNKS - 1)
            _emit(w_ptr, mask_ptr, packed_ptr, w_c, s[c], c * CHUNK + i, cols, t_low, t_high, cut,
                  c < CHUNKS - 1, CHUNK, ZERO, MASK, PACKED)  # fmt: skip
    else:
        for start in range(0, cols, CHUNK):
            w_c, s_c = _score(w_ptr, x_ptr, start + i, cols, HAS_X, ABSOLUTE, False)
            _emit(w_ptr, mask_ptr, packed_ptr, w_c, s_c, start + i, cols, t_low, t_high, cut,
                  False, CHUNK, ZERO, MASK, PACKED)  # fmt: skip


def config(cols: int, dtype: torch.dtype, cc: int) -> dict[str, Any]:
    """CHUNK, CHUNKS, HELD, num_warps and maxnreg for a width, a dtype and a compute capability.

    A thread loads 8 columns of a chunk at a time, 16 bytes of bf16. Few warps make few cross-warp
    reductions, which are the cost of a count beside the comparisons; but 8 chunks, 64 scores a thread, are
    the most that 128 registers (fp32: 168) take without a spill, and 128 let 16 warps live on an SM to hide
    the loads. The code for sm_100 needs some 200; there the assembler chooses.
    """
    registers = 168 if dtype == torch.float32 else 128
    if cols > MAX_HELD:
        chunks = triton.cdiv(cols, 4096)
        return {"CHUNK": 4096, "CHUNKS": chunks, "HELD": False, "num_warps": 16}
    warps = 1
    while triton.cdiv(cols, 256 * warps) > 8:
        warps *= 2
    chunks = max(1, triton.cdiv(cols, 256 * warps))
    shape = {"CHUNK": 256 * warps, "CHUNKS": chunks, "HELD": True, "num_warps": warps}
    # 16 warps leave 128 registers each in any case.
    return shape if cc >= 100 or warps > 8 else {**shape, "maxnreg": registers}


def select_rows_triton(
    weight: Tensor,
    k: int,
    *,
    x: Tensor | None,
    absolute: bool,
    zero: bool,
    outputs: dict[str, Tensor],
    nan: Tensor,
) -> None:
    """Launch the kernel on checked arguments; ``outputs`` may hold mask and packed."""
    rows, cols = weight.shape
    if not rows * cols:
        return
    # Without x, the scores of a 16-bit weight lie on its own grid, whose keys are shorter by SHIFT bits.
    shift = 0 if x is not None else {torch.bfloat16: 16, torch.float16: 13}.get(weight.dtype, 0)
    lowest = 0 if absolute and x is None else (0x7F800000 ^ -1) >> shift  # the key of -Inf
    normal = statistics.NormalDist()
    share = min(max(k / max(cols, 1), 1e-6), 1 - 1e-6)
    z, mean = normal.inv_cdf(1 - share / 2), (2 / torch.pi) ** 0.5
    launch(
        select_rows_kernel,
        (rows,),
        weight,
        nan if x is None else x.to(torch.float32),
        nan if x is None else x.amin().to(torch.float32).reshape(1),
        outputs["mask"].view(torch.uint8) if "mask" in outputs else nan,
        outputs.get("packed", nan),
        nan,
        cols,
        k,
        z / mean,
        1 / (2 * normal.pdf(z) * mean),
        weight.stride(0),
        SHIFT=shift,
        LOWEST=lowest,
        HAS_X=x is not None,
        ABSOLUTE=absolute,
        ZERO=zero,
        MASK="mask" in outputs,
        PACKED="packed" in outputs,
        **config(cols, weight.dtype, target(weight)),
    )
