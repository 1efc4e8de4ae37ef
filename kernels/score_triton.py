# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: SIM108 (the forms that Triton compiles)
"""What the Triton kernels of selection share; the score is defined in kernels/score.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(w):
    """fp16, bf16 or fp32 -> fp32, exactly. bf16 by its bits: the interpreter's conversion loses subnormals."""
    if w.dtype == tl.bfloat16:
        return (w.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return w.to(tl.float32)


@triton.jit
def max_or_nan(a, b):
    """The greater; a NaN when either is one."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_score(
    w_ptr, source, i, left, HAS_X: tl.constexpr, ABSOLUTE: tl.constexpr, EXACT: tl.constexpr, SCORE: tl.constexpr
):
    """(weights, scores) of the columns i, of which those below `left` exist, all of them if EXACT; the rest score 0.

    `source` is the pointer to x; with SCORE, a metric's function (kernels/metric.py), it is (m, the row, the column of
    the first i).
    """
    if EXACT:
        w = tl.load(w_ptr + i)
    else:
        w = tl.load(w_ptr + i, mask=i < left, other=0.0)
    s = widen(w)
    if SCORE is not None:
        there = tl.full(w.shape, True, tl.int1) if EXACT else i < left
        s = SCORE(s, source[0], source[1], source[2] + i, there)
        if not EXACT:
            s = tl.where(there, s, 0.0)
    else:
        if ABSOLUTE:
            s = tl.abs(s)
        if HAS_X:
            if EXACT:
                s = s * tl.load(source + i)
            else:
                s = s * tl.load(source + i, mask=i < left, other=0.0)
    return w, s


@triton.jit
def key_of(s):
    """fp32 -> int32 in the same order: the bits of |s| with the sign of s; those of 0 and -0 are 0."""
    bits = s.to(tl.int32, bitcast=True)
    return ((bits & 0x7FFFFFFF) ^ (bits >> 31)) - (bits >> 31)


@triton.jit
def bits_set(word):
    """How many bits of a uint32 are set, in the form that LLVM turns into one popc."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24
