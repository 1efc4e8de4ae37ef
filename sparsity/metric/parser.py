"""Text to tree: infix ``+ - * /``, unary minus, parentheses, numbers and calls.

    sum     := product (("+" | "-") product)*
    product := signed (("*" | "/") signed)*
    signed  := "-" NUMBER | "-" signed | atom
    atom    := NUMBER | "W" | "G" | "X" | NAME "(" sum ("," sum)* ")" | "(" sum ")"

A recursive descent over tokens; nothing is ever handed to Python's own parser. A minus before a number belongs to
the number: ``-2`` is a number, ``neg(2)`` an operation.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import NamedTuple

from trisparse.sparsity.metric.expression import MAX_DEPTH, Node, number, shape_problem
from trisparse.sparsity.metric.operations import INPUTS, OPERATIONS

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[^\W\d]\w*)|(?P<symbol>[-+*/(),]))"
)
_SUMS = {"+": "add", "-": "sub"}
_PRODUCTS = {"*": "mul", "/": "ratio"}


class MetricSyntaxError(ValueError):
    """An expression cannot be read; the message shows the text with a caret under the wrong character.

    Attributes:
        reason: what is wrong, without the text.
        text: the expression.
        position: index of the wrong character.
    """

    def __init__(self, reason: str, text: str, position: int) -> None:
        self.reason, self.text, self.position = reason, text, position
        line = re.sub(r"\s", " ", text)  # one character for one, so that the caret stays in its place
        super().__init__(f"{reason}\n  {line}\n  {' ' * position}^")

    def __reduce__(self) -> tuple[type[MetricSyntaxError], tuple[str, str, int]]:
        return MetricSyntaxError, (self.reason, self.text, self.position)


class _Token(NamedTuple):
    kind: str
    text: str
    position: int


def parse(text: str) -> Node:
    """The tree of an expression such as ``"abs(W) * X"``.

    Raises:
        MetricSyntaxError: it cannot be read, is deeper than 64 levels, or its value has not the shape of W.
    """
    parser = _Parser(text)
    node = parser.sum()
    parser.expect_end()
    if problem := shape_problem(node):
        raise MetricSyntaxError(problem, text, len(text) - len(text.lstrip()))
    return node


def _tokens(text: str) -> list[_Token]:
    found, position, end = [], 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            position += len(text[position:]) - len(text[position:].lstrip())
            raise MetricSyntaxError(f"unexpected character {text[position]!r}", text, position)
        kind = str(match.lastgroup)
        found.append(_Token(kind, match[kind], match.start(kind)))
        position = match.end()
    return [*found, _Token("end", "", end)]


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _tokens(text)
        self.index = 0
        self.nesting = 0
        if self.next.kind == "end":
            raise self.error("the expression is empty")

    @property
    def next(self) -> _Token:
        return self.tokens[self.index]

    def error(self, reason: str, at: _Token | None = None) -> MetricSyntaxError:
        return MetricSyntaxError(reason, self.text, (at or self.next).position)

    def take(self) -> _Token:
        token = self.next
        self.index += token.kind != "end"
        return token

    def expect(self, symbol: str, opened: _Token) -> None:
        if self.next.text != symbol:
            raise self.error(f"expected {symbol!r} to close the '(' at character {opened.position + 1}")
        self.take()

    def expect_end(self) -> None:
        if self.next.kind != "end":
            missing = "unmatched" if self.next.text == ")" else "expected an operator before"
            raise self.error(f"{missing} {self.next.text!r}")

    def node(self, name: str, operands: tuple[Node, ...], at: _Token) -> Node:
        try:
            return Node(name, operands)
        except ValueError as error:  # too deep
            raise self.error(str(error), at) from None

    def sum(self) -> Node:
        node = self.product()
        while self.next.text in _SUMS:
            token = self.take()
            node = self.node(_SUMS[token.text], (node, self.product()), token)
        return node

    def product(self) -> Node:
        node = self.signed()
        while self.next.text in _PRODUCTS:
            token = self.take()
            node = self.node(_PRODUCTS[token.text], (node, self.signed()), token)
        return node

    def signed(self) -> Node:
        self.nesting += 1
        if self.nesting > 2 * MAX_DEPTH:  # parentheses add no level to the tree, but one to the stack
            raise self.error(f"the expression is nested more than {2 * MAX_DEPTH} deep")
        try:
            if self.next.text != "-":
                return self.atom()
            minus = self.take()
            if self.next.kind == "number":
                return self.number(-1)
            return self.node("neg", (self.signed(),), minus)
        finally:
            self.nesting -= 1

    def atom(self) -> Node:
        token = self.next
        if token.kind == "number":
            return self.number(1)
        if token.kind == "name":
            return self.named()
        if token.text == "(":
            self.take()
            node = self.sum()
            self.expect(")", token)
            return node
        what = "the expression ends" if token.kind == "end" else f"found {token.text!r}"
        raise self.error(f"expected a value, but {what}")

    def number(self, sign: int) -> Node:
        token = self.take()
        try:
            return number(sign * float(token.text))
        except ValueError as error:  # beyond fp32
            raise self.error(str(error), token) from None

    def named(self) -> Node:
        token = self.take()
        if token.text in INPUTS:
            if self.next.text == "(":
                raise self.error(f"{token.text} is an input, not an operation: write {token.text} * (...)")
            return Node(token.text)
        if token.text not in OPERATIONS:
            raise self.error(f"unknown name {token.text!r}{_suggestion(token.text)}", token)
        opened = self.next
        arity = OPERATIONS[token.text].arity
        usage = f"{token.text}({', '.join('xy'[:arity])})"
        if opened.text != "(":
            raise self.error(f"{token.text} is an operation: write {usage}", token)
        self.take()
        operands: list[Node] = []
        if self.next.text != ")":
            operands.append(self.sum())
            while self.next.text == ",":
                self.take()
                operands.append(self.sum())
        self.expect(")", opened)
        if len(operands) != arity:
            hint = "; it squares, as in the published code" if token.text == "pow" else ""
            raise self.error(f"{usage} takes {arity} operand{'s' * (arity > 1)}, got {len(operands)}{hint}", token)
        return self.node(token.text, tuple(operands), token)


def _suggestion(name: str) -> str:
    known = (*INPUTS, *OPERATIONS)
    lower = {entry.lower(): entry for entry in known}
    close = [lower[name.lower()]] if name.lower() in lower else get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
