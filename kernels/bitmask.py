"""Packed masks: one bit a weight, little-endian within a byte.

    packed[i, j] = sum over b in 0..7 of mask[i, 8*j + b] << b

mask [rows, cols] bool -> packed [rows, ceil(cols/8)] uint8. Column 8*j + b is bit b of byte j; the bits
beyond the last column are 0. A mask takes 1/16 of a bf16 weight.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trisparse.kernels.score import check_inner


def _check_2d(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be {dtype}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have 2 dimensions")
    check_inner(tensor, name)


def _check_cols(cols: int, packed: Tensor) -> None:
    if isinstance(cols, bool) or not isinstance(cols, int) or cols < 0 or -(-cols // 8) != packed.shape[1]:
        high = 8 * packed.shape[1]
        allowed = f"{max(0, high - 7)}..{high}"
        raise ValueError(f"cols is {cols!r}; {packed.shape[1]} bytes a row hold {allowed} columns")


def pack_bits_ref(mask: Tensor) -> Tensor:
    """The specification of `pack_bits`."""
    _check_2d(mask, torch.bool, "mask")
    rows, cols = mask.shape
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -cols % 8)).reshape(rows, -(-cols // 8), 8)
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded * place).sum(2, dtype=torch.uint8)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool mask [rows, cols] to uint8 [rows, ceil(cols/8)]; column 8j + i is bit i of byte j.

    Raises:
        ValueError: not bool, not 2-D, or a non-contiguous inner dimension.
    """
    if mask.device.type != "cpu":
        return pack_bits_ref(mask)
    _check_2d(mask, torch.bool, "mask")
    return torch.from_numpy(np.packbits(mask.numpy().view(np.uint8), axis=1, bitorder="little"))


def unpack_bits_ref(packed: Tensor, cols: int) -> Tensor:
    """The specification of `unpack_bits`."""
    _check_2d(packed, torch.uint8, "packed")
    _check_cols(cols, packed)
    place = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, :, None] >> place) & 1
    return bits.reshape(packed.shape[0], 8 * packed.shape[1])[:, :cols].to(torch.bool)


def unpack_bits(packed: Tensor, cols: int) -> Tensor:
    """Unpack uint8 [rows, ceil(cols/8)] to a bool mask [rows, cols]; the inverse of `pack_bits`.

    Raises:
        ValueError: not uint8, not 2-D, a non-contiguous inner dimension, or ``cols`` that do not fit.
    """
    if packed.device.type != "cpu":
        return unpack_bits_ref(packed, cols)
    _check_2d(packed, torch.uint8, "packed")
    _check_cols(cols, packed)
    bits = np.unpackbits(packed.numpy(), axis=1, count=cols, bitorder="little")
    return torch.from_numpy(bits).view(torch.bool)


def count_bits_ref(packed: Tensor) -> Tensor:
    """The specification of `count_bits`."""
    return unpack_bits_ref(packed, 8 * packed.shape[1] if packed.dim() == 2 else 0).sum(1)


def count_bits(packed: Tensor) -> Tensor:
    """The bits set in each row of uint8 [rows, bytes], as int64 [rows]: the kept weights of each row.

    Raises:
        ValueError: not uint8, not 2-D, or a non-contiguous inner dimension.
    """
    if packed.device.type != "cpu":
        return count_bits_ref(packed)
    _check_2d(packed, torch.uint8, "packed")
    return torch.from_numpy(np.bitwise_count(packed.numpy()).sum(axis=1, dtype=np.int64))
