"""``load``: the model in a checkpoint, with its masks attached and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from trisparse.sparsity.checkpoint.architecture import architecture, check_size, empty_model
from trisparse.sparsity.checkpoint.files import (
    CONFIG_FILE,
    INFO_FILE,
    MASKS_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    check_no_adapter,
    is_checkpoint,
)
from trisparse.sparsity.checkpoint.headers import read_headers, weight_files
from trisparse.sparsity.checkpoint.info import Manifest, read_info, read_manifest
from trisparse.sparsity.checkpoint.loading import attach_mask, check_zeros
from trisparse.sparsity.checkpoint.packing import empty_layer, fill, replace
from trisparse.sparsity.checkpoint.registration import register
from trisparse.sparsity.checkpoint.target import TargetError, check_kept, mask_names
from trisparse.sparsity.checkpoint.validation import check_mask, check_pattern, check_positions
from trisparse.sparsity.checkpoint.writer import Form
from trisparse.sparsity.compression import compress
from trisparse.sparsity.foreign.compressed_tensors import load_compressed_tensors, sparse_format
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import Mask, MaskError, attach, check_masks, detach, masks_sha256
from trisparse.sparsity.pattern import parse_pattern
from trisparse.sparsity.progress import quiet_transformers


def load(
    path: str | Path,
    *,
    into: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    form: Form = "dense",
    device_map: Any = None,
) -> Any:
    """Load a checkpoint that :func:`save` wrote, with its masks attached and checked; or one of compressed-tensors.

    Args:
        path: the folder.
        into: for a module that is not transformers': an instance of the same architecture, filled in place.
        dtype: of a transformers model; None keeps that of the file.
        form: ``"dense"`` gives ordinary layers with masks, to be pruned further or retrained, whatever the form in the
            folder; ``"compressed"`` gives ``SparseLinear`` where the folder holds compressed weights, as
            ``from_pretrained`` does.
        device_map: of a transformers model, as of ``from_pretrained``.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: the folder is missing, not ours, damaged, or its masks do not match their hash.
        MaskError: a pruned weight in a folder of dense weights is not zero.
        ValueError: ``form`` is unknown.
    """
    path = Path(path)
    if form not in get_args(Form):
        raise ValueError(f"form must be 'compressed' or 'dense', got {form!r}")
    if not is_checkpoint(path) and sparse_format(path) is not None:
        if into is not None or device_map is not None:
            raise ValueError(f"{path} was written by compressed-tensors: load it without into and device_map")
        foreign = load_compressed_tensors(path, dtype=dtype)
        if form == "compressed":
            compress(foreign, prefer="memory")
        return foreign
    manifest = read_manifest(path)
    model: nn.Module
    if manifest is not None:
        if into is None:
            return _from_pretrained(path, dtype, device_map, dense=form == "dense").eval()
        _fill(into, path, manifest, dense=form == "dense")
        return into.eval()
    info = read_info(path)
    if into is None:
        model = _from_pretrained(path, dtype, device_map)
    else:
        model = into
        read_headers([path / WEIGHTS_FILE])
        try:
            _check_fits(load_file(path / WEIGHTS_FILE), model)
            load_model(model, path / WEIGHTS_FILE)
        except (RuntimeError, OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} does not fit into the given {type(into).__name__}: {error}") from error
        for module in model.modules():
            detach(module)
    for name, mask in _read_masks(path, info).items():
        owner, _, param = name.rpartition(".")
        try:
            attach(model.get_submodule(owner), param, mask, zero=False)
        except (AttributeError, MaskError):
            raise CheckpointError(f"{path} has a mask for {name}, but the model has no such weight") from None
    if masks_sha256(model) != info.get("masks_sha256"):
        raise CheckpointError(f"the masks in {path} do not match their hash")
    check_masks(model)
    return model.eval()


def _fill(model: nn.Module, path: Path, manifest: Manifest, *, dense: bool) -> None:
    """Load a plain module's compressed checkpoint into ``model``."""
    read_headers([path / WEIGHTS_FILE])
    try:
        tensors = load_file(path / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / WEIGHTS_FILE} cannot be read: {error}") from error
    holders = mask_names(manifest.targets)
    made: dict[str, SparseLinear] = {}
    found: dict[str, Tensor] = {}
    for name, target in manifest.targets.items():
        owner, _, param = name.rpartition(".")
        prefix = f"{owner}." if owner else ""
        try:
            layer = model.get_submodule(owner)
            if name in holders:
                found[name] = tensors.pop(holders[name])
                check_mask(target, found[name])
                continue
            if param != "weight" or not owner:
                raise ValueError("only the weight of a layer inside the module is stored compressed")
            empty = empty_layer(layer, target)
            empty.values = tensors.pop(f"{prefix}values").to(empty.dtype)
            if tuple(empty.values.shape) != target.tensors["values"][1]:
                raise ValueError(f"values have shape {tuple(empty.values.shape)}")
            positions = {part: tensors.pop(prefix + part) for part in target.tensors if part != "values"}
            made[name] = fill(empty, positions, check_positions(target, positions))
        except (KeyError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{path / WEIGHTS_FILE} is damaged at {name}: {error}") from error
    for name, sparse in made.items():
        tensors[name] = sparse.to_dense().get_parameter("weight")
    try:
        _check_fits(tensors, model)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit into the given {type(model).__name__}: {error}") from error
    model.load_state_dict(tensors, strict=False)
    for module in model.modules():
        detach(module)
    for name, target in manifest.targets.items():
        owner, _, param = name.rpartition(".")
        layer = model.get_submodule(owner)
        try:
            if name in made and not dense:
                made[name].bias = layer.bias  # type: ignore[assignment]
                replace(model, owner, made[name])
            elif name in made:
                attach(layer, param, made[name].mask, zero=False)
            else:
                check_zeros(layer, param, attach_mask(layer, param, target, found[name]))
        except TargetError as error:
            raise CheckpointError(f"{path / WEIGHTS_FILE} is damaged at {name}: {error}") from error


def _check_fits(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise a CheckpointError, before anything is changed, unless ``weights`` are those of ``model``."""
    own = model.state_dict()
    wrong = [n for n, w in weights.items() if n not in own or own[n].shape != w.shape]
    present = {own[n].data_ptr() for n in weights if n in own}
    wrong += [n for n, w in own.items() if n not in weights and w.data_ptr() not in present]
    if wrong:
        raise CheckpointError(f"{', '.join(wrong[:3])} differ")


def _from_pretrained(path: Path, dtype: torch.dtype | None, device_map: Any, *, dense: bool = True) -> PreTrainedModel:
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(f"{path} was saved from a plain module: pass an instance of it as load(path, into=...)")
    check_no_adapter(path)
    register()
    stored = read_headers(weight_files(path))
    model_class, config = architecture(path, len(stored))
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict) and settings.get("quant_method") == "trisparse":
        settings["dense"] = dense  # the quantizer checks the size
    elif settings is not None:  # transformers would load it by a quantizer that checks nothing
        raise CheckpointError(f"{path / CONFIG_FILE} has a quantization_config that is none of ours")
    else:
        check_size(empty_model(model_class, config, path), [tensor.shape for tensor in stored.values()], path)
    model: PreTrainedModel
    try:
        with quiet_transformers():
            loaded: Any = model_class.from_pretrained(
                path,
                config=config,
                dtype=dtype or "auto",
                device_map=device_map,
                local_files_only=True,
                output_loading_info=True,
            )
            model, loading = loaded
    except CheckpointError:
        raise
    except Exception as error:  # what a config breaks in a model may raise anything
        raise CheckpointError(f"the weights in {path} cannot be read: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := loading.get(what):
            listed = ", ".join(sorted(map(str, keys))[:3])
            raise CheckpointError(
                f"the weights in {path} do not fit {model_class.__name__}: {what.replace('_', ' ')} {listed}"
            )
    return model


def _read_masks(path: Path, info: Mapping[str, Any]) -> dict[str, Mask]:
    read_headers([path / MASKS_FILE])
    try:
        bits = load_file(path / MASKS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / MASKS_FILE} cannot be read: {error}") from error
    if bits.keys() != info["targets"].keys():
        raise CheckpointError(f"{MASKS_FILE} and {INFO_FILE} in {path} list different weights")
    found = {}
    for name, entry in info["targets"].items():
        try:
            shape = torch.Size(entry["shape"])
            found[name] = Mask(
                bits[name], shape, int(entry["cols"]), bool(entry["transposed"]), parse_pattern(entry["pattern"])
            )
            check_kept(found[name].pattern, found[name].bits.shape[0], found[name].cols, found[name].kept)
            check_pattern(found[name].pattern, found[name].bits, found[name].cols)
        except (KeyError, TypeError, ValueError, MaskError) as error:
            raise CheckpointError(f"{INFO_FILE} in {path} is damaged at {name}: {error}") from error
    return found
