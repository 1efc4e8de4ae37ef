"""Calibration windows as Wanda draws them from C4: a random place in each of some random documents."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Of a stream, documents are drawn among this many times those asked for: the first ones that are long enough, which
# take long to find (2% of C4's have more than 2,048 tokens) and are shuffled already.
_SPARE = 2


def document_windows(
    data: Any, encode: Callable[[Any], list[int]], seq_len: int, samples: int, seed: int
) -> torch.Tensor:
    """One window of ``seq_len`` tokens out of each of ``samples`` documents that are longer than that.

    Documents are drawn with replacement, and every document is tokenized by itself. In a list or dataset, the seed
    gives the very windows that Wanda's ``get_c4`` (lib/data.py) gives for the same rows: it draws a row until one is
    long enough, then a place in it. A stream has no rows to draw from: its first ``2 * samples`` documents that are
    long enough stand for all.

    Args:
        data: rows, indexed or only iterated over.
        encode: row -> its token ids.

    Returns:
        int64 [samples, seq_len].

    Raises:
        ValueError: no document is longer than ``seq_len`` tokens.
    """
    draw = random.Random(seed)
    if not hasattr(data, "__len__"):
        data = list(_long_rows(data, encode, seq_len, _SPARE * samples))
        encode = _as_they_are
    windows, short = [], set()
    while len(windows) < samples:
        if len(short) == len(data):
            raise ValueError(f"data is too short: none of its {len(data)} documents is longer than seq_len={seq_len}")
        row = draw.randint(0, len(data) - 1)
        if row in short:
            continue
        ids = encode(data[row])
        if len(ids) <= seq_len:
            short.add(row)
            continue
        begin = draw.randint(0, len(ids) - seq_len - 1)
        windows.append(ids[begin : begin + seq_len])
    return torch.tensor(windows, dtype=torch.int64)


def _long_rows(data: Any, encode: Callable[[Any], list[int]], seq_len: int, most: int) -> Iterator[list[int]]:
    found = 0
    for row in data:
        ids = encode(row)
        if len(ids) > seq_len:
            yield ids
            found += 1
            if found == most:
                return


def _as_they_are(ids: list[int]) -> list[int]:
    return ids
