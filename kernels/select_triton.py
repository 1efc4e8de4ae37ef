# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005, SIM102 (the forms that Triton compiles)
"""Triton kernel of row selection; the operation and its reference are in kernels/select.py.

One program holds one row in registers, as CHUNKS tensors of CHUNK columns (so that a width such as 11008 is
padded to 11264 and not to 16384). Scores are compared as int32 keys in the order of the floats, which for
scores without a sign are their bits. The search looks for a threshold t with count(key >= t) = k and keeps a
bracket

    count(key >= low) >= k > count(key >= high)

The first guesses come from the row's mean, as if its weights were normal; the next interpolate the counts.
When a bracket's end is one score off, it moves to the next score inside, and the count after that is exact but
for ties. After eight counts, the ends move so and the bracket is halved in turns, so that the search always ends:
when count(key >= low) = k, or when no key lies between low and high, and then all that are left are ties, of
which the first columns are kept. About five counts do for rows of 4096 (docs/kernels.md).
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trisparse.kernels.launch import launch, target
from trisparse.kernels.score_triton import widen

MAX_HELD = 32768  # columns whose scores fit the registers of one program; wider rows are read again for each count


@triton.jit
def _key(s):
    """fp32 -> int32 in the same order: the bits of |s| with the sign of s; those of 0 and -0 are 0."""
    bits = s.to(tl.int32, bitcast=True)
    return ((bits & 0x7FFFFFFF) ^ (bits >> 31)) - (bits >> 31)


@triton.jit
def _score(w_ptr, x_ptr, i, cols, HAS_X: tl.constexpr, ABSOLUTE: tl.constexpr, EXACT: tl.constexpr):
    """Scores of the columns i; EXACT: all of them exist, else those that do not score 0."""
    exists, other = None if EXACT else i < cols, None if EXACT else 0.0
    s = widen(tl.load(w_ptr + i, mask=exists, other=other))
    if ABSOLUTE:
        s = tl.abs(s)
    if HAS_X:
        s = s * tl.load(x_ptr + i, mask=exists, other=other)
    return s


@triton.jit
def _keys_again(w_ptr, x_ptr, i, cols, floor, ceiling, HAS_X: tl.constexpr, ABSOLUTE: tl.constexpr):
    """Keys of the columns i of a row that is too wide to be held."""
    s = _score(w_ptr, x_ptr, i, cols, HAS_X, ABSOLUTE, False)
    return tl.where(i < cols, tl.minimum(tl.maximum(_key(s), floor), ceiling), floor)


@triton.jit
def _bits_set(word):
    """How many bits of a uint32 are set, in the form that LLVM turns into one popc."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def _quarters(keys, CHUNK: tl.constexpr):
    """Each key tensor [CHUNK] as four of every fourth column: in registers, so that nothing moves."""
    quarters = ()
    for c in tl.static_range(len(keys)):
        even, odd = tl.split(tl.reshape(keys[c], [CHUNK // 2, 2]))
        k0, k2 = tl.split(tl.reshape(even, [CHUNK // 4, 2]))
        k1, k3 = tl.split(tl.reshape(odd, [CHUNK // 4, 2]))
        quarters = quarters + (k0, k1, k2, k3)
    return quarters


@triton.jit
def _missed(quarters, t, FROM: tl.constexpr, TO: tl.constexpr):
    """Of each column of quarters FROM to TO - 1, at most 32, how many are below t."""
    # Two instructions a key: a funnel shift takes in the sign of key - t. After 32 of them, nothing is left of
    # what the word began with.
    word = (quarters[FROM] - t).to(tl.uint32, bitcast=True)
    for c in tl.static_range(FROM, TO):
        word = (word << 1) | ((quarters[c] - t).to(tl.uint32, bitcast=True) >> 31)
    if TO - FROM < 32:
        word &= (1 << (TO - FROM)) - 1
    return _bits_set(word).to(tl.int32, bitcast=True)


@triton.jit
def _count(quarters, t):
    """How many keys reach t."""
    N: tl.constexpr = len(quarters)
    missed = _missed(quarters, t, 0, min(N, 32))
    for c in tl.static_range(32, N, 32):
        missed += _missed(quarters, t, c, min(N, c + 32))
    return N * missed.shape[0] - tl.sum(missed, 0)


@triton.jit
def _count_again(
    w_ptr, x_ptr, t, cols, floor, ceiling, HAS_X: tl.constexpr, ABSOLUTE: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The same for a row that is too wide to be held; columns that do not exist never reach t > floor."""
    i = tl.arange(0, CHUNK)
    n = tl.zeros([CHUNK], tl.int32)
    for start in range(0, cols, CHUNK):
        n += (_keys_again(w_ptr, x_ptr, start + i, cols, floor, ceiling, HAS_X, ABSOLUTE) >= t).to(tl.int32)
    return tl.sum(n, 0)


@triton.jit
def _nearest(keys, to, ABOVE: tl.constexpr):
    """How far the nearest key is at or above `to`, or at or below."""
    nearest = (keys[0] - to if ABOVE else to - keys[0]).to(tl.uint32, bitcast=True)
    for c in tl.static_range(1, len(keys)):
        # What lies on the other side wraps around to a great distance.
        nearest = tl.minimum(nearest, (keys[c] - to if ABOVE else to - keys[c]).to(tl.uint32, bitcast=True))
    return tl.min(nearest, 0).to(tl.int32, bitcast=True)


@triton.jit
def _tied(key, low, high):
    """1 for the keys in [low, high), else 0."""
    return ((key >= low) & (key < high)).to(tl.int32)


@triton.jit
def _last_tie(key, i, low, high, need):
    """The column of the need-th key in [low, high)."""
    tied = _tied(key, low, high)
    return tl.max(tl.where((tied != 0) & (tl.cumsum(tied, 0) == need), i, -1), 0)


@triton.jit
def _pack(below, CHUNK: tl.constexpr):
    """Of int32 [CHUNK] the signs, inverted, as bits [CHUNK / 8], the first lowest."""
    even, odd = tl.split(tl.reshape(below.to(tl.uint32, bitcast=True), [CHUNK // 2, 2]))
    b04, b26 = tl.split(tl.reshape(even, [CHUNK // 4, 2]))
    b15, b37 = tl.split(tl.reshape(odd, [CHUNK // 4, 2]))
    b0, b4 = tl.split(tl.reshape(b04, [CHUNK // 8, 2]))
    b1, b5 = tl.split(tl.reshape(b15, [CHUNK // 8, 2]))
    b2, b6 = tl.split(tl.reshape(b26, [CHUNK // 8, 2]))
    b3, b7 = tl.split(tl.reshape(b37, [CHUNK // 8, 2]))
    columns = (b7, b6, b5, b4, b3, b2, b1, b0)
    word = b7  # eight bits of which are pushed in, and the rest cut off
    for b in tl.static_range(8):
        word = (word << 1) | (columns[b] >> 31)
    return (word ^ 255).to(tl.uint8)


@triton.jit
def _emit(
    w_ptr, mask_ptr, packed_ptr, below, start, cols,
    CHUNK: tl.constexpr, ZERO: tl.constexpr, MASK: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write the columns from `start` on; a weight is dropped where ``below`` is negative."""
    i = start + tl.arange(0, CHUNK)
    exists = None if EXACT else i < cols
    if ZERO:
        # Read again, from the cache: kept, the weights would take half as many registers as the keys.
        w = tl.load(w_ptr + i, mask=exists, other=None if EXACT else 0.0)
        tl.store(w_ptr + i, tl.where(below < 0, 0.0, w).to(w.dtype), mask=exists)
    if MASK:
        tl.store(mask_ptr + i, (below >= 0).to(tl.uint8), mask=exists)
    if PACKED:
        b = start // 8 + tl.arange(0, CHUNK // 8)
        tl.store(packed_ptr + b, _pack(below, CHUNK), mask=None if EXACT else b < tl.cdiv(cols, 8))


@triton.jit
def select_rows_kernel(
    w_ptr,  # [rows, cols], rows stride_w apart; zeroed in place if ZERO
    x_ptr,  # [cols] fp32 if HAS_X
    least_ptr,  # [1] int32 if HAS_X: the least of the bits of x; negative when an x is, or is -0
    mask_ptr,  # [rows, cols] bytes 0 and 1 if MASK
    packed_ptr,  # [rows, ceil(cols / 8)] bits if PACKED
    nan_ptr,  # [1] int32, set when a score is a NaN
    cols,
    k,
    guess,  # the k-th score of a normal row, over the mean of |score|
    slope,  # by how much it falls, over that mean, for each further column kept, over cols
    stride_w,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HELD: tl.constexpr,
    SHIFT: tl.constexpr,
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
    signed = not ABSOLUTE
    if HAS_X and ABSOLUTE:
        signed = tl.load(least_ptr) < 0
    keys = ()
    n = cols
    # The mean of |score|, a NaN if any score is one, the keys, and how many of these are not negative.
    if HELD:
        total = tl.zeros([CHUNK], tl.float32)
        for c in tl.static_range(CHUNKS):
            s = _score(w_ptr, x_ptr, c * CHUNK + i, cols, HAS_X, ABSOLUTE, c < CHUNKS - 1)
            total = total + s if c else s
            keys = keys + (s.to(tl.int32, bitcast=True),)
        if signed:
            mapped = ()
            reached = tl.zeros([CHUNK], tl.int32)
            total = tl.zeros([CHUNK], tl.float32)
            for c in tl.static_range(CHUNKS):
                total += tl.abs(keys[c].to(tl.float32, bitcast=True))
                key = _key(keys[c].to(tl.float32, bitcast=True))
                reached += ((key >= 0) & (c * CHUNK + i < cols)).to(tl.int32)
                mapped = mapped + (key,)
            keys = mapped
            n = tl.sum(reached, 0)
    else:
        total = tl.zeros([CHUNK], tl.float32)
        for start in range(0, cols, CHUNK):
            s = _score(w_ptr, x_ptr, start + i, cols, HAS_X, ABSOLUTE, False)
            total += tl.abs(s)
        if signed:
            n = _count_again(w_ptr, x_ptr, 0, cols, -1, 0x7FFFFFFF, HAS_X, ABSOLUTE, CHUNK)
    mean = tl.sum(total, 0) / cols
    # The search stays on the side of 0 where the threshold is. The keys of the other side all move to its
    # end, so that no difference of two keys overflows.
    floor, ceiling = -1, 0x7FFFFFFF
    low, n_low = 0, n
    high, n_high = (0x7F800000 >> SHIFT) + 1, 0
    if signed:
        if n < k:
            floor, ceiling = -0x80000000, 0
            low, n_low = -(0x7F800000 >> SHIFT), cols
            high, n_high = 0, n
        if HELD:
            clamped = ()
            for c in tl.static_range(CHUNKS):
                clamped = clamped + (tl.minimum(tl.maximum(keys[c], floor), ceiling),)
            keys = clamped
    if HELD:
        last = tl.where((CHUNKS - 1) * CHUNK + i < cols, keys[CHUNKS - 1], floor)
        keys = keys[: CHUNKS - 1] + (last,)
    if k == 0:
        low, n_low = high, 0
    if mean != mean:
        tl.store(nan_ptr, 1)
        n_low = k  # the search ends at once; the mask is never seen
    if HELD:
        quarters = _quarters(keys, CHUNK)
    at = mean * guess
    q = _key(at) >> SHIFT
    step = 0  # 8 to 11 recur
    while (n_low != k) & (high - low > 1):
        if HELD:
            if (tl.minimum(n_low - k, k - n_high) == 1) | (step & 10 == 8):
                # Move an end of the bracket to the next score inside.
                if (n_low - k == 1) | ((k - n_high != 1) & (step == 8)):
                    low += _nearest(keys, low << SHIFT, True) >> SHIFT
                    q = low + 1
                else:
                    high -= _nearest(keys, (high << SHIFT) - 1, False) >> SHIFT
                    q = high - 1
        q = tl.minimum(tl.maximum(q, low + 1), high - 1)
        if HELD:
            n = _count(quarters, q << SHIFT)
        else:
            n = _count_again(w_ptr, x_ptr, q << SHIFT, cols, floor, ceiling, HAS_X, ABSOLUTE, CHUNK)
        enough = n >= k
        low, n_low = tl.where(enough, q, low), tl.where(enough, n, n_low)
        high, n_high = tl.where(enough, high, q), tl.where(enough, n_high, n)
        step = tl.where(step == 11, 8, step + 1)
        if (step <= 3) & ((n_high == 0) | (n_low == cols)):
            # One side of the bracket is still far: follow the normal density, and a little beyond.
            miss = (n - k + 0.5) / cols
            beyond = tl.where(miss > 0, 0.01, -0.01)
            at += mean * slope * (miss * (1.0 + 0.2 * step) + beyond)
            q = _key(at) >> SHIFT
        else:
            if step & (10 if HELD else 9) == (10 if HELD else 8):
                q = low + ((high - low) >> 1)
            else:
                share = (n_low - k + 0.5) / (n_low - n_high)
                q = low + ((high - low).to(tl.float32) * share).to(tl.int32)
    t_low, t_high, left = low << SHIFT, high << SHIFT, k - n_high
    cut = cols
    if n_low != k:
        # Only ties are left in the bracket, and of these the first `left` stay: find the chunk of the last.
        start, need = 0, 0
        if HELD:
            key = keys[0]
            for c in tl.static_range(CHUNKS):
                n = tl.sum(_tied(keys[c], t_low, t_high), 0)
                here = (left > 0) & (left <= n)
                key = tl.where(here, keys[c], key)
                start, need = tl.where(here, c * CHUNK, start), tl.where(here, left, need)
                left -= n
        else:
            for at_c in range(0, cols, CHUNK):
                key = _keys_again(w_ptr, x_ptr, at_c + i, cols, floor, ceiling, HAS_X, ABSOLUTE)
                n = tl.sum(_tied(key, t_low, t_high), 0)
                here = (left > 0) & (left <= n)
                start, need = tl.where(here, at_c, start), tl.where(here, left, need)
                left -= n
            key = _keys_again(w_ptr, x_ptr, start + i, cols, floor, ceiling, HAS_X, ABSOLUTE)
        cut = _last_tie(key, start + i, t_low, t_high, need)
    if HELD:
        # Two loops, since keys that only one branch changes would be copied for the other.
        if n_low == k:
            for c in tl.static_range(CHUNKS):
                _emit(w_ptr, mask_ptr, packed_ptr, keys[c] - t_low, c * CHUNK, cols,
                      CHUNK, ZERO, MASK, PACKED, c < CHUNKS - 1)  # fmt: skip
        else:
            for c in tl.static_range(CHUNKS):
                key = tl.where((keys[c] < t_high) & (c * CHUNK + i > cut), t_low - 1, keys[c])
                _emit(w_ptr, mask_ptr, packed_ptr, key - t_low, c * CHUNK, cols,
                      CHUNK, ZERO, MASK, PACKED, c < CHUNKS - 1)  # fmt: skip
    else:
        for start in range(0, cols, CHUNK):
            key = _keys_again(w_ptr, x_ptr, start + i, cols, floor, ceiling, HAS_X, ABSOLUTE)
            key = tl.where((key < t_high) & (start + i > cut), t_low - 1, key)
            _emit(w_ptr, mask_ptr, packed_ptr, key - t_low, start, cols, CHUNK, ZERO, MASK, PACKED, False)


def config(cols: int, dtype: torch.dtype, cc: int) -> dict[str, Any]:
    """CHUNK, CHUNKS, HELD, num_warps and maxnreg for a width, a dtype and a compute capability.

    A thread loads 8 columns of a chunk at a time, 16 bytes of bf16. Few warps make few cross-warp
    reductions, which are the cost of a count beside the comparisons; but 8 chunks, 64 keys a thread, are
    the most that 128 registers take without a spill, which let 16 warps live on an SM to hide the loads, and
    11 chunks (fp32: 8) the most for 168 registers and 12 warps. The code for sm_100 holds pairs of scores in
    64-bit registers, and needs up to 230.
    """
    if cols > MAX_HELD:
        chunks = triton.cdiv(cols, 4096)
        return {"CHUNK": 4096, "CHUNKS": chunks, "HELD": False, "num_warps": 16}
    warps, most = 1, 8 if dtype == torch.float32 else 11
    while triton.cdiv(cols, 256 * warps) > most:
        warps *= 2
    chunks = max(1, triton.cdiv(cols, 256 * warps))
    shape = {"CHUNK": 256 * warps, "CHUNKS": chunks, "HELD": True, "num_warps": warps}
    registers = 240 if cc >= 100 else 168 if dtype == torch.float32 or chunks > 8 else 128
    # 16 warps leave 128 registers each in any case.
    return shape if warps > 8 else {**shape, "maxnreg": registers}


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
    normal = statistics.NormalDist()
    share = min(max(k / max(cols, 1), 1e-6), 1 - 1e-6)
    tails = 2 if absolute else 1
    z, mean = normal.inv_cdf(1 - share / tails), (2 / torch.pi) ** 0.5
    if x is not None:
        x = x.to(torch.float32).contiguous()
    launch(
        select_rows_kernel,
        (rows,),
        weight,
        nan if x is None else x,
        nan if x is None else x.view(torch.int32).amin().reshape(1),
        outputs["mask"].view(torch.uint8) if "mask" in outputs else nan,
        outputs.get("packed", nan),
        nan,
        cols,
        k,
        z / mean,
        1 / (tails * normal.pdf(z) * mean),
        weight.stride(0),
        SHIFT=shift,
        HAS_X=x is not None,
        ABSOLUTE=absolute,
        ZERO=zero,
        MASK="mask" in outputs,
        PACKED="packed" in outputs,
        **config(cols, weight.dtype, target(weight)),
    )
