"""Text in, token windows out: what calibration, retraining and perplexity read.

Windows do not overlap, as in the evaluations of Wanda (``lib/eval.py``) and PERP: a text is tokenized once, as
a whole, and cut into pieces of ``seq_len`` tokens. ``sampling="documents"`` draws calibration windows as Wanda does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from trisparse.sparsity.documents import document_windows
from trisparse.sparsity.text import load_text, pydoc_text
from trisparse.sparsity.window_cache import read_windows, window_file, write_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With a seed, windows are chosen among this many times the tokens asked for: enough that the choice is a
# sample of a dataset, not its beginning, and still quick to tokenize.
_SPARE = 8

_BLANK_LINE = "\n\n"

Sampling = Literal["windows", "documents"]
SAMPLING = ("windows", "documents")

__all__ = ["SAMPLING", "Sampling", "load_text", "pydoc_text", "token_windows"]


def token_windows(
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seq_len: int,
    samples: int | None = None,
    seed: int | None = None,
    vocab_size: int | None = None,
    sampling: Sampling = "windows",
    cache: bool = True,
) -> torch.Tensor:
    """Cut ``data`` into non-overlapping windows of ``seq_len`` tokens; a shorter rest is dropped.

    Args:
        data: token ids as a tensor, [length] (one stream) or [n, length] (each row is cut by itself); a string
            or a list of strings (joined by blank lines, as WikiText-2 is in Wanda's and PERP's evaluation); a
            ``datasets`` dataset with a column ``input_ids`` (rows joined end to end) or ``text`` (taken as a
            list of strings); or an iterable of batches (each row cut by itself, padding left out).
        samples: how many windows to return; all where there are fewer. Of a dataset, only the first rows that
            hold enough tokens are read. A streamed dataset needs ``samples``.
        seed: choose the windows at random; without it they are the first ones.
        vocab_size: the ids must be below it.
        sampling: ``"windows"`` as above, or ``"documents"``: a random place in each of ``samples`` random rows, every
            row tokenized by itself, as Wanda's calibration on C4 (:mod:`trisparse.sparsity.documents`).
        cache: keep the windows of long texts and datasets, and take them from there when the same is asked again
            (:mod:`trisparse.sparsity.window_cache`).

    Returns:
        int64 [windows, seq_len] on the CPU.

    Raises:
        ValueError: an argument out of range; data that is missing, empty, too short or of another kind; text
            without a tokenizer; ids outside [0, ``vocab_size``).
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2 (a token to read and one to predict), got {seq_len}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if sampling not in SAMPLING:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLING)}, got {sampling!r}")
    how = {"seq_len": seq_len, "samples": samples, "seed": seed, "sampling": sampling}
    file = window_file(data, tokenizer, **how) if cache else None
    windows = None if file is None else read_windows(file, seq_len)
    if windows is None:
        cut = _documents if sampling == "documents" else _windows
        windows = cut(data, tokenizer, seq_len, samples, seed, vocab_size)
        if file is not None:
            write_windows(file, windows)
    check_ids(int(windows.min()), int(windows.max()), vocab_size)
    return windows


