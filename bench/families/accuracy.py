"""When a result in floating point is right: an error of at most twice torch's own, against a wider dtype.

Errors are the greatest ones, relative to the greatest magnitude of what is exact. One unit of the dtype is allowed
besides, where torch happens to hit the exact value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Expected:
    """What is right, and the relative error that each result may have."""

    exact: Results
    allowed: tuple[float, ...]


def wider(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the reference: fp64, on a GPU fp32 for half precision."""
    return torch.float64 if device.type == "cpu" or dtype == torch.float32 else torch.float32


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The greatest error of each result, relative to the greatest magnitude of what is exact; NaN for a NaN."""
    return [
        float((one.to(right.dtype) - right).abs().max()) / (float(right.abs().max()) or 1.0)
        for one, right in zip(found, exact, strict=True)
    ]


def expected(exact: Results, usual: Results) -> Expected:
    """What to hold contestants to, given what torch's own operations make of it in the contestants' dtype."""
    units = [torch.finfo(tensor.dtype).eps for tensor in usual]
    return Expected(exact, tuple(2 * error + unit for error, unit in zip(errors(usual, exact), units, strict=True)))


def check(found: Results, right: Expected) -> None:
    """Raise an AssertionError unless every error is allowed; a NaN never is."""
    for place, (error, allowed) in enumerate(zip(errors(found, right.exact), right.allowed, strict=True)):
        if not error <= allowed:
            raise AssertionError(f"result {place} has a relative error of {error:.1e}, allowed are {allowed:.1e}")
