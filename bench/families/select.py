"""The benchmark "select": the masks of one weight, against eager PyTorch and torch.compile of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trisparse.bench.families.usual_selection import (
    compiler_problem,
    powers_of_two,
    published_metric,
    scores,
    tie_free,
    tie_free_squares,
    usual_global,
    usual_layer,
    usual_nm,
    usual_rows,
    vectorised_nm,
)
from trisparse.bench.registry import Case, Measured, Options, benchmark, equal
from trisparse.kernels.metric import compile_metric
from trisparse.kernels.nm import select_nm, select_nm_ref
from trisparse.kernels.select import select_rows, select_rows_ref
from trisparse.kernels.threshold import select_global, select_global_ref
from trisparse.sparsity.metric import METRICS
from trisparse.sparsity.metric.parser import parse

_FP32, _BF16 = torch.float32, torch.bfloat16
SHAPES = tuple((r, c, d) for r, c in ((4096, 4096), (11008, 4096), (8192, 8192), (8192, 28672)) for d in (_FP32, _BF16))
QUICK_SHAPES = ((1024, 1024, _FP32), (1024, 1024, _BF16), (2048, 2048, _BF16))
NM = ((2, 4), (4, 8), (8, 16), (16, 32))
_PARTS = 4  # tensors of a global selection, as of a model's layers
Call = Callable[[], Any]


@benchmark(
    "select",
    "masks of one weight (row, n:m, layer, global; |W|, |W| * X, a metric with G) against PyTorch",
    devices=("cpu", "cuda"),
    takes=("dtype", "repeats"),
)
def select(options: Options) -> Iterator[Case | Measured]:
    """Every selection on every shape; contestants are "usual" (the baseline), "torch.compile" and "trisparse".

    For n:m the usual route is published code's loop over groups; "vectorised" is the same without the loop, which is
    also what torch.compile gets.

    Raises:
        ValueError: a dtype that is neither float32 nor bfloat16.
    """
    problem = compiler_problem(options.device.type)
    if problem is not None:
        print(f"select: torch.compile does not work here and is left out ({problem})", file=sys.stderr)
    shapes = QUICK_SHAPES if options.quick else SHAPES
    if options.dtype is not None:
        shapes = tuple(dict.fromkeys((rows, cols, options.dtype) for rows, cols, _ in shapes))
    for rows, cols, dtype in shapes:
        for case in cases(rows, cols, dtype, options, compiled=problem is None):
            torch.compiler.reset()  # torch gives up on a function that it compiled for too many shapes
            yield case


def cases(rows: int, cols: int, dtype: torch.dtype, options: Options, *, compiled: bool) -> Iterator[Case]:
    """The cases of one shape and dtype.

    Args:
        rows, cols, dtype: of the weight.
        options: device, ``quick`` and ``only``.
        compiled: whether torch.compile is a contestant.
    """
    device = options.device
    where = f"{rows}x{cols} {str(dtype).removeprefix('torch.')}"
    repeats = 3 if options.quick else 5 if device.type == "cpu" else 30
    k, x = cols // 2, powers_of_two(cols, device)
    nm = NM[:2] if options.quick else NM
    # Names come before data: what --only leaves out costs nothing.
    for score, vector in (("|W|", None), ("|W| * X", x)):
        wanted = [
            name
            for name in ("row 50%", *(f"{n}:{m}" for n, m in nm), "layer 50%", "global 50%")
            if options.only in f"{name}, {score}, {where}"
        ]
        if not wanted:
            continue
        weight = tie_free(rows, cols, dtype, vector, device)
        for name in wanted:
            calls, reference = _selection(name, weight, vector, k, compiled=compiled)
            yield _case(f"{name}, {score}, {where}", name, score, weight, calls, reference, repeats)
    score = METRICS["pruner-zero"].infix
    wanted = [name for name in ("row 50%", "2:4") if options.only in f"{name}, {score}, {where}"]
    inputs = tie_free_squares(rows, cols, dtype, device) if wanted else None
    if inputs is None:
        if wanted:
            print(f"select: {where} has no scores of {score} without ties and is left out", file=sys.stderr)
        return
    for name in wanted:
        calls, reference = _metric(name, *inputs, k, compiled=compiled)
        yield _case(f"{name}, {score}, {where}", name, score, inputs[0], calls, reference, repeats, read=inputs[1])


def _case(
    title: str,
    pattern: str,
    score: str,
    weight: Tensor,
    contestants: dict[str, Call],
    reference: Call,
    repeats: int,
    read: Tensor | None = None,
) -> Case:
    rows, cols = weight.shape
    dtype = str(weight.dtype).removeprefix("torch.")
    vector = 4 * cols if score.endswith("X") else 0
    return Case(
        name=title,
        parameters={"rows": rows, "cols": cols, "dtype": dtype, "pattern": pattern, "score": score},
        contestants=contestants,
        reference=reference,
        baseline="usual",
        check=_check,
        bytes=weight.nbytes + (0 if read is None else read.nbytes) + vector + weight.numel(),  # the mask: a byte each
        repeats=repeats,
    )


def _selection(name: str, weight: Tensor, x: Tensor | None, k: int, *, compiled: bool) -> tuple[dict[str, Call], Call]:
    """The contestants and the reference of a selection by |W| or |W| · X."""
    if name.startswith("row"):
        usual = partial(_scored, usual_rows, weight, x, k)
        ours = partial(select_rows, weight, k, x=x)
        return _contestants(usual, usual, ours, compiled), partial(select_rows_ref, weight, k, x=x)
    if ":" in name:
        n, m = map(int, name.split(":"))
        usual, vectorised = (
            partial(_scored, usual_nm, weight, x, n, m),
            partial(_scored, vectorised_nm, weight, x, n, m),
        )
        ours = partial(select_nm, weight, n, m, x=x)
        return _contestants(usual, vectorised, ours, compiled), partial(select_nm_ref, weight, n, m, x=x)
    k = _between_values(scores(weight, x))
    if name.startswith("layer"):
        usual = partial(_scored, usual_layer, weight, x, k)
        xs = None if x is None else [x]
        return (
            _contestants(usual, usual, lambda: select_global([weight], k, xs=xs)[0], compiled),
            lambda: select_global_ref([weight], k, xs=xs)[0],
        )
    parts = list(weight.chunk(_PARTS))
    xs = None if x is None else [x] * len(parts)
    usual_parts = partial(_scored_parts, usual_global, parts, x, k)
    return (
        _contestants(usual_parts, usual_parts, partial(select_global, parts, k, xs=xs), compiled),
        partial(select_global_ref, parts, k, xs=xs),
    )


def _metric(name: str, weight: Tensor, g: Tensor, k: int, *, compiled: bool) -> tuple[dict[str, Call], Call]:
    """The contestants and the reference of a selection by Pruner-Zero's published metric."""
    metric = compile_metric(parse(METRICS["pruner-zero"].infix))
    score = metric.evaluate(weight, g, None)
    if name.startswith("row"):
        usual = partial(_scored_by_metric, usual_rows, weight, g, k)
        ours = partial(select_rows, weight, k, score=metric, g=g)
        return _contestants(usual, usual, ours, compiled), partial(select_rows_ref, score, k, absolute=False)
    n, m = map(int, name.split(":"))
    usual = partial(_scored_by_metric, usual_nm, weight, g, n, m)
    vectorised = partial(_scored_by_metric, vectorised_nm, weight, g, n, m)
    ours = partial(select_nm, weight, n, m, score=metric, g=g)
    return _contestants(usual, vectorised, ours, compiled), partial(select_nm_ref, score, n, m, absolute=False)


