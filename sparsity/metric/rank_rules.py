"""Rewritings that keep the mask of each row but not every bit of the score.

``EQUAL_RULES`` are equations of real numbers and hold anywhere in a tree; ``ROOT_RULES`` hold at its root, where only
the order within a row counts (so also for n:m, but not for budgets over a layer or the model, nor for whole rows).
Rounding makes ties: of two scores closer than its step, an outer function such as exp or mms gives equal values, and
the lower index wins. A rule never swaps two scores; it can only tell apart again what the outer function had merged.
Functions that merge far apart scores are left: exp beyond 88 is infinite and below -103 zero, tanh beyond 9 is 1, so
these two go only where the operand provably stays within 8.

A row-constant factor such as norm2(W), or the divisor of div, is taken to be positive: it is zero only for an all-zero
matrix, whose weights no mask can hurt, or gradients, which carry no information then.
"""

from __future__ import annotations

from collections.abc import Callable

from trisparse.sparsity.metric.exact_rules import Rule, order_key
from trisparse.sparsity.metric.expression import Node, number
from trisparse.sparsity.metric.interval import interval, nonnegative

_UNSATURATED = 8.0


def square_of_root(node: Node) -> Node | None:
    """sqr(sqrt(x)) = sqrt(sqr(x)) = |x|, since sqrt takes the absolute value."""
    pair = {"sqr": "sqrt", "sqrt": "sqr"}.get(node.data)
    return Node("abs", node.left.operands) if pair and node.left.data == pair else None


def exp_of_log(node: Node) -> Node | None:
    """exp(log(x)) = |x| + 0.001, by the guard of log."""
    if node.data != "exp" or node.left.data != "log":
        return None
    return Node("add", (number(0.001), Node("abs", node.left.operands)))


def add_and_subtract(node: Node) -> Node | None:
    """(x + y) - y = x, (x - y) + y = x, x - (x - y) = y, (x - y) - x = -y."""
    if node.data == "sub":
        left, right = node.operands
        if left.data == "add" and right in left.operands:
            return left.operands[left.left == right]
        if right.data == "sub" and right.left == left:
            return right.right
        if left.data == "sub" and left.left == right:
            return Node("neg", (left.right,))
    if node.data == "add":
        for one, other in (node.operands, node.operands[::-1]):
            if one.data == "sub" and one.right == other:
                return one.left
    return None


def odd_function(node: Node) -> Node | None:
    """tanh(-x) = -tanh(x), |tanh(x)| = tanh(|x|), zsn(-x) = -zsn(x)."""
    if node.data in ("tanh", "zsn") and node.left.data == "neg":
        return Node("neg", (Node(node.data, node.left.operands),))
    if node.data == "abs" and node.left.data == "tanh":
        return Node("tanh", (Node("abs", node.left.operands),))
    return None


def scaling_of_affine(node: Node) -> Node | None:
    """mms and zsn of a * x + b are those of x, for a > 0 and b the same in the whole matrix."""
    if node.data not in ("mms", "zsn"):
        return None
    bare = _without_affine(node.left, lambda other: not any(other.shape))
    return Node(node.data, (bare,)) if bare != node.left and bare.shape == node.left.shape else None


def chain(node: Node) -> Node | None:
    """(x + y) + z = x + (y + z), and so for products: one order of the operands for all ways to write it."""
    if node.data not in ("add", "mul"):
        return None
    members = _members(node, node.data)
    if len(members) == 2:
        return None
    ordered = sorted(members, key=order_key)
    built = ordered[0]
    for member in ordered[1:]:
        built = Node(node.data, (built, member))
    return built if built != node else None


def increasing(node: Node) -> Node | None:
    """A strictly increasing function keeps the order: exp, tanh (unsaturated), mms, zsn."""
    if node.data in ("mms", "zsn"):  # a constant matrix stays constant: all ties, before and after
        return node.left
    if node.data in ("exp", "tanh") and max(map(abs, interval(node.left))) <= _UNSATURATED:
        return node.left
    return None


def increasing_in_magnitude(node: Node) -> Node | None:
    """sqr, sqrt and log increase with |x|."""
    return Node("abs", node.operands) if node.data in ("sqr", "sqrt", "log") else None


def product_of_powers(node: Node) -> Node | None:
    """sqr(x) * sqr(y) = sqr(x * y), which orders as |x * y|; so does sqrt."""
    if node.data not in ("mul", "ratio"):
        return None
    left, right = node.operands
    if left.data != right.data or left.data not in ("sqr", "sqrt"):
        return None
    return Node("abs", (Node(node.data, (left.left, right.left)),))


def affine(node: Node) -> Node | None:
    """Terms and positive factors that are the same in the whole row do not change its order."""
    bare = _without_affine(node, lambda other: not other.shape[1])
    return bare if bare != node else None


def _without_affine(node: Node, constant: Callable[[Node], bool]) -> Node:
    """``node`` without constant terms and positive constant factors, as far as they come off its root."""
    if node.data == "add":
        for one, other in (node.operands, node.operands[::-1]):
            if constant(one) and other.shape == node.shape:
                return _without_affine(other, constant)
    if node.data == "sub":
        left, right = node.operands
        if constant(right) and left.shape == node.shape:
            return _without_affine(left, constant)
        if constant(left) and right.shape == node.shape:
            return Node("neg", (_without_affine(right, constant),))
    if node.data == "neg":
        return Node("neg", (_without_affine(node.left, constant),))
    return _without_factor(node, constant)


def _without_factor(node: Node, constant: Callable[[Node], bool]) -> Node:
    if node.data == "mul":
        for one, other in (node.operands, node.operands[::-1]):
            if constant(one) and other.shape == node.shape:
                if _positive(one):
                    return _without_factor(other, constant)
                if one.is_number and one.number < 0:
                    return Node("neg", (_without_factor(other, constant),))
        return Node("mul", tuple(_without_factor(operand, constant) for operand in node.operands))
    if node.data == "div":
        return _without_factor(node.left, constant)
    if node.data == "ratio":
        left, right = node.operands
        if constant(right) and _positive(right) and left.shape == node.shape:
            return _without_factor(left, constant)
        return Node("ratio", (_without_factor(left, constant), _without_factor(right, constant)))
    if node.data in ("neg", "abs", "sqr", "sqrt"):
        return Node(node.data, (_without_factor(node.left, constant),))
    return node


def _positive(node: Node) -> bool:
    """Whether a row-constant value is positive, but for an all-zero matrix."""
    if node.is_number:
        return node.number > 0
    if interval(node)[0] > 0:
        return True
    if node.data in ("norm1", "norm2"):
        return bool(node.inputs)
    if node.data in ("rowsum", "max", "mean"):
        return nonnegative(node.left) and node.left.data not in ("mms", "sub", "minimum")
    if node.data in ("mul", "ratio"):
        return all(map(_positive, node.operands))
    return node.data in ("sqr", "sqrt", "abs") and _positive(node.left)


def _members(node: Node, data: str) -> list[Node]:
    return [member for operand in node.operands for member in _members(operand, data)] if node.data == data else [node]


EQUAL_RULES: tuple[Rule, ...] = (
    square_of_root,
    exp_of_log,
    add_and_subtract,
    odd_function,
    scaling_of_affine,
    chain,
)
ROOT_RULES: tuple[Rule, ...] = (increasing, increasing_in_magnitude, product_of_powers, affine)
