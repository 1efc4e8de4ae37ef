"""``save``: a pruned model to a folder that transformers opens, its pruned weights compressed or dense."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from trisparse.sparsity.checkpoint.files import INFO_FILE, MASKS_FILE, WEIGHTS_FILE, check_output, replaced_folder
from trisparse.sparsity.checkpoint.info import Manifest, checkpoint_info, mask_entry, plain_info
from trisparse.sparsity.checkpoint.model_card import CARD_FILE, model_card
from trisparse.sparsity.checkpoint.packing import pack, unpack_dense
from trisparse.sparsity.checkpoint.quantizer import TrisparseConfig, TrisparseQuantizer
from trisparse.sparsity.mask import check_masks, masks, masks_sha256
from trisparse.sparsity.progress import quiet_transformers

Form = Literal["compressed", "dense"]


def save(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any = None,
    recipe: Sequence[Mapping[str, Any]] = (),
    form: Form = "compressed",
    max_shard_size: int | str = "50GB",
) -> Path:
    """Write ``model`` with its masks to the folder ``path``, which appears whole or not at all.

    Args:
        model: masked or compressed; a transformers model (opens with ``from_pretrained``) or any module (opens with
            ``load(path, into=)``). It stays as it is.
        path: a new folder, an empty one, or an earlier result of ours, which is replaced with all that it holds.
        tokenizer: saved alongside.
        recipe: what was done to the model, step by step; JSON values.
        form: ``"compressed"`` stores the pruned weights of linear layers by their kept values where that is smaller;
            ``"dense"`` stores ordinary weights, which every tool opens, with the masks in a file beside them. A model
            without masks is stored dense.
        max_shard_size: of a file of weights of a transformers model, in bytes or as ``"5GB"``.

    Raises:
        ValueError: ``path`` exists and is not ours, or ``form`` is unknown.
        MaskError: a pruned weight is not zero.
    """
    path = Path(path)
    if form not in get_args(Form):
        raise ValueError(f"form must be 'compressed' or 'dense', got {form!r}")
    check_output(path)
    check_masks(model)
    with replaced_folder(path) as unfinished:
        write_checkpoint(model, unfinished, name=path.name, recipe=recipe, form=form, max_shard_size=max_shard_size)
        if tokenizer is not None:
            with quiet_transformers():
                tokenizer.save_pretrained(unfinished)
    return path


def write_checkpoint(
    model: nn.Module,
    folder: Path,
    *,
    name: str,
    recipe: Sequence[Mapping[str, Any]] = (),
    form: Form = "compressed",
    max_shard_size: int | str = "50GB",
) -> None:
    """Write ``model``, whose masks were checked, into the empty ``folder``; the card calls it ``name``."""
    if not masks(model):
        form = "dense"  # nothing is compressed, and every tool opens an ordinary model
    with quiet_transformers():
        if form == "compressed":
            _write_compressed(model, folder, recipe, max_shard_size)
        else:
            _write_dense(model, folder, recipe, max_shard_size)
    (folder / CARD_FILE).write_text(model_card(model, name, recipe=recipe, form=form), encoding="utf-8")


def _write_compressed(
    model: nn.Module, folder: Path, recipe: Sequence[Mapping[str, Any]], max_shard_size: int | str
) -> None:
    if isinstance(model, PreTrainedModel):
        config = TrisparseConfig(manifest=Manifest({}, recipe))
        with _quantizer(model, TrisparseQuantizer(config)):
            # The model's own names: what transformers renames for older readers would not be compressed weights there.
            model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=False)
        return
    state, targets = pack(model)
    save_file(_separate(state), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_json(folder / INFO_FILE, plain_info(type(model).__name__, Manifest(targets, recipe)))


def _write_dense(
    model: nn.Module, folder: Path, recipe: Sequence[Mapping[str, Any]], max_shard_size: int | str
) -> None:
    found = masks(model)
    state = unpack_dense(model)
    if isinstance(model, PreTrainedModel):
        with _quantizer(model, None):
            model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    elif state.keys() == model.state_dict().keys():
        save_model(model, str(folder / WEIGHTS_FILE))
    else:
        save_file(_separate(state), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    entries = {name: mask_entry(mask) for name, mask in found.items()}
    save_file({name: mask.bits for name, mask in found.items()}, folder / MASKS_FILE)
    _write_json(folder / INFO_FILE, checkpoint_info(type(model).__name__, entries, masks_sha256(model), recipe))


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with one name for each tensor, contiguous: safetensors takes no shared memory."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    for name, tensor in sorted(state.items()):
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        found[name] = tensor.detach().contiguous()
    return found


@contextmanager
def _quantizer(model: PreTrainedModel, quantizer: TrisparseQuantizer | None) -> Iterator[None]:
    """Have ``save_pretrained`` write with ``quantizer``, or as an ordinary model; the model stays as it was."""
    before, config = model.__dict__.get("hf_quantizer"), model.config.__dict__.get("quantization_config")
    model.__dict__.pop("hf_quantizer", None)
    model.config.__dict__.pop("quantization_config", None)
    if quantizer is not None:
        model.__dict__["hf_quantizer"] = quantizer
    try:
        yield
    finally:
        model.__dict__.pop("hf_quantizer", None)
        model.config.__dict__.pop("quantization_config", None)
        if before is not None:
            model.__dict__["hf_quantizer"] = before
        if config is not None:
            model.config.quantization_config = config


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
