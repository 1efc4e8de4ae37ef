"""N:M selection: keep exactly the n greatest scores of every m consecutive inputs.

    mask[i, m*g + j] = (score[i, m*g + j] is among the n greatest of group g),  score = |W| * X or W * X

W [rows, cols], X [cols] -> mask [rows, cols] bool; cols % m == 0. Equal scores: the lower index is kept.
Source: 2:4 sparsity of Ampere's tensor cores (Mishra et al. 2021, https://arxiv.org/abs/2104.08378); 2:4 and
4:8 pruning as in Wanda (Sun et al. 2024, https://arxiv.org/abs/2306.11695, section 4.1).

An element is kept when fewer than n of its group come before it: those with a greater score, and those with
an equal score and a lower index. Counting them takes m - 1 comparisons of the weights with themselves,
shifted.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trisparse.kernels.score import Chunks, check_weight, check_x, checked_score_ref, run_chunks

MAX_M = 32  # a group fits one 32-bit word of a packed mask


def check_nm(n: int, m: int, cols: int) -> None:
    """Raise a ValueError unless 1 <= n < m <= 32 and ``cols`` is a multiple of ``m``."""
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} is {value!r}; it must be an int")
    if not 2 <= m <= MAX_M:
        raise ValueError(f"m is {m}; it must be in 2..{MAX_M}")
    if not 1 <= n < m:
        raise ValueError(f"n is {n}; it must be in 1..{m - 1} for m = {m}")
    if cols % m:
        raise ValueError(f"weight has {cols} columns; they must be a multiple of m = {m}")


def select_nm_ref(weight: Tensor, n: int, m: int, *, x: Tensor | None = None, absolute: bool = True) -> Tensor:
    """The specification of `select_nm`: a stable descending sort of each group."""
    score = checked_score_ref(weight, x, absolute, "weight", "x")
    check_nm(n, m, weight.shape[1])
    groups = score.reshape(weight.shape[0], weight.shape[1] // m, m)
    order = torch.sort(groups, dim=2, descending=True, stable=True).indices[..., :n]
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=score.device).scatter_(2, order, True)
    return mask.reshape(weight.shape)


def select_nm(weight: Tensor, n: int, m: int, *, x: Tensor | None = None, absolute: bool = True) -> Tensor:
    """Keep exactly the ``n`` greatest scores of every ``m`` consecutive columns; ties go to the lower column.

    Args:
        weight: [rows, cols] of fp32, fp16, bf16 or fp64, the inner dimension contiguous.
        n: how many to keep in each group, 1 <= n < m.
        m: the size of a group, at most 32.
        x: None, or [cols] of a float dtype on the weight's device; the score is multiplied by it in fp32.
        absolute: rank by ``|weight|``; False ranks by ``weight`` itself, which then is the score.

    Returns:
        [rows, cols] bool, True = kept.

    Raises:
        ValueError: a wrong dtype, shape, stride, device, ``n`` or ``m``, a tail group, or a NaN score.
    """
    if weight.device.type != "cpu":
        return select_nm_ref(weight, n, m, x=x, absolute=absolute)
    check_weight(weight, "weight")
    check_x(x, weight, "x")
    rows, cols = weight.shape
    check_nm(n, m, cols)
    chunks = Chunks(weight, x, absolute, "weight", "x")
    mask = torch.empty(rows, cols, dtype=torch.bool)
    kept = mask.numpy()
    longest = max((stop - start for start, stop in chunks.spans), default=0) * cols
    # after[i]: how many of the group follow i; inside[d][i]: does the group hold i + d, too? All in bytes.
    after = np.tile(np.arange(m - 1, -1, -1, dtype=np.uint8), longest // m)
    inside = [(after >= d).view(np.uint8) for d in range(m)]

    def select(start: int, stop: int) -> None:
        keys = chunks.keys(start, stop).reshape(-1)
        before = after[: keys.size].copy()  # will be how many of the group come before each element
        buffer = np.empty(keys.size, np.bool_)
        for d in range(1, min(m, keys.size)):
            first = buffer[:-d]
            np.greater_equal(keys[:-d], keys[d:], out=first)  # i comes before i + d
            wins = first.view(np.uint8)
            wins &= inside[d][: keys.size - d]
            before[d:] += wins
            before[:-d] -= wins
        np.less(before, n, out=kept[start:stop].reshape(-1))

    run_chunks(select, chunks.spans)
    return mask
