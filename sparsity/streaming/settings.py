"""What the result of a streamed prune depends on, as plain values: two runs are of one kind if these are equal."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trisparse.sparsity.batches import batches_sha256
from trisparse.sparsity.capture import Batch
from trisparse.sparsity.distributed import Processes
from trisparse.sparsity.streaming.model_on_disk import ModelOnDisk


def settings_of(
    source: ModelOnDisk,
    batches: Sequence[Batch],
    *,
    processes: Processes,
    gradients: str | Path | None,
    **arguments: Any,
) -> dict[str, Any]:
    """The ``arguments`` of a call and what stands behind them, as values that JSON can hold.

    Weights are told apart by the names, sizes and times of their files, not by their bytes. The number of threads and
    the kind of the device count, too: sums come out otherwise in their last bits.
    """
    config = source.folder / "config.json"
    return {
        "weights": _fingerprint([config, *source.files]),
        "config": hashlib.sha256(config.read_bytes()).hexdigest(),
        "data": batches_sha256(batches),
        "shape of the data": [list(batch["input_ids"].shape) for batch in batches if "input_ids" in batch],
        "gradients": None if gradients is None else _fingerprint([Path(gradients)]),
        **{name: _plain(value) for name, value in arguments.items()},
        "processes": processes.count,
        "device": source.device.type,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("trisparse", "torch", "transformers")},
    }


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
