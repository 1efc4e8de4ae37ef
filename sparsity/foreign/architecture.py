"""The model that a folder's ``config.json`` describes, without weights and without believing it.

A config may ask for a million layers or for code of its own: neither is built or run.
"""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from trisparse.sparsity.checkpoint import CheckpointError
from trisparse.sparsity.foreign.tensor_files import read_config
from trisparse.sparsity.progress import quiet_transformers

_LAYERS = re.compile(r"^(num|n|encoder|decoder)_.*(layers?|blocks)$|^depths?$")
_EXPERTS = re.compile(r"experts$")
_LABELS = re.compile(r"^num_labels$")


def architecture(folder: Path, tensors: int) -> tuple[type[PreTrainedModel], Any]:
    """The model class and the config of ``folder``, from its config.json alone and without what it says of compression.

    Args:
        folder: with a config.json.
        tensors: how many the folder holds: a model has no more layers than that.

    Raises:
        CheckpointError: it is damaged, or transformers has no such architecture.
    """
    file = folder / "config.json"
    _check_counts(read_config(folder), tensors, file)
    try:
        # False, for what is not given is asked of the user, who may wait for a prompt that nobody sees.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        named = (config.architectures or ["none"])[0]
        model_class = getattr(transformers, named, None)
    except Exception as error:  # a config's own checks raise whatever they like
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise CheckpointError(f"transformers has no model {named}, which {folder} was saved from")
    for key in ("quantization_config", "compression_config"):
        if hasattr(config, key):
            delattr(config, key)
    return model_class, config


def empty_model(model_class: type[PreTrainedModel], config: Any, folder: Path) -> PreTrainedModel:
    """The model on the meta device.

    Args:
        model_class, config: as :func:`architecture` returns them.
        folder: for errors.

    Raises:
        CheckpointError: the config describes no such model.
    """
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=True), no_init_weights():
            model = model_class(deepcopy(config))
        model.tie_weights()
    except Exception as error:  # a model's own checks raise whatever they like
        raise CheckpointError(f"{folder / 'config.json'} describes no {model_class.__name__}: {error}") from error
    return model


def filled_model(
    model_class: type[PreTrainedModel],
    config: Any,
    weights: dict[str, Tensor],
    dtype: torch.dtype | str,
    folder: Path,
) -> PreTrainedModel:
    """The model of ``config`` with ``weights``, named and laid out as in a checkpoint.

    Raises:
        CheckpointError: they do not fit, found before anything is allocated.
    """
    stored = sum(weight.numel() for weight in weights.values())
    empty = empty_model(model_class, config, folder)
    if (wanted := sum(weight.numel() for weight in empty.parameters())) > stored:
        raise CheckpointError(f"{folder} has {stored:,} weights, and a model of its config.json has {wanted:,}")
    try:
        with quiet_transformers():
            made: Any = model_class.from_pretrained(
                None, config=deepcopy(config), state_dict=weights, dtype=dtype, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the weights in {folder} do not fit {model_class.__name__}: {error}") from error
    model: PreTrainedModel = made[0]
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := made[1].get(what):
            listed = ", ".join(sorted(map(str, keys))[:3])
            raise CheckpointError(
                f"the weights in {folder} do not fit {model_class.__name__}: {what.replace('_', ' ')} {listed}"
            )
    return model


def _check_counts(config: Any, tensors: int, file: Path) -> None:
    """Refuse a config with more layers than there are tensors: each takes time and memory, also without weights.

    Experts may be stacked into one tensor, and labels are no tensors: of these, as many as a real model has.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, tensors, file)
        for pattern, most in ((_LAYERS, tensors), (_EXPERTS, max(tensors, 1 << 12)), (_LABELS, 1 << 17)):
            counts = value if isinstance(value, list) else [value]
            if pattern.search(key) and any(isinstance(count, int | float) and count > most for count in counts):
                raise CheckpointError(f"{file} is damaged: {key} is {value}, and there are {tensors} tensors")
