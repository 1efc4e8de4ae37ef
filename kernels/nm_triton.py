# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005, SIM108 (the forms that Triton compiles)
"""Triton kernels of N:M selection; the operation, its reference and its formats are in kernels/nm.py.

A group of m is held as m planes: plane j is a tensor of the j-th elements of many groups, so that a thread
has whole groups in its registers and compares plane with plane. Along `in` with m a power of two, planes
come from vectorised loads by splitting, a unit of max(m, 8) columns a thread, so that a unit has whole bytes
of the packed mask; for another m from m strided loads; along `out` they are m rows. There, a unit is a group.

Scores are compared by their bits, which order as the scores do while none is negative: the N-th greatest of a
group comes from two sorted halves, and the sign of a difference is a bit of the group's word. When a warp has
a negative score, a NaN or a tie at the N-th, it takes `_keep_exactly`, which knows all these. With random
weights times X that is rare; without X, ties are common, and `_keep_exactly` comes first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trisparse.kernels.bitmask_triton import merge_bits
from trisparse.kernels.launch import launch
from trisparse.kernels.metric_triton import MetricInputs
from trisparse.kernels.score_triton import bits_set, widen

SPLIT, STRIDED, ALONG_OUT = 0, 1, 2
ROWS = 4  # of a program: they share the loads of x


@triton.jit
def split_planes(v, G: tl.constexpr, M: tl.constexpr):
    """[G, M] -> M tensors [G], in order."""
    if M == 1:
        return (tl.reshape(v, [G]),)
    else:
        even, odd = tl.split(tl.reshape(v, [G, M // 2, 2]))
        evens = split_planes(even, G, M // 2)
        odds = split_planes(odd, G, M // 2)
        out = (evens[0], odds[0])
        for i in tl.static_range(1, M // 2):
            out = out + (evens[i], odds[i])
        return out


@triton.jit
def join_planes(p, G: tl.constexpr, M: tl.constexpr):
    """M tensors [G] -> [G, M]; the inverse of `split_planes`."""
    if M == 1:
        return tl.reshape(p[0], [G, 1])
    else:
        even = join_planes(p[0::2], G, M // 2)
        odd = join_planes(p[1::2], G, M // 2)
        return tl.reshape(tl.join(even, odd), [G, M])


@triton.jit
def _planes(w_ptr, start, size, UNITS: tl.constexpr, U: tl.constexpr, MODE: tl.constexpr, stride):
    """U planes [UNITS]; `start` is the first unit's first element, `size` how many elements there are."""
    h = tl.arange(0, UNITS)
    out = ()
    if MODE == 0:
        C: tl.constexpr = min(U, 128 // w_ptr.dtype.element_ty.primitive_bitwidth)  # 16 bytes of a thread
        for c in tl.static_range(0, U, C):
            i = h[:, None] * U + c + tl.arange(0, C)[None, :]
            out = out + split_planes(tl.load(w_ptr + start + i, mask=i < size, other=0.0), UNITS, C)
    elif MODE == 1:
        for j in tl.static_range(U):
            out = out + (tl.load(w_ptr + start + h * U + j, mask=h * U < size, other=0.0),)
    else:
        for j in tl.static_range(U):
            out = out + (tl.load(w_ptr + start + j * stride + h, mask=h < size, other=0.0),)
    return out


@triton.jit
def _score_planes(
    w_ptr, m, row, col, size, UNITS: tl.constexpr, U: tl.constexpr, MODE: tl.constexpr, stride, SCORE: tl.constexpr
):
    """A metric's scores of the weights that `_planes` reads from (row, col) on; 0 where there are none."""
    h = tl.arange(0, UNITS)
    w_ptr += row * stride + col
    out = ()
    if MODE == 0:
        C: tl.constexpr = min(U, 128 // w_ptr.dtype.element_ty.primitive_bitwidth)
        for c in tl.static_range(0, U, C):
            i = h[:, None] * U + c + tl.arange(0, C)[None, :]
            w = widen(tl.load(w_ptr + i, mask=i < size, other=0.0))
            s = tl.where(i < size, SCORE(w, m, row, col + i, i < size), 0.0)
            out = out + split_planes(s, UNITS, C)
    else:
        for j in tl.static_range(U):
            i = h * U + j if MODE == 1 else h
            at = w_ptr + i if MODE == 1 else w_ptr + j * stride + i
            w = widen(tl.load(at, mask=i < size, other=0.0))
            out = out + (tl.where(i < size, SCORE(w, m, row if MODE == 1 else row + j, col + i, i < size), 0.0),)
    return out


@triton.jit
def _store_planes(p_ptr, p, start, size, UNITS: tl.constexpr, U: tl.constexpr, MODE: tl.constexpr, stride):
    """Write U planes where `_planes` would read them."""
    kind: tl.constexpr = p_ptr.dtype.element_ty
    h = tl.arange(0, UNITS)
    if MODE == 0:
        C: tl.constexpr = min(U, 128 // kind.primitive_bitwidth)
        for c in tl.static_range(0, U, C):
            i = h[:, None] * U + c + tl.arange(0, C)[None, :]
            tl.store(p_ptr + start + i, join_planes(p[c : c + C], UNITS, C).to(kind), mask=i < size)
    else:
        for j in tl.static_range(U):
            if MODE == 1:
                tl.store(p_ptr + start + h * U + j, p[j].to(kind), mask=h * U < size)
            else:
                tl.store(p_ptr + start + j * stride + h, p[j].to(kind), mask=h < size)


@triton.jit
def _nth_greatest(p, N: tl.constexpr, M: tl.constexpr, NETWORK: tl.constexpr):
    """(The N-th greatest, the greatest) of M planes; NETWORK sorts either half of them."""
    for e in tl.static_range(0, len(NETWORK), 2):
        low = tl.minimum(p[NETWORK[e]], p[NETWORK[e + 1]])
        high = tl.maximum(p[NETWORK[e]], p[NETWORK[e + 1]])
        p = p[: NETWORK[e]] + (low,) + p[NETWORK[e] + 1 : NETWORK[e + 1]] + (high,) + p[NETWORK[e + 1] + 1 :]
    # The N greatest are the i greatest of the first half and the N - i greatest of the second, for one i: the
    # one whose lesser end is the greatest. The compiler removes the comparators that nothing here reads.
    A: tl.constexpr = M // 2
    FIRST: tl.constexpr = N - (M - A) if N > M - A else 0
    if FIRST == 0:
        nth = p[M - N]
    else:
        nth = tl.minimum(p[A - FIRST], p[A])
    for i in tl.static_range(FIRST + 1, (N if N < A else A) + 1):
        if i == N:
            nth = tl.maximum(nth, p[A - N])
        else:
            nth = tl.maximum(nth, tl.minimum(p[A - i], p[M - (N - i)]))
    return nth, tl.maximum(p[A - 1], p[M - 1])


@triton.jit
def _at_least(key, least, FIRST: tl.constexpr, M: tl.constexpr, SIGNED: tl.constexpr):
    """uint32 words whose bit j says whether plane FIRST + j of M is `least` or more."""
    word = tl.zeros(least.shape, tl.uint32)
    for i in tl.static_range(M):
        if SIGNED:
            bit = (key[FIRST + M - 1 - i] >= least).to(tl.uint32)
        else:
            # Keys below 2^31 differ by less than 2^31, so that the sign says which is greater; a shift of
            # word and sign as one is a single instruction, and a comparison's bit would take three.
            bit = (least - 1 - key[FIRST + M - 1 - i]) >> 31
        word = (word << 1) | bit
    return word


@triton.jit
def _keep_exactly(bits, N: tl.constexpr, M: tl.constexpr, NETWORK: tl.constexpr, SIGNED: tl.constexpr, nan_ptr):
    """uint32 words of the N planes kept of M, from the bits of any scores; ties go to the lower plane."""
    key = ()
    most = bits[0] & 0x7FFFFFFF
    for j in tl.static_range(M):
        magnitude = bits[j] & 0x7FFFFFFF
        most = tl.maximum(most, magnitude)
        if SIGNED:
            key = key + (tl.where(bits[j] == magnitude, 0x80000000 + magnitude, 0x80000000 - magnitude),)
        else:
            key = key + (magnitude,)
    if tl.max((most > 0x7F800000).to(tl.int32), 0) != 0:  # beyond Inf
        tl.store(nan_ptr, 1)
    nth, _ = _nth_greatest(key, N, M, NETWORK)
    word = _at_least(key, nth + 1, 0, M, SIGNED)
    ties = _at_least(key, nth, 0, M, SIGNED) ^ word  # whose bits are all among them
    need = N - bits_set(word).to(tl.int32)
    for _ in range(N):
        lowest = tl.where(need > 0, ties & (0 - ties), 0)
        word |= lowest
        ties ^= lowest
        need -= 1
    return word


@triton.jit
def select_nm_kernel(
    w_ptr,  # [rows, cols], rows stride_w apart; zeroed in place if ZERO
    x_ptr,  # [cols] fp32 if HAS_X
    g_ptr,  # [rows, cols] if SCORE reads G, rows stride_g apart
    stats_ptr,  # the statistics that SCORE reads
    mask_ptr,  # [rows, cols] bytes 0 and 1 if MASK
    packed_ptr,  # [rows, ceil(cols / 8)] bits if PACKED
    values_ptr,  # [rows, cols / 2] if COMPRESS (2:4)
    meta_ptr,  # [rows, cols / 8] bytes if COMPRESS
    nan_ptr,  # [1] int32, set when a score is a NaN
    rows,  # ALONG_OUT: of groups
    cols,
    stride_w,
    stride_g,
    N: tl.constexpr,
    M: tl.constexpr,
    U: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    MODE: tl.constexpr,
    NETWORK: tl.constexpr,
    HAS_X: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    SCORE: tl.constexpr,
    NEGATIVE: tl.constexpr,  # whether scores are expected below 0
    ZERO: tl.constexpr,
    MASK: tl.constexpr,
    PACKED: tl.constexpr,
    COMPRESS: tl.constexpr,
):
    """ROWS rows (ALONG_OUT: row groups) of UNITS units; the program's x serves all of them."""
    STEP: tl.constexpr = 1 if MODE == 2 else U  # columns of a unit
    SIGNED: tl.constexpr = not ABSOLUTE or HAS_X
    blocks = tl.cdiv(cols, UNITS * STEP)
    pid = tl.program_id(0)
    col = (pid % blocks) * (UNITS * STEP)
    size = cols - col
    h = tl.arange(0, UNITS)
    if HAS_X:
        if MODE == 2:
            x = (tl.load(x_ptr + col + h, mask=h < size, other=0.0),)
        else:
            x = _planes(x_ptr, col, size, UNITS, U, MODE, 0)
    first = (pid // blocks) * ROWS
    for r in range(0, tl.minimum(ROWS, rows - first)):
        row = first.to(tl.int64) + r
        if MODE == 2:
            row = row * M
        w = _planes(w_ptr, row * stride_w + col, size, UNITS, U, MODE, stride_w)
        if SCORE is not None:
            m = (g_ptr, stride_g, x_ptr, stats_ptr, rows * M if MODE == 2 else rows, cols)
            s = _score_planes(w_ptr, m, row, col, size, UNITS, U, MODE, stride_w, SCORE)
        bits = ()
        for j in tl.static_range(U):
            if SCORE is None:
                v = widen(w[j])
            else:
                v = s[j]
            if ABSOLUTE:
                v = tl.abs(v)
            if HAS_X:
                v = v * x[0 if MODE == 2 else j]
            bits = bits + (v.to(tl.uint32, bitcast=True),)
        word = tl.zeros([UNITS], tl.uint32)
        if not NEGATIVE:
            # The common case: no score is negative or a NaN, and none equals the N-th of its group. Then the
            # bits order as the scores do, and the word of those at least the N-th has N bits a group.
            most = bits[0]
            for k in tl.static_range(U // M):
                nth, top = _nth_greatest(bits[k * M : k * M + M], N, M, NETWORK)
                most = tl.maximum(most, top)
                word |= _at_least(bits, nth, k * M, M, False) << (k * M)
            odd = tl.where(most > 0x7F800000, 1, bits_set(word) - N * (U // M))
            if tl.max(tl.where(h * STEP < size, odd, 0), 0) != 0:
                word = tl.zeros([UNITS], tl.uint32)
                for k in tl.static_range(U // M):
                    part = _keep_exactly(bits[k * M : k * M + M], N, M, NETWORK, True, nan_ptr)
                    word |= part << (k * M)
        else:
            for k in tl.static_range(U // M):
                part = _keep_exactly(bits[k * M : k * M + M], N, M, NETWORK, SIGNED, nan_ptr)
                word |= part << (k * M)
        keep = ()
        for j in tl.static_range(U):
            keep = keep + (((word >> j) & 1) != 0,)
        if ZERO:
            kept = ()
            for j in tl.static_range(U):
                kept = kept + (tl.where(keep[j], w[j], 0.0).to(w[j].dtype),)
            _store_planes(w_ptr, kept, row * stride_w + col, size, UNITS, U, MODE, stride_w)
        if MASK:
            _store_planes(mask_ptr, keep, row * cols + col, size, UNITS, U, MODE, cols)
        if PACKED:
            row_bytes = tl.cdiv(cols, 8)
            if MODE == 2:
                b = tl.arange(0, UNITS // 8)
                for j in tl.static_range(M):
                    byte = merge_bits((keep[j] & (h < size)).to(tl.int32), UNITS, 1, 8)
                    at = packed_ptr + (row + j) * row_bytes + col // 8 + b
                    tl.store(at, byte.to(tl.uint8), mask=b < row_bytes - col // 8)
            else:
                kind: tl.constexpr = tl.uint8 if U == 8 else (tl.uint16 if U == 16 else tl.uint32)
                for k in tl.static_range(1, U // M):  # a group beyond the last has weights 0, of which N are kept
                    word = tl.where(h * U + k * M < size, word, word & ((1 << (k * M)) - 1))
                # Rows begin at multiples of the word: cols is a multiple of M.
                at = (packed_ptr + row * row_bytes + col // 8).to(tl.pointer_type(kind))
                tl.store(at + h, word.to(kind), mask=h * U < size)
        if COMPRESS:
            values = ()
            meta = tl.zeros([UNITS], tl.int32)
            for k in tl.static_range(0, U, 4):
                v0 = tl.where(keep[k], w[k], tl.where(keep[k + 1], w[k + 1], w[k + 2]))
                v1 = tl.where(keep[k + 3], w[k + 3], tl.where(keep[k + 2], w[k + 2], w[k + 1]))
                i0 = tl.where(keep[k], 0, tl.where(keep[k + 1], 1, 2))
                i1 = tl.where(keep[k + 3], 3, tl.where(keep[k + 2], 2, 1))
                values = values + (v0, v1)
                meta |= (i0 | (i1 << 2)) << k
            _store_planes(values_ptr, values, row * (cols // 2) + col // 2, size // 2, UNITS, U // 2, 0, 0)
            tl.store(meta_ptr + row * (cols // 8) + col // 8 + h, meta.to(tl.uint8), mask=h * U < size)


def sorting_network(size: int) -> tuple[int, ...]:
    """Batcher's merge exchange (Knuth, The Art of Computer Programming 3, 5.2.2 M): pairs i, j in one tuple."""
    pairs: list[int] = []
    top = 1 << max(0, (size - 1).bit_length() - 1)
    p = top
    while p:
        q, r, d = top, 0, p
        while d:
            for i in range(size - d):
                if i & p == r:
                    pairs += [i, i + d]
            d, q, r = q - p, q // 2, p
        p //= 2
    return tuple(pairs)


def select_nm_triton(
    weight: Tensor,
    n: int,
    m: int,
    *,
    x: Tensor | None,
    absolute: bool,
    metric: MetricInputs | None = None,
    along_out: bool,
    zero: bool,
    outputs: dict[str, Tensor],
    nan: Tensor,
) -> None:
    """Launch the kernel on checked arguments; ``outputs`` may hold mask, packed, values and meta."""
    rows, cols = weight.shape
    power = m & (m - 1) == 0
    mode = ALONG_OUT if along_out else SPLIT if power else STRIDED
    unit = max(m, 8) if mode == SPLIT else m
    # One warp a program, so that no barrier is needed to learn whether any of its groups is uncommon. A thread
    # has one unit or two along `in`, and 32 elements along `out`, 8 neighbours at the most: 16 bytes of bf16.
    units = min(256, 1024 // triton.next_power_of_2(m)) if along_out else 64 if unit <= 8 else 32
    programs = triton.cdiv(cols, units if along_out else units * unit)
    row_groups = rows // m if along_out else rows
    half = m // 2
    dummy = nan
    options: dict[str, Any] = {
        "N": n,
        "M": m,
        "U": unit,
        "UNITS": units,
        "ROWS": ROWS,
        "MODE": mode,
        "NETWORK": sorting_network(half) + tuple(half + i for i in sorting_network(m - half)),
        "HAS_X": x is not None,
        "ABSOLUTE": absolute,
        # Of |W| alone many are equal in 16 bits, and the common case would be none.
        "NEGATIVE": not absolute or x is None,
        "SCORE": None,
        "ZERO": zero,
        "MASK": "mask" in outputs,
        "PACKED": "packed" in outputs,
        "COMPRESS": "values" in outputs,
    }
    if metric is not None:
        options |= {**metric.constants, "HAS_X": False, "ABSOLUTE": False, "NEGATIVE": metric.negative}
        x = metric.x
    launch(
        select_nm_kernel,
        (programs * triton.cdiv(row_groups, ROWS),),
        weight,
        dummy if x is None else x.to(torch.float32),
        dummy if metric is None else metric.g,
        dummy if metric is None else metric.statistics,
        outputs["mask"].view(torch.uint8) if "mask" in outputs else dummy,
        outputs.get("packed", dummy),
        outputs.get("values", dummy),
        outputs["meta"].view(torch.uint8) if "meta" in outputs else dummy,
        nan,
        row_groups,
        cols,
        weight.stride(0),
        0 if metric is None else metric.g.stride(0),
        num_warps=1,
        **options,
    )
