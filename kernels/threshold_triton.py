# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of global selection; the operation and its reference are in kernels/threshold.py.

The same plan as on the CPU: a fixed random sample brackets the k-th score; one read counts what lies beyond
the bracket and collects what lies inside (about 2% of the weights, which alone are sorted); one read writes
the masks. Where only some of the scores equal to the k-th are kept, one more read counts them per program,
so that each program knows how many came before it. Neither copies nor index tensors of the size of the
weights are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trisparse.kernels.launch import launch
from trisparse.kernels.score import nan_error, score_ref
from trisparse.kernels.score_triton import widen

_SAMPLES = 1 << 16
_MARGIN = 5 * (1 << 7)  # five standard deviations of the k-th score's place in the sample
_BLOCK = 2048


@triton.jit
def _tile(w_ptr, x_ptr, rows, cols, stride_w, HAS_X: tl.constexpr, ABSOLUTE: tl.constexpr, BLOCK: tl.constexpr):
    """(row, columns, whether they exist, scores) of this program: BLOCK columns of a row, in flat order."""
    blocks = tl.cdiv(cols, BLOCK)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    i = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = widen(tl.load(w_ptr + row * stride_w + i, mask=i < cols, other=0.0))
    if ABSOLUTE:
        s = tl.abs(s)
    if HAS_X:
        s = s * tl.load(x_ptr + i, mask=i < cols, other=0.0)
    return row, i, i < cols, s


