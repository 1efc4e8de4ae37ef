"""Row selection: keep exactly the k greatest scores of each row.

    mask[i, j] = (score[i, j] is among the k greatest of row i),  score = |W| * X or W * X

W [rows, cols], X [cols] -> mask [rows, cols] bool. Equal scores: the lower index is kept, so that every
backend gives the identical mask. Source: Wanda prunes per output row (Sun et al. 2024,
https://arxiv.org/abs/2306.11695, section 3), where a stable sort with int64 indices, a scatter and a select
move more than ten times the bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trisparse.kernels.bitmask import empty_mask, pack_bits
from trisparse.kernels.launch import by_kernel
from trisparse.kernels.operation import Operation
from trisparse.kernels.score import (
    Chunks,
    Keys,
    check_budget,
    check_disjoint,
    check_out,
    check_weight,
    check_writable,
    check_x,
    checked_score_ref,
    raise_if_nan,
    run_chunks,
)


def select_rows_ref(weight: Tensor, k: int, *, x: Tensor | None = None, absolute: bool = True) -> Tensor:
    """The specification of `select_rows`: a stable descending sort of each row."""
    score = checked_score_ref(weight, x, absolute, "weight", "x")
    check_budget(k, weight.shape[1], "the columns of weight")
    order = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros(score.shape, dtype=torch.bool, device=score.device).scatter_(1, order, True)


def select_rows(
    weight: Tensor,
    k: int,
    *,
    x: Tensor | None = None,
    absolute: bool = True,
    out: str = "mask",
    apply: bool = False,
) -> Tensor:
    """Keep exactly the ``k`` greatest scores of each row; ties go to the lower column.

    Args:
        weight: [rows, cols] of fp32, fp16, bf16 or fp64, the inner dimension contiguous.
        k: how many to keep in each row, 0 <= k <= cols.
        x: None, or [cols] of a float dtype on the weight's device; the score is multiplied by it in fp32.
        absolute: rank by ``|weight|``; False ranks by ``weight`` itself, which then is the score.
        out: "mask", or "packed" for the packed bits of kernels/bitmask.py.
        apply: also zero the others in ``weight``, in place.

    Returns:
        The mask, bool [rows, cols] with True = kept, or the packed mask, uint8 [rows, ceil(cols/8)].

    Raises:
        ValueError: a wrong dtype, shape, stride, device, ``k`` or ``out``, overlapping memory, or a NaN score
            (then ``weight`` may have been zeroed in part where ``apply`` was asked).
    """
    check_weight(weight, "weight")
    check_x(x, weight, "x")
    check_budget(k, weight.shape[1], "the columns of weight")
    check_out(out, ("mask", "packed"))
    if apply:
        check_writable(weight, "weight")
    operation = _IN_PLACE if apply else _FUNCTIONAL
    return operation(weight.detach(), k, None if x is None else x.detach(), absolute, out)


def _run(weight: Tensor, k: int, x: Tensor | None, absolute: bool, out: str) -> Tensor:
    return _select(weight, k, x, absolute, out, apply=False)


def _run_in_place(weight: Tensor, k: int, x: Tensor | None, absolute: bool, out: str) -> Tensor:
    check_disjoint({"weight": weight}, {"x": x})
    return _select(weight, k, x, absolute, out, apply=True)


def _result(weight: Tensor, k: int, x: Tensor | None, absolute: bool, out: str) -> Tensor:
    return empty_mask(weight, out)


_FUNCTIONAL = Operation("select_rows", _run, _result, reads_back=True)
_IN_PLACE = Operation("select_rows_", _run_in_place, _result, mutates=("weight",), reads_back=True)


def _select(weight: Tensor, k: int, x: Tensor | None, absolute: bool, out: str, apply: bool) -> Tensor:
    if by_kernel(weight) and weight.dtype != torch.float64:
        return _by_kernel(weight, k, x, absolute, out, apply)
    if weight.device.type == "cpu":
        mask = _select_cpu(weight, k, x, absolute)
    else:
        mask = select_rows_ref(weight, k, x=x, absolute=absolute)
    if apply:
        weight.masked_fill_(~mask, 0)
    return pack_bits(mask) if out == "packed" else mask


def _by_kernel(weight: Tensor, k: int, x: Tensor | None, absolute: bool, out: str, apply: bool) -> Tensor:
    from trisparse.kernels.select_triton import select_rows_triton  # Triton is there on Linux only

    result = empty_mask(weight, out)
    nan = weight.new_zeros(1, dtype=torch.int32)
    select_rows_triton(weight, k, x=x, absolute=absolute, zero=apply, outputs={out: result}, nan=nan)
    raise_if_nan(nan, "weight", "x", x)
    return result


def _select_cpu(weight: Tensor, k: int, x: Tensor | None, absolute: bool) -> Tensor:
    rows, cols = weight.shape
    chunks = Chunks(weight, x, absolute, "weight", "x")
    mask = torch.empty(rows, cols, dtype=torch.bool)
    kept = mask.numpy()

    def select(start: int, stop: int) -> None:
        keys = chunks.keys(start, stop)  # read even for k = 0 and k = cols, so that a NaN never passes
        part = kept[start:stop]
        if k in (0, cols):
            part[:] = k > 0
            return
        ordered = np.partition(keys, cols - k, axis=1)
        threshold = ordered[:, cols - k, None]
        np.greater_equal(keys, threshold, out=part)
        # More than k reach the threshold where one of those below its place equals it.
        tied = np.flatnonzero(ordered[:, : cols - k].max(axis=1) == threshold[:, 0])
        if tied.size:
            _drop_ties(part, keys, threshold, k, tied)

    run_chunks(select, chunks.spans)
    return mask


def _drop_ties(part: npt.NDArray[np.bool_], keys: Keys, threshold: Keys, k: int, rows: npt.NDArray[np.int64]) -> None:
    """In each of ``rows``, unmark the last of the elements that equal the threshold until ``k`` are left."""
    for row in rows.tolist():
        surplus = int(np.count_nonzero(part[row])) - k
        equal = np.flatnonzero(keys[row] == threshold[row])
        part[row, equal[equal.size - surplus :]] = False
