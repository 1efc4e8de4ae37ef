"""Trees as JSON in the shape of Pruner-Zero's published ``best_tree.json``.

    {"data": "mul", "left": {"data": "W"}, "right": {"data": "2.0"}}

An operation on one operand has only "left", an input has neither; a number is its text.
"""

from __future__ import annotations

from typing import Any

from trisparse.sparsity.metric.expression import MAX_DEPTH, Node, number
from trisparse.sparsity.metric.operations import INPUTS, OPERATIONS

_SIDES = ("left", "right")


def to_json(node: Node) -> dict[str, Any]:
    """The tree as nested dicts that ``json.dumps`` takes."""
    sides = dict(zip(_SIDES, map(to_json, node.operands), strict=False))
    return {"data": repr(node.number) if node.is_number else node.data, **sides}


def from_json(tree: Any) -> Node:
    """The tree of nested dicts.

    Raises:
        ValueError: names the path of the wrong node, such as ``root.left.right``.
    """
    return _node(tree, "root", 1)


def _node(tree: Any, path: str, depth: int) -> Node:
    if depth > MAX_DEPTH:
        raise ValueError(f"{path.partition('.')[0]}: the tree has more than {MAX_DEPTH} levels")
    if not isinstance(tree, dict) or not isinstance(tree.get("data"), str):
        raise ValueError(f"{path}: a node must be an object with a text as 'data', got {_short(tree)}")
    data = tree["data"]
    if unknown := [key for key in tree if key not in ("data", *_SIDES)]:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; a node has 'data', 'left' and 'right'")
    given = [side for side in _SIDES if side in tree]
    wanted = list(_SIDES[: OPERATIONS[data].arity]) if data in OPERATIONS else []
    if data not in OPERATIONS and data not in INPUTS:
        value = _number(data, path)
        if not given:
            return value
    if given != wanted:
        raise ValueError(f"{path}: {data!r} has {_sides(wanted)}, but {_sides(given)} is given")
    return Node(data, tuple(_node(tree[side], f"{path}.{side}", depth + 1) for side in wanted))


def _number(data: str, path: str) -> Node:
    try:
        return number(float(data))
    except ValueError:
        known = ", ".join((*INPUTS, *OPERATIONS))
        raise ValueError(f"{path}: {data!r} is neither a number nor one of {known}") from None


def _sides(sides: list[str]) -> str:
    return " and ".join(sides) or "no operand"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