def _contestants(usual: partial[Any], for_compiler: partial[Any], ours: Call, compiled: bool) -> dict[str, Call]:
    found = {"usual": usual}
    if for_compiler is not usual:
        found["vectorised"] = for_compiler
    if compiled:
        # Whole graphs alone: what falls back to eager would be measured under the wrong name.
        compiled_call = torch.compile(for_compiler.func, fullgraph=True, dynamic=False)
        found["torch.compile"] = partial(compiled_call, *for_compiler.args)
    return found | {"trisparse": ours}


def _scored(mask: Callable[..., Tensor], weight: Tensor, x: Tensor | None, *budget: int) -> Tensor:
    return mask(scores(weight, x), *budget)


def _scored_by_metric(mask: Callable[..., Tensor], weight: Tensor, g: Tensor, *budget: int) -> Tensor:
    return mask(published_metric(weight, g), *budget)


def _scored_parts(mask: Callable[..., list[Tensor]], parts: list[Tensor], x: Tensor | None, k: int) -> list[Tensor]:
    return mask([scores(part, x) for part in parts], k)


def _check(result: Any, expected: Any) -> None:
    """One mask, or one for each tensor of a global selection."""
    if isinstance(expected, Tensor):
        result, expected = [result], [expected]
    for own, right in zip(result, expected, strict=True):
        equal(own, right)


def _between_values(score: Tensor) -> int:
    """About half of the elements, so that the least that is kept and the greatest that is pruned differ."""
    return int((score >= score.flatten().median()).sum())
