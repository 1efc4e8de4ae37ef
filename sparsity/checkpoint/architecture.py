"""Which model a folder's ``config.json`` describes, without believing it.

A config may ask for a million layers or for code of its own: neither is built or run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from trisparse.sparsity.checkpoint.files import CONFIG_FILE, CheckpointError, read_json
from trisparse.sparsity.progress import quiet_transformers

_LAYERS = re.compile(r"^(num|n|encoder|decoder)_.*(layers?|blocks)$|^depths?$")
_EXPERTS = re.compile(r"experts$")
_LABELS = re.compile(r"^num_labels$")
_IMPLEMENTATION = re.compile(r"^_?(attn|experts)_implementation(_internal)?$")


def architecture(folder: Path, tensors: int) -> tuple[type[PreTrainedModel], Any]:
    """The model class and the config of ``folder``, from its config.json alone.

    Args:
        folder: with a config.json.
        tensors: how many the folder holds: a model has no more layers than that.

    Raises:
        CheckpointError: it is damaged, or transformers has no such architecture.
    """
    file = folder / CONFIG_FILE
    try:
        content = read_json(file)
        _check_counts(content, tensors, file)
        _check_settings(content, file)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no model of transformers': it has no {CONFIG_FILE}") from None
    try:
        # False, for what is not given is asked of the user, who may wait for a prompt that nobody sees.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        named = (config.architectures or ["none"])[0]
        model_class = getattr(transformers, named, None)
    except Exception as error:  # a config's own checks raise whatever they like
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise CheckpointError(f"transformers has no model {named}, which {folder} was saved from")
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


def check_size(model: nn.Module, shapes: Iterable[Sequence[int]], folder: Path) -> None:
    """Check that ``model``, on the meta device, has no more weights than tensors of these ``shapes`` in ``folder``.

    What transformers does not find, or finds with another shape, it allocates and draws at random before it says so.

    Raises:
        CheckpointError: it has more.
    """
    stored = sum(math.prod(shape) for shape in shapes)
    wanted = sum(weight.numel() for weight in model.parameters())
    if wanted > stored:
        raise CheckpointError(f"{folder} has {stored:,} weights, and a model of its config.json has {wanted:,}")


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


def _check_settings(config: Any, file: Path, *, top: bool = True) -> None:
    """Refuse what has transformers fetch code, or load other weights than were checked."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_settings(value, file, top=False)
        if _IMPLEMENTATION.search(key) and "/" in str(value):
            raise CheckpointError(f"{file} asks for the kernel {str(value)[:200]!r} of another place: none is fetched")
        if key == "transformers_weights" and value is not None:
            raise CheckpointError(
                f"{file} names weights of its own, {str(value)[:200]!r}: only the usual files are read"
            )
        # transformers takes the one of a text config where the model has none.
        if key == "quantization_config" and value is not None and not top:
            raise CheckpointError(f"{file} has a quantization_config inside another config: it belongs at the top")
