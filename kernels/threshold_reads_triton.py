# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""The two Triton kernels of global selection, and what launches them; kernels/threshold_triton.py tells the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trisparse.kernels.bitmask_triton import merge_bits
from trisparse.kernels.launch import launch
from trisparse.kernels.metric_triton import MetricInputs
from trisparse.kernels.score_triton import load_score, max_or_nan

_CHUNK = 1024  # columns handled at a time, 8 a thread: 16 bytes of a 16-bit weight, a byte of the packed mask
_CHUNKS = 8  # the most chunks of a program: 64 scores a thread are held

_LOW = tl.constexpr(1)  # a program's counts in one int32, 8 bits each: scores at the lower end of the bracket,
_HIGH = tl.constexpr(1 << 8)  # at its upper end,
_ABOVE = tl.constexpr(1 << 16)  # above it,
_INSIDE = tl.constexpr(1 << 24)  # strictly inside


@triton.jit
def _place(cols, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """(row, first column) of this program: CHUNKS * CHUNK columns of a row, in flat order."""
    blocks = tl.cdiv(cols, CHUNK * CHUNKS)
    pid = tl.program_id(0)
    return (pid // blocks).to(tl.int64), (pid % blocks).to(tl.int64) * (CHUNK * CHUNKS)


@triton.jit
def _pieces(t, N: tl.constexpr, PIECES: tl.constexpr):
    """[N] as PIECES tensors [N / PIECES], every PIECES-th element in each: a thread's vector, taken apart."""
    pieces = (t,)
    for level in tl.static_range(PIECES.bit_length() - 1):
        halves = ()
        for p in tl.static_range(len(pieces)):
            halves = halves + tl.split(tl.reshape(pieces[p], [N >> level + 1, 2]))
        pieces = halves
    return pieces


@triton.jit
def bracket_kernel(
    w_ptr,  # [rows, cols], rows stride_w apart
    x_ptr,  # [cols] fp32 if HAS_X
    g_ptr,  # [rows, cols] if SCORE reads G, rows stride_g apart
    stats_ptr,  # the statistics that SCORE reads
    bracket_ptr,  # [2] fp32: low, high
    count_ptr,  # [5, programs] int32: scores == low, == high, > high, strictly between; whether any is a NaN
    start_ptr,  # [programs] int64: where the program's scores begin in `inside`
    inside_ptr,  # [capacity] fp32: the scores strictly between, each program's together
    cursor_ptr,  # [1] int64: how many of `inside` are taken
    capacity,
    first,  # of all tensors' programs, the first of this tensor
    programs,
    rows,
    cols,
    stride_w,
    stride_g,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_X: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    SCORE: tl.constexpr,
):
    """Count against the bracket, and collect what is inside."""
    row, start = _place(cols, CHUNK, CHUNKS)
    w_ptr += row * stride_w + start
    if SCORE is not None:
        x_ptr = ((g_ptr, stride_g, x_ptr, stats_ptr, rows, cols), row, start)
    else:
        x_ptr += start
    left = tl.minimum(cols - start, CHUNK * CHUNKS).to(tl.int32)
    low, high = tl.load(bracket_ptr), tl.load(bracket_ptr + 1)
    top = tl.zeros([CHUNK], tl.float32)
    n = tl.zeros([CHUNK // VECTOR], tl.int32)
    s = ()
    for c in tl.static_range(CHUNKS):
        i = c * CHUNK + tl.arange(0, CHUNK)
        _, s_c = load_score(w_ptr, x_ptr, i, left, HAS_X, ABSOLUTE, EXACT, SCORE)
        top = max_or_nan(top, s_c)
        if not EXACT:
            s_c = tl.where(i < left, s_c, float("nan"))
        s = s + _pieces(s_c, CHUNK, VECTOR)
    for c in tl.static_range(len(s)):
        from_low = tl.where(s[c] > low, _INSIDE, tl.where(s[c] >= low, _LOW, 0))
        n += tl.where(s[c] > high, _ABOVE, tl.where(s[c] >= high, _HIGH, from_low))
    at = tl.cumsum(n >> 24, 0) - (n >> 24)
    even, odd = tl.sum(n & 0x00FF00FF, 0), tl.sum((n >> 8) & 0x00FF00FF, 0)
    inside = odd >> 16
    count_ptr += first + tl.program_id(0)
    tl.store(count_ptr, even & 0xFFFF)
    tl.store(count_ptr + programs, odd & 0xFFFF)
    tl.store(count_ptr + 2 * programs, even >> 16)
    tl.store(count_ptr + 3 * programs, inside)
    tl.store(count_ptr + 4 * programs, tl.max((top != top).to(tl.int32), 0))
    if inside > 0:
        begin = tl.atomic_add(cursor_ptr, inside.to(tl.int64), sem="relaxed")
        tl.store(start_ptr + first + tl.program_id(0), begin)
        if begin + inside <= capacity:
            inside_ptr += begin
            for c in tl.static_range(len(s)):
                within = (s[c] > low) & (s[c] < high)
                tl.store(inside_ptr + at, s[c], mask=within)
                at += within.to(tl.int32)


@triton.jit
def write_kernel(
    w_ptr,  # [rows, cols], rows stride_w apart; zeroed in place if ZERO
    x_ptr,  # [cols] fp32 if HAS_X
    g_ptr,  # [rows, cols] if SCORE reads G, rows stride_g apart
    stats_ptr,  # the statistics that SCORE reads
    threshold_ptr,  # [2] fp32: the k-th score, and the next greater fp32
    cut_ptr,  # [2] int64: the program up to which equal scores are kept, and how many of its own
    out_ptr,  # PACKED: [rows, ceil(cols / 8)] bits; else [rows, cols] bytes 0 and 1
    first,  # of all tensors' programs, the first of this tensor
    rows,
    cols,
    stride_w,
    stride_g,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_X: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    SCORE: tl.constexpr,
    ZERO: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write the mask or its bits: scores above the k-th, and the equal ones up to the cut."""
    row, start = _place(cols, CHUNK, CHUNKS)
    w_ptr += row * stride_w + start
    if SCORE is not None:
        x_ptr = ((g_ptr, stride_g, x_ptr, stats_ptr, rows, cols), row, start)
    else:
        x_ptr += start
    left = tl.minimum(cols - start, CHUNK * CHUNKS).to(tl.int32)
    threshold, beyond = tl.load(threshold_ptr), tl.load(threshold_ptr + 1)
    cut_program, ties = tl.load(cut_ptr), tl.load(cut_ptr + 1)
    program = first + tl.program_id(0)
    cut = tl.where(program < cut_program, CHUNK * CHUNKS, -1)  # the last column whose equal score is kept
    if program == cut_program:
        before = tl.zeros([], tl.int32)
        for at in range(0, left, CHUNK):
            i = at + tl.arange(0, CHUNK)
            _, s = load_score(w_ptr, x_ptr, i, left, HAS_X, ABSOLUTE, False, SCORE)
            equal = ((s == threshold) & (i < left)).to(tl.int32)
            rank = before + tl.cumsum(equal, 0)
            cut = tl.maximum(cut, tl.max(tl.where((equal != 0) & (rank <= ties), i, -1), 0))
            before += tl.sum(equal, 0)
    if PACKED:
        out_ptr += row * tl.cdiv(cols, 8) + start // 8
    else:
        out_ptr += row * cols + start
    for c in tl.static_range(CHUNKS):
        i = c * CHUNK + tl.arange(0, CHUNK)
        w, s = load_score(w_ptr, x_ptr, i, left, HAS_X, ABSOLUTE, EXACT, SCORE)
        keep = s >= tl.where(i <= cut, threshold, beyond)
        if not EXACT:
            keep = keep & (i < left)
        if PACKED:
            byte = merge_bits(keep.to(tl.int32), CHUNK, 1, 8).to(tl.uint8)
            j = c * (CHUNK // 8) + tl.arange(0, CHUNK // 8)
            tl.store(out_ptr + j, byte, mask=None if EXACT else j < tl.cdiv(left, 8))
        else:
            tl.store(out_ptr + i, keep.to(tl.uint8), mask=None if EXACT else i < left)
        if ZERO:
            tl.store(w_ptr + i, tl.where(keep, w, 0.0).to(w.dtype), mask=None if EXACT else i < left)


@dataclass
class Part:
    """One tensor as the kernels take it.

    A contiguous one without x is a single row, so that no program is left with the end of a short row; its
    bits are then those of the rows if these end with a byte.
    """

    weight: Tensor
    x: Tensor | None
    packed: bool
    metric: MetricInputs | None = None

    def __post_init__(self) -> None:
        self.weight = self.weight.detach()
        if self.metric is not None:
            self.x = self.metric.x
        elif self.x is not None:
            self.x = self.x.detach().to(torch.float32).contiguous()
        elif self.weight.is_contiguous() and not (self.packed and self.weight.shape[1] % 8):
            self.weight = self.weight.view(1, -1)
        rows, cols = self.weight.shape
        chunks = triton.cdiv(cols, _CHUNK)
        self.chunks = triton.cdiv(chunks, triton.cdiv(chunks, _CHUNKS)) if chunks else 1
        self.programs = rows * triton.cdiv(cols, _CHUNK * self.chunks)

    def launch(self, kernel: Any, *args: Any, no_x: Tensor, absolute: bool, **constexprs: Any) -> None:
        """Run a kernel over the tensor; ``no_x`` stands in for an x that is not there."""
        rows, cols = self.weight.shape
        metric = self.metric
        launch(
            kernel,
            (self.programs,),
            self.weight,
            no_x if self.x is None else self.x,
            no_x if metric is None else metric.g,
            no_x if metric is None else metric.statistics,
            *args,
            rows,
            cols,
            self.weight.stride(0),
            0 if metric is None else metric.g.stride(0),
            CHUNK=_CHUNK,
            CHUNKS=self.chunks,
            EXACT=cols % (_CHUNK * self.chunks) == 0,
            HAS_X=self.x is not None,
            ABSOLUTE=absolute,
            **({"SCORE": None} if metric is None else metric.constants),
            **constexprs,
        )
