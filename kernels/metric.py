"""A pruning metric, any expression over W, G and X, compiled to a Triton function that scores on the fly.

    score[i, j] = metric(W, G, X)[i, j]      W, G [rows, cols], X [cols]; fp32; greater = kept

`compile_metric` turns the tree into the source of one element-wise function ``score``, which the selection kernels
call on what they have loaded, so that no score matrix is formed. What the tree reduces (``mms(G)`` needs the least
and the greatest of G) must be known first: all reductions that do not contain one another are taken in one *pass*
over the weights, and each level of nesting needs one more (`Pass`). A reduction of what has one value a column, such
as ``norm2(X)``, reads only that.

The operations are those of sparsity/metric/operations.py, and a score is computed as torch does: each step is
rounded to fp32 (products and sums are not contracted), quotients and roots are rounded correctly, least and greatest
do not depend on an order. So the scores of an expression equal torch's bit for bit unless it contains exp, log or
tanh (a few units in the last place) or a sum (mean, zsn, norm, div, rowsum, colsum: summed in another order).

Source: the metrics are those of Pruner-Zero's search space (Dong et al. 2024, https://arxiv.org/abs/2406.02924).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from trisparse.kernels.cache import cache_folder
from trisparse.kernels.launch import by_kernel
from trisparse.kernels.metric_lower import FULL, Lowering, Shape, Term, shape_of
from trisparse.kernels.score import DTYPES, check_inner, check_weight, check_x, nan_error

_HEADER = '''"""{text}

Written by trisparse.kernels.metric; a copy that is changed is written again.
"""

# ruff: noqa
import triton
import triton.language as tl

from trisparse.kernels.metric_math import (
    exp, log, maximum, min_max_scaled, minimum, over, over_norm, standardised, tanh
)
from trisparse.kernels.score_triton import widen
'''
_ARGUMENTS = "w, m, row, i, there"


class Expression(Protocol):
    """A metric's tree, as sparsity/metric/expression.py has it: operations over W, G, X and numbers."""

    @property
    def data(self) -> str:
        """The operation's or input's name; "" for a number."""

    @property
    def operands(self) -> Sequence[Expression]:
        """One or two under an operation, else none."""

    @property
    def number(self) -> float:
        """The value of a number."""

    def evaluate(self, w: Tensor, g: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        """The specification: the score in fp32 [rows, cols], in plain torch."""


@dataclass(frozen=True)
class Pass:
    """Reductions that are taken together.

    Attributes:
        name: of the function in the source that computes what is reduced.
        shape: whether that differs from row to row, and from column to column: what the pass runs over.
        slots: the statistics that it makes, as places in `CompiledMetric.statistics`.
        reads: which of W, G and X it loads.
    """

    name: str
    shape: Shape
    slots: tuple[int, ...]
    reads: frozenset[str]


@dataclass(frozen=True)
class CompiledMetric:
    """A metric as Triton source; made by `compile_metric`.

    Attributes:
        expression: the tree.
        text: the tree as nested calls, a comment of the source.
        reads: which of W, G and X the metric reads.
        score_reads: which of them the score function itself reads; the others only enter a statistic.
        negative: whether scores are expected below 0; kernels are right in either case, but faster when told.
        statistics: (kind, shape) of each reduction; the scalars stand first in the buffer, then those per column,
            then those per row.
        passes: in the order in which they must run.
        source: of the module with ``score`` and the passes' functions.
    """

    expression: Expression
    text: str
    reads: frozenset[str]
    score_reads: frozenset[str]
    negative: bool
    statistics: tuple[tuple[str, Shape], ...]
    passes: tuple[Pass, ...]
    source: str

    @property
    def reads_over_weights(self) -> int:
        """How many passes run over matrices before the selection."""
        return sum(part.shape == FULL for part in self.passes)

    @cached_property
    def module(self) -> ModuleType:
        """The source, written to the cache once and imported: Triton compiles functions that stand in a file."""
        return _import(self.source)

    @property
    def function(self) -> Any:
        """The Triton function ``score(w, m, row, i, there)`` -> fp32, element by element.

        ``w`` are weights in fp32 of the row ``row`` and the columns ``i``, of which those exist that are ``there``
        (a mask of w's shape); ``m`` = (g_ptr, stride_g, x_ptr, stats_ptr, rows, cols), as `MetricInputs` gives them.
        """
        return self.module.score

    def check(self, weight: Tensor, g: Tensor | None, x: Tensor | None, names: tuple[str, str, str]) -> None:
        """Raise a ValueError unless the inputs fit one another and none that the metric reads is missing."""
        check_weight(weight, names[0])
        check_x(x, weight, names[2])
        if g is not None:
            if g.dtype not in DTYPES:
                raise ValueError(f"{names[1]} has dtype {g.dtype}; allowed are {', '.join(map(str, DTYPES))}")
            if g.shape != weight.shape:
                raise ValueError(
                    f"{names[1]} has shape {tuple(g.shape)}; it must be the weight's, {tuple(weight.shape)}"
                )
            if g.device != weight.device:
                raise ValueError(f"{names[1]} is on {g.device}; it must be on the weight's device, {weight.device}")
            check_inner(g, names[1])
        for letter, name, value in (("G", names[1], g), ("X", names[2], x)):
            if letter in self.reads and value is None:
                raise ValueError(f"{name} is missing; the metric {self.text} reads {letter}")

    def evaluate(self, weight: Tensor, g: Tensor | None, x: Tensor | None) -> Tensor:
        """The score matrix in plain torch, fp32 [rows, cols]."""
        return self.expression.evaluate(weight.detach(), g, x)

    def scores(self, weight: Tensor, g: Tensor | None, x: Tensor | None, name: str) -> Tensor:
        """`evaluate` for a selection to rank: a NaN is a ValueError."""
        score = self.evaluate(weight, g, x)
        if bool(score.isnan().any()):
            raise nan_error(f"{self.text} of {name}", "", None)
        return score

    def fused(self, weight: Tensor, g: Tensor | None) -> bool:
        """Whether kernels score on the fly here; fp64 and devices without kernels take `evaluate`."""
        return by_kernel(weight) and torch.float64 not in (weight.dtype, None if g is None else g.dtype)


def compile_metric(expression: Expression) -> CompiledMetric:
    """Compile a metric's tree; equal trees give the same object.

    Raises:
        ValueError: an unknown operation, a wrong number of operands, or a value that has not the shape of W.
    """
    return _compile(_Tree(expression, _term(expression)))


def check_inputs(
    score: CompiledMetric | None,
    weight: Tensor,
    g: Tensor | None,
    x: Tensor | None,
    names: tuple[str, str, str] = ("weight", "g", "x"),
) -> None:
    """The checks of what a selection ranks by: a metric, or |W| or W times X, where ``g`` has no place."""
    if score is not None:
        score.check(weight, g, x, names)
        return
    check_weight(weight, names[0])
    check_x(x, weight, names[2])
    if g is not None:
        raise ValueError(f"{names[1]} is given without a score, the metric that reads it")


def score(metric: CompiledMetric, weight: Tensor, *, g: Tensor | None = None, x: Tensor | None = None) -> Tensor:
    """The score matrix, fp32 [rows, cols]; selections need none of it: give them the metric.

    Args:
        metric: from `compile_metric`.
        weight: [rows, cols] of fp32, fp16, bf16 or fp64, the inner dimension contiguous.
        g: [rows, cols] of a float dtype, the inner dimension contiguous; needed if the metric reads G.
        x: [cols] of a float dtype; needed if the metric reads X.

    Raises:
        ValueError: an input is missing, or of a wrong dtype, shape, stride or device.
    """
    metric.check(weight, g, x, ("weight", "g", "x"))
    if not metric.fused(weight, g):
        return metric.evaluate(weight, g, x)
    from trisparse.kernels.metric_triton import MetricInputs  # Triton is there on Linux only

    if not weight.numel():
        return weight.new_empty(weight.shape, dtype=torch.float32)
    return MetricInputs(metric, weight.detach(), g, x).scores()


@dataclass(frozen=True, eq=False)
class _Tree:
    """An expression that hashes and compares by its terms, whatever its class does."""

    expression: Expression
    term: Term

    def __hash__(self) -> int:
        return hash(self.term)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tree) and self.term == other.term


