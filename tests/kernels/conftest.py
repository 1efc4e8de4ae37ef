"""Weights that break selections, and an oracle that shares no code with them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _awkward(rows: int, cols: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    special = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 2.0**-24, -(2.0**-24), 1e-40, 2e-45])
    picks = torch.randint(0, len(special), (rows, cols), generator=generator)
    return {
        "normal": normal(rows, cols),
        "strided rows": normal(rows, cols + 5)[:, 2 : 2 + cols],
        "every other row": normal(2 * rows, cols)[::2],
        "all equal": torch.full((rows, cols), -1.5, dtype=dtype),
        "all zero": torch.zeros(rows, cols, dtype=dtype),
        "zeros of both signs": torch.zeros(rows, cols, dtype=dtype) * normal(rows, cols),
        "few values": (normal(rows, cols) * 2).round() / 2,
        "special values": special[picks].to(dtype),
        "subnormals": (normal(rows, cols).float() * 1e-39).to(dtype),
    }


@pytest.fixture(scope="session")
def awkward() -> Callable[[int, int, torch.dtype], dict[str, Tensor]]:
    """Named weights [rows, cols] of a dtype: ties, zeros of both signs, infinities, subnormals, strides."""
    return functools.cache(_awkward)


@pytest.fixture(scope="session")
def greatest() -> Callable[[Sequence[float], int], list[bool]]:
    """Which of some scores are among the k greatest, ties to the lower index: a sort in plain Python."""

    def mark(scores: Sequence[float], k: int) -> list[bool]:
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        kept = set(order[:k])
        return [i in kept for i in range(len(scores))]

    return mark


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """fp32, fp16 and bf16."""
    value = request.param
    assert isinstance(value, torch.dtype)
    return value
