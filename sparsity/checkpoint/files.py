"""The files of a checkpoint's folder: their names, JSON that is read with care, and a folder that appears whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
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


def check_output(path: str | Path, *, sources: Iterable[str | Path] = ()) -> None:
    """Check that :func:`save` may write to ``path``.

    Args:
        path: the output folder, which is replaced as a whole.
        sources: folders that the result is made from; a name that is no folder, such as a model id, is none.

    Raises:
        ValueError: it exists and is neither an empty folder nor a checkpoint or a folder of adapters of ours; or it
            and one of ``sources`` are one folder, or one is inside the other.
    """
    path = Path(path)
    resolved = path.resolve()
    for source in map(Path, sources):
        if source.exists() and (resolved.is_relative_to(source.resolve()) or source.resolve().is_relative_to(resolved)):
            raise ValueError(
                f"output folder {path} and {source}, which it is made from, are one inside the other, and the "
                "output is replaced as a whole: choose another folder"
            )
    if not path.exists() or is_checkpoint(path) or (path / ADAPTERS_FILE).is_file():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    raise ValueError(f"output folder {path} exists and is not a trisparse checkpoint: choose another, or remove it")


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of ``path`` in the end: whole, or after an error not.

    An earlier folder is renamed before the new one is: between the two calls there is none of that name, and a process
    that is killed just then leaves both in ``.NAME-*`` beside it, as ``old`` and ``new``.

    Raises:
        OSError: the new folder could not be put in place; it says where the earlier one is if that could not be
            put back.
    """
    path = path.resolve()  # of a symbolic link, what it points to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()  # with the permissions of the umask, which mkdtemp ignores
        yield new
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        except BaseException as error:
            if old.exists() and not path.exists():
                try:
                    old.rename(path)
                except OSError as again:
                    raise OSError(
                        f"{path} could not be replaced ({error}) nor put back ({again}): the earlier folder is {old}, "
                        f"the new one {new}"
                    ) from error
            raise
    finally:
        if path.exists() or not old.exists():  # never the only copy of the earlier folder
            shutil.rmtree(work, ignore_errors=True)
