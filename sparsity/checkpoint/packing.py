"""A pruned model's ``state_dict`` in the compressed form, and every tensor back to a dense one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trisparse.kernels.compressed import compress
from trisparse.kernels.score import DTYPES
from trisparse.sparsity.backends import default_plan
from trisparse.sparsity.checkpoint.target import Target, TargetError, mask_names
from trisparse.sparsity.linear import SparseLinear, storage_format
from trisparse.sparsity.mask import Mask, masks, to_matrix
from trisparse.sparsity.pattern import Pattern

_Layer = TypeVar("_Layer", bound=nn.Module)


def pack(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Target]]:
    """The ``state_dict`` of ``model`` with pruned weights compressed where that is smaller, and what each one is.

    The model stays as it is. Weights without a compressed form (convolutions, tied weights, fused experts) stay dense,
    and their masks are tensors of their own: see checkpoint/target.py.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    targets: dict[str, Target] = {}
    found = masks(model)
    for name, mask in found.items():
        path, _, param = name.rpartition(".")
        layer = model.get_submodule(path)
        if isinstance(layer, SparseLinear):
            targets[name] = Target.of(mask, layer.format)
            continue
        packed = None
        if type(layer) in (nn.Linear, Conv1D) and param == "weight" and owners[id(layer.weight)] == 1:
            packed = _compressed(state[name], mask)
        if packed is None:
            targets[name] = Target.of(mask, "dense")
            continue
        format, tensors = packed
        targets[name] = Target.of(mask, format)
        del state[name]
        prefix = f"{path}." if path else ""
        state |= {prefix + part: tensor for part, tensor in tensors.items()}
    for name, holder in mask_names(targets).items():
        state[holder] = found[name].bits
    return state, targets


def _compressed(weight: Tensor, mask: Mask) -> tuple[str, dict[str, Tensor]] | None:
    """The format and the tensors of a weight, or None where it has no compressed form or a larger one."""
    if hasattr(weight, "full_tensor"):  # split over processes (a DTensor): one at a time, on all of them
        weight = weight.full_tensor()
    if weight.dtype not in DTYPES:
        return None
    format, n, m = storage_format(mask.pattern, mask.cols)
    matrix = to_matrix(weight, mask.cols, transposed=mask.transposed).contiguous()
    made = compress(matrix, mask.bits.to(matrix.device), format, n, m)
    tensors = {"values": made.values, "meta" if format == "2:4" else "bitmask": made.meta}
    if made.row_offsets is not None:
        tensors["row_offsets"] = made.row_offsets
    return (format, tensors) if sum(t.nbytes for t in tensors.values()) < weight.nbytes else None


def unpack_dense(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of ``model`` as if no layer were compressed."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for path, layer in model.named_modules():
        if isinstance(layer, SparseLinear):
            prefix = f"{path}." if path else ""
            for part in ("values", "meta", "bitmask", "row_offsets"):
                state.pop(prefix + part, None)
            weight = layer.weight
            state[f"{prefix}weight"] = weight.t().contiguous() if layer.kind == "Conv1D" else weight
    return state


class EmptyLayer(nn.Module):
    """Stands in for a SparseLinear while transformers loads its values and bias; :func:`fill` makes one of it."""

    values: Tensor
    target: Target

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("values", torch.empty(shape, dtype=dtype, device="meta"))
        self.bias: nn.Parameter | None = None
        # What draws missing weights at random asks some models' layers for this, and leaves what is marked alone.
        self.weight = torch.empty(0)
        self._is_hf_initialized = self.weight._is_hf_initialized = True  # type: ignore[attr-defined]


def empty_layer(layer: nn.Module, target: Target) -> EmptyLayer:
    """A layer without values for the tensors of ``target``, in place of ``layer``; takes its bias.

    Raises:
        ValueError: ``layer`` is no linear layer of the shape of ``target``.
    """
    if not isinstance(layer, nn.Linear | Conv1D) or type(layer) not in (nn.Linear, Conv1D):
        raise ValueError(f"a {type(layer).__name__} has no compressed form")
    if tuple(layer.weight.shape) != target.shape or isinstance(layer, Conv1D) != target.transposed:
        raise ValueError(f"the model's weight has shape {tuple(layer.weight.shape)}, the file's {target.shape}")
    made = _copied(_first_empty(target.tensors["values"][1], layer.weight.dtype))
    made.target, made.bias = target, layer.bias
    made._buffers["values"] = made.values.detach()  # another object: buffers that are one count once
    return made


def fill(layer: EmptyLayer, positions: Mapping[str, Tensor], tiles: Tensor | None) -> SparseLinear:
    """The SparseLinear with the values of ``layer``.

    Args:
        layer: with ``values`` where they are to stay.
        positions: ``meta``, or ``bitmask`` and maybe ``row_offsets``, checked, on the CPU.
        tiles: its tile offsets, where it has them.

    Raises:
        TargetError: it has no values.
    """
    target, device = layer.target, layer.values.device
    if device.type == "meta":
        raise TargetError("its values were not loaded")
    made = _twin(target.cols, target.rows, target.pattern, "Conv1D" if target.transposed else "Linear", layer.dtype)
    made.values, made.bias, made.training = layer.values, layer.bias, layer.training
    for part, tensor in positions.items():
        setattr(made, part, tensor.to(device))
    made.tile_offsets = None if tiles is None else tiles.to(device)
    if (plan := default_plan(made)) != made.plan:
        made.adopt(plan)
    return made


def _twin(cols: int, rows: int, pattern: Pattern, kind: str, dtype: torch.dtype) -> SparseLinear:
    return _copied(_first(cols, rows, pattern, kind, dtype))


def _copied(first: _Layer) -> _Layer:
    """A layer like ``first`` with parameters, buffers and hooks of its own; making it anew takes ten times as long."""
    made: _Layer = object.__new__(type(first))
    for name, value in first.__dict__.items():
        made.__dict__[name] = value.copy() if isinstance(value, dict | set) else value
    return made


@lru_cache(maxsize=64)
def _first_empty(shape: tuple[int, ...], dtype: torch.dtype) -> EmptyLayer:
    return EmptyLayer(shape, dtype)


@lru_cache(maxsize=64)
def _first(cols: int, rows: int, pattern: Pattern, kind: str, dtype: torch.dtype) -> SparseLinear:
    kept = 0 if storage_format(pattern, cols)[0] == "bitmask" else None
    return SparseLinear(cols, rows, pattern, kept=kept, bias=False, kind=kind, device="meta", dtype=dtype)


def replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put ``layer`` in place of the module ``path`` of ``model``."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def tensor_names(targets: Mapping[str, Target]) -> dict[str, tuple[str, torch.dtype | None, tuple[int, ...]]]:
    """Every tensor that ``targets`` ask for: its weight, dtype (None: floating point) and shape, by its name."""
    holders = mask_names(targets)
    found: dict[str, tuple[str, torch.dtype | None, tuple[int, ...]]] = {}
    for name, target in targets.items():
        if name in holders:  # the weight itself may be stored under the name of another that it is tied to
            found[holders[name]] = (name, torch.uint8, target.bits_shape)
        path, dot, _ = name.rpartition(".")
        for part, (dtype, shape) in target.tensors.items():
            found[path + dot + part] = (name, dtype, shape)
    return found