def _windows(
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    seq_len: int,
    samples: int | None,
    seed: int | None,
    vocab_size: int | None,
) -> torch.Tensor:
    needed = None if samples is None else seq_len * samples * (1 if seed is None else _SPARE)
    pieces = [piece for piece in _pieces(data, tokenizer, needed, seq_len) if piece.numel()]
    if not pieces:
        raise ValueError("data is empty: it has no tokens")
    longest = max(piece.shape[1] for piece in pieces)
    if longest < seq_len:
        where = "" if sum(map(len, pieces)) == 1 else " in its longest row"
        raise ValueError(f"data is too short: {longest} tokens{where}, and one window needs seq_len={seq_len}")
    check_ids(min(int(p.min()) for p in pieces), max(int(p.max()) for p in pieces), vocab_size)
    windows = torch.cat([p[:, : p.shape[1] // seq_len * seq_len].reshape(-1, seq_len) for p in pieces])
    if seed is not None:
        windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
    return windows[:samples]


def _documents(
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    seq_len: int,
    samples: int | None,
    seed: int | None,
    vocab_size: int | None,
) -> torch.Tensor:
    if samples is None or seed is None:
        raise ValueError("sampling='documents' draws at random: it needs samples and a seed")
    rows: Any = data
    column = "text"
    if isinstance(data, torch.Tensor):
        rows, column = _rows(data), "input_ids"
    elif hasattr(data, "column_names"):
        column = _column(data, tokenizer)
    elif not (isinstance(data, list | tuple) and data and all(isinstance(text, str) for text in data)):
        raise ValueError(f"sampling='documents' needs rows: a list of strings or a dataset, got {type(data).__name__}")
    elif tokenizer is None:
        raise ValueError("data is text: pass the model's tokenizer=, or token ids instead")

    def encode(row: Any) -> list[int]:
        if isinstance(row, torch.Tensor):
            return row.tolist()  # type: ignore[no-any-return]
        if column == "input_ids":
            return [token for piece in _batch_rows(row) for token in piece.flatten().tolist()]
        text = row if isinstance(row, str) else row["text"] or ""
        found = tokenizer(text, padding=False, truncation=False, verbose=False)  # type: ignore[misc]
        return list(found["input_ids"])

    return document_windows(rows, encode, seq_len, samples, seed)


def check_ids(lowest: int, highest: int, vocab_size: int | None) -> None:
    """Raise a ValueError unless the ids from ``lowest`` to ``highest`` are in [0, ``vocab_size``)."""
    if lowest < 0:
        raise ValueError(f"data has the token id {lowest}: ids must not be negative")
    if vocab_size is not None and highest >= vocab_size:
        raise ValueError(f"data has the token id {highest}, but vocab_size={vocab_size}: another tokenizer's?")


def _pieces(
    data: Any, tokenizer: PreTrainedTokenizerBase | None, needed: int | None, seq_len: int
) -> list[torch.Tensor]:
    """``data`` as int64 matrices whose rows are to be cut one by one; at least ``needed`` tokens of a dataset."""
    if isinstance(data, torch.Tensor):
        return [_rows(data)]
    if isinstance(data, str):
        return [_tokenize([data], tokenizer)]
    if isinstance(data, Mapping) and "input_ids" in data:  # one batch
        return _batch_rows(data)
    if isinstance(data, list | tuple) and data and all(isinstance(text, str) for text in data):
        return [_tokenize(data, tokenizer)]
    if hasattr(data, "column_names"):
        return [_dataset_stream(data, tokenizer, needed)]
    if isinstance(data, Iterable) and not isinstance(data, Mapping):
        return _batches(data, needed, seq_len)
    raise ValueError(
        "data must be token ids (a tensor), a string, a list of strings, a datasets.Dataset or an iterable of "
        f"batches, got {type(data).__name__}"
    )


def _rows(ids: torch.Tensor) -> torch.Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"data must hold integer token ids, got a tensor of {ids.dtype}")
    if ids.ndim not in (1, 2):
        raise ValueError(f"data must be [length] or [n, length], got a tensor of shape {tuple(ids.shape)}")
    return (ids[None] if ids.ndim == 1 else ids).detach().to("cpu", torch.int64)


def _batch_rows(batch: Mapping[str, Any]) -> list[torch.Tensor]:
    ids = _rows(torch.as_tensor(batch["input_ids"]))
    if batch.get("attention_mask") is None:
        return [ids]
    real = _rows(torch.as_tensor(batch["attention_mask"])) != 0
    return [ids] if bool(real.all()) else [row[keep][None] for row, keep in zip(ids, real, strict=True)]


def _batches(data: Iterable[Any], needed: int | None, seq_len: int) -> list[torch.Tensor]:
    pieces: list[torch.Tensor] = []
    tokens = 0
    for batch in data:
        if isinstance(batch, Mapping) and "input_ids" in batch:
            rows = _batch_rows(batch)
        elif isinstance(batch, torch.Tensor):
            rows = [_rows(batch)]
        else:
            raise ValueError(
                "data must be a list of strings, or an iterable of tensors of token ids or of mappings with "
                f"'input_ids'; it holds a {type(batch).__name__}"
            )
        pieces += rows
        tokens += sum(len(row) * (row.shape[1] // seq_len * seq_len) for row in rows)  # in whole windows
        if needed is not None and tokens >= needed:
            break
    return pieces


def _tokenize(texts: list[str] | tuple[str, ...], tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
    if not any(text.strip() for text in texts):
        raise ValueError("data is empty: its text has no characters but white space")
    if tokenizer is None:
        raise ValueError("data is text: pass the model's tokenizer=, or token ids instead")
    # verbose=False: a text longer than the model's context is no mistake here, it is cut right after.
    ids = tokenizer(_BLANK_LINE.join(texts), padding=False, truncation=False, verbose=False)["input_ids"]
    return torch.tensor([ids], dtype=torch.int64)


def _dataset_stream(data: Any, tokenizer: PreTrainedTokenizerBase | None, needed: int | None) -> torch.Tensor:
    """[1, length] of a dataset's rows, in order, as many as give ``needed`` tokens."""
    column = _column(data, tokenizer)
    if not hasattr(data, "__len__") and needed is None:
        raise ValueError("data is a streamed dataset, which may have no end: samples must say how much to read")
    ids: list[torch.Tensor] = []
    texts: list[str] = []
    tokens = 0
    for row in data:
        if column == "input_ids":
            ids.append(torch.cat([piece.flatten() for piece in _batch_rows(row)]))
            tokens += len(ids[-1])
        else:
            texts.append(row["text"] or "")
            # The rows are tokenized again as one text, whose joints add tokens: this count is a lower bound.
            tokens += 0 if needed is None else _count(texts[-1], tokenizer)
        if needed is not None and tokens >= needed:
            break
    if column == "text":
        return _tokenize(texts, tokenizer)
    return torch.cat(ids)[None] if ids else torch.empty(1, 0, dtype=torch.int64)


def _column(data: Any, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Which column of a dataset is read, "input_ids" or "text"."""
    if isinstance(data, Mapping):
        raise ValueError(f"data is several datasets, pass one of its splits: {', '.join(data)}")
    columns = data.column_names or list(next(iter(data), {}))  # a stream may not know its columns yet
    column = next((name for name in ("input_ids", "text") if name in columns), None)
    if column is None:
        raise ValueError(f"data must have a column 'input_ids' or 'text', it has: {', '.join(columns) or 'none'}")
    if column == "text" and tokenizer is None:
        raise ValueError("data is text: pass the model's tokenizer=, or token ids instead")
    return column


def _count(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
