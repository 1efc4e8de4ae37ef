"""Windows of tokens that were cut before: kept in the cache folder under a hash of all that they depend on.

A file holds the token ids of one call of ``token_windows``, as safetensors with a hash of its own; what it was cut from is
not in it, but can be read from the ids. ``$TRISPARSE_CACHE_WINDOWS=0`` switches the cache off.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trisparse.kernels.cache import cache_folder

_KEY_VERSION = 1  # goes up when windows are cut otherwise
_LEAST_CHARACTERS = 1 << 20  # less text is tokenized sooner than it is hashed and looked up
_LEAST_TOKENS = 1 << 14  # fewer are not worth a file
_DIGITS = "sha256"  # key of the hash in a file's metadata


def window_file(data: Any, tokenizer: Any, **how: Any) -> Path | None:
    """Where the windows of ``data`` belong; None for what is not cached: short texts, token ids and batches, data or
    tokenizers that cannot be told apart, or everything while the cache is switched off.

    Args:
        data: a string, a list of strings, or a dataset of rows that stand still: in memory, on disk, or a stream of
            one commit of the hub (``load_text``).
        tokenizer: one of the library tokenizers, whose whole state counts.
        how: the arguments of ``token_windows`` that decide which windows are cut.
    """
    if os.environ.get("TRISPARSE_CACHE_WINDOWS", "1").lower() in ("0", "off", "false", "no"):
        return None
    fingerprint = _data_fingerprint(data)
    if fingerprint is None:
        return None
    known = _tokenizer_fingerprint(tokenizer)
    if known is None:
        return None
    key = [_KEY_VERSION, fingerprint, known, version("tokenizers"), how]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "windows" / f"{name}.safetensors"


def read_windows(file: Path, seq_len: int) -> Tensor | None:
    """The windows in ``file``, int64 [windows, seq_len]; None where there is none, or a damaged one."""
    try:
        with safe_open(file, framework="pt") as opened:
            ids: Tensor = opened.get_tensor("windows")
            digits = (opened.metadata() or {}).get(_DIGITS)
    except (OSError, SafetensorError):
        return None
    if ids.dtype != torch.int32 or ids.ndim != 2 or ids.shape[1] != seq_len or not len(ids) or _hash(ids) != digits:
        return None
    return ids.to(torch.int64)


def write_windows(file: Path, windows: Tensor) -> None:
    """Keep ``windows`` [n, seq_len] in ``file``, which appears whole; a folder that cannot be written is a warning."""
    if windows.numel() < _LEAST_TOKENS or int(windows.max()) > torch.iinfo(torch.int32).max:
        return
    ids = windows.to(torch.int32).contiguous()
    unfinished: str | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        number, unfinished = tempfile.mkstemp(prefix=".", dir=file.parent)
        with os.fdopen(number, "wb") as opened:
            opened.write(save({"windows": ids}, metadata={_DIGITS: _hash(ids)}))
        Path(unfinished).replace(file)
    except OSError as error:
        warnings.warn(f"token windows are not kept: the cache cannot be written ({error})", stacklevel=3)
        if unfinished is not None:
            Path(unfinished).unlink(missing_ok=True)


def _hash(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def _data_fingerprint(data: Any) -> str | None:
    texts = [data] if isinstance(data, str) else data
    if isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts):
        if sum(map(len, texts)) < _LEAST_CHARACTERS:
            return None
        digest = hashlib.sha256()
        for text in texts:
            encoded = text.encode(errors="surrogatepass")
            digest.update(f"{len(encoded)} ".encode())
            digest.update(encoded)
        return f"{'text' if isinstance(data, str) else 'texts'} {digest.hexdigest()}"
    if not hasattr(data, "column_names"):
        return None
    if hasattr(data, "__len__"):
        own = getattr(data, "_fingerprint", None)  # datasets' hash of the files and of every step since
        return None if own is None else f"dataset {own}"
    stream = getattr(data, "trisparse_source", None)  # of load_text; what is derived from the stream has none
    return None if stream is None else f"stream {stream}"


def _tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """A hash of the state of a tokenizer; "none" without one (datasets of ids need none)."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        return None
    state = json.loads(backend.to_str())
    for passing in ("truncation", "padding"):  # of the last call
        state.pop(passing, None)
    return hashlib.sha256(f"{type(tokenizer).__name__} {json.dumps(state, sort_keys=True)}".encode()).hexdigest()
