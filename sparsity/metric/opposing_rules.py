"""Pairs of opposing operations that cancel in the paper's Opposing Operation Simplification, but not exactly.

Dong et al. 2024 (https://arxiv.org/abs/2406.02924), section 3.2: operations that undo each other are removed to keep
the search from breeding variants of one metric. The text names exp/log and sub/neg; Appendix E adds sqr/sqrt. Under
the published guards these cancel only roughly, so they change the metric: a search uses them, nothing else does. The
pairs that cancel exactly are in ``exact_rules`` and ``rank_rules``.
"""

from __future__ import annotations

from trisparse.sparsity.metric.exact_rules import Rule
from trisparse.sparsity.metric.expression import Node


def log_of_exp(node: Node) -> Node | None:
    """log(exp(x)) ~ x; truly log(exp(min(x, 100)) + 0.001), flat below -7 and above 88."""
    return node.left.left if node.data == "log" and node.left.data == "exp" else None


def exp_of_log(node: Node) -> Node | None:
    """exp(log(x)) ~ |x|; truly |x| + 0.001."""
    return Node("abs", node.left.operands) if node.data == "exp" and node.left.data == "log" else None


def divide_and_multiply(node: Node) -> Node | None:
    """(x / y) * y ~ x; truly 0 where y is 0, and for div the norm of y stands against each element."""
    if node.data != "mul":
        return None
    for one, other in (node.operands, node.operands[::-1]):
        if one.data in ("div", "ratio") and one.right == other:
            return one.left
    return None


def multiply_and_divide(node: Node) -> Node | None:
    """(x * y) / y ~ x; truly as in ``divide_and_multiply``."""
    if node.data not in ("div", "ratio") or node.left.data != "mul" or node.right not in node.left.operands:
        return None
    return node.left.operands[node.left.left == node.right]


OPPOSING_RULES: tuple[Rule, ...] = (log_of_exp, exp_of_log, divide_and_multiply, multiply_and_divide)
