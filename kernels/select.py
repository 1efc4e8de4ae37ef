"""Row selection: keep exactly the k greatest scores of each row.

    mask[i, j] = (score[i, j] is among the k greatest of row i),  score = |W| * X or W * X     (kernels/score.py)

W [rows, cols], X [cols] -> mask [rows, cols] bool. Equal scores: the lower index is kept, so that every backend
gives the identical mask. Source: Wanda prunes per output row (Sun et al. 2024, https://arxiv.org/abs/2306.11695,
section 3), where a stable sort with int64 indices, a scatter and a select move more than ten times the bytes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trisparse.kernels.score import Chunks, check_budget, check_weight, check_x, checked_score_ref, run_chunks


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
        threshold = np.partition(keys, cols - k, axis=1)[:, cols - k, None]
        np.greater_equal(keys, threshold, out=part)
        surplus = part.view(np.uint8).sum(axis=1, dtype=np.int64) - k
        rows_over = np.flatnonzero(surplus)
        if rows_over.size:
            _drop_ties(part, keys, threshold, surplus, rows_over)

    run_chunks(select, chunks.spans)
    return mask


def _drop_ties(
    part: np.ndarray, keys: np.ndarray, threshold: np.ndarray, surplus: np.ndarray, rows: np.ndarray
) -> None:
    """In each of ``rows``, unmark the last ``surplus`` elements that equal the threshold."""
    cols = keys.shape[1]
    every = rows.size == keys.shape[0]
    tied = np.flatnonzero(keys == threshold if every else keys[rows] == threshold[rows])
    row = tied // cols  # position within `rows`; `tied` is sorted by row, then by column
    end = np.searchsorted(row, np.arange(1, rows.size + 1))
    drop = np.arange(tied.size) >= (end - surplus[rows])[row]
    part[rows[row[drop]], tied[drop] % cols] = False
