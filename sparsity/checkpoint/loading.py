"""Loading compressed weights into a model: empty layers before, checks of what arrived after."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trisparse.sparsity.checkpoint.architecture import check_size
from trisparse.sparsity.checkpoint.files import CheckpointError, check_no_adapter
from trisparse.sparsity.checkpoint.headers import StoredTensor, read_headers, weight_files
from trisparse.sparsity.checkpoint.info import Manifest
from trisparse.sparsity.checkpoint.packing import EmptyLayer, empty_layer, fill, replace, tensor_names
from trisparse.sparsity.checkpoint.target import MASKS_PREFIX, Target, TargetError, mask_names
from trisparse.sparsity.checkpoint.validation import check_mask, check_positions
from trisparse.sparsity.mask import Mask, attach

Positions = tuple[dict[str, Tensor], Tensor | None]  # a weight's tensors without its values, and its tile offsets

# Tensors that transformers is to leave to us.
_OURS = rf"\.(meta|bitmask|row_offsets)$|^{MASKS_PREFIX}\.\d+$"


class Loading:
    """The layers of ``model`` that are compressed in the files, empty, until :meth:`finish`.

    transformers loads the values, as it loads all weights: it casts them and places them by the device map. What says
    where they belong is read here and checked on the CPU first.

    Args:
        model: a transformers model on the meta device, of any class that the checkpoint may be opened as.
        manifest: what the files hold.
        files: safetensors.

    Raises:
        CheckpointError: a file is damaged, or does not hold what ``manifest`` says or what the model needs.
    """

    def __init__(self, model: Any, manifest: Manifest, files: Sequence[Path]) -> None:
        self._model = model
        _check_place(files, str(getattr(model.config, "name_or_path", "") or ""))
        check_no_adapter(files[0].parent)
        prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
        headers = read_headers(files)
        self._stored = _check_stored(model, manifest, headers, prefix)
        self._holders = mask_names(manifest.targets)
        self._weights: list[_Weight] = []
        modules = dict(model.named_modules())
        for name, target in manifest.targets.items():
            own = _own_name(name, modules, prefix)
            if own is not None:  # else of a part that this class of model does not have, such as the head
                layer = self._prepare(own, target, modules)
                self._weights.append(_Weight(name, own, target, layer))
        check_size(model, [tensor.shape for tensor in headers.values()], files[0].parent)
        model._keys_to_ignore_on_load_unexpected.add(_OURS)

    def _prepare(self, name: str, target: Target, modules: Mapping[str, nn.Module]) -> nn.Module:
        path, _, param = name.rpartition(".")
        layer = modules[path]
        if target.format == "dense":
            weight = getattr(layer, param, None)
            if not isinstance(weight, Tensor) or tuple(weight.shape) != target.shape:
                raise CheckpointError(f"the model has no weight {name} of shape {target.shape}")
            return layer
        try:
            if param != "weight":
                raise ValueError("only a parameter named weight is stored compressed")
            made = empty_layer(layer, target)
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be compressed: {error}") from error
        replace(self._model, path, made)
        return made

    def _read(self, name: str, target: Target) -> Positions:
        """The indices of a weight, read and checked; or the mask of one that is stored dense."""
        if target.format == "dense":
            stored = {"mask": self._stored[self._holders[name]]}
        else:
            prefix = name.removesuffix("weight")
            stored = {part: self._stored[prefix + part] for part in target.tensors if part != "values"}
        try:
            tensors = {part: tensor.read() for part, tensor in stored.items()}
            if target.format == "dense":
                check_mask(target, tensors["mask"])
                return tensors, None
            return tensors, check_positions(target, tensors)
        except TargetError as error:
            raise CheckpointError(f"{next(iter(stored.values())).file} is damaged at {name}: {error}") from error

    def finish(self, *, dense: bool) -> None:
        """Give the layers their indices, attach the masks of the others and, with ``dense``, decompress.

        Raises:
            CheckpointError: the tensors of a weight are damaged, or not those that were saved.
        """
        self._model._keys_to_ignore_on_load_unexpected.discard(_OURS)
        for weight in self._weights:
            # Not in threads beside transformers' work: waiting for each other's turn takes longer than it saves.
            tensors, tiles = self._read(weight.name, weight.target)
            path, _, param = weight.own.rpartition(".")
            layer = weight.layer
            try:
                if isinstance(layer, EmptyLayer):
                    sparse = fill(layer, tensors, tiles)
                    replace(self._model, path, sparse.to_dense() if dense else sparse)
                else:
                    check_zeros(layer, param, attach_mask(layer, param, weight.target, tensors["mask"]))
            except TargetError as error:
                raise CheckpointError(f"the checkpoint is damaged at {weight.name}: {error}") from error


@dataclass(frozen=True)
class _Weight:
    """A pruned weight: its name in the files and in the model, what it is, and its layer."""

    name: str
    own: str
    target: Target
    layer: nn.Module


def check_zeros(layer: nn.Module, param: str, mask: Mask) -> None:
    """Raise a TargetError unless the weights that ``mask`` prunes are zero."""
    weight: Tensor = getattr(layer, param).detach()
    if weight.is_meta:  # it stays on the disk
        return
    if alive := int(((weight != 0) & ~mask.dense(weight.device)).sum()):
        raise TargetError(f"{alive} pruned weights are not zero")


def attach_mask(layer: nn.Module, param: str, target: Target, bits: Tensor) -> Mask:
    """Attach and return the mask, checked, of a weight that is stored dense."""
    mask = Mask(bits, torch.Size(target.shape), target.cols, target.transposed, target.pattern)
    attach(layer, param, mask, zero=False)
    return mask


def _check_place(files: Sequence[Path], model: str) -> None:
    """Files of a local folder must be in it: the index of shards may not name others."""
    if model and os.path.isdir(model):
        folder = files[0].parent
        inside = os.path.normpath(folder)
        if not (Path(inside) == Path(os.path.normpath(model)) or Path(inside).is_relative_to(os.path.normpath(model))):
            raise CheckpointError(f"{model} names the file of weights {files[0]}, which is outside of it")
        expected = {os.path.normpath(file) for file in weight_files(folder)}
        if len(files) > 1 and {os.path.normpath(file) for file in files} - expected:
            raise CheckpointError(f"{model} names files of weights that are outside of it")


def _own_name(name: str, modules: Mapping[str, nn.Module], prefix: str) -> str | None:
    """The name in the model of a weight of the file: a base model has no prefix where one with a head has."""
    for own in (name, name.removeprefix(prefix), prefix + name):
        if own.rpartition(".")[0] in modules:
            return own
    return None


def _check_stored(
    model: Any, manifest: Manifest, stored: Mapping[str, StoredTensor], prefix: str
) -> Mapping[str, StoredTensor]:
    """``stored`` by the manifest's names, after a check that all is there, with its dtype and shape, and no more."""
    needed = tensor_names(manifest.targets)
    if not needed.keys() <= stored.keys():
        stored = _renamed(model, stored, needed, prefix)
    for tensor, (name, dtype, shape) in needed.items():
        found = stored.get(tensor)
        if found is None:
            listed = sorted({entry.file.name for entry in stored.values()})
            raise CheckpointError(f"{', '.join(listed[:3])} has no {tensor}, which {name} needs")
        right = found.dtype is not None and (found.dtype.is_floating_point if dtype is None else found.dtype == dtype)
        if not right or found.shape != shape:
            raise CheckpointError(
                f"{found.file} is damaged at {tensor}: it is {found.dtype} {found.shape}, not "
                f"{dtype or 'floating point'} {shape}"
            )
    known = {stored[tensor].name for tensor in needed}
    for found in stored.values():
        if found.name not in known and re.search(_OURS, found.name):
            raise CheckpointError(f"{found.file} is damaged at {found.name}: no weight is listed that needs it")
    return stored


def _renamed(
    model: Any, stored: Mapping[str, StoredTensor], needed: Mapping[str, Any], prefix: str
) -> dict[str, StoredTensor]:
    """``stored`` by the names in the model, as transformers renames them when it loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    conversions = get_model_conversion_mapping(model, None, None)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    found = dict(stored)
    for name, tensor in stored.items():
        if name not in needed:
            new = apply_renamings(name, renamings)
            for own in (new, new.removeprefix(prefix), prefix + new):
                if own in needed:
                    found[own] = tensor
    return found
