"""A metric's expression tree over W, G and X, and its value.

W [rows, cols] is the weight, G [rows, cols] the l2 norm over calibration sequences of its gradient, X [1, cols] the
root mean square of each input. The score has the shape of W and greater is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trisparse.sparsity.metric.operations import INPUTS, OPERATIONS

Shape = tuple[bool, bool]  # whether the value differs from row to row, and from column to column
_INPUT_SHAPES: dict[str, Shape] = {"W": (True, True), "G": (True, True), "X": (False, True)}


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a tree: an operation with its operands, an input ("W", "G", "X"), or a number.

    Attributes:
        data: the operation's or input's name; "" for a number.
        operands: one or two nodes under an operation, else none.
        number: the value of a number.
    """

    data: str
    operands: tuple[Node, ...] = ()
    number: float = 0.0

    def __post_init__(self) -> None:
        if self.data in OPERATIONS:
            if len(self.operands) != (arity := OPERATIONS[self.data].arity):
                raise ValueError(f"{self.data} takes {arity} operand{'s' * (arity > 1)}, got {len(self.operands)}")
        elif self.data and self.data not in INPUTS:
            raise ValueError(f"unknown operation {self.data!r}; known are {', '.join((*INPUTS, *OPERATIONS))}")
        elif self.operands:
            raise ValueError(f"{self.data or self.number} takes no operands")

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

    @property
    def depth(self) -> int:
        """Levels of the tree; a leaf has one."""
        return 1 + max((operand.depth for operand in self.operands), default=0)

    @property
    def inputs(self) -> frozenset[str]:
        """Which of W, G and X the tree reads."""
        return frozenset(node.data for node in self.walk() if node.data in INPUTS)

    @property
    def shape(self) -> Shape:
        """Whether the value differs from row to row, and from column to column."""
        if not self.data:
            return False, False
        if self.data in INPUTS:
            return _INPUT_SHAPES[self.data]
        operation = OPERATIONS[self.data]
        rows = any(operand.shape[0] for operand in self.operands)
        cols = any(operand.shape[1] for operand in self.operands)
        if self.data == "div":  # the divisor is a norm
            return self.left.shape
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
        if not all(self.shape):
            raise ValueError("the metric's value has not the shape of W: " + _shape_name(self.shape))
        return self._value(values, w.device)

    def _value(self, values: dict[Node, Tensor], device: torch.device) -> Tensor:
        if self not in values:  # a subtree that occurs twice is computed once
            if self.is_number:
                values[self] = torch.tensor(self.number, dtype=torch.float32, device=device)
            else:
                operands = (operand._value(values, device) for operand in self.operands)
                values[self] = OPERATIONS[self.data].compute(*operands)
        return values[self]


def _shape_name(shape: Shape) -> str:
    return {(False, False): "one number", (True, False): "one number a row", (False, True): "one number a column"}[
        shape
    ]
