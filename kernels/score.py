"""The score that every selection ranks by, its checks, and its order-preserving integer keys.

    score = |W| * X    (``absolute``; X = 1 when not given)        W [rows, cols], X [cols]
    score =  W  * X    (not ``absolute``)

in fp32 (fp64 for an fp64 weight). Greater scores are kept; of equal scores the lower index is kept; -0 equals +0.
|W| * X is Wanda's criterion (Sun et al. 2024, https://arxiv.org/abs/2306.11695, equation 1).

A key is an integer that orders as the score does: the bits of the float, where a negative one becomes minus
its magnitude. So -0 and +0 share the key 0, and each NaN lies beyond the key of an infinity. Selecting by keys
needs no float comparison, and 16-bit weights without X need half the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CHUNK = 1 << 17  # Elements handled at a time: keys and bytes of a chunk stay in a core's second-level cache.

Keys = npt.NDArray[np.signedinteger[Any]]

_MAGNITUDE = {np.int16: 0x7FFF, np.int32: 0x7FFF_FFFF, np.int64: 0x7FFF_FFFF_FFFF_FFFF}
# The bits of +Inf as a signed integer; a greater magnitude is a NaN.
_INFINITY = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}
_INTEGER = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def score_ref(weight: Tensor, x: Tensor | None, absolute: bool) -> Tensor:
    """The score in fp32 (fp64 for fp64), [rows, cols]; see the module's docstring."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    score = weight.to(dtype)
    if absolute:
        score = score.abs()
    return score if x is None else score * x.to(dtype)


def checked_score_ref(weight: Tensor, x: Tensor | None, absolute: bool, name: str, x_name: str) -> Tensor:
    """`score_ref` after `check_weight` and `check_x`; a NaN score is a ValueError."""
    check_weight(weight, name)
    check_x(x, weight, x_name)
    score = score_ref(weight, x, absolute)
    if bool(score.isnan().any()):
        raise nan_error(name, x_name, x)
    return score


def check_weight(weight: Tensor, name: str) -> None:
    """Raise a ValueError unless ``weight`` is 2-D, of a supported dtype, with a contiguous inner dimension."""
    if weight.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"{name} has dtype {weight.dtype}; allowed are {allowed}")
    if weight.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; it must have 2 dimensions, [rows, cols]")
    check_inner(weight, name)


def check_inner(tensor: Tensor, name: str) -> None:
    """Raise a ValueError unless the inner dimension of a 2-D tensor is contiguous."""
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}; its inner dimension must be contiguous (stride 1): "
            f"pass {name}.contiguous()"
        )


def check_x(x: Tensor | None, weight: Tensor, name: str) -> None:
    """Raise a ValueError unless ``x`` is None or a float vector with one entry per column of ``weight``."""
    if x is None:
        return
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}; allowed are {', '.join(str(dtype) for dtype in DTYPES)}")
    if x.dim() != 1 or x.shape[0] != weight.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be ({weight.shape[1]},), one entry per column of the weight"
        )
    if x.device != weight.device:
        raise ValueError(f"{name} is on {x.device}; it must be on the weight's device, {weight.device}")


def check_budget(k: int, limit: int, what: str) -> None:
    """Raise a ValueError unless ``k`` is an int in 0..limit."""
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= limit:
        raise ValueError(f"k is {k!r}; it must be an int in 0..{limit} ({what})")


def nan_error(name: str, x_name: str, x: Tensor | None) -> ValueError:
    """The error for a NaN score."""
    cause = name if x is None else f"{name} times {x_name}"
    return ValueError(f"{cause} gives NaN scores; a score must be a number (Inf is allowed, Inf * 0 is not)")


class Chunks:
    """The keys of a CPU weight [rows, cols], made a few rows at a time.

    ``keys(start, stop)`` gives those of the rows start..stop as a fresh contiguous array, and raises a
    ValueError when one is a NaN. ``spans`` are the (start, stop) that cover all rows.
    """

    def __init__(self, weight: Tensor, x: Tensor | None, absolute: bool, name: str, x_name: str) -> None:
        weight = weight.detach()
        self.shape = (weight.shape[0], weight.shape[1])
        self._error = nan_error(name, x_name, x)
        self._absolute = absolute
        self._x: npt.NDArray[np.floating[Any]] | None = None
        score_dtype = weight.dtype
        if x is not None:
            score_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            self._x = x.detach().to(score_dtype).numpy()
        self._is_bfloat16 = weight.dtype == torch.bfloat16
        # |W| * X is never negative when X is not: then the magnitude bits are the key already.
        self._nonnegative = absolute and (self._x is None or not bool((self._x < 0).any()))
        self._integer = torch.empty(0, dtype=_INTEGER[score_dtype]).numpy().dtype
        self._infinity = _INFINITY[score_dtype]
        self._weight = weight.view(torch.int16).numpy() if self._is_bfloat16 else weight.numpy()
        step = max(1, CHUNK // max(1, self.shape[1]))
        self.spans = [(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step)]

    def keys(self, start: int, stop: int) -> Keys:
        """Keys of rows start..stop, a fresh contiguous [stop - start, cols]."""
        part = self._weight[start:stop]
        if self._x is not None:
            if self._is_bfloat16:  # NumPy has no bf16; its bits are the upper half of the fp32 of the same value.
                part = np.left_shift(part.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
            score = part.astype(self._x.dtype, order="C")
            if self._absolute:
                np.abs(score, out=score)
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                score *= self._x
            keys: Keys = score.view(self._integer)
        else:
            keys = np.array(part.view(self._integer), order="C")
        magnitude = keys.dtype.type(_MAGNITUDE[keys.dtype.type])
        if self._nonnegative:
            keys &= magnitude
        else:
            sign = keys >> (keys.dtype.itemsize * 8 - 1)  # 0 or -1; (key ^ -1) + 1 = -key
            keys &= magnitude
            keys ^= sign
            keys -= sign
        if keys.size and (keys.max() > self._infinity or (not self._nonnegative and keys.min() < -self._infinity)):
            raise self._error
        return keys


def run_chunks(work: Callable[[int, int], Any], spans: list[tuple[int, int]]) -> list[Any]:
    """``[work(start, stop) for start, stop in spans]`` in as many threads as torch uses; NumPy frees the GIL."""
    threads = min(torch.get_num_threads(), len(spans))
    if threads <= 1:
        return [work(start, stop) for start, stop in spans]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda span: work(*span), spans))
