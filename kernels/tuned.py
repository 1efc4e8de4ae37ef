"""What was measured on a device, kept in a file: launch configurations, and times of whole operations.

``<cache folder>/tune/<device>.json`` holds ``{"versions": ..., section: {key: value}}``. What was measured with other
versions of torch, Triton or this package is not used, and is dropped at the next write. ``trisparse bench tune``
writes it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trisparse.kernels.cache import cache_folder
from trisparse.kernels.launch import redirected


def device_name(device: torch.device) -> str:
    """What measurements are filed under: the GPU's name, or "cpu" with the count of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {torch.get_num_threads()} threads"


def tune_file(device: torch.device) -> Path:
    """Where the measurements of ``device`` are kept; the file need not exist."""
    return cache_folder() / "tune" / (re.sub(r"\W+", "-", device_name(device)).strip("-") + ".json")


def recall(device: torch.device, section: str, key: str) -> Any:
    """What was measured for ``key`` with these versions, or None.

    Raises:
        ValueError: the file is damaged.
    """
    return _read(device)[section].get(key)


def keep(device: torch.device, section: str, key: str, value: Any) -> None:
    """Add a measurement; the file is replaced as a whole, so that a reader never sees half of one."""
    content = _read(device)
    content[section][key] = value
    file = tune_file(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=file.parent, suffix=".json")
    with os.fdopen(descriptor, "w") as stream:
        json.dump(content, stream, indent=1)
    os.replace(unfinished, file)
    launch_config.cache_clear()


@cache
def launch_config(device: torch.device, operation: str, key: str) -> dict[str, Any] | None:
    """The launch configuration that was fastest for ``operation``, or None; read once in a process."""
    found = recall(device, "configs", f"{operation} {key}")
    return None if found is None else dict(found)


_trying: ContextVar[tuple[str, dict[str, Any]] | None] = ContextVar("trisparse_trying", default=None)


@contextmanager
def trying(operation: str, config: dict[str, Any]) -> Iterator[None]:
    """Launch ``operation`` with ``config`` in this context, under any runner."""
    token = _trying.set((operation, config))
    try:
        yield
    finally:
        _trying.reset(token)


def tuned(operand: Tensor, operation: str, key: str) -> dict[str, Any] | None:
    """The configuration to launch ``operation`` on ``operand`` with, instead of the computed one, or None.

    That of `trying`, else on CUDA what was measured. Other runners are not given the latter: they must be repeatable.
    """
    forced = _trying.get()
    if forced is not None and forced[0] == operation:
        return forced[1]
    if not operand.is_cuda or redirected():
        return None
    return launch_config(operand.device, operation, key)


def bucket(tokens: int) -> int:
    """Token counts that share a configuration: the power of two that is at least ``tokens``."""
    return 1 << max(tokens - 1, 0).bit_length()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {"torch": str(torch.__version__)}
    for package in ("triton", "trisparse"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def _read(device: torch.device) -> dict[str, Any]:
    file, versions = tune_file(device), _versions()
    empty: dict[str, Any] = {"versions": versions, "configs": {}, "backends": {}}
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return empty
    except ValueError as error:
        raise ValueError(f"{file} is damaged, remove it: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in empty):
        raise ValueError(f"{file} is damaged, remove it: it does not hold {', '.join(empty)}")
    return content if content["versions"] == versions else empty
