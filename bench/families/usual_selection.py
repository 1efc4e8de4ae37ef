"""Masks as they are usually made in eager PyTorch, what torch.compile is given, and weights on which all agree.

The usual routes break ties as they happen to, ours to the lower index. The scores made here have none at the threshold,
so that every right mask is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_X_EXPONENTS = 2  # X is 2^-2 ... 2^2: products with it are exact
_BF16_SCORES = 250 << 7  # bf16 values of one sign that stay normal under X
_BF16_SQUARES = 125 << 7  # and whose squares do


def scores(weight: Tensor, x: Tensor | None) -> Tensor:
    """|W| or |W| · X."""
    return weight.abs() if x is None else weight.abs() * x.reshape(1, -1)


def published_metric(weight: Tensor, g: Tensor) -> Tensor:
    """Pruner-Zero's published metric, |W · W| · mms(G), with G scaled to 0..1 in the matrix."""
    squares = (weight.float() * weight.float()).abs()
    return squares * ((g - g.min()) / (g.max() - g.min()))


def usual_rows(metric: Tensor, k: int) -> Tensor:
    """Wanda's unstructured mask (its lib/prune.py): stable sort of every row, scatter of the indices pruned."""
    pruned = torch.zeros_like(metric) == 1
    order = torch.sort(metric, dim=-1, stable=True)[1]
    pruned.scatter_(1, order[:, : metric.shape[1] - k], True)
    return ~pruned


def usual_nm(metric: Tensor, n: int, m: int) -> Tensor:
    """Wanda's N:M mask (its lib/prune.py): for every group of m columns, topk of the pruned and a scatter."""
    pruned = torch.zeros_like(metric) == 1
    for start in range(0, metric.shape[1], m):
        group = metric[:, start : start + m].float()
        pruned.scatter_(1, start + torch.topk(group, m - n, dim=1, largest=False)[1], True)
    return ~pruned


def vectorised_nm(metric: Tensor, n: int, m: int) -> Tensor:
    """The same mask without the loop: topk of all groups at once."""
    groups = metric.reshape(metric.shape[0], -1, m)
    pruned = torch.zeros_like(groups) == 1
    pruned.scatter_(2, torch.topk(groups, m - n, dim=2, largest=False)[1], True)
    return ~pruned.reshape(metric.shape)


def usual_layer(metric: Tensor, k: int) -> Tensor:
    """The usual layer-wide mask: sort all scores, compare with the k-th."""
    return metric >= torch.sort(metric.flatten(), descending=True)[0][k - 1]


def usual_global(metrics: Sequence[Tensor], k: int) -> list[Tensor]:
    """The masks of torch.nn.utils.prune.global_unstructured: topk of all scores, concatenated, for the pruned."""
    together = torch.cat([metric.reshape(-1) for metric in metrics])
    mask = torch.ones_like(together, dtype=torch.bool)
    mask[torch.topk(together, together.numel() - k, largest=False)[1]] = False
    parts = mask.split([metric.numel() for metric in metrics])
    return [part.reshape(metric.shape) for part, metric in zip(parts, metrics, strict=True)]


@cache
def compiler_problem(device: str) -> str | None:
    """Why torch.compile does not work for ``device`` here; None where it does."""
    torch.compiler.reset()
    try:
        torch.compile(lambda x: x.abs() + 1, fullgraph=True)(torch.zeros(4, device=device))
    except Exception as problem:  # whatever a missing or broken compiler raises
        return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem).strip() else ''}"
    return None


def powers_of_two(cols: int, device: torch.device) -> Tensor:
    """An X [cols], fp32, that scales without rounding."""
    exponents = torch.randint(-_X_EXPONENTS, _X_EXPONENTS + 1, (cols,), generator=_generator(1))
    return (2.0**exponents).to(device)


def tie_free(rows: int, cols: int, dtype: torch.dtype, x: Tensor | None, device: torch.device) -> Tensor:
    """A weight [rows, cols] of both signs; no two of its scores |W| · X are equal (bf16: none of the same row).

    Args:
        rows, cols: shape.
        dtype: float32 or bfloat16.
        x: None, or from :func:`powers_of_two`.
        device: of the result.

    Raises:
        ValueError: another dtype, or more columns than bf16 has values for.
    """
    if dtype == torch.float32:
        order = torch.randperm(rows * cols, generator=_generator(0)).reshape(rows, cols)
        magnitude = (order + 0x3F80_0000).to(torch.int32).view(torch.float32)  # consecutive floats from 1.0 on
    elif dtype == torch.bfloat16:
        if cols > _BF16_SCORES:
            raise ValueError(f"bfloat16 has too few values for {cols} columns without ties")
        magnitude = (_ranks(rows, cols) + 0x3F80 - cols // 2).to(torch.int16).view(torch.bfloat16)
    else:
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype}")
    weight = (magnitude * _signs(rows, cols)).to(dtype).to(device)
    return weight if x is None else (weight / x).to(dtype)


def tie_free_squares(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """W [rows, cols] and G (fp32) with exact and, in each row, different W² · mms(G); None where the dtype has none.

    W has so few digits that its squares are exact, and G is 1/2 or 1 but for one 0, so that mms(G) is G. Equal scores
    would take w² = 2 v², which no two rational numbers have.

    Args: as for :func:`tie_free`.
    """
    ranks = _ranks(rows, cols) - cols // 2
    if dtype == torch.float32:
        magnitude = ((ranks << 12) + 0x3F80_0000).to(torch.int32).view(torch.float32)
    elif cols <= _BF16_SQUARES:
        magnitude = (ranks + 0x3F80).to(torch.int16).view(torch.bfloat16)
    else:
        return None
    g = torch.randint(1, 3, (rows, cols), generator=_generator(3)) / 2
    g[0, 0], g[-1, -1] = 0, 1
    return (magnitude * _signs(rows, cols)).to(dtype).to(device), g.to(device)


def _ranks(rows: int, cols: int) -> Tensor:
    """In each row every number below ``cols`` once, [rows, cols]."""
    shuffled = torch.randperm(cols, generator=_generator(0))
    shifts = torch.randint(0, cols, (rows, 1), generator=_generator(4))
    return shuffled[(torch.arange(cols) + shifts) % cols]


def _signs(rows: int, cols: int) -> Tensor:
    return torch.randint(0, 2, (rows, cols), generator=_generator(2), dtype=torch.int8) * 2 - 1


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
