# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
# ruff: noqa: E741, RUF005, SIM108 (the forms that Triton compiles)
"""Triton kernels of N:M selection; the operation, its reference and its formats are in kernels/nm.py.

A group of m is held as m planes: plane j is a tensor of the j-th elements of many groups, so that a thread
has whole groups in its registers and compares plane with plane. Along `in` with m a power of two, planes
come from one vectorised load by splitting; for another m from m strided loads; along `out` they are m rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trisparse.kernels.bitmask_triton import merge_bits
from trisparse.kernels.launch import launch
from trisparse.kernels.score_triton import max_or_nan, widen

SPLIT, STRIDED, ALONG_OUT = 0, 1, 2


@triton.jit
def _split_planes(v, G: tl.constexpr, M: tl.constexpr):
    """[G, M] -> M tensors [G], in order."""
    if M == 1:
        return (tl.reshape(v, [G]),)
    else:
        even, odd = tl.split(tl.reshape(v, [G, M // 2, 2]))
        evens = _split_planes(even, G, M // 2)
        odds = _split_planes(odd, G, M // 2)
        out = (evens[0], odds[0])
        for i in tl.static_range(1, M // 2):
            out = out + (evens[i], odds[i])
        return out


@triton.jit
def _join_planes(p, G: tl.constexpr, M: tl.constexpr):
    """M tensors [G] -> [G, M]; the inverse of `_split_planes`."""
    if M == 1:
        return tl.reshape(p[0], [G, 1])
    else:
        even = _join_planes(p[0::2], G, M // 2)
        odd = _join_planes(p[1::2], G, M // 2)
        return tl.reshape(tl.join(even, odd), [G, M])


@triton.jit
def _planes(w_ptr, start, size, GROUPS: tl.constexpr, M: tl.constexpr, MODE: tl.constexpr, stride):
    """M planes [GROUPS]; `start` is the first group's first element, `size` how many elements there are."""
    if MODE == 0:
        i = tl.arange(0, GROUPS * M)
        v = tl.load(w_ptr + start + i, mask=i < size, other=0.0)
        return _split_planes(tl.reshape(v, [GROUPS, M]), GROUPS, M)
    g = tl.arange(0, GROUPS)
    if MODE == 1:
        out = (tl.load(w_ptr + start + g * M, mask=g * M < size, other=0.0),)
        for j in tl.static_range(1, M):
            out = out + (tl.load(w_ptr + start + g * M + j, mask=g * M < size, other=0.0),)
    else:
        out = (tl.load(w_ptr + start + g, mask=g < size, other=0.0),)
        for j in tl.static_range(1, M):
            out = out + (tl.load(w_ptr + start + j * stride + g, mask=g < size, other=0.0),)
    return out


@triton.jit
def _store_planes(p_ptr, p, start, size, GROUPS: tl.constexpr, M: tl.constexpr, MODE: tl.constexpr, stride):
    """Write M planes where `_planes` would read them."""
    if MODE == 0:
        i = tl.arange(0, GROUPS * M)
        v = tl.reshape(_join_planes(p, GROUPS, M), [GROUPS * M])
        tl.store(p_ptr + start + i, v.to(p_ptr.dtype.element_ty), mask=i < size)
    else:
        g = tl.arange(0, GROUPS)
        for j in tl.static_range(M):
            v = p[j].to(p_ptr.dtype.element_ty)
            if MODE == 1:
                tl.store(p_ptr + start + g * M + j, v, mask=g * M < size)
            else:
                tl.store(p_ptr + start + j * stride + g, v, mask=g < size)


@triton.jit
def _keep_by_rank(s, N: tl.constexpr, M: tl.constexpr):
    """Which of the M planes are kept: those that fewer than N of their group come before."""
    before = (tl.full(s[0].shape, M - 1, tl.int32),)
    for i in tl.static_range(1, M):
        before = before + (tl.full(s[0].shape, M - 1 - i, tl.int32),)
    for i in tl.static_range(M):
        for j in tl.static_range(i + 1, M):
            first = (s[i] >= s[j]).to(tl.int32)  # i comes before j; of equals, too
            before = before[:i] + (before[i] - first,) + before[i + 1 : j] + (before[j] + first,) + before[j + 1 :]
    keep = (before[0] < N,)
    for i in tl.static_range(1, M):
        keep = keep + (before[i] < N,)
    return keep


