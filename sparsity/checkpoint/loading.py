"""Loading compressed weights into a model: empty layers before, checks of what arrived after."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trisparse.sparsity.backends import default_plan
from trisparse.sparsity.checkpoint.files import CheckpointError
from trisparse.sparsity.checkpoint.headers import StoredTensor, read_headers, weight_files
from trisparse.sparsity.checkpoint.info import Manifest
from trisparse.sparsity.checkpoint.packing import empty_layer, replace, tensor_names
from trisparse.sparsity.checkpoint.target import MASKS_PREFIX, Target, TargetError, mask_names
from trisparse.sparsity.checkpoint.validation import check_mask, check_tensors
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import Mask, attach


class Loading:
    """The layers of ``model`` that are compressed in the files, empty, until :meth:`finish`.

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
        self._stored = read_headers(files)
        holders = mask_names(manifest.targets)
        prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
        modules = dict(model.named_modules())
        self._targets: dict[str, Target] = {}
        self._holders: dict[str, str] = {}
        self._own: dict[str, str] = {}  # the manifest's name to the model's
        self._where: dict[str, str] = {}  # a weight's name in the model to a file that holds it, for messages
        for name, target in manifest.targets.items():
            own = _own_name(name, modules, prefix)
            if own is None:
                continue  # of a part that this class of model does not have, such as the head
            self._targets[own] = target
            self._own[name] = own
            if name in holders:
                self._holders[own] = holders[name]
        self._check_stored(manifest, prefix)
        for name, target in self._targets.items():
            self._prepare(name, target, modules)
        if self._holders:
            self._add_masks()

    def _check_stored(self, manifest: Manifest, prefix: str) -> None:
        """Every tensor that the targets need is in the files, with its dtype and shape."""
        needed = tensor_names(manifest.targets)
        stored = self._stored
        if not needed.keys() <= stored.keys():
            stored = _renamed(self._model, stored, needed, prefix)
        for tensor, (name, dtype, shape) in needed.items():
            found = stored.get(tensor)
            if found is None:
                listed = sorted({entry.file.name for entry in stored.values()})
                raise CheckpointError(f"{', '.join(listed[:3])} has no {tensor}, which {name} needs")
            right = found.dtype is not None and (
                found.dtype.is_floating_point if dtype is None else found.dtype == dtype
            )
            if not right or found.shape != shape:
                raise CheckpointError(
                    f"{found.file} is damaged at {tensor}: it is {found.dtype} {found.shape}, not "
                    f"{dtype or 'floating point'} {shape}"
                )
            self._where[self._own.get(name, name)] = str(found.file)

    def _prepare(self, name: str, target: Target, modules: Mapping[str, nn.Module]) -> None:
        path, _, param = name.rpartition(".")
        layer = modules[path]
        if target.format == "dense":
            weight = getattr(layer, param, None)
            if not isinstance(weight, Tensor) or tuple(weight.shape) != target.shape:
                raise CheckpointError(f"the model has no weight {name} of shape {target.shape}")
            return
        try:
            if param != "weight":
                raise ValueError("only a parameter named weight is stored compressed")
            made = empty_layer(layer, target)
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be compressed: {error}") from error
        made.tile_offsets = None  # computed in the end
        made._is_hf_initialized = True  # nothing in it is for transformers to draw at random
        replace(self._model, path, made)

    def _add_masks(self) -> None:
        """Tensors of the model, while it is loaded, for the masks of dense weights."""
        holder = nn.Module()
        for name, tensor in self._holders.items():
            empty = torch.empty(self._targets[name].bits_shape, dtype=torch.uint8, device="meta")
            holder.register_buffer(tensor.rpartition(".")[2], empty)
        self._model.add_module(MASKS_PREFIX, holder)

    def finish(self, *, dense: bool) -> None:
        """Check what was loaded, attach the masks and, with ``dense``, decompress.

        Raises:
            CheckpointError: the tensors of a weight are damaged, or not those that were saved.
        """
        holder = getattr(self._model, MASKS_PREFIX, None) if self._holders else None
        for name, target in self._targets.items():
            path, _, param = name.rpartition(".")
            layer = self._model.get_submodule(path)
            try:
                if isinstance(layer, SparseLinear):
                    finish_layer(layer, target)
                    if dense:
                        replace(self._model, path, layer.to_dense())
                else:
                    bits = getattr(holder, self._holders[name].rpartition(".")[2]).cpu()
                    check_zeros(layer, param, attach_mask(layer, param, target, bits))
            except TargetError as error:
                raise CheckpointError(f"{self._where.get(name, 'the checkpoint')} is damaged at {name}: {error}") from error
        if holder is not None:
            delattr(self._model, MASKS_PREFIX)

def finish_layer(layer: SparseLinear, target: Target) -> None:
    """Check the buffers of a layer that was loaded, and make it ready to run.

    Raises:
        TargetError: they are damaged.
    """
    tensors = {part: getattr(layer, part) for part in target.tensors}
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        raise TargetError("it was not loaded")
    tiles = check_tensors(target, tensors)
    if tiles is not None:
        layer.tile_offsets = tiles.to(layer.values.device)
    layer.adopt(default_plan(layer))


def check_zeros(layer: nn.Module, param: str, mask: Mask) -> None:
    """Raise a TargetError unless the weights that ``mask`` prunes are zero."""
    weight: Tensor = getattr(layer, param).detach()
    if alive := int(((weight != 0) & ~mask.dense(weight.device)).sum()):
        raise TargetError(f"{alive} pruned weights are not zero")


def attach_mask(layer: nn.Module, param: str, target: Target, bits: Tensor) -> Mask:
    """Attach and return the mask of a weight that is stored dense.

    Raises:
        TargetError: the bits are damaged.
    """
    check_mask(target, bits)
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
