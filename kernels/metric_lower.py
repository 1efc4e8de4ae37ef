"""The terms of a metric's expression: its reductions taken out and put in order, its elements as Triton source.

Part of kernels/metric.py. A `Term` is a tree that hashes. `Lowering.lower` replaces each reduction by a leaf that
stands for a number (or a number a row, or a column) which a pass has computed before; equal reductions share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

Shape = tuple[bool, bool]  # whether a value differs from row to row, and from column to column
NUMBER, ROW, COLUMN, FULL = (False, False), (True, False), (False, True), (True, True)

_INPUTS: dict[str, Shape] = {"W": FULL, "G": FULL, "X": COLUMN}
# What has no reduction: the operation's source over its operands' names.
_SOURCE: dict[str, str] = {
    "sqr": "{0} * {0}",
    "pow": "{0} * {0}",
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "log": "log({0})",
    "exp": "exp({0})",
    "sqrt": "tl.sqrt_rn(tl.abs({0}))",
    "tanh": "tanh({0})",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "ratio": "over({0}, {1})",
    "maximum": "maximum({0}, {1})",
    "minimum": "minimum({0}, {1})",
    # What reductions leave behind:
    "mms": "min_max_scaled({0}, {1}, {2})",
    "zsn": "standardised({0}, {1}, {2}, {3}, {4})",
    "div": "over_norm({0}, {1})",
}
_ARITY = {"mms": 1, "zsn": 1, "norm2": 1, "norm1": 1, "div": 2, "rowsum": 1, "colsum": 1}
_ARITY |= {"max": 1, "min": 1, "mean": 1, "skp": 1}
_ARITY |= dict.fromkeys(("sqr", "pow", "neg", "abs", "log", "exp", "sqrt", "tanh"), 1)
_ARITY |= dict.fromkeys(("add", "sub", "mul", "ratio", "maximum", "minimum"), 2)


@dataclass(frozen=True)
class Term:
    """A tree with equality and a hash: an operation, "W", "G", "X", a number (""), or a statistic ("=")."""

    data: str
    operands: tuple[Term, ...] = ()
    number: float = 0.0
    slot: Slot | None = None

    @cached_property
    def _hash(self) -> int:
        return hash((self.data, self.operands, self.number, None if self.slot is None else self.slot.place))

    def __hash__(self) -> int:  # once per object: a tree is looked up many times
        return self._hash

    @cached_property
    def text(self) -> str:
        """As nested calls."""
        if self.slot is not None:
            return f"{self.slot.kind}({self.slot.value.text})"
        if not self.data:
            return repr(self.number)
        return f"{self.data}({', '.join(o.text for o in self.operands)})" if self.operands else self.data

    @cached_property
    def inputs(self) -> frozenset[str]:
        """Which of W, G and X it reads."""
        own = {self.data} & set(_INPUTS)
        return frozenset(own).union(*(operand.inputs for operand in self.operands))

    @cached_property
    def slots(self) -> frozenset[Slot]:
        """The statistics that it reads."""
        own = set() if self.slot is None else {self.slot}
        return frozenset(own).union(*(operand.slots for operand in self.operands))

    @cached_property
    def nonnegative(self) -> bool:
        """Whether its sign shows that it is never below 0, if G and X, norms and means of squares, are not."""
        if self.slot is not None:
            return self.slot.kind in ("norm1", "norm2", "std") or self.slot.value.nonnegative
        signs = [operand.nonnegative for operand in self.operands]
        if not self.data:
            return self.number >= 0
        if self.data == "mul":
            return all(signs) or self.operands[0] == self.operands[1]
        if self.data in ("add", "ratio", "minimum", "tanh"):
            return all(signs)
        if self.data in ("maximum", "div"):
            return any(signs) if self.data == "maximum" else signs[0]
        return self.data in ("G", "X", "abs", "sqr", "pow", "exp", "sqrt", "mms")

    def emit(self, lines: list[str], names: dict[Term, str]) -> str:
        """The name of the value, after appending to ``lines`` what computes it; equal subtrees are computed once."""
        if self.data in _INPUTS:
            return self.data.lower()
        if self not in names:
            names[self] = ""  # keep the order of names that of the lines
            if self.slot is not None:
                source = self.slot.load()
            elif not self.data:
                source = f"tl.full([], {_literal(self.number)}, tl.float32)"
            else:
                source = _SOURCE[self.data].format(*(operand.emit(lines, names) for operand in self.operands))
            names[self] = f"v{len(lines)}"
            lines.append(f"{names[self]} = {source}")
        return names[self]


@dataclass(frozen=True, eq=False)
class Slot:
    """One reduction: ``kind`` of ``value``, whose ``shape`` it runs over and whose result has the shape ``result``.

    ``place`` is its number among all reductions, ``index`` its number among those of its result's shape. ``order``
    is (matrix passes before it, passes over rows or columns after the last of these), see `Lowering.schedule`.
    """

    kind: str
    value: Term
    shape: Shape
    result: Shape
    place: int
    index: int
    order: tuple[int, float]
    totals: dict[Shape, int]

    def load(self) -> str:
        """Source that loads it from the buffer: all scalars, then those per column, then those per row."""
        scalars, columns = scalars_padded(self.totals.get(NUMBER, 0)), self.totals.get(COLUMN, 0)
        if self.result == NUMBER:
            return f"tl.load(stats_ptr + {self.index})"
        if self.result == COLUMN:
            return f"tl.load(stats_ptr + {scalars} + {self.index} * cols + i, mask=i < cols, other=0.0)"
        start = f"stats_ptr + {scalars} + {columns} * cols + {self.index} * rows"
        return f"tl.load({start} + row, mask=row < rows, other=0.0)"


def scalars_padded(count: int) -> int:
    """How many places the scalars take, so that what follows stays aligned for vector loads."""
    return -(-count // 16) * 16


def shape_of(term: Term) -> Shape:
    """Whether the value differs from row to row, and from column to column."""
    if term.slot is not None:
        return term.slot.result
    if term.data in _INPUTS:
        return _INPUTS[term.data]
    shapes = [shape_of(operand) for operand in term.operands]
    return any(s[0] for s in shapes), any(s[1] for s in shapes)


@dataclass
class Lowering:
    """Lowers one expression, and collects its reductions in ``slots``."""

    slots: list[Slot] = field(default_factory=list)
    _known: dict[tuple[str, Term], Slot] = field(default_factory=dict)
    _done: dict[Term, Term] = field(default_factory=dict)
    _totals: dict[Shape, int] = field(default_factory=dict)

    def lower(self, term: Term) -> Term:
        """The term with statistics in place of its reductions.

        Raises:
            ValueError: an unknown operation, or a wrong number of operands.
        """
        if term not in self._done:
            self._done[term] = self._lower(term)
        return self._done[term]

    def _lower(self, term: Term) -> Term:
        name = term.data
        if name in _INPUTS or not name:
            if term.operands:
                raise ValueError(f"{name or term.number} takes no operands")
            return term
        if name not in _ARITY:
            raise ValueError(f"unknown operation {name!r}; known are {', '.join((*_INPUTS, *_ARITY))}")
        if len(term.operands) != _ARITY[name]:
            raise ValueError(f"{name} takes {_ARITY[name]} operands, got {len(term.operands)}")
        operands = tuple(self.lower(operand) for operand in term.operands)
        if name == "skp":
            return operands[0]
        if name in _SOURCE and name not in _REDUCED:
            return Term(name, operands)
        return _REDUCED[name](self, *operands)

    def _statistic(self, kind: str, value: Term, result: Shape = NUMBER) -> Term:
        if (kind, value) not in self._known:
            shape = shape_of(value)
            before = [slot.order if slot.shape != FULL else (slot.order[0] + 1, 0) for slot in value.slots]
            passes, steps = max(before, default=(0, 0))
            index = self._totals.get(result, 0)
            self._totals[result] = index + 1
            order = (passes, math.inf if shape == FULL else steps + 1)
            slot = Slot(kind, value, shape, result, len(self.slots), index, order, self._totals)
            self.slots.append(slot)
            self._known[kind, value] = slot
        return Term("=", slot=self._known[kind, value])

    def schedule(self) -> list[list[Slot]]:
        """The reductions that one pass can take, in an order that knows all that each needs.

        Between two passes over matrices stand those over rows or columns, which cost little, so that only
        reductions of matrices within such reductions add a read of the weights.
        """
        stages: dict[tuple[tuple[int, float], Shape], list[Slot]] = {}
        for slot in self.slots:
            stages.setdefault((slot.order, slot.shape), []).append(slot)
        return [stages[key] for key in sorted(stages)]

    def mms(self, x: Term) -> Term:
        """(x - min) / (max - min)."""
        return Term("mms", (x, self.extreme("min", x), self.extreme("max", x)))

    def zsn(self, x: Term) -> Term:
        """(x - mean) / std; 0 of a number."""
        if shape_of(x) == NUMBER:
            return Term("")
        return Term("zsn", (x, *(self._statistic(kind, x) for kind in ("mean", "std", "min", "max"))))

    def div(self, x: Term, y: Term) -> Term:
        """x / norm2(y)."""
        return Term("div", (x, self.norm2(y)))

    def norm2(self, x: Term) -> Term:
        """The root of the sum of squares; |x| of a number."""
        return Term("abs", (x,)) if shape_of(x) == NUMBER else self._statistic("norm2", x)

    def norm1(self, x: Term) -> Term:
        """The sum of magnitudes."""
        return Term("abs", (x,)) if shape_of(x) == NUMBER else self._statistic("norm1", x)

    def extreme(self, kind: str, x: Term) -> Term:
        """max, min or mean of all; a number is its own."""
        return x if shape_of(x) == NUMBER else self._statistic(kind, x)

    def sum_along(self, axis: int, x: Term) -> Term:
        """The sum of each row (axis 1) or column (axis 0)."""
        rows, cols = shape_of(x)
        if axis == 1:
            if not cols:  # one column: each row is its own sum
                return x
            return self._statistic("rowsum", x, ROW) if rows else self._statistic("sum", x)
        if not rows:
            return x
        return self._statistic("colsum", x, COLUMN) if cols else self._statistic("sum", x)


_REDUCED: dict[str, Callable[..., Term]] = {
    "mms": Lowering.mms,
    "zsn": Lowering.zsn,
    "div": Lowering.div,
    "norm2": Lowering.norm2,
    "norm1": Lowering.norm1,
    "max": lambda lowering, x: lowering.extreme("max", x),
    "min": lambda lowering, x: lowering.extreme("min", x),
    "mean": lambda lowering, x: lowering.extreme("mean", x),
    "rowsum": lambda lowering, x: lowering.sum_along(1, x),
    "colsum": lambda lowering, x: lowering.sum_along(0, x),
}


def _literal(number: float) -> str:
    return repr(number) if math.isfinite(number) else f'float("{number}")'
