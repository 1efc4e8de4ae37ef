"""The tensors of a folder of safetensors that somebody else wrote, one at a time, after a check of all headers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trisparse.sparsity.checkpoint import CheckpointError
from trisparse.sparsity.checkpoint.files import CONFIG_FILE, read_json
from trisparse.sparsity.checkpoint.headers import read_headers, weight_files


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of ``folder``.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return read_json(folder / CONFIG_FILE)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no model of transformers': it has no {CONFIG_FILE}") from None


class TensorFiles:
    """The tensors of ``folder`` by name; a context manager that closes the files.

    Args:
        folder: with ``model.safetensors``, or with shards and their index.
        files: the files, where they are called otherwise.

    Raises:
        CheckpointError: a file is missing or damaged, or the index names files outside of the folder.
    """

    def __init__(self, folder: Path, files: list[Path] | None = None) -> None:
        self.stored = read_headers(weight_files(folder) if files is None else files)
        self._stack = ExitStack()
        self._opened: dict[Path, Any] = {}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._opened.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def read(self, name: str) -> Tensor:
        """The tensor ``name``.

        Raises:
            CheckpointError: safetensors or torch cannot read it.
        """
        file = self.stored[name].file
        try:
            if file not in self._opened:
                self._opened[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            tensor: Tensor = self._opened[file].get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged: tensor {name}: {error}") from error
        return tensor
