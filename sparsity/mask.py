"""Masks: which weights of a parameter are kept, as packed bits, attached to the module that owns it.

A mask is an object of its own and is never inferred from ``weight != 0``: a kept weight may be zero, and an
update of the weights may make one. Attaching leaves the model's ``state_dict`` as it was.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from trisparse.kernels.bitmask import apply_bits, count_bits, pack_bits, unpack_bits
from trisparse.kernels.score import DTYPES
from trisparse.sparsity.pattern import Pattern

_ATTRIBUTE = "_trisparse_masks"


class MaskError(RuntimeError):
    """A pruned weight is not zero, or a mask does not fit its parameter."""


class HoldsMask(ABC):
    """A module whose ``weight`` cannot be but zero where its ``mask`` prunes."""

    @property
    @abstractmethod
    def mask(self) -> Mask:
        """Which weights are kept."""


@dataclass(frozen=True)
class Mask:
    """Kept positions of one parameter.

    The bits describe the matrix [rows = outputs, cols = inputs] of the parameter: a convolution is flattened
    to [out, in·kh·kw], fused experts to [experts·out, in], and a parameter stored as [..., in, out]
    (``transposed``, GPT-2's Conv1D) is turned first.

    Attributes:
        bits: uint8 [rows, ceil(cols / 8)] on the CPU; bit i of byte j is column 8j + i, 1 = kept.
        shape: shape of the parameter.
        cols: inputs per row of the matrix.
        transposed: whether the last two dimensions of the parameter are (in, out).
        pattern: the pattern that the mask was selected with.
    """

    bits: Tensor
    shape: torch.Size
    cols: int
    transposed: bool
    pattern: Pattern
    kept: int = field(init=False)

    def __post_init__(self) -> None:
        rows = self.shape.numel() // self.cols if self.cols else 0
        if self.bits.dtype != torch.uint8 or self.bits.shape != (rows, -(-self.cols // 8)):
            raise MaskError(
                f"mask bits must be uint8 [{rows}, {-(-self.cols // 8)}] for a parameter of shape "
                f"{tuple(self.shape)} with {self.cols} inputs, got {self.bits.dtype} {tuple(self.bits.shape)}"
            )
        object.__setattr__(self, "kept", int(count_bits(self.bits).sum()))

    @classmethod
    def from_matrix(cls, keep: Tensor, shape: torch.Size, pattern: Pattern, *, transposed: bool = False) -> Mask:
        """Pack ``keep`` (bool [rows, cols], True = kept) for a parameter of ``shape``."""
        return cls(pack_bits(keep.contiguous()).cpu(), shape, keep.shape[1], transposed, pattern)

    def matrix(self, device: torch.device | str = "cpu") -> Tensor:
        """Bool [rows, cols], True = kept."""
        return unpack_bits(self.bits.to(device), self.cols)

    def dense(self, device: torch.device | str = "cpu") -> Tensor:
        """Bool tensor of the parameter's shape, True = kept."""
        return from_matrix(self.matrix(device), self.shape, transposed=self.transposed)

    @property
    def sparsity(self) -> float:
        """Pruned share of the parameter, in [0, 1)."""
        return 1 - self.kept / self.shape.numel()

    @property
    def sha256(self) -> str:
        """Hash of the shape, the layout and the bits."""
        return bits_sha256(self.bits, tuple(self.shape), self.cols, self.transposed)


def to_matrix(param: Tensor, cols: int, *, transposed: bool = False) -> Tensor:
    """Matrix [rows = outputs, cols = inputs] of a parameter; a view where the layout allows it."""
    return (param.transpose(-1, -2) if transposed else param).reshape(-1, cols)


def from_matrix(matrix: Tensor, shape: torch.Size, *, transposed: bool = False) -> Tensor:
    """Inverse of :func:`to_matrix`: a tensor of the parameter's ``shape``."""
    if not transposed:
        return matrix.reshape(shape)
    return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


def attach(module: nn.Module, param: str, mask: Mask, *, zero: bool = True) -> None:
    """Attach ``mask`` to ``module.<param>`` and zero the pruned weights in place (unless ``zero`` is False).

    Raises:
        MaskError: the mask was made for another shape.
    """
    weight: Tensor = getattr(module, param)
    if weight.shape != mask.shape:
        raise MaskError(f"mask of shape {tuple(mask.shape)} does not fit {param} of shape {tuple(weight.shape)}")
    if zero:
        _zero(weight, mask)
    module.__dict__.setdefault(_ATTRIBUTE, {})[param] = mask


def _zero(weight: Tensor, mask: Mask) -> None:
    if weight.is_contiguous() and not mask.transposed and weight.dtype in DTYPES:
        # One kernel that reads an eighth of a byte a weight, where a bool matrix would be made and read.
        apply_bits(weight.detach().view(mask.bits.shape[0], mask.cols), mask.bits.to(weight.device))
        return
    with torch.no_grad():
        weight.masked_fill_(~mask.dense(weight.device), 0)


def mask_of(module: nn.Module, param: str = "weight") -> Mask | None:
    """The mask attached to ``module.<param>``, or None."""
    if isinstance(module, HoldsMask) and param == "weight":
        return module.mask
    attached: dict[str, Mask] = module.__dict__.get(_ATTRIBUTE, {})
    return attached.get(param)


def detach(module: nn.Module) -> None:
    """Forget the masks of ``module`` itself (not of its children); the weights stay as they are."""
    module.__dict__.pop(_ATTRIBUTE, None)


def masks(model: nn.Module) -> dict[str, Mask]:
    """Every mask in ``model``, by parameter name (as in ``named_parameters``)."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, HoldsMask):
            found[f"{prefix}.weight" if prefix else "weight"] = module.mask
        for param, mask in module.__dict__.get(_ATTRIBUTE, {}).items():
            found[f"{prefix}.{param}" if prefix else param] = mask
    return found


def masks_sha256(model: nn.Module) -> str:
    """One hash over the names and bits of all masks of ``model``."""
    return combined_sha256({name: mask.sha256 for name, mask in masks(model).items()})


def bits_sha256(bits: Tensor, shape: tuple[int, ...], cols: int, transposed: bool) -> str:
    """The hash of a mask with these ``bits`` (see :class:`Mask`)."""
    digest = hashlib.sha256(f"{shape} {cols} {transposed}\n".encode())
    digest.update(np.ascontiguousarray(bits.numpy()).data)
    return digest.hexdigest()


def combined_sha256(hashes: Mapping[str, str]) -> str:
    """One hash over the names and the hashes of masks."""
    digest = hashlib.sha256()
    for name, one in sorted(hashes.items()):
        digest.update(f"{name} {one}\n".encode())
    return digest.hexdigest()


def check_masks(model: nn.Module) -> None:
    """Check that every pruned weight of ``model`` is zero.

    Raises:
        MaskError: names each parameter with a pruned weight that is not zero, and how many there are.
    """
    broken = []
    for name, mask in masks(model).items():
        owner, _, param = name.rpartition(".")
        if isinstance(model.get_submodule(owner), HoldsMask):
            continue
        weight = model.get_submodule(owner).get_parameter(param).detach()
        if hasattr(weight, "full_tensor"):  # split over processes (a DTensor): one at a time, on all of them
            weight = weight.full_tensor()
        if weight.shape != mask.shape:
            broken.append(f"{name}: shape {tuple(weight.shape)}, mask {tuple(mask.shape)}")
        elif alive := int(((weight != 0) & ~mask.dense(weight.device)).sum()):
            broken.append(f"{name}: {alive} pruned weights are not zero")
    if broken:
        raise MaskError("the masks do not hold: " + "; ".join(broken))