@triton.jit
def bracket_kernel(
    w_ptr,  # [rows, cols], rows stride_w apart
    x_ptr,  # [cols] fp32 if HAS_X
    bracket_ptr,  # [2] fp32: low, high
    count_ptr,  # [5] int64: scores > high, >= high, > low, >= low; strictly between
    inside_ptr,  # [capacity] fp32: the scores strictly between, in any order
    nan_ptr,  # [tensors] int32, one of them set when a score is a NaN
    capacity,
    tensor,
    rows,
    cols,
    stride_w,
    HAS_X: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count against the bracket, and collect what is inside."""
    _, _, there, s = _tile(w_ptr, x_ptr, rows, cols, stride_w, HAS_X, ABSOLUTE, BLOCK)
    low, high = tl.load(bracket_ptr), tl.load(bracket_ptr + 1)
    if tl.max((there & (s != s)).to(tl.int32), 0) != 0:
        tl.store(nan_ptr + tensor, 1)
    tl.atomic_add(count_ptr, tl.sum((there & (s > high)).to(tl.int32), 0).to(tl.int64))
    tl.atomic_add(count_ptr + 1, tl.sum((there & (s >= high)).to(tl.int32), 0).to(tl.int64))
    tl.atomic_add(count_ptr + 2, tl.sum((there & (s > low)).to(tl.int32), 0).to(tl.int64))
    tl.atomic_add(count_ptr + 3, tl.sum((there & (s >= low)).to(tl.int32), 0).to(tl.int64))
    inside = (there & (s > low) & (s < high)).to(tl.int32)
    found = tl.sum(inside, 0)
    if found > 0:
        at = tl.atomic_add(count_ptr + 4, found.to(tl.int64)) + tl.cumsum(inside, 0) - 1
        tl.store(inside_ptr + at, s, mask=(inside != 0) & (at < capacity))


@triton.jit
def equal_kernel(
    w_ptr, x_ptr, threshold_ptr, equal_ptr, rows, cols, stride_w,
    HAS_X: tl.constexpr, ABSOLUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many scores of each program equal the threshold: equal [programs] int32."""
    _, _, there, s = _tile(w_ptr, x_ptr, rows, cols, stride_w, HAS_X, ABSOLUTE, BLOCK)
    equal = there & (s == tl.load(threshold_ptr))
    tl.store(equal_ptr + tl.program_id(0), tl.sum(equal.to(tl.int32), 0))


@triton.jit
def write_kernel(
    w_ptr,  # [rows, cols], rows stride_w apart; zeroed in place if ZERO
    x_ptr,  # [cols] fp32 if HAS_X
    threshold_ptr,  # [1] fp32
    before_ptr,  # [programs] int64: how many equal scores come before each program, if TIES
    mask_ptr,  # [rows, cols] bytes 0 and 1
    ties,  # how many equal scores are kept, if TIES; else all
    rows,
    cols,
    stride_w,
    TIES: tl.constexpr,
    HAS_X: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the mask: scores above the threshold, and the first `ties` equal to it."""
    row, i, there, s = _tile(w_ptr, x_ptr, rows, cols, stride_w, HAS_X, ABSOLUTE, BLOCK)
    threshold = tl.load(threshold_ptr)
    if TIES:
        equal = there & (s == threshold)
        rank = tl.load(before_ptr + tl.program_id(0)) + tl.cumsum(equal.to(tl.int32), 0)
        keep = (s > threshold) | (equal & (rank <= ties))
    else:
        keep = s >= threshold
    tl.store(mask_ptr + row * cols + i, keep.to(tl.uint8), mask=there)
    if ZERO:
        at = w_ptr + row * stride_w + i
        tl.store(at, tl.where(keep, tl.load(at, mask=there, other=0.0), 0.0).to(w_ptr.dtype.element_ty), mask=there)


@dataclass
class _Part:
    """One tensor as the kernels take it: a contiguous one without x is a single row."""

    weight: Tensor
    x: Tensor | None

    def __post_init__(self) -> None:
        self.weight = self.weight.detach()
        if self.x is None and self.weight.is_contiguous():
            self.weight = self.weight.view(1, -1)
        if self.x is not None:
            self.x = self.x.to(torch.float32)
        rows, cols = self.weight.shape
        self.programs = rows * triton.cdiv(cols, _BLOCK)
        self.shape = (rows, cols, self.weight.stride(0))


def select_global_triton(
    weights: Sequence[Tensor], k: int, vectors: Sequence[Tensor | None], absolute: bool, zero: bool
) -> list[Tensor]:
    """The masks of checked, not all empty weights."""
    parts = [_Part(weight, x) for weight, x in zip(weights, vectors, strict=True)]
    device, total = weights[0].device, sum(weight.numel() for weight in weights)
    masks = [torch.empty(weight.shape, dtype=torch.bool, device=device) for weight in weights]
    threshold, ties = _threshold(parts, weights, vectors, k, total, absolute)
    before = None
    if ties is not None:
        equal = torch.zeros(sum(part.programs for part in parts), dtype=torch.int32, device=device)
        start = 0
        for part in parts:
            launch(
                equal_kernel,
                (part.programs,),
                part.weight,
                threshold if part.x is None else part.x,
                threshold,
                equal[start:],
                *part.shape,
                HAS_X=part.x is not None,
                ABSOLUTE=absolute,
                BLOCK=_BLOCK,
            )
            start += part.programs
        before = equal.cumsum(0) - equal
    start = 0
    for part, mask in zip(parts, masks, strict=True):
        launch(
            write_kernel,
            (part.programs,),
            part.weight,
            threshold if part.x is None else part.x,
            threshold,
            threshold if before is None else before[start:],
            mask.view(torch.uint8),
            ties or 0,
            *part.shape,
            TIES=ties is not None,
            HAS_X=part.x is not None,
            ABSOLUTE=absolute,
            ZERO=zero,
            BLOCK=_BLOCK,
        )
        start += part.programs
    return masks


def _threshold(
    parts: list[_Part],
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor | None],
    k: int,
    total: int,
    absolute: bool,
) -> tuple[Tensor, int | None]:
    """(threshold [1] fp32, ties): kept are the scores above it and the first ``ties`` equal (None: all)."""
    device = weights[0].device
    bracket = _bracket(weights, vectors, k, total, absolute)
    capacity = total if total <= 4 * _SAMPLES else total // 16
    while True:
        counts = torch.zeros(5, dtype=torch.int64, device=device)
        nan = torch.zeros(len(parts), dtype=torch.int32, device=device)
        inside = torch.empty(max(capacity, 1), dtype=torch.float32, device=device)
        for number, part in enumerate(parts):
            launch(
                bracket_kernel,
                (part.programs,),
                part.weight,
                bracket if part.x is None else part.x,
                bracket,
                counts,
                inside,
                nan,
                capacity,
                number,
                *part.shape,
                HAS_X=part.x is not None,
                ABSOLUTE=absolute,
                BLOCK=_BLOCK,
            )
        if device.type == "meta":  # compiling only: nothing was counted
            return bracket[:1], 1
        if bool(nan.any()):
            bad = int(nan.nonzero()[0, 0])
            raise nan_error(f"weights[{bad}]", f"xs[{bad}]", vectors[bad])
        above_high, from_high, above_low, from_low, between = counts.tolist()
        if k == 0:
            return torch.full((1,), torch.nan, device=device), None
        if k <= above_high:  # the sample was unlucky: the k-th lies above the bracket
            bracket = torch.stack([bracket[1], torch.full_like(bracket[1], torch.inf)])
        elif k > from_low:
            bracket = torch.stack([torch.full_like(bracket[0], -torch.inf), bracket[0]])
        elif from_high < k <= above_low and between > capacity:
            capacity = between
        else:
            break
    if k <= from_high:
        value, above, equal = bracket[1:], above_high, from_high - above_high
    elif k > above_low:
        value, above, equal = bracket[:1], above_low, from_low - above_low
    else:
        found = inside[:between].sort().values
        place = between - (k - from_high)
        value = found[place : place + 1].clone()
        above = from_high + int((found > value).sum())
        equal = int((found == value).sum())
    return value, None if k - above == equal else k - above


def _bracket(weights: Sequence[Tensor], vectors: Sequence[Tensor | None], k: int, total: int, absolute: bool) -> Tensor:
    """[low, high] fp32: scores that very probably hold the k-th greatest between them."""
    device = weights[0].device
    if total <= 4 * _SAMPLES or device.type == "meta":
        return torch.tensor([-torch.inf, torch.inf], device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    samples = []
    for weight, x in zip(weights, vectors, strict=True):
        rows, cols = weight.shape
        size = (-(-_SAMPLES * weight.numel() // total),)
        if not weight.numel():
            continue
        row = torch.randint(0, rows, size, generator=generator, device=device)
        col = torch.randint(0, cols, size, generator=generator, device=device)
        picked = weight.detach()[row, col]
        samples.append(score_ref(picked, None if x is None else x[col], absolute))
    sample = torch.cat(samples).sort().values
    place = sample.shape[0] - round(sample.shape[0] * (k / total))
    low, high = place - _MARGIN, place + _MARGIN
    infinity = torch.full_like(sample[0], torch.inf)
    return torch.stack([-infinity if low < 0 else sample[low], infinity if high >= sample.shape[0] else sample[high]])
