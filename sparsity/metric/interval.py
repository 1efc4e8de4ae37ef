"""What values a tree can take, from W of any sign and G, X >= 0 (they are a norm and a root mean square)."""

from __future__ import annotations

import math
from functools import lru_cache

from trisparse.sparsity.metric.expression import Node

Interval = tuple[float, float]

_ANY: Interval = (-math.inf, math.inf)
_NONNEGATIVE: Interval = (0.0, math.inf)


def nonnegative(node: Node) -> bool:
    """Whether no value of ``node`` is below 0."""
    return interval(node)[0] >= 0


@lru_cache(maxsize=1 << 14)
def interval(node: Node) -> Interval:
    """Least and greatest value that ``node`` can take, in exact arithmetic; wider where that is not known."""
    if node.is_number:
        return node.number, node.number
    if not node.operands:
        return _ANY if node.data == "W" else _NONNEGATIVE
    low, high = interval(node.left)
    if len(node.operands) == 2:
        return _binary(node, (low, high), interval(node.right))
    least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    greatest = max(abs(low), abs(high))
    match node.data:
        case "skp" | "max" | "min" | "mean":
            return low, high
        case "neg":
            return -high, -low
        case "abs":
            return least, greatest
        case "sqr" | "pow":
            return least * least, greatest * greatest
        case "sqrt":
            return math.sqrt(least), math.sqrt(greatest)
        case "log":
            return math.log(least + 1e-3), math.log(greatest + 1e-3)
        case "exp":
            return math.exp(min(low, 100)), math.exp(min(high, 100))
        case "tanh":
            return math.tanh(low), math.tanh(high)
        case "mms":
            return 0.0, 1.0
        case "norm1" | "norm2":
            return _NONNEGATIVE
        case "rowsum" | "colsum":
            return _of_sign(low, high)
        case _:
            return _ANY


def _binary(node: Node, x: Interval, y: Interval) -> Interval:
    match node.data:
        case "add":
            return x[0] + y[0], x[1] + y[1]
        case "sub":
            return x[0] - y[1], x[1] - y[0]
        case "mul" if node.left == node.right:
            return _NONNEGATIVE
        case "mul":
            corners = [a * b if a and b else 0.0 for a in x for b in y]
            return min(corners), max(corners)
        case "div":
            return _of_sign(*x)
        case "ratio" if x[0] >= 0 and y[0] >= 0:
            return _NONNEGATIVE
        case "maximum":
            return max(x[0], y[0]), max(x[1], y[1])
        case "minimum":
            return min(x[0], y[0]), min(x[1], y[1])
        case _:
            return _ANY


def _of_sign(low: float, high: float) -> Interval:
    return (0.0 if low >= 0 else -math.inf), (0.0 if high <= 0 else math.inf)
