"""A metric's expression tree over W, G and X, and its value.

W [rows, cols] is the weight, G [rows, cols] the l2 norm over calibration sequences of its gradient, X [1, cols] the
root mean square of each input. The score has the shape of W and greater is kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trisparse.sparsity.metric.operations import INPUTS, OPERATIONS

Shape = tuple[bool, bool]  # whether the value differs from row to row, and from column to column
_INPUT_SHAPES: dict[str, Shape] = {"W": (True, True), "G": (True, True), "X": (False, True)}

MAX_DEPTH = 64  # every walk over a tree recurses; no metric that means anything comes near
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a tree: an operation with its operands, an input ("W", "G", "X"), or a number.

    Attributes:
        data: the operation's or input's name; "" for a number.
        operands: one or two nodes under an operation, else none.
        number: the value of a number.
        depth: levels of the tree; a leaf has one.
        inputs: which of W, G and X the tree reads.
        shape: whether the value differs from row to row, and from column to column.

    Raises:
        ValueError: an unknown name, a wrong number of operands, a number that fp32 cannot hold, or a tree of more
            than 64 levels.
    """

    data: str
    operands: tuple[Node, ...] = ()
    number: float = 0.0
    depth: int = field(init=False, repr=False, compare=False)
    inputs: frozenset[str] = field(init=False, repr=False, compare=False)
    shape: Shape = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.data in OPERATIONS:
            if len(self.operands) != (arity := OPERATIONS[self.data].arity):
                raise ValueError(f"{self.data} takes {arity} operand{'s' * (arity > 1)}, got {len(self.operands)}")
        elif self.data and self.data not in INPUTS:
            raise ValueError(f"unknown operation {self.data!r}; known are {', '.join((*INPUTS, *OPERATIONS))}")
        elif self.operands:
            raise ValueError(f"{self.data or self.number} takes no operands")
        if not abs(self.number) <= _LARGEST:
            raise ValueError(f"{self.number} is no fp32 number")
        depth = 1 + max((operand.depth for operand in self.operands), default=0)
        if depth > MAX_DEPTH:
            raise ValueError(f"the expression has more than {MAX_DEPTH} levels")
        inputs = frozenset({self.data} & set(INPUTS)).union(*(operand.inputs for operand in self.operands))
        # Computed once, here: each is asked for again and again, and recursing costs a power of the depth.
        known: dict[str, Any] = {
            "operands": tuple(self.operands),
            "number": 0.0 if self.data else self.number + 0.0,  # + 0.0 makes -0.0 the one zero
            "depth": depth,
            "inputs": inputs,
            "shape": self._shape(),
        }
        known["_hash"] = hash((self.data, known["operands"], known["number"]))
        for name, value in known.items():
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Node], tuple[str, tuple[Node, ...], float]]:
        return Node, (self.data, self.operands, self.number)  # the hash of a string differs between processes

    @property
    def left(self) -> Node:
        """The first operand."""
        return self.operands[0]

    @property
    def right(self) -> Node:
        """The second operand."""
        return self.operands[1]

    @property
    def is_number(self) -> bool:
        """Whether it is a number."""
        return not self.data

    def _shape(self) -> Shape:
        if not self.data:
            return False, False
        if self.data in INPUTS:
            return _INPUT_SHAPES[self.data]
        operation = OPERATIONS[self.data]
        if self.data == "div":  # the divisor is a norm
            return self.left.shape
        rows = any(operand.shape[0] for operand in self.operands)
        cols = any(operand.shape[1] for operand in self.operands)
        if operation.keeps_shape:
            return rows, cols
        return rows and operation.over == "row", cols and operation.over == "column"

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents first, left to right."""
        yield self
        for operand in self.operands:
            yield from operand.walk()

    def evaluate(self, w: Tensor, g: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        """The score in fp32, [rows, cols].

        Args:
            w: [rows, cols], any float dtype.
            g: [rows, cols]; needed if the tree reads G.
            x: [cols] or [1, cols]; needed if the tree reads X.

        Raises:
            ValueError: an input that the tree reads is missing or of a wrong shape, or the value has not W's shape.
        """
        if problem := shape_problem(self):
            raise ValueError(problem)
        given = {"W": w, "G": g, "X": None if x is None else x.reshape(1, -1)}
        expected = {"W": tuple(w.shape), "G": tuple(w.shape), "X": (1, w.shape[1])}
        values: dict[Node, Tensor] = {}
        for name in sorted(self.inputs):
            value = given[name]
            if value is None:
                raise ValueError(f"the metric reads {name}, which is missing")
            if tuple(value.shape) != expected[name]:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {expected[name]}")
            values[Node(name)] = value.detach().float()
        # An operand is freed after its last use: a tree of 20 nodes would else hold 20 matrices.
        uses = Counter(operand for node in set(self.walk()) for operand in node.operands)
        score = self._value(values, uses, w.device)
        return score.expand(w.shape) if score.shape != w.shape else score

    def _value(self, values: dict[Node, Tensor], uses: Counter[Node], device: torch.device) -> Tensor:
        if self not in values:  # a subtree that occurs twice is computed once
            if self.is_number:
                values[self] = torch.full((1, 1), self.number, dtype=torch.float32, device=device)
            else:
                operands = [operand._value(values, uses, device) for operand in self.operands]
                values[self] = OPERATIONS[self.data].compute(*operands)
                for operand in self.operands:
                    uses[operand] -= 1
                    if not uses[operand]:
                        del values[operand]
        return values[self]


def number(value: float) -> Node:
    """A number as a node."""
    return Node("", number=value)


def shape_problem(node: Node) -> str:
    """Why the value of ``node`` has not the shape of W and so cannot be a score; "" where it has."""
    if all(node.shape):
        return ""
    is_one = {(False, False): "one number", (True, False): "one number a row", (False, True): "one number a column"}
    return f"the value is {is_one[node.shape]}, but a score needs one a weight: let it depend on W or G"


def is_integer(value: float) -> bool:
    """Whether a number is written without a point."""
    return math.isfinite(value) and value == int(value) and abs(value) < 1e15
