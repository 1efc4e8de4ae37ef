"""The safetensors of a folder that somebody else wrote: checked names, and one tensor at a time.

Nothing here trusts the folder. JSON is bounded in size, an index may name files of its own folder alone, and what is
wrong raises a CheckpointError that names the file. Offsets and shapes in a safetensors header are checked by
safetensors itself, which refuses those that leave the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trisparse.sparsity.checkpoint import CheckpointError

_JSON_BYTES = 1 << 26  # the index of a model with 10^5 tensors takes a tenth of this


def read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``.

    Raises:
        CheckpointError: it is missing, too large, no JSON object, or has a key twice.
    """
    try:
        if (size := file.stat().st_size) > _JSON_BYTES:
            raise CheckpointError(f"{file} is damaged: {size:,} bytes are more than any model needs")
        content = json.loads(file.read_text(), object_pairs_hook=_once)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is damaged: it holds no object")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def index_of(folder: Path, stem: str) -> Path:
    """The index of the files of ``folder`` whose names begin with ``stem``."""
    return folder / f"{stem}.safetensors.index.json"


def tensor_places(folder: Path, stem: str = "model") -> dict[str, Path]:
    """The file of every tensor of ``folder``, by its name there: of ``stem.safetensors``, or as its index says.

    Raises:
        CheckpointError: there are no safetensors, or the index is damaged or names files outside of the folder.
    """
    one, index = folder / f"{stem}.safetensors", index_of(folder, stem)
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} is damaged: it has no weight_map")
        for file in set(map(str, weight_map.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{index} is damaged: {file!r} is no file of safetensors in the folder")
            if not (folder / file).is_file():
                raise CheckpointError(f"{folder} lacks {file}, which {index.name} names")
        return {name: folder / str(file) for name, file in weight_map.items()}
    if not one.is_file():
        raise CheckpointError(f"{folder} holds no {one.name} and no {index.name}: only safetensors are read")
    with TensorFiles({}) as files:
        return dict.fromkeys(files.names_in(one), one)


class TensorFiles:
    """The tensors of a folder, read one at a time; a context manager that closes the files.

    Args:
        places: the file of each tensor, as from :func:`tensor_places`.
    """

    def __init__(self, places: Mapping[str, Path]) -> None:
        self.places = places
        self._stack = ExitStack()
        self._opened: dict[Path, Any] = {}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._opened.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def names_in(self, file: Path) -> list[str]:
        """The names of all tensors of one file."""
        return list(self._open(file).keys())

    def read(self, name: str) -> Tensor:
        """The tensor ``name``.

        Raises:
            CheckpointError: its file is damaged or does not hold it.
        """
        file = self.places[name]
        try:
            tensor: Tensor = self._open(file).get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{file} is damaged: tensor {name}: {error}") from error
        return tensor

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            try:
                self._opened[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{file} is damaged: {error}") from error
        return self._opened[file]
