"""The compressed weight of a layer that is built otherwise than the checkpoint's: fused, or split over devices.

Engines that serve models fuse q, k and v (or gate and up) into one layer by their rows, and split a layer over devices
by its rows (outputs) or its columns (inputs). Rows of a compressed weight are runs of its tensors: they are cut and put
together as they are, with the row offsets of format "bitmask" shifted. Columns are not: a slice of them is decompressed
and compressed again by its slice of the mask, to the form that :func:`storage_format` gives its width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trisparse.kernels.bitmask import pack_bits, unpack_bits
from trisparse.kernels.compressed import CompressedWeight, compress
from trisparse.sparsity.backends import Prefer, default_plan
from trisparse.sparsity.checkpoint.files import CheckpointError
from trisparse.sparsity.checkpoint.target import Target, TargetError
from trisparse.sparsity.checkpoint.validation import check_positions
from trisparse.sparsity.linear import SparseLinear, storage_format
from trisparse.sparsity.pattern import Pattern

EXPORT = "`trisparse export FOLDER --to dense` writes a checkpoint that needs none of this"


@dataclass(frozen=True)
class Share:
    """What a layer holds of a weight of the checkpoint.

    Attributes:
        name: of the weight, for messages.
        target: what the checkpoint says of it; its format is not "dense".
        rows, cols: (start, stop) of the outputs and inputs that the layer holds.
    """

    name: str
    target: Target
    rows: tuple[int, int]
    cols: tuple[int, int]

    @property
    def form(self) -> tuple[str, int, int]:
        """The (format, n, m) that the share is held in."""
        return storage_format(self.target.pattern, self.cols[1] - self.cols[0])


def share_of_rank(size: int, held: int, rank: int, ranks: int) -> tuple[int, int]:
    """(start, stop) of the rows or columns that a device holds, ``held`` of ``size``.

    Each of ``ranks`` devices has a slice of its own, or all have everything, or neighbours share a slice: so it is with
    heads of keys and values that are fewer than the devices.

    Raises:
        ValueError: ``size`` is not split that way.
    """
    slices = size // held if held > 0 and size % held == 0 else 0
    if not slices or (slices > 1 and ranks % slices):
        raise ValueError(f"{size} rows or columns are not split over {ranks} devices by {held} each")
    start = rank * slices // ranks * held if slices > 1 else 0
    return start, start + held


class LayerParts:
    """The weight of one layer on one device, from the tensors of its shares, which come in any order.

    A share is checked, cut and put on the device as soon as its last tensor has come, so that no more than one whole
    weight is held besides.

    Args:
        shares: from the first output of the layer to the last.
        device, dtype: of the layer's weight.

    Raises:
        ValueError: the shares cannot be one compressed weight.
    """

    def __init__(self, shares: Sequence[Share], *, device: torch.device, dtype: torch.dtype) -> None:
        self.shares = tuple(shares)
        self._device, self._dtype = device, dtype
        self._staged: list[dict[str, Tensor]] = [{} for _ in self.shares]
        self._cut: list[CompressedWeight | None] = [None for _ in self.shares]
        if len({(share.form, share.cols) for share in self.shares}) != 1:
            forms = ", ".join(f"{share.name} ({share.target.pattern})" for share in self.shares)
            raise ValueError(f"weights of different forms cannot be one layer: {forms}; {EXPORT}")

    @property
    def tensors(self) -> dict[str, torch.dtype]:
        """Name and dtype of the tensors that each share is stored as."""
        stored = {part: dtype for share in self.shares for part, (dtype, _) in share.target.tensors.items()}
        return {part: dtype or self._dtype for part, dtype in stored.items()}

    def add(self, index: int, part: str, tensor: Tensor) -> None:
        """Take a copy of a tensor of the share ``index``: ``values``, ``meta``, ``bitmask`` or ``row_offsets``.

        Raises:
            CheckpointError: it is not what the checkpoint says, or comes a second time, or the weight is damaged.
        """
        share, staged = self.shares[index], self._staged[index]
        wanted = share.target.tensors
        if part not in wanted:
            raise CheckpointError(f"{share.name} is stored as {share.target.format!r}, which has no {part}")
        if part in staged or self._cut[index] is not None:
            raise CheckpointError(f"{part} of {share.name} came twice")
        dtype, shape = wanted[part]
        right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if not right or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"the checkpoint is damaged at {share.name}: {part} is {tensor.dtype} {tuple(tensor.shape)}, not "
                f"{dtype or 'floating point'} {shape}"
            )
        # A copy: what reads the files may use its memory again. Indices are checked on the CPU.
        if part == "values":
            staged[part] = tensor.detach().to(self._device, self._dtype, copy=True).contiguous()
        else:
            staged[part] = tensor.detach().to("cpu", copy=True).contiguous()
        if staged.keys() == wanted.keys():
            self._cut[index] = self._checked(share, staged)
            staged.clear()

    def _checked(self, share: Share, tensors: dict[str, Tensor]) -> CompressedWeight:
        values, target = tensors.pop("values"), share.target
        try:
            tiles = check_positions(target, tensors)
        except TargetError as error:
            raise CheckpointError(f"the checkpoint is damaged at {share.name}: {error}") from error
        format, n, m = storage_format(target.pattern, target.cols)
        whole = CompressedWeight(
            format,
            (target.rows, target.cols),
            n,
            m,
            values,
            tensors["meta" if format == "2:4" else "bitmask"].to(self._device),
            tensors["row_offsets"].to(self._device) if format == "bitmask" else None,
            None if tiles is None else tiles.to(self._device),
        )
        return cut_columns(cut_rows(whole, *share.rows), *share.cols, target.pattern)

    def finish(self, prefer: Prefer = "speed") -> SparseLinear:
        """The layer, without a bias, with the default plan; it can be had once.

        Raises:
            CheckpointError: tensors have not come.
        """
        weights = [weight for weight in self._cut if weight is not None]
        if len(weights) != len(self.shares):
            missing = [
                f"{part} of {share.name}"
                for share, staged, cut in zip(self.shares, self._staged, self._cut, strict=True)
                if cut is None
                for part in share.target.tensors
                if part not in staged
            ]
            raise CheckpointError(f"the checkpoint has no {', '.join(missing)}")
        self._cut = [None for _ in self.shares]
        return _layer(concatenate_rows(weights), self.shares[0].target.pattern, prefer)


def cut_rows(weight: CompressedWeight, start: int, stop: int) -> CompressedWeight:
    """Rows start to stop of ``weight``, in memory of their own; ``weight`` itself where that is all of them."""
    if (start, stop) == (0, weight.shape[0]):
        return weight
    part = weight.part(start, stop)
    copies = [
        None if tensor is None else tensor.clone()
        for tensor in (part.values, part.meta, part.row_offsets, part.tile_offsets)
    ]
    return CompressedWeight(part.format, part.shape, part.n, part.m, *copies)  # type: ignore[arg-type]


def cut_columns(weight: CompressedWeight, start: int, stop: int, pattern: Pattern) -> CompressedWeight:
    """Columns start to stop of ``weight``, in the form that a weight of ``pattern`` and this width is stored in.

    Raises:
        ValueError: the slice does not hold the pattern, since it begins or ends inside a group.
    """
    cols = weight.shape[1]
    if (start, stop) == (0, cols):
        return weight
    # By the mask, never by what is not zero: a kept weight may be zero.
    mask = unpack_bits(weight.packed, cols)[:, start:stop].contiguous()
    dense = weight.decompress()[:, start:stop].contiguous()
    return compress(dense, pack_bits(mask), *storage_format(pattern, stop - start))


def concatenate_rows(weights: Sequence[CompressedWeight]) -> CompressedWeight:
    """The weight whose rows are those of ``weights``, in their order.

    Raises:
        ValueError: they are of different forms or widths.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    if len({(weight.format, weight.n, weight.m, weight.shape[1]) for weight in weights}) != 1:
        raise ValueError("weights of different forms or widths have no common form")
    offsets, tiles = None, None
    if first.row_offsets is not None:
        pieces, kept = [first.row_offsets[:1]], 0
        for weight in weights:
            assert weight.row_offsets is not None
            pieces.append(weight.row_offsets[1:] + kept)
            kept += weight.values.numel()
        offsets = torch.cat(pieces)
        tiles = torch.cat([weight.tile_offsets for weight in weights if weight.tile_offsets is not None])
    return CompressedWeight(
        first.format,
        (sum(weight.shape[0] for weight in weights), first.shape[1]),
        first.n,
        first.m,
        torch.cat([weight.values for weight in weights]),
        torch.cat([weight.meta for weight in weights]),
        offsets,
        tiles,
    )


def _layer(weight: CompressedWeight, pattern: Pattern, prefer: Prefer) -> SparseLinear:
    (rows, cols), values = weight.shape, weight.values
    kept = values.numel() if weight.format == "bitmask" else None
    made = SparseLinear(cols, rows, pattern, kept=kept, bias=False, device="meta", dtype=values.dtype)
    made.values, made.positions = values, weight.meta
    made.row_offsets, made.tile_offsets = weight.row_offsets, weight.tile_offsets
    made.prefer = prefer
    made.adopt(default_plan(made, prefer))
    return made
