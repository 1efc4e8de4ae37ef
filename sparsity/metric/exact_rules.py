"""Rewritings that leave every fp32 value as it is, bit for bit (-0 equals 0), wherever that value is finite.

Each rule takes a node whose operands are simplified and returns an equal one, or None where it does not apply. G and
X are taken to be >= 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from trisparse.sparsity.metric.expression import Node, number
from trisparse.sparsity.metric.interval import interval, nonnegative
from trisparse.sparsity.metric.operations import OPERATIONS

Rule = Callable[[Node], Node | None]

_EVEN = ("abs", "sqr", "pow", "log", "sqrt", "norm1", "norm2")  # f(-x) = f(x)
_ZERO_OF_ZERO = (
    *("neg", "abs", "sqr", "pow", "sqrt", "tanh", "mms", "zsn", "norm1", "norm2", "div", "ratio"),
    *("rowsum", "colsum", "max", "min", "mean"),
)
_COMMUTATIVE = ("add", "mul", "maximum", "minimum")


def is_zero(node: Node) -> bool:
    """Whether every value is 0: the number, or a product with it."""
    if node.is_number:
        return node.number == 0
    return node.data == "mul" and any(is_zero(operand) for operand in node.operands)


def fold_constants(node: Node) -> Node | None:
    """Operations on numbers are done now, by the same code."""
    if not node.operands or not all(operand.is_number for operand in node.operands):
        return None
    operands = [torch.full((1, 1), operand.number, dtype=torch.float32) for operand in node.operands]
    value = float(OPERATIONS[node.data].compute(*operands).item())
    return number(value) if value - value == 0 else None  # Inf and NaN stay for the evaluation to refuse


def drop_skip(node: Node) -> Node | None:
    """skp(x) = x."""
    return node.left if node.data == "skp" else None


def neutral_element(node: Node) -> Node | None:
    """x + 0 = x - 0 = x * 1 = x / 1 = x, 0 - x = -x, x * -1 = -x."""
    if len(node.operands) != 2:
        return None
    left, right = node.operands
    if node.data == "add":
        return right if is_zero(left) else left if is_zero(right) else None
    if node.data == "sub":
        return left if is_zero(right) else Node("neg", (right,)) if is_zero(left) else None
    if node.data in ("mul", "ratio"):
        for one, other in ((right, left), (left, right))[: 2 if node.data == "mul" else 1]:
            if one.is_number and abs(one.number) == 1:
                return other if one.number == 1 else Node("neg", (other,))
    return None


def zero(node: Node) -> Node | None:
    """0 is x - x, a function of 0 that is 0, x / 0 by its guard, mms and zsn of one number; 0 * W for W's shape."""
    if node.is_number or node == _ZEROS:
        return None
    left, right = node.left if node.operands else node, node.operands[-1] if node.operands else node
    if (
        is_zero(node)
        or (node.data == "sub" and left == right)
        or (node.data in _ZERO_OF_ZERO and is_zero(left))
        or (node.data in ("div", "ratio") and is_zero(right))
        or (node.data in ("mms", "zsn") and not any(left.shape))
    ):
        return _ZEROS if all(node.shape) else number(0)
    return None


def double_negation(node: Node) -> Node | None:
    """-(-x) = x and -(x - y) = y - x."""
    if node.data != "neg":
        return None
    if node.left.data == "neg":
        return node.left.left
    return Node("sub", node.left.operands[::-1]) if node.left.data == "sub" else None


def sign_of_sum(node: Node) -> Node | None:
    """x + -y = x - y, -x + y = y - x, x - -y = x + y, -x - y = -(x + y)."""
    if node.data not in ("add", "sub"):
        return None
    left, right = node.operands
    if right.data == "neg":
        return Node("sub" if node.data == "add" else "add", (left, right.left))
    if left.data == "neg":
        return (
            Node("sub", (right, left.left)) if node.data == "add" else Node("neg", (Node("add", (left.left, right)),))
        )
    return None


