"""What a checkpoint says of one pruned weight: the form that it is stored in, its shape and the hash of its mask.

| format    | tensors                                                                                         |
|-----------|-------------------------------------------------------------------------------------------------|
| "2:4"     | ``values`` [rows, cols / 2], ``meta`` int16 [rows, cols / 16]                                     |
| "n:m"     | ``values`` [rows, cols n / m], ``bitmask`` uint8 [rows, ceil(cols / 8)]                           |
| "bitmask" | ``values`` [kept], ``bitmask`` uint8 [rows, ceil(cols / 8)], ``row_offsets`` int64 [rows + 1]     |
| "dense"   | the weight under its own name, its mask as bits uint8 [rows, ceil(cols / 8)] elsewhere            |

The tensors stand in place of ``weight`` (``q_proj.values``). Masks of dense weights are ``trisparse_masks.0``, ``.1``
and so on, in the sorted order of the weights' names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trisparse.sparsity.linear import storage_format
from trisparse.sparsity.mask import Mask, combined_sha256
from trisparse.sparsity.pattern import NM, Pattern, Rows, kept_of, kept_per_row, parse_pattern

VERSION = 1  # of the compressed form
MASKS_PREFIX = "trisparse_masks"

_FORMATS = ("2:4", "n:m", "bitmask", "dense")
_MAX_SIZE = 2**48  # weights of one tensor; beyond it sizes could leave int64


class TargetError(ValueError):
    """An entry of a checkpoint that cannot be."""


@dataclass(frozen=True)
class Target:
    """One pruned weight.

    Attributes:
        format: as in the table above.
        pattern: that it was pruned to.
        shape, cols, transposed, kept, sha256: of its :class:`Mask`.
    """

    format: str
    pattern: Pattern
    shape: tuple[int, ...]
    cols: int
    transposed: bool
    kept: int
    sha256: str

    def __post_init__(self) -> None:
        if self.format not in _FORMATS:
            raise TargetError(f"format {self.format!r} is none of {', '.join(_FORMATS)}")
        if not self.shape or math.prod(self.shape) > _MAX_SIZE or min(self.shape) < 0:
            raise TargetError(f"shape {list(self.shape)} cannot be")
        size = math.prod(self.shape)
        if self.cols < 1 or size % self.cols:
            raise TargetError(f"{self.cols} columns do not fit shape {list(self.shape)}")
        if not 0 <= self.kept <= size:
            raise TargetError(f"{self.kept} of {size} weights cannot be kept")
        if self.format != "dense":
            if len(self.shape) != 2 or self.cols != self.shape[0 if self.transposed else 1]:
                raise TargetError(f"format {self.format!r} does not hold shape {list(self.shape)}")
            made, n, m = storage_format(self.pattern, self.cols)
            if made != self.format:
                raise TargetError(f"a weight pruned to {self.pattern} is not stored as {self.format!r} but as {made!r}")
            if m and self.kept * m != size * n:
                raise TargetError(f"{self.kept} of {size} weights are not {self.pattern}")
        check_kept(self.pattern, self.rows, self.cols, self.kept)

    @property
    def rows(self) -> int:
        """Outputs."""
        return math.prod(self.shape) // self.cols

    @property
    def bits_shape(self) -> tuple[int, int]:
        """Of the packed mask."""
        return self.rows, -(-self.cols // 8)

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """Dtype (None: any of floating point) and shape of each tensor that stands in place of the weight."""
        if self.format == "dense":
            return {}
        if self.format == "2:4":
            return {
                "values": (None, (self.rows, self.cols // 2)),
                "meta": (torch.int16, (self.rows, self.cols // 16)),
            }
        bitmask = (torch.uint8, self.bits_shape)
        if self.format == "n:m":
            return {"values": (None, (self.rows, self.kept // max(self.rows, 1))), "bitmask": bitmask}
        return {"values": (None, (self.kept,)), "bitmask": bitmask, "row_offsets": (torch.int64, (self.rows + 1,))}

    @classmethod
    def of(cls, mask: Mask, format: str) -> Target:
        """What is to be said of a weight with ``mask`` that is stored as ``format``."""
        return cls(format, mask.pattern, tuple(mask.shape), mask.cols, mask.transposed, mask.kept, mask.sha256)

    def entry(self, pattern: str) -> dict[str, Any]:
        """As JSON, without what follows from the rest; ``pattern`` is that of most weights."""
        entry: dict[str, Any] = {
            "format": self.format,
            "shape": list(self.shape),
            "kept": self.kept,
            "sha256": self.sha256,
        }
        if str(self.pattern) != pattern:
            entry["pattern"] = str(self.pattern)
        if self.transposed:
            entry["transposed"] = True
        if self.cols != self.shape[-2 if self.transposed else -1]:
            entry["cols"] = self.cols
        return entry

    @classmethod
    def from_entry(cls, entry: Any, pattern: str) -> Target:
        """Inverse of :meth:`entry`.

        Raises:
            TargetError: something is missing, of another type, or cannot be.
        """
        if not isinstance(entry, Mapping):
            raise TargetError(f"{entry!r} is no entry")
        if unknown := entry.keys() - {"format", "shape", "kept", "sha256", "pattern", "transposed", "cols"}:
            raise TargetError(f"unknown {', '.join(sorted(map(repr, unknown)))}")
        shape, transposed = entry.get("shape"), entry.get("transposed", False)
        if not isinstance(shape, list) or not 1 <= len(shape) <= 8 or not all(type(size) is int for size in shape):
            raise TargetError(f"shape {shape!r} is no list of integers")
        if not isinstance(transposed, bool) or (transposed and len(shape) < 2):
            raise TargetError(f"transposed {transposed!r} cannot be")
        cols, kept = entry.get("cols", shape[-2 if transposed else -1]), entry.get("kept")
        if type(cols) is not int or type(kept) is not int:
            raise TargetError(f"kept {kept!r} and cols {cols!r} must be integers")
        texts: list[str] = []
        for text in (entry.get("format"), entry.get("pattern", pattern), entry.get("sha256")):
            if not isinstance(text, str) or len(text) > 64:
                raise TargetError(f"format, pattern and sha256 must be short texts, got {str(text)[:80]!r}")
            texts.append(text)
        try:
            made = parse_pattern(texts[1])
        except ValueError as error:
            raise TargetError(str(error)) from error
        return cls(texts[0], made, tuple(shape), cols, transposed, kept, texts[2])


def check_kept(pattern: Pattern, rows: int, cols: int, kept: int) -> None:
    """Check that a matrix [rows, cols] pruned to ``pattern`` may keep ``kept`` weights.

    No hash covers the pattern, which says what the next step of pruning may do. The budget of scope "global" is that of
    a model, of which one weight says nothing.

    Raises:
        TargetError: it may not.
    """
    if isinstance(pattern, NM):
        least, most = rows * (cols // pattern.m) * pattern.n, rows * -(-cols // pattern.m) * pattern.n
    elif isinstance(pattern, Rows):
        expected = kept_of(rows, pattern.sparsity) * cols
        tolerance = rows // 10**5 * cols  # the text has six digits
        least, most = expected - tolerance, expected + tolerance
    elif pattern.scope == "global":
        return
    else:
        expected = kept_of(rows * cols, pattern.sparsity)
        if pattern.scope == "row":
            expected = rows * kept_per_row(pattern, rows, cols)[0]
        # Some methods round in each row or in each block of columns, and the text has six digits.
        tolerance = rows + cols + rows * cols // 10**5
        least, most = expected - tolerance, expected + tolerance
    if not least <= kept <= most:
        raise TargetError(f"{kept} of {rows * cols} weights are not {pattern}")


def mask_names(targets: Mapping[str, Target]) -> dict[str, str]:
    """The tensor that holds the mask of each weight that is stored dense."""
    dense = sorted(name for name, target in targets.items() if target.format == "dense")
    return {name: f"{MASKS_PREFIX}.{index}" for index, name in enumerate(dense)}


def targets_sha256(targets: Mapping[str, Target]) -> str:
    """:func:`trisparse.sparsity.mask.masks_sha256` of the masks that ``targets`` describe."""
    return combined_sha256({name: target.sha256 for name, target in targets.items()})
