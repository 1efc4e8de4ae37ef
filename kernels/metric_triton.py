# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

"""Triton kernels of metrics: the statistics that a score needs, and the score matrix; see kernels/metric.py.

A pass reduces tiles, one a program, each to one number (row sums: one a row; column sums: one a column), and torch
reduces those in a fixed order, in fp64: no atomics, so the same inputs give the same bits. A standard deviation comes
from each tile's sum and its squared deviations from its own mean, joined as by Chan, Golub & LeVeque (1983,
https://doi.org/10.1080/00031305.1983.10483115), so that one read does and nothing cancels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trisparse.kernels.launch import launch
from trisparse.kernels.metric import CompiledMetric, Pass
from trisparse.kernels.metric_lower import COLUMN, FULL, NUMBER, ROW, Shape, scalars_padded
from trisparse.kernels.score_triton import max_or_nan, widen

MIN, MAX, SUM, NORM1, NORM2, STD, ROWSUM, COLSUM = range(8)
_KINDS = {"min": MIN, "max": MAX, "sum": SUM, "mean": SUM, "norm1": NORM1, "norm2": NORM2}
_KINDS |= {"std": STD, "rowsum": ROWSUM, "colsum": COLSUM}


@triton.jit
def min_or_nan(a, b):
    """The lesser; a NaN when either is one."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def statistics_kernel(
    w_ptr,  # [rows, cols] if HAS_W, rows stride_w apart
    g_ptr,  # [rows, cols] if the values read G, rows stride_g apart
    x_ptr,  # [cols] fp32 if they read X
    stats_ptr,  # what earlier passes found
    tile_ptr,  # [numbers, tiles] fp32
    row_ptr,  # [row sums, extent_rows, tiles of a row] fp32
    col_ptr,  # [column sums, tiles of a column, extent_cols] fp32
    rows,
    cols,
    extent_rows,  # what the pass runs over: rows, or 1
    extent_cols,  # cols, or 1
    stride_w,
    stride_g,
    VALUES: tl.constexpr,  # the generated function: one value for each of KINDS
    KINDS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    HAS_W: tl.constexpr,
):
    """One tile [R, C]."""
    across = tl.cdiv(extent_cols, C)
    down = tl.cdiv(extent_rows, R)
    tile = tl.program_id(0)
    tiles = across * down
    row = ((tile // across) * R + tl.arange(0, R)[:, None]).to(tl.int64)
    i = (tile % across) * C + tl.arange(0, C)[None, :]
    there = (row < extent_rows) & (i < extent_cols)
    w = 0.0
    if HAS_W:
        w = widen(tl.load(w_ptr + row * stride_w + i, mask=there, other=0.0))
    values = VALUES(w, (g_ptr, stride_g, x_ptr, stats_ptr, rows, cols), row, i, there)
    number = 0
    row_number = 0
    col_number = 0
    for j in tl.static_range(len(KINDS)):
        v = values[j] + tl.zeros([R, C], tl.float32)
        if KINDS[j] == 6:
            sums = tl.sum(tl.where(there, v, 0.0), 1)
            r = (tile // across) * R + tl.arange(0, R)
            at = (row_number * extent_rows + r).to(tl.int64) * across + tile % across
            tl.store(row_ptr + at, sums, mask=r < extent_rows)
            row_number += 1
        elif KINDS[j] == 7:
            sums = tl.sum(tl.where(there, v, 0.0), 0)
            c = (tile % across) * C + tl.arange(0, C)
            at = (col_number * down + tile // across).to(tl.int64) * extent_cols + c
            tl.store(col_ptr + at, sums, mask=c < extent_cols)
            col_number += 1
        else:
            if KINDS[j] == 0:
                found = tl.reduce(tl.where(there, v, float("inf")), None, min_or_nan)
            elif KINDS[j] == 1:
                found = tl.reduce(tl.where(there, v, float("-inf")), None, max_or_nan)
            else:
                if KINDS[j] == 3:
                    v = tl.abs(v)
                elif KINDS[j] == 4:
                    v = v * v
                found = tl.sum(tl.where(there, v, 0.0))
            tl.store(tile_ptr + number * tiles + tile, found)
            number += 1
            if KINDS[j] == 5:
                size = tl.minimum(extent_rows - (tile // across) * R, R) * tl.minimum(
                    extent_cols - (tile % across) * C, C
                )
                d = v - found / size
                tl.store(tile_ptr + number * tiles + tile, tl.sum(tl.where(there, d * d, 0.0)))
                number += 1


@triton.jit
def score_kernel(
    w_ptr,  # [rows, cols], rows stride_w apart
    g_ptr,  # [rows, cols] if the metric reads G, rows stride_g apart
    x_ptr,  # [cols] fp32 if it reads X
    stats_ptr,
    score_ptr,  # [rows, cols] fp32
    rows,
    cols,
    stride_w,
    stride_g,
    SCORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of one row."""
    across = tl.cdiv(cols, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64)
    i = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    w = widen(tl.load(w_ptr + row * stride_w + i, mask=i < cols, other=0.0))
    s = SCORE(w, (g_ptr, stride_g, x_ptr, stats_ptr, rows, cols), row, i, i < cols)
    tl.store(score_ptr + row * cols + i, s, mask=i < cols)


@triton.jit
def sample_kernel(
    w_ptr,  # [rows, cols], rows stride_w apart
    g_ptr,  # [rows, cols] if the metric reads G, rows stride_g apart
    x_ptr,  # [cols] fp32 if it reads X
    stats_ptr,
    row_ptr,  # [count] int64
    col_ptr,  # [count] int64
    score_ptr,  # [count] fp32
    count,
    rows,
    cols,
    stride_w,
    stride_g,
    SCORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores of single elements."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = n < count
    row = tl.load(row_ptr + n, mask=there, other=0)
    i = tl.load(col_ptr + n, mask=there, other=0)
    w = widen(tl.load(w_ptr + row * stride_w + i, mask=there, other=0.0))
    s = SCORE(w, (g_ptr, stride_g, x_ptr, stats_ptr, rows, cols), row, i, there)
    tl.store(score_ptr + n, s, mask=there)


class MetricInputs:
    """What kernels that score on the fly take besides the weight; making it runs the metric's passes.

    Attributes:
        g: [rows, cols]; a stand-in where the metric does not read G.
        x: [cols] fp32, or a stand-in.
        statistics: fp32 buffer, laid out as `Slot.load` reads it.
        text, negative: the metric's.
        constants: SCORE, and that products and sums are not contracted.
    """

    def __init__(self, metric: CompiledMetric, weight: Tensor, g: Tensor | None, x: Tensor | None) -> None:
        rows, cols = weight.shape
        count = {shape: sum(s == shape for _, s in metric.statistics) for shape in (NUMBER, COLUMN, ROW)}
        scalars = scalars_padded(count[NUMBER])
        size = scalars + count[COLUMN] * cols + count[ROW] * rows
        self.statistics = weight.new_empty(max(size, 1), dtype=torch.float32)
        self._parts: dict[Shape, Tensor] = {
            NUMBER: self.statistics[:scalars],
            COLUMN: self.statistics[scalars : scalars + count[COLUMN] * cols].view(-1, cols),
            ROW: self.statistics[scalars + count[COLUMN] * cols : size].view(-1, rows),
        }
        self.x = self.statistics if x is None else x.detach().to(torch.float32).contiguous()
        self.g = weight if g is None else g.detach()
        self.text, self.negative = metric.text, metric.negative
        self._weight, self._metric = weight, metric
        self.constants = {"SCORE": metric.function, "enable_fp_fusion": False}
        for part in metric.passes if weight.numel() else ():
            self._run(part)

    def scores(self) -> Tensor:
        """The score matrix, fp32 [rows, cols]."""
        rows, cols = self._weight.shape
        out = self._weight.new_empty(rows, cols, dtype=torch.float32)
        block = min(1024, triton.next_power_of_2(cols))
        self._launch(score_kernel, rows * triton.cdiv(cols, block), out, rows, cols, BLOCK=block)
        return out

    def scores_at(self, row: Tensor, col: Tensor) -> Tensor:
        """The scores of single elements, fp32 [count]; row and col are int64 [count]."""
        count = row.numel()
        out = self._weight.new_empty(count, dtype=torch.float32)
        programs = triton.cdiv(count, 256)
        self._launch(sample_kernel, programs, row, col, out, count, *self._weight.shape, BLOCK=256)
        return out

    def _launch(self, kernel: Any, programs: int, *args: Any, BLOCK: int) -> None:
        strides = self._weight.stride(0), self.g.stride(0)
        inputs = self._weight, self.g, self.x, self.statistics
        launch(kernel, (programs,), *inputs, *args, *strides, BLOCK=BLOCK, **self.constants)

    def _run(self, part: Pass) -> None:
        """One pass: partial reductions by the kernel, then the rest in torch."""
        rows, cols = self._weight.shape
        kinds = [_KINDS[self._metric.statistics[slot][0]] for slot in part.slots]
        extent_rows, extent_cols = rows if part.shape[0] else 1, cols if part.shape[1] else 1
        # Tiles of 4096 elements, 32 a thread, 8 of them side by side: 16 bytes of bf16. Square ones where there are
        # column sums, whose partial results would else be a quarter of the weight's bytes.
        if part.shape == FULL:
            r, c = (64, 64) if COLSUM in kinds else (4, 1024)
        else:
            r, c = (4096, 1) if part.shape[0] else (1, 4096)
        r, c = min(r, triton.next_power_of_2(extent_rows)), min(c, triton.next_power_of_2(extent_cols))
        down, across = triton.cdiv(extent_rows, r), triton.cdiv(extent_cols, c)
        numbers = sum(kind < ROWSUM for kind in kinds) + kinds.count(STD)
        new = self._weight.new_empty
        tile_sums = new(numbers, down * across, dtype=torch.float32)
        row_sums = new(kinds.count(ROWSUM), extent_rows, across, dtype=torch.float32)
        col_sums = new(kinds.count(COLSUM), down, extent_cols, dtype=torch.float32)
        launch(
            statistics_kernel,
            (down * across,),
            self._weight,
            self.g,
            self.x,
            self.statistics,
            *(sums if sums.numel() else self.statistics for sums in (tile_sums, row_sums, col_sums)),
            rows,
            cols,
            extent_rows,
            extent_cols,
            self._weight.stride(0),
            self.g.stride(0),
            VALUES=getattr(self._metric.module, part.name),
            KINDS=tuple(kinds),
            R=r,
            C=c,
            HAS_W="W" in part.reads,
            enable_fp_fusion=False,
        )
        tiles, by_row, by_col = iter(tile_sums), iter(row_sums), iter(col_sums)
        for slot, kind in zip(part.slots, kinds, strict=True):
            name, shape = self._metric.statistics[slot]
            index = sum(s == shape for _, s in self._metric.statistics[:slot])
            if kind == ROWSUM:
                value = next(by_row).double().sum(1)
            elif kind == COLSUM:
                value = next(by_col).double().sum(0)
            elif kind == STD:
                value = _deviation(next(tiles), next(tiles), extent_rows, extent_cols, r, c)
            else:
                value = _number(name, next(tiles), extent_rows * extent_cols)
            self._parts[shape][index] = value


def _number(name: str, tiles: Tensor, size: int) -> Tensor:
    """min, max, sum, mean, norm1 or norm2 from those of the tiles."""
    if name == "min":
        return tiles.amin()
    if name == "max":
        return tiles.amax()
    total = tiles.double().sum().float()
    return total.sqrt() if name == "norm2" else total / size if name == "mean" else total


def _deviation(sums: Tensor, squares: Tensor, rows: int, cols: int, r: int, c: int) -> Tensor:
    """The standard deviation (unbiased) from each tile's sum and squared deviations from its mean; 0 of one number."""
    if rows * cols == 1:
        return sums.new_zeros(())
    high = torch.arange(0, rows, r, device=sums.device).neg().add(rows).clamp(max=r)
    wide = torch.arange(0, cols, c, device=sums.device).neg().add(cols).clamp(max=c)
    sizes = (high[:, None] * wide).flatten()
    sums = sums.double()
    away = sums / sizes - sums.sum() / (rows * cols)
    return ((squares.double().sum() + (sizes * away * away).sum()) / (rows * cols - 1)).sqrt()