def sign_of_product(node: Node) -> Node | None:
    """(-x) * y = -(x * y), and so for both quotients; the sign goes outwards. A norm has no sign."""
    if node.data not in ("mul", "div", "ratio"):
        return None
    left, right = node.operands
    if node.data == "div" and right.data in ("neg", "abs"):
        return Node("div", (left, right.left))
    if left.data == "neg":
        return Node("neg", (Node(node.data, (left.left, right)),))
    return Node("neg", (Node(node.data, (left, right.left)),)) if right.data == "neg" else None


def even_function(node: Node) -> Node | None:
    """f(-x) = f(|x|) = f(x) for the even functions; |x| itself only loses a minus."""
    if node.data not in _EVEN or node.left.data not in ("neg", "abs"):
        return None
    return node.left if node.data == node.left.data else Node(node.data, (node.left.left,))


def absolute_of_nonnegative(node: Node) -> Node | None:
    """|x| = x where x >= 0."""
    return node.left if node.data == "abs" and nonnegative(node.left) else None


def absolute_of_product(node: Node) -> Node | None:
    """|x * y| = |x| * |y|, |x / y| = |x| / |y|, |x / norm2(y)| = |x| / norm2(y); rounding knows no sign."""
    if node.data != "abs" or node.left.data not in ("mul", "div", "ratio"):
        return None
    x, y = node.left.operands
    return Node(node.left.data, (Node("abs", (x,)), y if node.left.data == "div" else Node("abs", (y,))))


def square(node: Node) -> Node | None:
    """pow(x) = x * x = sqr(x)."""
    if node.data == "pow":
        return Node("sqr", node.operands)
    return Node("sqr", (node.left,)) if node.data == "mul" and node.left == node.right else None


def idempotent(node: Node) -> Node | None:
    """mms(mms(x)) = mms(x); x + x = 2 * x."""
    if node.data == "mms" and node.left.data == "mms":
        return node.left
    return Node("mul", (number(2), node.left)) if node.data == "add" and node.left == node.right else None


def dominated(node: Node) -> Node | None:
    """The greater or lesser of two is one of them where their values cannot overlap, or where they are the same."""
    if node.data not in ("maximum", "minimum"):
        return None
    for one, other in (node.operands, node.operands[::-1]):
        if one == other or interval(one)[1] <= interval(other)[0]:
            return one if node.data == "minimum" else other
    return None


def reduction_of_one(node: Node) -> Node | None:
    """The greatest, least or mean of one number is that number; so is a sum over one."""
    single = {"max": (0, 1), "min": (0, 1), "mean": (0, 1), "rowsum": (1,), "colsum": (0,)}.get(node.data)
    return node.left if single and not any(node.left.shape[axis] for axis in single) else None


def operand_order(node: Node) -> Node | None:
    """x + y = y + x and so on: numbers first, then what reads W, then G, then X; (x + y) + z with its sum first."""
    if node.data not in _COMMUTATIVE or node.left.data == node.data:
        return None
    if node.right.data != node.data and order_key(node.left) <= order_key(node.right):
        return None
    return Node(node.data, (node.right, node.left))


def order_key(node: Node) -> tuple[bool, int, int, str]:
    """A key that puts operands into a fixed order."""
    first = min(("WGX".index(name) for name in node.inputs), default=3)
    return not node.is_number, first, -node.depth, repr(node)


_ZEROS = Node("mul", (number(0), Node("W")))

EXACT_RULES: tuple[Rule, ...] = (
    fold_constants,
    drop_skip,
    neutral_element,
    zero,
    double_negation,
    sign_of_sum,
    sign_of_product,
    even_function,
    absolute_of_nonnegative,
    absolute_of_product,
    square,
    idempotent,
    dominated,
    reduction_of_one,
    operand_order,
)
