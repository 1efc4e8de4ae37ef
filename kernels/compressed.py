"""A weight [rows, cols] in one of four compressed forms, and the way there and back.

| format    | values                     | meta                                | bytes of bf16 at 50% |
|-----------|----------------------------|-------------------------------------|----------------------|
| "2:4"     | [rows, cols / 2]           | int16 [rows, cols / 16], see nm.py  | 0.56 of dense        |
| "n:m"     | [rows, cols * n / m]       | packed mask, see bitmask.py         | 0.56                 |
| "bitmask" | [kept], row after row      | packed mask, row and tile offsets   | 0.57                 |
| "masked"  | [rows, cols], the weight   | packed mask, applied at each use    | 1.06                 |

The packed mask is uint8 [rows, ceil(cols / 8)]. "bitmask" has int64 row_offsets [rows + 1] besides, as in
kernels/bitmask.py, and tile_offsets [rows, ceil(cols / 128)]: how many weights of the row are kept before column
128 * t. With these a kernel finds the values of a tile anywhere in a row by counting the bits of at most 128
columns. They are int16, read as unsigned, up to 65536 columns, else int32, and count as compressed bytes: 2 bytes
for every 128 columns, 0.8% of the dense bf16 weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trisparse.kernels.bitmask import apply_bits, compress_bits, count_bits, decompress_trusted, unpack_bits
from trisparse.kernels.nm import check_nm, meta_2_4, packed_2_4
from trisparse.kernels.score import check_weight

FORMATS = ("2:4", "n:m", "bitmask", "masked")
TILE = 128  # columns between two tile offsets


@dataclass(frozen=True)
class CompressedWeight:
    """A compressed weight; `compress` makes one. The module's docstring gives the forms.

    Attributes:
        format: "2:4", "n:m", "bitmask" or "masked".
        shape: (rows, cols) of the dense weight, which is (out_features, in_features) of a linear layer.
        n: weights kept of every ``m``; 0 where the format is "bitmask" or "masked".
        m: size of a group; 0 where the format is "bitmask" or "masked".
        values: the kept weights, or with "masked" the weight itself.
        meta: int16 words of a 2:4 mask, or the packed mask.
        row_offsets: int64 [rows + 1], where each row's values begin; "bitmask" only.
        tile_offsets: [rows, ceil(cols / 128)], see the module's docstring; "bitmask" only.

    Raises:
        ValueError: a tensor that does not fit the format and the shape, named.
    """

    format: str
    shape: tuple[int, int]
    n: int
    m: int
    values: Tensor
    meta: Tensor
    row_offsets: Tensor | None = None
    tile_offsets: Tensor | None = None

    def __post_init__(self) -> None:
        rows, cols = self.shape
        check_format(self.format)
        if self.format in ("2:4", "n:m"):
            check_nm(self.n, self.m, cols)
            if self.format == "2:4":
                _check_2_4(self.n, self.m, cols)
            kept: tuple[int, ...] = (rows, cols * self.n // self.m)
        elif (self.n, self.m) != (0, 0):
            raise ValueError(f"n and m are {self.n} and {self.m}; for format {self.format!r} both must be 0")
        else:
            kept = (self.values.numel(),) if self.format == "bitmask" else (rows, cols)
        two_four = self.format == "2:4"
        meta = (rows, cols // 16) if two_four else (rows, -(-cols // 8))
        self._check("values", self.values, self.values.dtype, kept)
        if not self.values.dtype.is_floating_point:
            raise ValueError(f"values has dtype {self.values.dtype}; it must be a floating-point dtype")
        self._check("meta", self.meta, torch.int16 if two_four else torch.uint8, meta)
        if self.format == "bitmask":
            if self.row_offsets is None or self.tile_offsets is None:
                raise ValueError("row_offsets and tile_offsets must be given for format 'bitmask'")
            self._check("row_offsets", self.row_offsets, torch.int64, (rows + 1,))
            self._check("tile_offsets", self.tile_offsets, tile_dtype(cols), (rows, -(-cols // TILE)))
        elif self.row_offsets is not None or self.tile_offsets is not None:
            raise ValueError(f"row_offsets and tile_offsets must be None for format {self.format!r}")

    def _check(self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; for {self.format!r} of shape {self.shape} it must be "
                f"{dtype} {shape}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
        if tensor.device != self.values.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on the device of values, {self.values.device}")
        if tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient; a compressed weight has none, so detach it")

    @property
    def bytes(self) -> int:
        """The bytes of all tensors."""
        tensors = (self.values, self.meta, self.row_offsets, self.tile_offsets)
        return sum(t.nbytes for t in tensors if t is not None)

    @property
    def packed(self) -> Tensor:
        """The mask as packed bits, uint8 [rows, ceil(cols / 8)]."""
        return packed_2_4(self.meta) if self.format == "2:4" else self.meta

    def part(self, start: int, stop: int) -> CompressedWeight:
        """Rows start to stop, sharing the memory of all but the row offsets."""
        values, row_offsets, tile_offsets = self.values, self.row_offsets, self.tile_offsets
        if row_offsets is None or tile_offsets is None:
            values = values[start:stop]
        else:
            row_offsets = row_offsets[start : stop + 1]
            first, last = int(row_offsets[0]), int(row_offsets[-1])
            values, row_offsets, tile_offsets = values[first:last], row_offsets - first, tile_offsets[start:stop]
        shape = (stop - start, self.shape[1])
        meta = self.meta[start:stop]
        return CompressedWeight(self.format, shape, self.n, self.m, values, meta, row_offsets, tile_offsets)

    def decompress(self) -> Tensor:
        """The dense weight [rows, cols] in the dtype of the values, 0 where it is pruned."""
        rows, cols = self.shape
        if self.format == "masked":
            return apply_bits(self.values.clone(), self.meta)
        if self.format == "2:4":
            dense = self.values.new_zeros(rows, cols // 4, 4)
            places = places_2_4(self.meta)
            return dense.scatter_(2, places, self.values.reshape(rows, cols // 4, 2)).reshape(rows, cols)
        offsets = self.row_offsets
        if offsets is None:
            offsets = torch.arange(rows + 1, device=self.values.device) * (cols * self.n // self.m)
        return decompress_trusted(self.values.reshape(-1), self.meta, offsets, cols)


def compress(weight: Tensor, packed: Tensor, format: str, n: int = 0, m: int = 0) -> CompressedWeight:
    """Compress the weights that a packed mask keeps.

    Args:
        weight: [rows, cols] of fp32, fp16, bf16 or fp64, the inner dimension contiguous. With "masked" the values
            share its memory where it is contiguous; every other format copies.
        packed: the packed mask, uint8 [rows, ceil(cols / 8)] on the weight's device.
        format: "2:4", "n:m", "bitmask" or "masked".
        n: for "n:m" only: the mask keeps exactly ``n`` of every ``m`` consecutive columns.
        m: for "n:m" only: at most 32, and a divisor of the columns.

    Raises:
        ValueError: a wrong format, dtype, shape, stride, device, ``n`` or ``m``, or a mask without the pattern.
    """
    check_format(format)
    check_weight(weight, "weight")
    weight = weight.detach()
    shape = (weight.shape[0], weight.shape[1])
    if format == "2:4":
        n, m = (n or 2), (m or 4)
        _check_2_4(n, m, shape[1])
    if format in ("2:4", "n:m"):
        check_nm(n, m, shape[1])
    elif (n, m) != (0, 0):
        raise ValueError(f"n and m are {n} and {m}; for format {format!r} leave them out")
    if format == "masked":
        return CompressedWeight(format, shape, 0, 0, weight.contiguous(), packed.contiguous())
    values, row_offsets = compress_bits(weight, packed)
    packed = packed.contiguous()
    if format == "bitmask":
        return CompressedWeight(format, shape, 0, 0, values, packed, row_offsets, tile_offsets(packed, shape[1]))
    mask = unpack_bits(packed, shape[1])
    if mask.device.type != "meta" and bool((mask.reshape(-1, m).sum(1) != n).any()):
        raise ValueError(f"packed does not keep exactly {n} of every {m} consecutive columns")
    kept = shape[1] * n // m
    values = values[: shape[0] * kept].reshape(shape[0], kept)
    return CompressedWeight(format, shape, n, m, values, meta_2_4(mask) if format == "2:4" else packed)


def check_format(format: str) -> None:
    """Raise a ValueError unless ``format`` is one of `FORMATS`."""
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {FORMATS}")


def tile_dtype(cols: int) -> torch.dtype:
    """The dtype of the tile offsets of rows of ``cols`` columns."""
    return torch.int16 if cols <= 1 << 16 else torch.int32


def tile_offsets(packed: Tensor, cols: int) -> Tensor:
    """How many bits of each row of ``packed`` are set before column 128 * t: [rows, ceil(cols / 128)]."""
    rows, tiles = packed.shape[0], -(-cols // TILE)
    padded = torch.nn.functional.pad(packed, (0, tiles * TILE // 8 - packed.shape[1]))
    count = count_bits(padded.reshape(rows * tiles, TILE // 8)).reshape(rows, tiles)
    before = count.cumsum(1) - count
    # Narrowing keeps the low 16 bits, which the kernels read as unsigned.
    return before.to(tile_dtype(cols))


def places_2_4(meta: Tensor) -> Tensor:
    """The places 0..3 of the two kept of each group, int64 [rows, groups, 2], of int16 ``meta`` [rows, groups / 4]."""
    shifts = torch.arange(0, 16, 2, device=meta.device)
    places = (meta.to(torch.int64)[:, :, None] >> shifts) & 3
    return places.reshape(meta.shape[0], 4 * meta.shape[1], 2)


def _check_2_4(n: int, m: int, cols: int) -> None:
    if (n, m) != (2, 4):
        raise ValueError(f"n and m are {n} and {m}; for format '2:4' they are 2 and 4")
    if cols % 16:
        raise ValueError(
            f"weight has {cols} columns; format '2:4' needs a multiple of 16 ('n:m' takes any multiple of 4)"
        )
