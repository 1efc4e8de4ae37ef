# mypy: disable-error-code="no-untyped-def, untyped-decorator"
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