@triton.jit
def _exchange(p, I: tl.constexpr, J: tl.constexpr):
    """The planes with the lesser of I and J in I and the greater in J."""
    low, high = tl.minimum(p[I], p[J]), tl.maximum(p[I], p[J])
    return p[:I] + (low,) + p[I + 1 : J] + (high,) + p[J + 1 :]


@triton.jit
def _keep_by_sort(s, N: tl.constexpr, M: tl.constexpr, NETWORK: tl.constexpr):
    """The same by a sorting network, whose comparators grow with M log^2 M and not with M^2."""
    p = s
    for e in tl.static_range(len(NETWORK) // 2):
        p = _exchange(p, NETWORK[2 * e], NETWORK[2 * e + 1])
    threshold = p[M - N]
    ties = tl.full(threshold.shape, N, tl.int32)  # how many equals are kept: N less those above
    for i in tl.static_range(M):
        ties -= (s[i] > threshold).to(tl.int32)
    tied = s[0] == threshold
    keep = ((s[0] > threshold) | (tied & (ties > 0)),)
    for i in tl.static_range(1, M):
        ties -= tied.to(tl.int32)
        tied = s[i] == threshold
        keep = keep + ((s[i] > threshold) | (tied & (ties > 0)),)
    return keep


@triton.jit
def _words(keep, M: tl.constexpr):
    """[G] int32 whose bit j says whether the group's j-th element is kept."""
    word = keep[0].to(tl.int32)
    for j in tl.static_range(1, M):
        word |= keep[j].to(tl.int32) << j
    return word


@triton.jit
def select_nm_kernel(
    w_ptr,  # [rows, cols], rows stride_w apart; zeroed in place if ZERO
    x_ptr,  # [cols] fp32 if HAS_X
    mask_ptr,  # [rows, cols] bytes 0 and 1 if MASK
    packed_ptr,  # [rows, ceil(cols / 8)] bits if PACKED
    values_ptr,  # [rows, cols / 2] if COMPRESS (2:4)
    meta_ptr,  # [rows, cols / 16] int16 if COMPRESS
    nan_ptr,  # [1] int32, set when a score is a NaN
    rows,
    cols,
    stride_w,
    N: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    MODE: tl.constexpr,
    NETWORK: tl.constexpr,
    HAS_X: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ZERO: tl.constexpr,
    MASK: tl.constexpr,
    PACKED: tl.constexpr,
    COMPRESS: tl.constexpr,
):
    """ROWS rows (ALONG_OUT: row groups) of GROUPS groups; the program's x serves all of them."""
    WIDTH: tl.constexpr = GROUPS if MODE == 2 else GROUPS * M
    BITS: tl.constexpr = M if M > 8 else 8  # of a packed word
    kind: tl.constexpr = tl.uint8 if BITS == 8 else (tl.uint16 if BITS == 16 else tl.uint32)
    blocks = tl.cdiv(cols, WIDTH)
    pid = tl.program_id(0)
    col = (pid % blocks) * WIDTH
    size = cols - col
    if HAS_X:
        if MODE == 2:
            g = tl.arange(0, GROUPS)
            x = (tl.load(x_ptr + col + g, mask=g < size, other=0.0),)
        else:
            x = _planes(x_ptr, col, size, GROUPS, M, MODE, 0)
    bad = tl.zeros([GROUPS], tl.int32)
    first = (pid // blocks) * ROWS
    for r in tl.static_range(ROWS):
        row = (first + r).to(tl.int64)
        if MODE == 2:
            row = row * M
        left = tl.where(row < rows, size, 0)
        w = _planes(w_ptr, row * stride_w + col, left, GROUPS, M, MODE, stride_w)
        s = ()
        for j in tl.static_range(M):
            v = widen(w[j])
            if ABSOLUTE:
                v = tl.abs(v)
            if HAS_X:
                v = v * x[0 if MODE == 2 else j]
            s = s + (v,)
        most = s[0]
        for j in tl.static_range(1, M):
            most = max_or_nan(most, s[j])
        bad |= (most != most).to(tl.int32)
        if M <= 8:
            keep = _keep_by_rank(s, N, M)
        else:
            keep = _keep_by_sort(s, N, M, NETWORK)
        if ZERO:
            kept = ()
            for j in tl.static_range(M):
                kept = kept + (tl.where(keep[j], w[j], 0.0).to(w[j].dtype),)
            _store_planes(w_ptr, kept, row * stride_w + col, left, GROUPS, M, MODE, stride_w)
        if MASK:
            _store_planes(mask_ptr, keep, row * cols + col, left, GROUPS, M, MODE, cols)
        if PACKED:
            row_bytes = tl.cdiv(cols, 8)
            if MODE == 2:
                b = tl.arange(0, GROUPS // 8)
                for j in tl.static_range(M):
                    byte = merge_bits((keep[j] & (tl.arange(0, GROUPS) < left)).to(tl.int32), GROUPS, 1, 8)
                    at = packed_ptr + (row + j) * row_bytes + col // 8 + b
                    inside = tl.where(row < rows, row_bytes - col // 8, 0)
                    tl.store(at, byte.to(tl.uint8), mask=b < inside)
            else:
                # A group beyond the last has zero weights, of which N are "kept": clear its bits.
                g = tl.arange(0, GROUPS)
                word = merge_bits(tl.where(g * M < left, _words(keep, M), 0), GROUPS, M, 8)
                b = tl.arange(0, GROUPS * M // BITS)
                # Rows begin at multiples of the word: cols is a multiple of M.
                at = (packed_ptr + row * row_bytes + col // 8).to(tl.pointer_type(kind))
                tl.store(at + b, word.to(kind), mask=b * BITS < left)
        if COMPRESS:
            v0 = tl.where(keep[0], w[0], tl.where(keep[1], w[1], w[2]))
            v1 = tl.where(keep[3], w[3], tl.where(keep[2], w[2], w[1]))
            i0 = tl.where(keep[0], 0, tl.where(keep[1], 1, 2))
            i1 = tl.where(keep[3], 3, tl.where(keep[2], 2, 1))
            v = tl.arange(0, GROUPS * 2)
            values = tl.reshape(tl.join(v0, v1), [GROUPS * 2])
            tl.store(values_ptr + row * (cols // 2) + col // 2 + v, values, mask=v * 2 < left)
            b = tl.arange(0, GROUPS // 4)
            word = merge_bits(i0 | (i1 << 2), GROUPS, 4, 16)
            tl.store(meta_ptr + row * (cols // 16) + col // 16 + b, word.to(tl.int16), mask=b * 16 < left)
    if tl.max(bad, 0) != 0:
        tl.store(nan_ptr, 1)


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
    along_out: bool,
    zero: bool,
    outputs: dict[str, Tensor],
    nan: Tensor,
) -> None:
    """Launch the kernel on checked arguments; ``outputs`` may hold mask, packed, values and meta."""
    rows, cols = weight.shape
    power = m & (m - 1) == 0
    mode = ALONG_OUT if along_out else SPLIT if power else STRIDED
    # 1024 columns a program: 8 a thread, one 16-byte load of bf16, and little padding at widths such as
    # 11008. Four rows a program share the loads of x.
    width = min(1024, triton.next_power_of_2(max(cols, 64)))
    groups = width if along_out else max(8, width // triton.next_power_of_2(m))
    programs = triton.cdiv(cols, groups if along_out else groups * m)
    row_groups = rows // m if along_out else rows
    share = 1 if m > 8 or along_out else 4
    dummy = nan
    options: dict[str, Any] = {
        "N": n,
        "M": m,
        "GROUPS": groups,
        "ROWS": share,
        "MODE": mode,
        "NETWORK": sorting_network(m) if m > 8 else (),
        "HAS_X": x is not None,
        "ABSOLUTE": absolute,
        "ZERO": zero,
        "MASK": "mask" in outputs,
        "PACKED": "packed" in outputs,
        "COMPRESS": "values" in outputs,
    }
    launch(
        select_nm_kernel,
        (programs * triton.cdiv(row_groups, share),),
        weight,
        dummy if x is None else x.to(torch.float32),
        outputs["mask"].view(torch.uint8) if "mask" in outputs else dummy,
        outputs.get("packed", dummy),
        outputs.get("values", dummy),
        outputs.get("meta", dummy),
        nan,
        rows,
        cols,
        weight.stride(0),
        num_warps=min(4, max(1, groups // 32)),  # a thread without a group of its own would repeat another's
        **options,
    )