def _term(node: Expression) -> Term:
    return Term(node.data, tuple(_term(operand) for operand in node.operands), float(node.number))


@lru_cache(maxsize=4096)
def _compile(tree: _Tree) -> CompiledMetric:
    lowering = Lowering()
    root = lowering.lower(tree.term)
    if shape_of(root) != FULL:
        raise ValueError(f"the metric {tree.term.text} has not the shape of W: it must differ by row and by column")
    parts = [_HEADER.format(text=tree.term.text), _function("score", [root], tree.term.text, single=True)]
    passes = []
    for number, stage in enumerate(lowering.schedule()):
        values = [stage_slot.value for stage_slot in stage]
        name = f"pass{number}"
        what = ", ".join(f"{s.kind} of {s.value.text}" for s in stage)
        parts.append(_function(name, values, f"Of these are taken: {what}."))
        slots = tuple(s.place for s in stage)
        passes.append(Pass(name, stage[0].shape, slots, frozenset().union(*(value.inputs for value in values))))
    return CompiledMetric(
        expression=tree.expression,
        text=tree.term.text,
        reads=tree.term.inputs,
        score_reads=root.inputs,
        negative=not root.nonnegative,
        statistics=tuple((s.kind, s.result) for s in lowering.slots),
        passes=tuple(passes),
        source="\n\n".join(parts),
    )


def _function(name: str, values: Sequence[Term], about: str, single: bool = False) -> str:
    lines: list[str] = []
    names: dict[Term, str] = {}
    results = [value.emit(lines, names) for value in values]
    result = results[0] if single else f"({''.join(r + ', ' for r in results)})"
    lines = [*_loads(frozenset().union(*(value.inputs for value in values))), *lines, f"return {result}"]
    body = "\n".join(f"    {line}" for line in lines)
    return f'@triton.jit\ndef {name}({_ARGUMENTS}):\n    """{about}"""\n{body}\n'


def _loads(reads: frozenset[str]) -> list[str]:
    lines = ["g_ptr, stride_g, x_ptr, stats_ptr, rows, cols = m"]
    if "G" in reads:
        lines.append("g = widen(tl.load(g_ptr + row * stride_g + i, mask=there, other=0.0))")
    if "X" in reads:
        lines.append("x = tl.load(x_ptr + i, mask=i < cols, other=0.0)")
    return lines


def _import(source: str) -> ModuleType:
    """Import ``source`` from its file in the cache, which is written, whole or not at all, where it is not there."""
    name = f"trisparse_metric_{hashlib.sha256(source.encode()).hexdigest()[:24]}"
    if name in sys.modules:
        return sys.modules[name]
    folder = cache_folder() / "metrics"
    path = folder / f"{name}.py"
    if not path.is_file() or path.read_text() != source:
        _write(path, source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _write(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(source)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
