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

from trisparse.kernels.score import (
    Chunks,
    Keys,
    check_budget,
    check_weight,
    check_x,
    checked_score_ref,
    run_chunks,
)


def select_rows_ref(weight: Tensor, k: int, *, x: Tensor | None = None, absolute: bool = True) -> Tensor:
    """The specification of `select_rows`: a stable descending sort of each row."""
    score = checked_score_ref(weight, x, absolute, "weight", "x")
    check_budget(k, weight.shape[1], "the columns of weight")
    order = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros(score.shape, dtype=torch.bool, device=score.device).scatter_(1, order, True)


def select_rows(weight: Tensor, k: int, *, x: Tensor | None = None, absolute: bool = True) -> Tensor:
    """Keep exactly the ``k`` greatest scores of each row; ties go to the lower column.

    Args:
        weight: [rows, cols] of fp32, fp16, bf16 or fp64, the inner dimension contiguous.
        k: how many to keep in each row, 0 <= k <= cols.
        x: None, or [cols] of a float dtype on the weight's device; the score is multiplied by it in fp32.
        absolute: rank by ``|weight|``; False ranks by ``weight`` itself, which then is the score.

    Returns:
        [rows, cols] bool, True = kept.

    Raises:
        ValueError: a wrong dtype, shape, stride, device or ``k``, or a NaN score.
    """
    if weight.device.type != "cpu":
        return select_rows_ref(weight, k, x=x, absolute=absolute)
    check_weight(weight, "weight")
    check_x(x, weight, "x")
    rows, cols = weight.shape
    check_budget(k, cols, "the columns of weight")
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
