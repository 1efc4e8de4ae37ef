"""The score that every selection ranks by, its checks, and its order-preserving integer keys.

    score = |W| * X    (``absolute``; X = 1 when not given)        W [rows, cols], X [cols]
    score =  W  * X    (not ``absolute``)

in fp32 (fp64 for an fp64 weight). Greater scores are kept; of equal scores the lower index is kept; -0
equals +0. |W| * X is Wanda's criterion (Sun et al. 2024, https://arxiv.org/abs/2306.11695, equation 1).

A key is an integer that orders as the score does: the bits of the float, where a negative one becomes minus
its magnitude. So -0 and +0 share the key 0, and each NaN lies beyond the key of an infinity. Selecting by
keys needs no float comparison, and 16-bit weights without X need half the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ALLOWED = ", ".join(str(dtype) for dtype in DTYPES)
CHUNK = 1 << 20  # Elements handled at a time: with fewer, two threads spend their time handing the GIL to each other.

Keys = npt.NDArray[np.signedinteger[Any]]

Result = TypeVar("Result")

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
    """Raise a ValueError unless ``weight`` is 2-D, of a float dtype, with a contiguous inner dimension."""
    if weight.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {weight.dtype}; allowed are {_ALLOWED}")
    if weight.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; it must have 2 dimensions, [rows, cols]")
    check_inner(weight, name)


def check_inner(tensor: Tensor, name: str) -> None:
    """Raise a ValueError unless the inner dimension of a 2-D tensor is contiguous."""
    if tensor.numel() and tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}; its inner dimension must be contiguous (stride 1): "
            f"pass {name}.contiguous()"
        )


def check_x(x: Tensor | None, weight: Tensor, name: str) -> None:
    """Raise a ValueError unless ``x`` is None or a float vector with one entry per column of ``weight``."""
    if x is None:
        return
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}; allowed are {_ALLOWED}")
    if x.dim() != 1 or x.shape[0] != weight.shape[1]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be ({weight.shape[1]},), one entry per column")
    if x.device != weight.device:
        raise ValueError(f"{name} is on {x.device}; it must be on the weight's device, {weight.device}")


def check_out(out: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError unless ``out`` is one of ``allowed``."""
    if out not in allowed:
        raise ValueError(f"out is {out!r}; allowed are {', '.join(map(repr, allowed))}")


def check_writable(weight: Tensor, name: str) -> None:
    """Raise a ValueError when rows of ``weight`` share memory, so that writing one would change another."""
    if weight.shape[0] > 1 and weight.stride(0) < weight.shape[1]:
        raise ValueError(f"{name} has strides {weight.stride()}; its rows overlap: pass {name}.clone()")


def check_disjoint(written: Mapping[str, Tensor], read: Mapping[str, Tensor | None]) -> None:
    """Raise a ValueError when one of ``written``, by name, shares a byte with another of them or of ``read``.

    ``written`` are [rows, cols] with an inner stride of 1 whose own rows do not overlap, ``read`` those or
    vectors. Column slices of one buffer, as of a fused QKV weight, interleave but share nothing.
    """
    layouts = [(name, True, _layout(tensor)) for name, tensor in written.items() if _has_memory(tensor)]
    layouts += [(name, False, _layout(t)) for name, t in read.items() if t is not None and _has_memory(t)]
    layouts.sort(key=lambda item: item[2].first)
    open_: list[tuple[str, bool, _Layout]] = []  # those that may reach beyond where the next one begins
    for name, is_written, layout in layouts:
        open_ = [item for item in open_ if item[2].end > layout.first]
        for other, other_is_written, before in open_:
            if (is_written or other_is_written) and _share(before, layout):
                later, earlier = (name, other) if other_is_written else (other, name)
                raise ValueError(
                    f"{later} overlaps the memory of {earlier}, which is to be zeroed in place: pass a clone"
                )
        open_.append((name, is_written, layout))


@dataclass(frozen=True)
class _Layout:
    """``rows`` runs of ``width`` bytes, the first at address ``first``, ``stride`` bytes apart."""

    first: int
    rows: int
    width: int
    stride: int

    @property
    def end(self) -> int:
        return self.first + (self.rows - 1) * self.stride + self.width


