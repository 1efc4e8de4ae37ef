"""The vocabulary of metrics: what each operation computes, and what is known of it.

The published operations are those of Pruner-Zero's Table 10 (Dong et al. 2024, https://arxiv.org/abs/2406.02924)
with the guards of its code, so that a tree means the same here and there: log(|x| + 1e-3), sqrt(|x|),
exp(min(x, 100)), pow(x) = x², and div(x, y) = x / ‖y‖ with the norm of the whole matrix. What they lack to write
other known metrics is marked as an extension; so is the infix ``/``, which divides element by element.

Reductions are over the whole matrix, over each row ("row": one value a row, [rows, 1]) or each column ("column":
[1, cols]).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Over = Literal["", "matrix", "row", "column"]

INPUTS = ("W", "G", "X")


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: as written in an expression and in a tree's JSON.
        arity: 1 or 2 operands.
        compute: (fp32 tensors that broadcast to [rows, cols]) -> an fp32 tensor.
        latex: a template with {0} and {1}.
        over: what it reduces over, "" for none.
        keeps_shape: False where the result is the reduction itself, as for a norm; mms and zsn keep their operand's
            shape.
        published: in the paper's vocabulary; else an extension.
        symbol: the infix symbol, or "".
        summary: one line for the list of operations.
    """

    name: str
    arity: int
    compute: Callable[..., Tensor]
    latex: str
    over: Over = ""
    keeps_shape: bool = True
    published: bool = True
    symbol: str = ""
    summary: str = ""


def _mms(x: Tensor) -> Tensor:
    low, high = x.min(), x.max()
    return torch.where(high > low, (x - low) / (high - low), torch.zeros_like(x))


def _zsn(x: Tensor) -> Tensor:
    deviation = x.std() if x.numel() > 1 else torch.zeros((), device=x.device)
    return torch.where(deviation > 0, (x - x.mean()) / deviation, torch.zeros_like(x))


def _div(x: Tensor, y: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(y)
    return torch.where(norm > 0, x / norm, torch.zeros_like(x))


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(y != 0, x / y, torch.zeros_like(x / y))


_ALL = (
    Operation("sqr", 1, torch.square, r"\left({0}\right)^2", summary="x²"),
    Operation("neg", 1, torch.neg, r"-{0}", symbol="-", summary="-x"),
    Operation("abs", 1, torch.abs, r"\left|{0}\right|", summary="|x|"),
    Operation("log", 1, lambda x: torch.log(x.abs() + 1e-3), r"\log\left|{0}\right|", summary="log(|x| + 0.001)"),
    Operation("exp", 1, lambda x: torch.exp(x.clamp(max=100)), r"\exp\left({0}\right)", summary="exp(min(x, 100))"),
    Operation("sqrt", 1, lambda x: x.abs().sqrt(), r"\sqrt{{\left|{0}\right|}}", summary="sqrt(|x|)"),
    Operation("tanh", 1, torch.tanh, r"\tanh\left({0}\right)", summary="tanh(x)"),
    Operation("pow", 1, torch.square, r"\left({0}\right)^2", summary="x², as the published code has it"),
    Operation("skp", 1, lambda x: x, r"{0}", summary="x"),
    Operation(
        "mms", 1, _mms, r"\mathrm{{mms}}\left({0}\right)", "matrix", summary="(x - min) / (max - min); 0 if constant"
    ),
    Operation("zsn", 1, _zsn, r"\mathrm{{zsn}}\left({0}\right)", "matrix", summary="(x - mean) / std; 0 if constant"),
    Operation("norm2", 1, torch.linalg.vector_norm, r"\left\|{0}\right\|_2", "matrix", False, summary="sqrt(sum x²)"),
    Operation("norm1", 1, lambda x: x.abs().sum(), r"\left\|{0}\right\|_1", "matrix", False, summary="sum |x|"),
    Operation("add", 2, torch.add, r"{0} + {1}", symbol="+", summary="x + y"),
    Operation("sub", 2, torch.sub, r"{0} - {1}", symbol="-", summary="x - y"),
    Operation("mul", 2, torch.mul, r"{0} \cdot {1}", symbol="*", summary="x · y"),
    Operation(
        "div", 2, _div, r"\frac{{{0}}}{{\left\|{1}\right\|_2}}", "matrix", summary="x / norm2(y); 0 if that is 0"
    ),
    Operation(
        "ratio",
        2,
        _ratio,
        r"\frac{{{0}}}{{{1}}}",
        published=False,
        symbol="/",
        summary="x / y element by element; 0 where y is 0",
    ),
    Operation(
        "maximum", 2, torch.maximum, r"\max\left({0}, {1}\right)", published=False, summary="the greater of x and y"
    ),
    Operation(
        "minimum", 2, torch.minimum, r"\min\left({0}, {1}\right)", published=False, summary="the lesser of x and y"
    ),
    Operation(
        "rowsum", 1, lambda x: x.sum(1, keepdim=True), r"\sum_j {0}", "row", False, False, summary="sum of each row"
    ),
    Operation(
        "colsum",
        1,
        lambda x: x.sum(0, keepdim=True),
        r"\sum_i {0}",
        "column",
        False,
        False,
        summary="sum of each column",
    ),
    Operation("max", 1, torch.amax, r"\max {0}", "matrix", False, False, summary="the greatest of all"),
    Operation("min", 1, torch.amin, r"\min {0}", "matrix", False, False, summary="the least of all"),
    Operation("mean", 1, torch.mean, r"\mathrm{{mean}}\,{0}", "matrix", False, False, summary="the mean of all"),
)

OPERATIONS = {operation.name: operation for operation in _ALL}
