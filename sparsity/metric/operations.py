"""The vocabulary of metrics: what each operation computes, and what is known of it.

The published operations are those of Pruner-Zero's Table 10 (Dong et al. 2024, https://arxiv.org/abs/2406.02924)
with the guards of its code, so that a tree means the same here and there: log(|x| + 1e-3), sqrt(|x|),
exp(min(x, 100)), pow(x) = x², and div(x, y) = x / ‖y‖ with the norm of the whole matrix. What they lack to write
other known metrics is marked as an extension; so is the infix ``/``, which divides element by element.

Three things differ from the published code. A constant matrix under mms or zsn, or a zero norm under div, gives zeros
instead of NaN. The norm in div(x, y) is that of y as it is; there, y is first repeated to the common shape of x and
y, so that for a y of X's shape it is sqrt(rows) times as great, and the result has that common shape. norm1 and norm2
stand in the table but not in the code; here they give one number.

Every value is 2-D: [rows, cols], [rows, 1], [1, cols] or [1, 1]. Reductions are over the whole matrix ([1, 1]), over
each row ("row": [rows, 1]) or each column ("column": [1, cols]), always of the operand's own shape.
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


# The guards test for the one bad case and let NaN and Inf through as NaN: zeros in their place would hide an overflow,
# and the selection refuses NaN.
def _mms(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x)
    return torch.where((high == low) & high.isfinite(), torch.zeros_like(x), (x - low) / (high - low))


def _zsn(x: Tensor) -> Tensor:
    if x.numel() < 2:
        return torch.zeros_like(x)
    deviation = x.std()
    # A constant matrix has a deviation of exactly 0 only where its mean rounds to the constant.
    low, high = torch.aminmax(x)
    return torch.where(
        (deviation == 0) | ((high == low) & high.isfinite()), torch.zeros_like(x), (x - x.mean()) / deviation
    )


def _div(x: Tensor, y: Tensor) -> Tensor:
    norm = _norm2(y)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm.masked_fill(norm.isinf(), torch.nan))


def _norm2(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm.reshape(1, 1)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    return (x / y).masked_fill(y == 0, 0)


def _rowsum(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True)


def _colsum(x: Tensor) -> Tensor:
    return x.sum(0, keepdim=True)


_ALL = (
    Operation("sqr", 1, torch.square, r"\left({0}\right)^2", summary="x²"),
    Operation("neg", 1, torch.neg, r"-{0}", symbol="-", summary="-x"),
    Operation("abs", 1, torch.abs, r"\left|{0}\right|", summary="|x|"),
    Operation(
        "log",
        1,
        lambda x: torch.log(x.abs() + 1e-3),
        r"\log\left(\left|{0}\right| + 0.001\right)",
        summary="log(|x| + 0.001)",
    ),
    Operation(
        "exp",
        1,
        lambda x: torch.exp(x.clamp(max=100)),
        r"\exp\left(\min\left({0}, 100\right)\right)",
        summary="exp(min(x, 100))",
    ),
    Operation("sqrt", 1, lambda x: x.abs().sqrt(), r"\sqrt{{\left|{0}\right|}}", summary="sqrt(|x|)"),
    Operation("tanh", 1, torch.tanh, r"\tanh\left({0}\right)", summary="tanh(x)"),
    Operation("pow", 1, torch.square, r"\left({0}\right)^2", summary="x², as the published code has it"),
    Operation("skp", 1, lambda x: x, r"{0}", summary="x"),
    Operation(
        "mms", 1, _mms, r"\mathrm{{mms}}\left({0}\right)", "matrix", summary="(x - min) / (max - min); 0 if constant"
    ),
    Operation("zsn", 1, _zsn, r"\mathrm{{zsn}}\left({0}\right)", "matrix", summary="(x - mean) / std; 0 if constant"),
    Operation("norm2", 1, _norm2, r"\left\|{0}\right\|_2", "matrix", False, summary="sqrt(sum x²)"),
    Operation(
        "norm1", 1, lambda x: x.abs().sum().reshape(1, 1), r"\left\|{0}\right\|_1", "matrix", False, summary="sum |x|"
    ),
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
        "rowsum", 1, _rowsum, r"\mathrm{{rowsum}}\left({0}\right)", "row", False, False, summary="sum of each row"
    ),
    Operation(
        "colsum", 1, _colsum, r"\mathrm{{colsum}}\left({0}\right)", "column", False, False, summary="sum of each column"
    ),
    Operation(
        "max",
        1,
        lambda x: x.amax().reshape(1, 1),
        r"\max\left({0}\right)",
        "matrix",
        False,
        False,
        summary="the greatest of all",
    ),
    Operation(
        "min",
        1,
        lambda x: x.amin().reshape(1, 1),
        r"\min\left({0}\right)",
        "matrix",
        False,
        False,
        summary="the least of all",
    ),
    Operation(
        "mean",
        1,
        lambda x: x.mean().reshape(1, 1),
        r"\mathrm{{mean}}\left({0}\right)",
        "matrix",
        False,
        False,
        summary="the mean of all",
    ),
)

OPERATIONS = {operation.name: operation for operation in _ALL}

# The paper's vocabulary in the order of its Table 10: what a search may use.
PUBLISHED_UNARY = tuple(operation.name for operation in _ALL if operation.published and operation.arity == 1)
PUBLISHED_BINARY = tuple(operation.name for operation in _ALL if operation.published and operation.arity == 2)
