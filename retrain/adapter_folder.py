"""A folder of adapters that were not merged: PEFT's own files, what they belong to and how they were made.

PEFT opens the folder with its config; ``trisparse_adapters.json`` names the pruned model with the hashes of its masks
and of its weight files, so that :func:`load_adapted_model` puts them on that one and on no other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel

from trisparse.retrain.sparse_lora_config import load_adapters
from trisparse.sparsity.checkpoint import ADAPTERS_FILE, CheckpointError, check_output, load, read_info, replaced_folder
from trisparse.sparsity.checkpoint.files import read_json
from trisparse.sparsity.mask import masks_sha256

_FORMAT_VERSION = 1


def save_adapters(
    model: PeftModel,
    path: str | Path,
    *,
    base: str | Path,
    tokenizer: Any = None,
    recipe: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the adapters of ``model`` to the folder ``path``, which appears whole or not at all.

    Args:
        model: under its adapters, as a retraining with ``merge=False`` leaves it (``report.peft_model``).
        path: as of :func:`trisparse.sparsity.checkpoint.save`.
        base: folder of the pruned model, which is needed to use them.
        tokenizer: saved alongside.
        recipe: what was done to the model, step by step; JSON values.

    Raises:
        ValueError: ``path`` exists and is no result of ours, or is ``base``.
        CheckpointError: ``base`` is no checkpoint of ours.
    """
    path, base = Path(path), Path(base).resolve()
    check_apart(path, base)
    check_output(path)
    info = {
        "version": _FORMAT_VERSION,
        "trisparse": version("trisparse"),
        "base": str(base),
        "masks_sha256": read_info(base)["masks_sha256"],
        "weights_sha256": _weight_files_sha256(base),
        "recipe": [dict(step) for step in recipe],
    }
    with replaced_folder(path) as unfinished:
        # PEFT would add the weights of the head and the embedding for a LoRA on the head, which the base model has
        model.save_pretrained(str(unfinished), save_embedding_layers=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        (unfinished / ADAPTERS_FILE).write_text(json.dumps(info, indent=2) + "\n")
    return path


def check_apart(path: str | Path, base: str | Path) -> None:
    """Check that adapters written to ``path`` do not replace ``base``, which they need.

    Raises:
        ValueError: they would.
    """
    out, needed = Path(path).resolve(), Path(base).resolve()
    if out == needed or out in needed.parents:
        raise ValueError(f"output folder {path} holds the pruned model that the adapters belong to: choose another")


def load_adapted_model(path: str | Path) -> tuple[PeftModel, list[dict[str, Any]]]:
    """The pruned model under the adapters in ``path``, in eval mode, and the recipe.

    Raises:
        CheckpointError: the folder is not ours or damaged, the pruned model is gone, or its masks or weights changed.
    """
    file = Path(path) / ADAPTERS_FILE
    try:
        info = read_json(file)
        base, recipe = info["base"], list(info["recipe"])
        expected_masks, expected_weights = info["masks_sha256"], info["weights_sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no folder of adapters: it has no {ADAPTERS_FILE}") from None
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from error
    if not Path(base).is_dir():
        raise CheckpointError(f"the adapters in {path} belong to {base}, which is not there; {file.name} names it")
    model = load(base)
    if masks_sha256(model) != expected_masks:
        raise CheckpointError(f"the adapters in {path} were trained for other masks than those of {base}")
    if _weight_files_sha256(Path(base)) != expected_weights:
        raise CheckpointError(f"the adapters in {path} were trained for other weights than those of {base}")
    return load_adapters(model, path).eval(), recipe


def _weight_files_sha256(folder: Path) -> str:
    """A hash over the names and bytes of a checkpoint's weight files, which takes no memory for the weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
