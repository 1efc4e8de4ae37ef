"""Saving and loading a pruned model: an ordinary Hugging Face folder with the masks beside it.

The weights are dense safetensors, so every tool opens the folder; ``trisparse.json`` and
``trisparse_masks.safetensors`` hold the masks, their hash and the recipe, which :func:`load` brings back.
A folder appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from trisparse.sparsity.mask import HoldsMask, Mask, MaskError, attach, check_masks, detach, masks, masks_sha256
from trisparse.sparsity.pattern import parse_pattern
from trisparse.sparsity.progress import quiet_transformers

INFO_FILE = "trisparse.json"
MASKS_FILE = "trisparse_masks.safetensors"
ADAPTERS_FILE = "trisparse_adapters.json"  # of a folder of adapters, see retrain/adapter_folder.py
_WEIGHTS_FILE = "model.safetensors"  # of models that are not transformers'
_FORMAT_VERSION = 1


class CheckpointError(RuntimeError):
    """A folder is not a checkpoint of ours, or is damaged."""


def save(
    model: nn.Module, path: str | Path, *, tokenizer: Any = None, recipe: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Write ``model`` with its masks to the folder ``path``.

    Args:
        model: a transformers model (opens with ``from_pretrained``) or any module (opens with ``load(path, into=)``).
        path: a new folder, an empty one, or an earlier result of ours, which is replaced with all that it holds.
        tokenizer: saved alongside.
        recipe: what was done to the model, step by step; JSON values.

    Raises:
        ValueError: ``path`` exists and is not ours, or the model is compressed.
        MaskError: a pruned weight is not zero.
    """
    path = Path(path)
    check_output(path)
    if any(isinstance(module, HoldsMask) for module in model.modules()):
        raise ValueError("model is compressed, and a checkpoint holds dense weights so far: decompress(model) it first")
    check_masks(model)
    found = masks(model)
    entries = {name: mask_entry(mask) for name, mask in found.items()}
    info = checkpoint_info(type(model).__name__, entries, masks_sha256(model), recipe)
    with replaced_folder(path) as unfinished:
        with quiet_transformers():
            if isinstance(model, PreTrainedModel):
                model.save_pretrained(unfinished)
            else:
                save_model(model, str(unfinished / _WEIGHTS_FILE))
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)
        save_file({name: mask.bits for name, mask in found.items()}, unfinished / MASKS_FILE)
        (unfinished / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n")
    return path


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` to write into, which takes its place in the end: whole, or after an error not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    unfinished.chmod(0o755)  # mkdtemp's folders are private
    try:
        yield unfinished
        if path.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
            path.rename(replaced / "old")
            try:
                unfinished.rename(path)
            except BaseException:
                (replaced / "old").rename(path)
                raise
            finally:
                shutil.rmtree(replaced)
        else:
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def mask_entry(mask: Mask) -> dict[str, Any]:
    """What ``trisparse.json`` says of a mask."""
    return {
        "pattern": str(mask.pattern),
        "shape": list(mask.shape),
        "cols": mask.cols,
        "transposed": mask.transposed,
        "kept": mask.kept,
    }


def checkpoint_info(
    model_class: str, entries: Mapping[str, Mapping[str, Any]], sha256: str, recipe: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Content of ``trisparse.json``: ``entries`` are the masks' (:func:`mask_entry`), ``sha256`` is over them all."""
    return {
        "version": _FORMAT_VERSION,
        "trisparse": version("trisparse"),
        "model_class": model_class,
        "masks_sha256": sha256,
        "targets": dict(entries),
        "recipe": [dict(step) for step in recipe],
    }


def check_output(path: str | Path) -> None:
    """Check that :func:`save` may write to ``path``.

    Raises:
        ValueError: it exists and is neither an empty folder nor a checkpoint or a folder of adapters of ours.
    """
    path = Path(path)
    if not path.exists() or any((path / name).is_file() for name in (INFO_FILE, ADAPTERS_FILE)):
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    raise ValueError(f"output folder {path} exists and is not a trisparse checkpoint: choose another, or remove it")


def load(path: str | Path, *, into: nn.Module | None = None, dtype: torch.dtype | None = None) -> Any:
    """Load a checkpoint that :func:`save` wrote, with its masks attached and checked.

    Args:
        path: the folder.
        into: for a module that is not transformers': an instance of the same architecture, filled in place.
        dtype: of a transformers model; None keeps that of the file.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: the folder is missing, not ours, damaged, or its masks do not match their hash.
        MaskError: a pruned weight in the file is not zero.
    """
    path = Path(path)
    info = read_info(path)
    model: nn.Module
    if into is None:
        model = _from_pretrained(path, dtype)
    else:
        model = into
        try:
            _check_fits(load_file(path / _WEIGHTS_FILE), model)
            load_model(model, path / _WEIGHTS_FILE)
        except (RuntimeError, OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} does not fit into the given {type(into).__name__}: {error}") from error
        for module in model.modules():
            detach(module)
    for name, mask in _read_masks(path, info).items():
        owner, _, param = name.rpartition(".")
        try:
            attach(model.get_submodule(owner), param, mask, zero=False)
        except AttributeError:
            raise CheckpointError(f"{path} has a mask for {name}, but the model has no such weight") from None
    if masks_sha256(model) != info.get("masks_sha256"):
        raise CheckpointError(f"the masks in {path} do not match their hash")
    check_masks(model)
    return model.eval()


def read_info(path: str | Path) -> dict[str, Any]:
    """What ``trisparse.json`` of the folder ``path`` says.

    Raises:
        CheckpointError: it is missing, unreadable or of a newer version.
    """
    file = Path(path) / INFO_FILE
    try:
        info = json.loads(file.read_text())
    except FileNotFoundError:
        if (Path(path) / ADAPTERS_FILE).is_file():
            raise CheckpointError(
                f"{path} holds adapters and not a whole model: trisparse.retrain.adapter_folder.load_adapted_model("
                "path) puts them on theirs"
            ) from None
        raise CheckpointError(f"{path} is not a trisparse checkpoint: it has no {INFO_FILE}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(info, dict) or not isinstance(info.get("targets"), dict):
        raise CheckpointError(f"{file} is damaged: it lists no targets")
    if info.get("version") != _FORMAT_VERSION:
        raise CheckpointError(f"{file} has version {info.get('version')!r}, this trisparse reads {_FORMAT_VERSION}")
    return info


def _check_fits(weights: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Raise a CheckpointError, before anything is changed, unless ``weights`` are those of ``model``."""
    own = model.state_dict()
    wrong = [n for n, w in weights.items() if n not in own or own[n].shape != w.shape]
    present = {own[n].data_ptr() for n in weights if n in own}
    wrong += [n for n, w in own.items() if n not in weights and w.data_ptr() not in present]
    if wrong:
        raise CheckpointError(f"{', '.join(wrong[:3])} differ")


def _from_pretrained(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    import transformers

    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} was saved from a plain module: pass an instance of it as load(path, into=...)")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'config.json'} is damaged: {error}") from error
    architecture = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise CheckpointError(f"transformers has no {architecture}, which {path} was saved from")
    model: PreTrainedModel
    try:
        with quiet_transformers():
            model, loading = model_class.from_pretrained(
                path, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the weights in {path} cannot be read: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := loading.get(what):
            listed = ", ".join(sorted(map(str, keys))[:3])
            raise CheckpointError(f"the weights in {path} do not fit {architecture}: {what.replace('_', ' ')} {listed}")
    return model


def _read_masks(path: Path, info: Mapping[str, Any]) -> dict[str, Mask]:
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
        except (KeyError, TypeError, ValueError, MaskError) as error:
            raise CheckpointError(f"{INFO_FILE} in {path} is damaged at {name}: {error}") from error
    return found
