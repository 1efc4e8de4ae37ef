"""Tree to text: infix with the fewest parentheses, which reads back as the same tree, and LaTeX."""

from __future__ import annotations

from trisparse.sparsity.metric.expression import Node, is_integer
from trisparse.sparsity.metric.operations import OPERATIONS

# How tightly a symbol binds; all else is closed in itself.
_BINDS = {"add": 1, "sub": 1, "mul": 2, "ratio": 2, "neg": 3}
_CLOSED = 4


def infix(node: Node) -> str:
    """The expression as text: ``parse(infix(node)) == node`` for every tree whose value has W's shape."""
    if node.is_number:
        return number_text(node.number)
    if not node.operands:
        return node.data
    if node.data == "neg" and not node.left.is_number:  # "-2" is a number; its negation as an operation is neg(2)
        return f"-{_enclosed(infix(node.left), _binding(node.left) < _BINDS['neg'])}"
    if node.data in _BINDS and node.data != "neg":
        symbol = OPERATIONS[node.data].symbol
        left = _enclosed(infix(node.left), _binding(node.left) < _BINDS[node.data])
        right = _enclosed(infix(node.right), _binding(node.right) <= _BINDS[node.data])
        return f"{left} {symbol} {right}"
    return f"{node.data}({', '.join(map(infix, node.operands))})"


def latex(node: Node) -> str:
    """The expression as LaTeX, with X as the norm of each input feature."""
    if node.is_number:
        text = number_text(node.number)
        mantissa, _, exponent = text.partition("e")
        return rf"{mantissa} \cdot 10^{{{int(exponent)}}}" if exponent else text
    if not node.operands:
        return node.data
    parts = [latex(operand) for operand in node.operands]
    if node.data in _BINDS and node.data != "ratio":  # a fraction's bar encloses both of its sides
        own = _BINDS[node.data]
        signed = [operand.data == "neg" or operand.number < 0 for operand in node.operands]
        parts[0] = _big(parts[0], _latex_binding(node.left) < own or (node.data == "neg" and signed[0]))
        if len(parts) == 2:
            parts[1] = _big(parts[1], _latex_binding(node.right) <= own or signed[1])
    return OPERATIONS[node.data].latex.format(*parts)


def number_text(value: float) -> str:
    """The shortest text that reads back as ``value``."""
    return str(int(value)) if is_integer(value) else repr(value)


def _binding(node: Node) -> int:
    if node.data == "neg" and node.left.is_number:
        return _CLOSED
    return _BINDS.get(node.data, _CLOSED)


def _latex_binding(node: Node) -> int:
    return _CLOSED if node.data == "ratio" else _BINDS.get(node.data, _CLOSED)


def _enclosed(text: str, enclose: bool) -> str:
    return f"({text})" if enclose else text


def _big(text: str, enclose: bool) -> str:
    return rf"\left({text}\right)" if enclose else text
