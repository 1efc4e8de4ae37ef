"""Any checkpoint that is read here, as a model with its masks; and the dense folder that every tool opens."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trisparse.sparsity.checkpoint import (
    ADAPTERS_FILE,
    CheckpointError,
    check_output,
    is_checkpoint,
    load,
    read_info,
    replaced_folder,
)
from trisparse.sparsity.checkpoint.writer import write_checkpoint
from trisparse.sparsity.foreign.architecture import dense_architecture, filled_model
from trisparse.sparsity.foreign.compressed_tensors import load_compressed_tensors, sparse_format
from trisparse.sparsity.foreign.recover import recover_masks
from trisparse.sparsity.foreign.tensor_files import TensorFiles
from trisparse.sparsity.mask import check_masks
from trisparse.sparsity.progress import quiet_transformers

Recipe = list[dict[str, Any]]

# What transformers' tokenizers and processors keep beside the weights, as shell patterns.
_ALONGSIDE = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*.json",
    "*vocab*.txt",
    "merges.txt",
    "bpe.codes",
    "normalizer.json",
    "*.model",  # SentencePiece: tokenizer.model, spiece.model, sentencepiece.bpe.model
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "chat_templates/*",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)


def load_any(
    folder: str | Path, *, dtype: torch.dtype | None = None, recover: bool = False
) -> tuple[PreTrainedModel, Recipe]:
    """A dense model with the masks that its checkpoint has, and what was done to it.

    Args:
        folder: a checkpoint of ours, of compressed-tensors' sparse formats, or a dense one of transformers'.
        dtype: of the model; None keeps that of the files.
        recover: take the masks of a dense checkpoint from its zeros.

    Raises:
        CheckpointError: the folder is damaged, or nothing of these.
        ValueError: masks are to be recovered where there are some, or no weight has enough zeros.
    """
    folder = Path(folder)
    if is_checkpoint(folder):
        model: PreTrainedModel = load(folder, dtype=dtype)
        recipe = list(read_info(folder)["recipe"])
    elif (folder / ADAPTERS_FILE).is_file():
        raise CheckpointError(f"{folder} holds adapters and not a whole model: retrain with --merge, and export that")
    elif (named := sparse_format(folder)) is not None:
        model, recipe = load_compressed_tensors(folder, dtype=dtype), [imported(named)]
    else:
        model, recipe = load_dense(folder, dtype=dtype), []
    if recover:
        recipe.append(recovered(model))
    return model, recipe


def load_dense(folder: Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of transformers' from dense safetensors, in eval mode.

    Raises:
        CheckpointError: the folder is damaged, or transformers has no such architecture.
    """
    with TensorFiles(folder) as files:
        weights = {name: files.read(name) for name in files}
    model = filled_model(*dense_architecture(folder, len(weights)), weights, dtype or "auto", folder)
    model.eval()
    return model


def imported(named: str) -> dict[str, Any]:
    """The step of a recipe that says where masks came from: compressed-tensors' format ``named``."""
    return {"step": "import", "format": f"compressed-tensors {named}"}


def recovered(model: nn.Module) -> dict[str, Any]:
    """Recover the masks of ``model``; the step of a recipe that says so."""
    rows = recover_masks(model)
    found = [row for row in rows if row.pattern is not None]
    kept, total = sum(row.kept for row in found), sum(row.total for row in found)
    return {"step": "recover-masks", "weights": len(found), "of": len(rows), "sparsity": 1 - kept / total}


def export_dense(model: PreTrainedModel, out: str | Path, source: str | Path) -> None:
    """Write ``model`` as plain safetensors, with no word of sparsity: zeros are zeros.

    Args:
        model: dense, with or without masks.
        out: a new or empty folder.
        source: the folder that its tokenizer and processors are copied from.

    Raises:
        ValueError: ``out`` is taken.
        MaskError: a pruned weight is not zero.
    """
    check_output(out)
    check_masks(model)
    with replaced_folder(Path(out)) as unfinished:
        save_dense(model, unfinished)
        copy_alongside(Path(source), unfinished)


def save_dense(model: PreTrainedModel, folder: Path) -> None:
    """Write config and weights as transformers does for a model that no quantizer loaded."""
    with quiet_transformers():
        model.save_pretrained(folder)


def copy_alongside(source: Path, folder: Path) -> None:
    """Copy the tokenizer and the processors of ``source``, where it has them."""
    for file in (file for pattern in _ALONGSIDE for file in source.glob(pattern)):
        if file.is_file():
            copied = folder / file.relative_to(source)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copied)


def export_trisparse(
    model: PreTrainedModel, out: str | Path, source: str | Path, recipe: Sequence[Mapping[str, Any]]
) -> None:
    """Write a checkpoint of ours, with the tokenizer and the processors of ``source``; as :func:`export_dense`."""
    check_output(out)
    check_masks(model)
    with replaced_folder(Path(out)) as unfinished:
        write_checkpoint(model, unfinished, name=Path(out).name, recipe=recipe)
        copy_alongside(Path(source), unfinished)
