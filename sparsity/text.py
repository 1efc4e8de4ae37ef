"""Texts by name: Python's own documentation, files, and the data sets that the papers calibrate and evaluate on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# Topics of `pydoc_data.topics` for each split; "train" is all the rest. By name, so that every Python version
# splits alike. Topics that print the same paragraphs stand in one split, or once (_REPEATED).
_TOPICS = {
    "test": "formatstrings comparisons calls objects raise binary subscriptions global slicings truth imaginary dict",
    "validation": "typesmapping strings operator-summary assert lambda booleans nonlocal typesmodules power shifting "
    "yield",
    "calibration": "typesseq string-methods import exprlists assignment return del lists typesmethods atom-literals",
}
# Topics that other topics (compound, specialnames, execmodel, ...) print nearly or wholly again.
_REPEATED = (
    "async attribute-access augassign callable-types class context-managers customization dynamic-features else "
    "exceptions for function id-classes if in naming numeric-types sequence-types try typesseq-mutable while "
    "with"
)

# The shards of C4 that Wanda and SparseGPT calibrate and evaluate on (lib/data.py).
_C4_FILES = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}
_TEXT_FILES = (".txt", ".md")
_TABLE_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SOURCES = (
    "'pydoc' (Python's own documentation), a .txt or .md file, a .jsonl, .json, .parquet or .csv file with a "
    "column 'text' or 'input_ids', a folder written by datasets.save_to_disk, 'wikitext2', 'c4', or the name of "
    "a dataset on the Hugging Face hub"
)


def pydoc_text(split: str) -> list[str]:
    """Python's own documentation (``pydoc_data.topics``, about 370 kB of English), one string per topic.

    ``split`` is ``"train"`` (about 55% of the characters), ``"calibration"`` (19%), ``"validation"`` (10%) or
    ``"test"`` (16%). Topics are whole and in one split only; each split mixes long and short ones from all over
    the documentation. The same topics on every Python version, though their text may differ a little.

    Raises:
        ValueError: an unknown split.
    """
    from pydoc_data.topics import topics

    held_out = {name: names.split() for name, names in _TOPICS.items()}
    if split in held_out:
        names = [name for name in held_out[split] if name in topics]
    elif split == "train":
        names = sorted(set(topics) - set(_REPEATED.split()) - {name for taken in held_out.values() for name in taken})
    else:
        raise ValueError(f"split must be one of train, {', '.join(held_out)}, got {split!r}")
    return ["\n".join(line.rstrip() for line in topics[name].splitlines()).rstrip() for name in names]


def load_text(spec: str, split: str | None = None) -> Any:
    """The text that a name or path stands for, to be cut by ``token_windows``: ``--data`` of the command line.

    Args:
        spec: ``pydoc``; a ``.txt`` or ``.md`` file; a ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` file; a
            folder written by ``datasets.save_to_disk``; ``wikitext2`` (``wikitext-2-raw-v1``); ``c4`` (streamed,
            the shards of Wanda); or a dataset of the Hugging Face hub (streamed). A name may end in its split:
            ``pydoc:test``, ``wikitext2:test``. Names go before paths: write ``./c4`` for a folder of that name.
        split: the split where ``spec`` names none, ``"train"`` by default. Only ``pydoc`` has
            ``"calibration"``, which means ``"train"`` elsewhere; C4 has no ``"test"`` and takes
            ``"validation"``, as Wanda does. A file is one split, whatever it is used for.

    Returns:
        A string (file), a list of strings (``pydoc``) or a ``datasets`` dataset.

    Raises:
        ValueError: nothing that can be read, and what could be; an unknown split; an unreadable file.
        ConnectionError: the hub cannot be reached, and what to do.
    """
    path = Path(spec).expanduser()
    name, _, suffix = spec.partition(":")
    if spec and name not in ("pydoc", "wikitext2", "c4"):
        if path.is_file():
            return _load_file(path)
        if path.is_dir():
            return _load_folder(path, "train" if split in (None, "calibration") else split)
    if not spec or Path(name).suffix in (*_TEXT_FILES, *_TABLE_FILES) or spec[0] in "./~" or name.count("/") > 1:
        raise ValueError(f"no such file or folder: {spec!r}. data may be {_SOURCES}")
    split = suffix or split or "train"
    if name == "pydoc":
        return pydoc_text(split)
    split = "train" if split == "calibration" else split
    if name == "wikitext2":
        return _load_hub("Salesforce/wikitext", split, name="wikitext-2-raw-v1")
    if name == "c4":
        split = "validation" if split == "test" else split
        if split not in _C4_FILES:
            raise ValueError(f"split must be one of {', '.join(_C4_FILES)} for c4, got {split!r}")
        return _load_hub("allenai/c4", split, data_files={split: _C4_FILES[split]}, streaming=True)
    return _load_hub(name, split, streaming=True)


def _load_file(path: Path) -> Any:
    if path.suffix in _TEXT_FILES:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if path.suffix not in _TABLE_FILES:
        raise ValueError(f"{path} is of a kind that is not read. data may be {_SOURCES}")
    import datasets

    try:
        return datasets.load_dataset(_TABLE_FILES[path.suffix], data_files=str(path), split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error


def _load_folder(path: Path, split: str | None) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} was not written by datasets.save_to_disk. data may be {_SOURCES}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise ValueError(f"split must be one of {', '.join(loaded)} for {path}, got {split!r}")
    return loaded[split]


def _load_hub(repository: str, split: str, **options: Any) -> Any:
    import datasets

    try:
        loaded = datasets.load_dataset(repository, split=split, **options)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"no dataset {repository!r} on the Hugging Face hub. data may be {_SOURCES}") from error
    except OSError as error:  # no network, the hub is down, or offline mode
        raise ConnectionError(
            f"cannot load {repository!r} from the Hugging Face hub: {error}. Without a network use 'pydoc' or a "
            f"text file, or, where there is one, run datasets.load_dataset({repository!r}, ...)"
            ".save_to_disk(FOLDER) and pass that folder"
        ) from error
    if options.get("streaming") and (commit := _commit(loaded)) is not None:
        # For the cache of token windows: a stream has no fingerprint. What is derived from it loses this attribute.
        loaded.trisparse_source = f"{repository}@{commit} {split} {sorted(options.items(), key=str)}"
    return loaded


def _commit(stream: Any) -> str | None:
    """The commit of the hub that ``stream`` reads, out of the addresses of its files."""
    read = getattr(getattr(stream, "_ex_iterable", None), "kwargs", {})
    commits = set(re.findall(r"hf://datasets/[^@'\"]+@([0-9a-f]{40})/", str(read)))
    return commits.pop() if len(commits) == 1 else None
