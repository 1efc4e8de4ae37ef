"""Numbers as the report writes them."""

from __future__ import annotations

import math
from collections.abc import Callable


def number(value: float) -> str:
    """Four digits: 0.01235, 12.35, 12,345."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-4:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def ratio(value: float) -> str:
    """Three digits and a times sign: 0.213×, 1.25×, 12.3×."""
    return f"{value:.3g}×" if abs(value) < 1000 else f"{value:,.0f}×"


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{number(value / 1e-9)} ns"


def size(value: float) -> str:
    """Bytes in kB, MB or GB, powers of 1000."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if value >= 10**power:
            return f"{number(float(f'{value / 10**power:.3g}'))} {unit}"
    return f"{value:.0f} B"


def percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value).replace("-", "−")


def or_none(value: float | None, text: Callable[[float], str]) -> str:
    """``text(value)``, or a dash where there is no value."""
    return "–" if value is None else text(value)
