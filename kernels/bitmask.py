"""Packed masks: one bit a weight, little-endian within a byte.

    packed[i, j] = sum over b in 0..7 of mask[i, 8*j + b] << b

mask [rows, cols] bool -> packed [rows, ceil(cols/8)] uint8. Column 8*j + b is bit b of byte j; the bits
beyond the last column are 0. A mask takes 1/16 of a bf16 weight.

The compressed unstructured form of a weight is (values, packed, row_offsets): the kept weights in row order,
the packed mask, and int64 [rows + 1] where each row's values begin, row_offsets[0] = 0, row_offsets[rows] =
kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trisparse.kernels.launch import by_kernel
from trisparse.kernels.operation import Operation
from trisparse.kernels.score import check_disjoint, check_inner, check_weight, check_writable, is_int


def _check_2d(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be {dtype}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have 2 dimensions")
    check_inner(tensor, name)


def _check_cols(cols: int, packed: Tensor) -> None:
    if not is_int(cols) or cols < 0 or -(-cols // 8) != packed.shape[1]:
        high = 8 * packed.shape[1]
        allowed = f"{max(0, high - 7)}..{high}"
        raise ValueError(f"cols is {cols!r}; {packed.shape[1]} bytes a row hold {allowed} columns")


def empty_mask(weight: Tensor, out: str) -> Tensor:
    """Uninitialised, for a weight [rows, cols]: bool [rows, cols], or for ``out`` "packed" its packed bits."""
    rows, cols = weight.shape
    if out == "packed":
        return weight.new_empty(rows, -(-cols // 8), dtype=torch.uint8)
    return weight.new_empty(rows, cols, dtype=torch.bool)


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
    _check_2d(mask, torch.bool, "mask")
    return _PACK(mask)


def _pack(mask: Tensor) -> Tensor:
    if by_kernel(mask):
        from trisparse.kernels.bitmask_triton import pack_triton

        packed = empty_mask(mask, "packed")
        pack_triton(mask, packed)
        return packed
    if mask.device.type != "cpu":
        return pack_bits_ref(mask)
    return torch.from_numpy(np.packbits(mask.numpy().view(np.uint8), axis=1, bitorder="little"))


_PACK = Operation("pack_bits", _pack, lambda mask: empty_mask(mask, "packed"))


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
    _check_2d(packed, torch.uint8, "packed")
    _check_cols(cols, packed)
    return _UNPACK(packed, cols)


def _unpack(packed: Tensor, cols: int) -> Tensor:
    if by_kernel(packed):
        from trisparse.kernels.bitmask_triton import unpack_triton

        mask = packed.new_empty(packed.shape[0], cols, dtype=torch.bool)
        unpack_triton(packed, mask, apply=False)
        return mask
    if packed.device.type != "cpu":
        return unpack_bits_ref(packed, cols)
    bits = np.unpackbits(packed.numpy(), axis=1, count=cols, bitorder="little")
    return torch.from_numpy(bits).view(torch.bool)


_UNPACK = Operation(
    "unpack_bits", _unpack, lambda packed, cols: packed.new_empty(packed.shape[0], cols, dtype=torch.bool)
)


def count_bits_ref(packed: Tensor) -> Tensor:
    """The specification of `count_bits`."""
    return unpack_bits_ref(packed, 8 * packed.shape[1] if packed.dim() == 2 else 0).sum(1)


def count_bits(packed: Tensor) -> Tensor:
    """The bits set in each row of uint8 [rows, bytes], as int64 [rows]: the kept weights of each row.

    Raises:
        ValueError: not uint8, not 2-D, or a non-contiguous inner dimension.
    """
    _check_2d(packed, torch.uint8, "packed")
    return _COUNT(packed)


def _count(packed: Tensor) -> Tensor:
    if by_kernel(packed):
        from trisparse.kernels.bitmask_triton import count_triton

        count = packed.new_empty(packed.shape[0], dtype=torch.int64)
        count_triton(packed, count)
        return count
    if packed.device.type != "cpu":
        return count_bits_ref(packed)
    return torch.from_numpy(np.bitwise_count(packed.numpy()).sum(axis=1, dtype=np.int64))


_COUNT = Operation("count_bits", _count, lambda packed: packed.new_empty(packed.shape[0], dtype=torch.int64))


def apply_bits_ref(weight: Tensor, packed: Tensor) -> Tensor:
    """The specification of `apply_bits`, except that it returns a new tensor."""
    _check_pair(weight, packed)
    return torch.where(unpack_bits_ref(packed, weight.shape[1]), weight, torch.zeros_like(weight))


def apply_bits(weight: Tensor, packed: Tensor) -> Tensor:
    """Zero, in place, each weight of [rows, cols] whose bit in ``packed`` [rows, ceil(cols/8)] is 0.

    Raises:
        ValueError: a wrong dtype, shape, stride or device, or a weight whose rows overlap.
    """
    _check_pair(weight, packed)
    check_writable(weight, "weight")
    _APPLY(weight.detach(), packed.detach())
    return weight


def _apply(weight: Tensor, packed: Tensor) -> None:
    check_disjoint({"weight": weight}, {"packed": packed})
    if by_kernel(weight):
        from trisparse.kernels.bitmask_triton import unpack_triton

        unpack_triton(packed, weight, apply=True)
    else:
        weight.masked_fill_(_unpack(~packed, weight.shape[1]), 0)  # inverted while it is small


_APPLY = Operation("apply_bits_", _apply, lambda weight, packed: None, mutates=("weight",))


def compress_bits_ref(weight: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """The specification of `compress_bits`."""
    _check_pair(weight, packed)
    mask = unpack_bits_ref(packed, weight.shape[1])
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    return weight[mask], offsets


def compress_bits(weight: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """(values, row_offsets) of the weights [rows, cols] that ``packed`` [rows, ceil(cols/8)] keeps.

    Returns:
        values [kept] in the weight's dtype, in row order; row_offsets int64 [rows + 1].

    Raises:
        ValueError: a wrong dtype, shape, stride or device.
    """
    _check_pair(weight, packed)
    return _COMPRESS(weight, packed)


def _compress(weight: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    offsets = torch.nn.functional.pad(_count(packed).cumsum(0), (1, 0))
    if not by_kernel(weight):
        return weight.detach()[_unpack(packed, weight.shape[1])], offsets
    # Compiling only, nothing is counted; any size serves.
    kept = weight.numel() if offsets.device.type == "meta" else int(offsets[-1])
    return _gather(weight, packed, offsets, kept), offsets


def _compress_result(weight: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty(kept), weight.new_empty(weight.shape[0] + 1, dtype=torch.int64)


def _gather(dense: Tensor, packed: Tensor, offsets: Tensor, kept: int) -> Tensor:
    """The values [kept] of `compress_bits` where their number is known: its gradient's, and decompression's."""
    if not by_kernel(dense):
        return dense.detach()[_unpack(packed, dense.shape[1])]
    from trisparse.kernels.bitmask_triton import move_triton

    values = dense.new_empty(kept)
    move_triton(packed, offsets, values, dense.detach(), compress=True)
    return values


_COMPRESS = Operation("compress_bits", _compress, _compress_result, reads_back=True)
_GATHER = Operation("gather_bits", _gather, lambda dense, packed, offsets, kept: dense.new_empty(kept))


def decompress_bits_ref(values: Tensor, packed: Tensor, offsets: Tensor, cols: int) -> Tensor:
    """The specification of `decompress_bits`."""
    _check_values(values, packed, offsets, cols)
    _check_kept(values, offsets)
    mask = unpack_bits_ref(packed, cols)
    return values.new_zeros(mask.shape).masked_scatter_(mask, values)


def decompress_bits(values: Tensor, packed: Tensor, offsets: Tensor, cols: int) -> Tensor:
    """The weight [rows, cols] of a compressed form; the inverse of `compress_bits`.

    Raises:
        ValueError: a wrong dtype, shape or device, or values that are not as many as the offsets say.
    """
    _check_values(values, packed, offsets, cols)
    return _DECOMPRESS(values, packed, offsets, cols)


def _decompress(values: Tensor, packed: Tensor, offsets: Tensor, cols: int) -> Tensor:
    _check_kept(values, offsets)
    return _scatter(values, packed, offsets, cols)


def _scatter(values: Tensor, packed: Tensor, offsets: Tensor, cols: int) -> Tensor:
    if not by_kernel(values):
        mask = _unpack(packed, cols)
        return values.new_zeros(mask.shape).masked_scatter_(mask, values.detach())
    from trisparse.kernels.bitmask_triton import move_triton

    dense = values.new_empty(packed.shape[0], cols)
    move_triton(packed, offsets, values.detach(), dense, compress=False)
    return dense


def decompress_trusted(values: Tensor, packed: Tensor, offsets: Tensor, cols: int) -> Tensor:
    """As `decompress_bits`, for offsets that fit: it does not wait for the device to check them."""
    return _DECOMPRESS_TRUSTED(values, packed, offsets, cols)


_DECOMPRESS = Operation(
    "decompress_bits",
    _decompress,
    lambda values, packed, offsets, cols: values.new_empty(packed.shape[0], cols),
    reads_back=True,
)
_DECOMPRESS_TRUSTED = Operation(
    "decompress_trusted_bits",
    _scatter,
    lambda values, packed, offsets, cols: values.new_empty(packed.shape[0], cols),
)


# Compressing and decompressing are linear, and each is the other's transpose.
def _save_compressed(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.cols = inputs[0].shape[1]
    ctx.save_for_backward(inputs[1], output[1])


def _compress_backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
    packed, offsets = ctx.saved_tensors
    return _DECOMPRESS(gradient.contiguous(), packed, offsets, ctx.cols), None


def _save_decompressed(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.kept = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1], inputs[2])


def _decompress_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    packed, offsets = ctx.saved_tensors
    return _GATHER(gradient.contiguous(), packed, offsets, ctx.kept), None, None, None


def _save_gathered(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.cols = inputs[0].shape[1]
    ctx.save_for_backward(inputs[1], inputs[2])


def _gather_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    packed, offsets = ctx.saved_tensors
    return _DECOMPRESS(gradient.contiguous(), packed, offsets, ctx.cols), None, None, None


_COMPRESS.registered.register_autograd(_compress_backward, setup_context=_save_compressed)
_DECOMPRESS.registered.register_autograd(_decompress_backward, setup_context=_save_decompressed)
_GATHER.registered.register_autograd(_gather_backward, setup_context=_save_gathered)


def _check_pair(weight: Tensor, packed: Tensor) -> None:
    check_weight(weight, "weight")
    _check_2d(packed, torch.uint8, "packed")
    shape = (weight.shape[0], -(-weight.shape[1] // 8))
    if tuple(packed.shape) != shape:
        raise ValueError(f"packed has shape {tuple(packed.shape)}; for this weight it must be {shape}")
    if packed.device != weight.device:
        raise ValueError(f"packed is on {packed.device}; it must be on the weight's device, {weight.device}")


def _check_values(values: Tensor, packed: Tensor, offsets: Tensor, cols: int) -> None:
    _check_2d(packed, torch.uint8, "packed")
    _check_cols(cols, packed)
    if offsets.dtype != torch.int64 or tuple(offsets.shape) != (packed.shape[0] + 1,):
        raise ValueError(
            f"offsets is {offsets.dtype} {tuple(offsets.shape)}; it must be torch.int64 ({packed.shape[0] + 1},)"
        )
    if values.dim() != 1 or not values.is_contiguous():
        raise ValueError(f"values has shape {tuple(values.shape)}; it must have 1 dimension and be contiguous")
    for name, tensor in (("packed", packed), ("offsets", offsets)):
        if tensor.device != values.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on the values' device, {values.device}")


def _check_kept(values: Tensor, offsets: Tensor) -> None:
    if offsets.device.type != "meta" and int(offsets[-1]) != values.shape[0]:
        raise ValueError(f"values has {values.shape[0]} entries; the offsets say {int(offsets[-1])}")