def _has_memory(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.device.type != "meta"


def _layout(tensor: Tensor) -> _Layout:
    size = tensor.element_size()
    if tensor.dim() == 1:
        rows, stride, width = tensor.shape[0], tensor.stride(0), 1
    else:
        rows, stride, width = tensor.shape[0], tensor.stride(0), tensor.shape[1]
    if stride == width:  # one run, contiguous
        rows, width = 1, rows * width
    elif stride == 0:  # an expanded vector
        rows = 1
    return _Layout(tensor.data_ptr(), rows, width * size, stride * size if rows > 1 else width * size)


def _share(a: _Layout, b: _Layout) -> bool:
    """Whether a run of ``a`` and one of ``b`` have a byte in common: exact for any two strides."""
    if a.rows > b.rows:
        a, b = b, a
    first = a.first - b.first + np.arange(a.rows, dtype=np.int64) * a.stride
    # Run j of b, from j * stride on, ends beyond first, and begins before first + width.
    least = np.maximum((first - b.width) // b.stride + 1, 0)
    most = np.minimum(-((-first - a.width) // b.stride) - 1, b.rows - 1)
    return bool((least <= most).any())


def raise_if_nan(flag: Tensor, name: str, x_name: str, x: Tensor | None) -> None:
    """Raise what a kernel flagged: one int32, nonzero when a score was a NaN. A meta flag was never computed."""
    if flag.device.type != "meta" and bool(flag.item()):
        raise nan_error(name, x_name, x)


def is_int(value: object) -> bool:
    """Whether it is an int, or what stands for one while torch traces with dynamic shapes; a bool is none."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_budget(k: int, limit: int, what: str) -> None:
    """Raise a ValueError unless ``k`` is an int in 0..limit."""
    if not is_int(k) or not 0 <= k <= limit:
        raise ValueError(f"k is {k!r}; it must be an int in 0..{limit} ({what})")


def nan_error(name: str, x_name: str, x: Tensor | None) -> ValueError:
    """The error for a NaN score."""
    cause = name if x is None else f"{name} times {x_name}"
    return ValueError(f"{cause} gives NaN scores; a score must be a number (Inf is allowed, Inf * 0 is not)")


class Chunks:
    """The keys of a CPU weight [rows, cols], made a few rows at a time.

    ``keys(start, stop)`` gives those of the rows start..stop as a fresh contiguous array, and raises a
    ValueError when one is a NaN. ``spans`` are the (start, stop) that cover all rows. Keys compare with
    those of another weight when both were made with the same ``form``; it defaults to the narrowest.
    """

    def __init__(
        self,
        weight: Tensor,
        x: Tensor | None,
        absolute: bool,
        name: str,
        x_name: str,
        form: torch.dtype | None = None,
    ) -> None:
        weight = weight.detach()
        rows, cols = weight.shape
        self.shape = (rows, cols)
        self._names = (name, x_name, x)
        self._absolute = absolute
        self._is_bfloat16 = weight.dtype == torch.bfloat16
        self._weight = weight.view(torch.int16).numpy() if self._is_bfloat16 else weight.numpy()
        score_dtype = score_form(weight, x)
        form = form or score_dtype
        converts = x is not None or form != weight.dtype
        self._score_dtype = _numpy_dtype(form if x is None else score_dtype) if converts else None
        self._form = _numpy_dtype(form) if form != torch.bfloat16 else None
        self._integer = _numpy_dtype(_INTEGER[form])
        self.infinity = _INFINITY[form]
        self._x = None if x is None else x.detach().to(score_dtype).numpy()
        # |W| * X is never negative when X is not: then the magnitude bits are the key already.
        self._nonnegative = absolute and (self._x is None or not bool((self._x < 0).any()))
        step = max(1, CHUNK // max(1, cols))
        self.spans = [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def keys(self, start: int, stop: int) -> Keys:
        """Keys of rows start..stop, a fresh contiguous [stop - start, cols]."""
        return self._keys(self._weight[start:stop], self._x)

    def keys_at(self, row: npt.NDArray[np.int64], col: npt.NDArray[np.int64]) -> Keys:
        """Keys of the elements (row[i], col[i])."""
        return self._keys(self._weight[row, col], None if self._x is None else self._x[col])

    def _keys(self, part: npt.NDArray[Any], x: npt.NDArray[Any] | None) -> Keys:
        magnitude = np.iinfo(self._integer).max
        keys: Keys
        if self._score_dtype is not None:
            score = self._convert(part)
            if self._absolute and not self._nonnegative:
                score = np.abs(score)
            if x is not None:
                with np.errstate(all="ignore"):  # Inf and subnormals are meant; a NaN is raised on below
                    score = np.multiply(score, x)
            keys = score.astype(self._form, copy=score is part).view(self._integer)
            if self._nonnegative:
                keys &= magnitude
        elif self._nonnegative:
            keys = np.bitwise_and(part.view(self._integer), magnitude, order="C")
        else:
            keys = np.array(part.view(self._integer), order="C")
        if not self._nonnegative:
            sign = keys >> (keys.dtype.itemsize * 8 - 1)  # 0 or -1; (key ^ -1) + 1 = -key
            keys &= magnitude
            keys ^= sign
            keys -= sign
        if keys.size:
            least = 0 if self._nonnegative else int(keys.min())
            if max(int(keys.max()), -least) > self.infinity:
                raise nan_error(*self._names)
        return keys

    def _convert(self, part: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``part`` in the score's dtype; the same array when it has it already."""
        if self._is_bfloat16:  # NumPy has no bf16; its bits are the upper half of an fp32's
            bits = part.view(np.uint16).astype(np.uint32, order="C")
            bits <<= 16
            part = bits.view(np.float32)
        elif part.dtype == np.float16 and part.ndim == 2:
            # Torch converts fp16 20 times faster than NumPy; below 2^15 elements it starts no threads of its
            # own.
            wide = np.empty(part.shape, np.float32)
            source, target = torch.from_numpy(part), torch.from_numpy(wide)
            step = max(1, ((1 << 15) - 1) // max(1, part.shape[1]))
            for row in range(0, part.shape[0], step):
                target[row : row + step].copy_(source[row : row + step])
            part = wide
        return part.astype(self._score_dtype, copy=False)


def score_form(weight: Tensor, x: Tensor | None) -> torch.dtype:
    """The narrowest dtype that holds every score: the weight's own without ``x``."""
    return weight.dtype if x is None or weight.dtype == torch.float64 else torch.float32


def run_chunks(work: Callable[..., Result], spans: Sequence[tuple[Any, ...]]) -> list[Result]:
    """`[work(*span) for span in spans]` in as many threads as torch uses; NumPy frees the GIL."""
    threads = min(torch.get_num_threads(), len(spans))
    if threads <= 1:
        return [work(*span) for span in spans]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda span: work(*span), spans))


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
