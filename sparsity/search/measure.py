"""What every evaluation of a search shares, measured once from the dense model: X and G of each target."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trisparse.sparsity.calibration import walk
from trisparse.sparsity.capture import Batch
from trisparse.sparsity.gradients import gradient_norms
from trisparse.sparsity.targets import Targets


@dataclass(frozen=True)
class Statistics:
    """X and G by the targets' names.

    Attributes:
        x: fp32 [parts, cols]; a target that no calibration input reached is not in it, and is not pruned.
        g: [rows, cols] in the orientation of ``target.matrix()``, or None if no tree reads G.
    """

    x: dict[str, Tensor]
    g: dict[str, Tensor] | None


def measure(
    model: nn.Module, targets: Targets, batches: Sequence[Batch], *, gradients: bool, progress: bool = True
) -> Statistics:
    """Measure X (and G, if ``gradients``) of the dense model on ``batches``.

    Raises:
        ValueError: no target is reached by the data, or an input or gradient is not finite.
    """
    x: dict[str, Tensor] = {}
    for group, statistics in walk(model, targets, batches, propagate="dense"):
        for target in group:
            rms = statistics.rms(target)
            if rms is None:
                continue
            if not bool(torch.isfinite(rms).all()):
                raise ValueError(f"the inputs of {target.name} overflow on the calibration data")
            x[target.name] = rms
    if not x:
        raise ValueError("data reaches none of the weights to prune: the model's forward does not use them")
    if not gradients:
        return Statistics(x, None)
    norms = gradient_norms(model, targets, batches, progress=progress)
    g: dict[str, Tensor] = {}
    for target in targets.found:
        if target.name in x:
            norm = norms.norm(target)
            g[target.name] = torch.zeros_like(target.matrix(), dtype=torch.float32) if norm is None else norm
    return Statistics(x, g)


def save_statistics(statistics: Statistics, path: Path, key: str) -> None:
    """Write to a safetensors file that holds ``key``; it appears whole or not at all."""
    tensors = {f"x/{name}": value.cpu().contiguous() for name, value in statistics.x.items()}
    tensors |= {f"g/{name}": value.cpu().contiguous() for name, value in (statistics.g or {}).items()}
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata={"format": "trisparse search statistics 1", "key": key})
    unfinished.replace(path)


def load_statistics(path: Path, key: str) -> Statistics | None:
    """The statistics in ``path``, or None if there is no such file, it is damaged, or it was made with another key."""
    if not path.is_file():
        return None
    x: dict[str, Tensor] = {}
    g: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
                kind, _, target = name.partition("/")
                (x if kind == "x" else g)[target] = file.get_tensor(name)
    except SafetensorError:  # damaged: measured again
        return None
    return Statistics(x, g or None)


def model_hash(model: nn.Module) -> str:
    """sha256 of the names, shapes, dtypes and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        data = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def data_hash(tensors: Sequence[Tensor]) -> str:
    """sha256 of integer tensors with their shapes."""
    digest = hashlib.sha256(json.dumps([list(tensor.shape) for tensor in tensors]).encode())
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().long().numpy().data)
    return digest.hexdigest()
