"""Gradient norms that are measured once: kept in the cache folder under a hash of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trisparse.kernels.cache import cache_folder
from trisparse.sparsity.capture import Batch
from trisparse.sparsity.gradient_statistics import GradientFileError, GradientStatistics
from trisparse.sparsity.gradients import Mode, gradient_norms, split_batch
from trisparse.sparsity.hardware import bf16_is_fast
from trisparse.sparsity.targets import Targets

_KEY_VERSION = 1  # goes up when what is measured changes
_ELSEWHERE = ("_name_or_path", "transformers_version")  # of a model's config: where it is from, not what it does


def cached_gradient_norms(
    model: nn.Module,
    targets: Targets,
    batches: Sequence[Batch],
    *,
    dtype: torch.dtype = torch.float32,
    mode: Mode | None = None,
    compute_dtype: torch.dtype | None = None,
    progress: bool = True,
    cache_dir: Path | None = None,
) -> GradientStatistics:
    """``gradient_norms``, or what it wrote when the same was asked before; either way read from a file.

    Files are in ``cache_dir / "gradients"``, by default under ``$TRISPARSE_CACHE``, ``$XDG_CACHE_HOME/trisparse`` or
    ``~/.cache/trisparse``, and stay there until they are deleted. They hold one value for each weight.

    Args:
        mode: not part of the key: the modes measure the same.
        others: as for ``gradient_norms``, which a ``loss=`` function can be given to; nothing tells here whether two
            functions are the same.

    Raises:
        ValueError, BlocksNotChainedError: as ``gradient_norms``.
    """
    folder = (cache_folder() if cache_dir is None else cache_dir) / "gradients"
    file = folder / f"{gradient_key(model, targets, batches, dtype, compute_dtype)}.safetensors"
    try:
        return GradientStatistics.load(file, targets.found)
    except (FileNotFoundError, GradientFileError):  # a damaged file is written anew
        path: Path | None = file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        warnings.warn(f"gradient norms are kept in memory: the cache cannot be written ({error})", stacklevel=2)
        path = None
    return gradient_norms(
        model, targets, batches, dtype=dtype, mode=mode, path=path, compute_dtype=compute_dtype, progress=progress
    )


def gradient_key(
    model: nn.Module,
    targets: Targets,
    batches: Sequence[Batch],
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
) -> str:
    """SHA-256 (hex) of all that gradient norms depend on.

    That is every byte of the weights and buffers with their names, the config (of another module its ``repr``), the
    sequences of the calibration data (however they are batched), the names of the targets and both dtypes. Hashing
    a part of the bytes would be a little faster, and miss a layer that was pruned or retrained.
    """
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    described: Any = repr(model)
    if hasattr(config, "to_dict"):
        described = {key: value for key, value in config.to_dict().items() if key not in _ELSEWHERE}
    device = next(model.parameters()).device
    automatic = compute_dtype is None and bf16_is_fast(device)
    what = [
        _KEY_VERSION,
        type(model).__qualname__,
        described,
        [target.name for target in targets.found],
        str(dtype),
        "automatic bfloat16" if automatic else str(compute_dtype or "own"),
    ]
    digest.update(json.dumps(what, sort_keys=True, default=str).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        _add(digest, name, tensor)
    for sequence in (sequence for batch in batches for sequence in split_batch(batch)):
        digest.update(b"sequence")
        for name in sorted(sequence):
            _add(digest, name, sequence[name])
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        digest.update(f"{name} = {value!r};".encode())
        return
    digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
    digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
