"""What a number that was measured on a model depends on, as its report keeps it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from trisparse.sparsity.mask import masks, masks_sha256

_PACKAGES = ("trisparse", "lm_eval", "torch", "transformers", "datasets")


def provenance(model: nn.Module) -> dict[str, Any]:
    """Of the model and of where it is evaluated.

    Returns:
        ``sparsity``, the pruned share of the weights that have masks, 0 where none has; ``masks_sha256``, None without;
        ``versions`` of the packages, None of one that is not installed.
    """
    pruned = masks(model)
    total = sum(mask.shape.numel() for mask in pruned.values())
    return {
        "sparsity": 1 - sum(mask.kept for mask in pruned.values()) / total if total else 0.0,
        "masks_sha256": masks_sha256(model) if pruned else None,
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
