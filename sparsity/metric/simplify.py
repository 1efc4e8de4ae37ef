"""A simpler tree for the same mask, and one tree for the many ways to write a metric.

Rules come in three strengths: ``exact_rules`` keep the score's bits, ``rank_rules`` keep the order within each row,
``opposing_rules`` are the paper's approximation for the search.
"""

from __future__ import annotations

from functools import lru_cache

from trisparse.sparsity.metric.exact_rules import EXACT_RULES, Rule
from trisparse.sparsity.metric.expression import MAX_DEPTH, Node
from trisparse.sparsity.metric.opposing_rules import OPPOSING_RULES
from trisparse.sparsity.metric.rank_rules import EQUAL_RULES, ROOT_RULES

_ROUNDS = 4 * MAX_DEPTH  # the rules shrink a tree or order it, so they end long before


@lru_cache(maxsize=1 << 14)
def simplify(node: Node, rowwise: bool = True, opposing: bool = False) -> Node:
    """The simplest equivalent that the rules find.

    Args:
        node: a tree whose value has W's shape, for G >= 0 and X >= 0.
        rowwise: keep only the order within each row (masks per row and n:m), up to ties that rounding made; False
            keeps the score bit for bit.
        opposing: also cancel opposing operations that only roughly undo each other, as the paper's search does.
    """
    rules = (*(OPPOSING_RULES if opposing else ()), *EXACT_RULES, *(EQUAL_RULES if rowwise else ()))
    for _ in range(_ROUNDS):
        before = node
        node = _rewrite(node, rules, {})
        if rowwise:
            node = _rewrite_root(node)
        if node == before:
            break
    return node


def _rewrite(node: Node, rules: tuple[Rule, ...], done: dict[Node, Node]) -> Node:
    """One pass from the leaves up."""
    if node not in done:
        result = node
        if node.operands:
            operands = tuple(_rewrite(operand, rules, done) for operand in node.operands)
            result = node if operands == node.operands else Node(node.data, operands)
            for rule in rules:
                simpler = rule(result)
                # A value of another shape would change the reductions and broadcasts above it.
                if simpler is not None and simpler.shape == result.shape:
                    result = simpler
                    break
        done[node] = result
    return done[node]


def _rewrite_root(node: Node) -> Node:
    """One rule at the root, or under a minus there: the reverse order is kept just as well."""
    if node.data == "neg":
        return Node("neg", (_rewrite_root(node.left),))
    for rule in ROOT_RULES:
        simpler = rule(node)
        if simpler is not None and simpler.shape == node.shape:
            return simpler
    return node
