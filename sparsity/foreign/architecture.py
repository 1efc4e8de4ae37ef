"""A model of the weights in a folder that somebody else wrote, whose config may ask for no more than there are."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from trisparse.sparsity.checkpoint import CheckpointError
from trisparse.sparsity.checkpoint.architecture import architecture, check_size, empty_model
from trisparse.sparsity.checkpoint.files import read_json
from trisparse.sparsity.progress import quiet_transformers

_GENERATION = "generation_config.json"


def dense_architecture(folder: Path, tensors: int) -> tuple[type[PreTrainedModel], Any]:
    """As :func:`architecture`, without what the config says of compression, which is undone by then."""
    model_class, config = architecture(folder, tensors)
    for key in ("quantization_config", "compression_config"):
        if hasattr(config, key):
            delattr(config, key)
    return model_class, config


def filled_model(
    model_class: type[PreTrainedModel],
    config: Any,
    weights: dict[str, Tensor],
    dtype: torch.dtype | str,
    folder: Path,
) -> PreTrainedModel:
    """The model of ``config`` with ``weights``, named and laid out as in a checkpoint, and its generation config.

    Raises:
        CheckpointError: they do not fit, found before anything is allocated; or ``generation_config.json`` is damaged.
    """
    check_size(empty_model(model_class, config, folder), [tuple(w.shape) for w in weights.values()], folder)
    try:
        with quiet_transformers():
            made: Any = model_class.from_pretrained(
                None, config=deepcopy(config), state_dict=weights, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # what a config breaks in a model may raise anything
        raise CheckpointError(f"the weights in {folder} do not fit {model_class.__name__}: {error}") from error
    model: PreTrainedModel = made[0]
    if (folder / _GENERATION).is_file() and model.can_generate():
        read_json(folder / _GENERATION)
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # its own checks
            raise CheckpointError(f"{folder / _GENERATION} is damaged: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := made[1].get(what):
            listed = ", ".join(sorted(map(str, keys))[:3])
            raise CheckpointError(
                f"the weights in {folder} do not fit {model_class.__name__}: {what.replace('_', ' ')} {listed}"
            )
    return model
