"""The files of a checkpoint's folder: their names, JSON that is read with care, and a folder that appears whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
INFO_FILE = "trisparse.json"
MASKS_FILE = "trisparse_masks.safetensors"
ADAPTERS_FILE = "trisparse_adapters.json"  # of a folder of adapters, see retrain/adapter_folder.py
WEIGHTS_FILE = "model.safetensors"
PEFT_FILE = "adapter_config.json"  # of PEFT, which transformers puts on a model without a word
INDEX_FILE = "model.safetensors.index.json"  # which shard holds which tensor

MAX_JSON_BYTES = 64 * 2**20  # a target takes about 150 bytes: room for 400 000 of them


class CheckpointError(RuntimeError):
    """A folder is not a checkpoint of ours, or is damaged."""


def check_no_adapter(folder: Path) -> None:
    """Check that transformers, which loads the model of ``folder``, does not change it by an adapter beside it.

    Raises:
        CheckpointError: it would.
    """
    if (folder / PEFT_FILE).exists():
        raise CheckpointError(
            f"{folder} holds an adapter, {PEFT_FILE}, beside the pruned model: move it to a folder of its own and open "
            "it with PeftModel.from_pretrained(model, folder)"
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is no file, too large, no JSON, no object, or names a key twice.
    """
    check_regular(file)
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} is larger than {MAX_JSON_BYTES >> 20} MiB")
    return parse_json(text, file)


def check_regular(file: Path) -> None:
    """Check that ``file``, if it is there, is a file: to open a pipe would wait for one who writes into it.

    Raises:
        CheckpointError: it is something else.
    """
    if not file.is_file() and file.exists():
        raise CheckpointError(f"{file} cannot be read: it is no file")


def parse_json(text: bytes, file: Path) -> dict[str, Any]:
    """The object that ``text``, which is from ``file``, holds; errors as of :func:`read_json`."""
    try:
        content = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is damaged: it lists no targets")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def compressed_config(folder: str | Path) -> dict[str, Any] | None:
    """``quantization_config`` in the folder's ``config.json`` if it is of our format, else None.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        found = read_json(Path(folder) / CONFIG_FILE).get("quantization_config")
    except FileNotFoundError:
        return None
    return found if isinstance(found, dict) and found.get("quant_method") == "trisparse" else None


def is_checkpoint(path: str | Path) -> bool:
    """Whether the folder holds a pruned model that this package wrote, in whatever form."""
    path = Path(path)
    if (path / INFO_FILE).is_file():
        return True
    try:
        return compressed_config(path) is not None
    except CheckpointError:
        return False


def check_output(path: str | Path) -> None:
    """Check that :func:`save` may write to ``path``.

    Raises:
        ValueError: it exists and is neither an empty folder nor a checkpoint or a folder of adapters of ours.
    """
    path = Path(path)
    if not path.exists() or is_checkpoint(path) or (path / ADAPTERS_FILE).is_file():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    raise ValueError(f"output folder {path} exists and is not a trisparse checkpoint: choose another, or remove it")


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` to write into, which takes its place in the end: whole, or after an error not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    unfinished.chmod(0o755)  # mkdtemp's folders are private
    try:
        yield unfinished
        if path.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
            path.rename(replaced / "old")
            try:
                unfinished.rename(path)
            except BaseException:
                (replaced / "old").rename(path)
                raise
            finally:
                shutil.rmtree(replaced)
        else:
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
