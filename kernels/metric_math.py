# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The arithmetic of generated score functions: fp32, elementwise, after torch's own operations."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _power_of_two(n):
    """2^n for an int32 n in -126..127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    """exp(min(x, 100)) within about 3 units in the last place; tl.exp loses one more for each doubling of x.

    x = n ln 2 + r with |r| <= ln 2 / 2, in two steps so that r keeps its digits: the first constant has 16 bits, and
    its product with n is exact. 2^n is multiplied in two halves, so that subnormals and Inf come out.
    """
    x = minimum(x, 100.0)
    x = maximum(x, -110.0)  # exp is 0 there; -Inf would give Inf - Inf
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, -0.693145751953125, x)
    r = tl.fma(n, -1.4286068203094173e-06, r)
    whole = n.to(tl.int32)
    half = whole >> 1
    return tl.exp2(r * 1.4426950408889634) * _power_of_two(half) * _power_of_two(whole - half)


@triton.jit
def log(x):
    """log(|x| + 0.001); the device's logf, within 1 unit in the last place."""
    return tl.log(tl.abs(x) + 1e-3)


@triton.jit
def tanh(x):
    """tanh within about 2 units in the last place.

    Near zero x + x³ P(x²), P fitted by weighted least squares to (tanh(x) / x - 1) / x² on |x| <= 0.625 to a relative
    error of 5e-9 in tanh; beyond, 1 - 2 / (exp(2|x|) + 1), which does not cancel there.
    """
    u = x * x
    p = tl.fma(u, -0.005704986397176981, 0.02063908614218235)
    p = tl.fma(p, u, -0.05373971536755562)
    p = tl.fma(p, u, 0.13331441581249237)
    p = tl.fma(p, u, -0.3333328068256378)
    near = tl.fma(x * u, p, x)
    far = 1.0 - tl.div_rn(2.0, exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) <= 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def maximum(a, b):
    """The greater; a NaN when either is one."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    """The lesser; a NaN when either is one."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def over(x, y):
    """x / y, correctly rounded; 0 where y is 0."""
    return tl.where(y == 0, 0.0, tl.div_rn(x, y))


@triton.jit
def over_norm(x, norm):
    """x / norm, correctly rounded; 0 where the norm is 0, and a NaN where it overflowed."""
    return tl.where(norm == 0, 0.0, tl.div_rn(x, tl.where(norm == float("inf"), float("nan"), norm)))


@triton.jit
def min_max_scaled(x, low, high):
    """(x - low) / (high - low), correctly rounded; 0 where these are equal, and a NaN where they are infinite."""
    return tl.where((low == high) & (tl.abs(high) != float("inf")), 0.0, tl.div_rn(x - low, high - low))


@triton.jit
def standardised(x, mean, deviation, low, high):
    """(x - mean) / deviation, correctly rounded; 0 of a constant, whose deviation rounding may leave above 0."""
    constant = (low == high) & (tl.abs(high) != float("inf"))
    return tl.where((deviation == 0) | constant, 0.0, tl.div_rn(x - mean, deviation))
