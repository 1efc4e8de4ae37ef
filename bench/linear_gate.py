"""The kernels of the sparse linear layer, compiled for GPUs that need not be there, at the shapes of Llama-2-7B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from trisparse.kernels.compressed import TILE, CompressedWeight, tile_dtype
from trisparse.kernels.linear import linear, linear_backward

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = (1, 8, 16, 512, 2048)
FORMATS = (("2:4", 2, 4), ("n:m", 4, 8), ("bitmask", 0, 0), ("masked", 0, 0))


def empty_weight(format: str, n: int, m: int, rows: int, cols: int, dtype: torch.dtype) -> CompressedWeight:
    """A compressed weight on the meta device, with half of a "bitmask" kept."""

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    meta = empty(rows, -(-cols // 8), dtype=torch.uint8)
    if format == "bitmask":
        offsets = empty(rows + 1, dtype=torch.int64), empty(rows, -(-cols // TILE), dtype=tile_dtype(cols))
        return CompressedWeight(format, (rows, cols), n, m, empty(rows * cols // 2, dtype=dtype), meta, *offsets)
    if format == "2:4":
        meta = empty(rows, cols // 16, dtype=torch.int16)
    values = empty(rows, cols if format == "masked" else cols * n // m, dtype=dtype)
    return CompressedWeight(format, (rows, cols), n, m, values, meta)


def operations(
    rows: int, cols: int, dtype: torch.dtype, tokens: tuple[int, ...] = TOKENS, rank: int = 16
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, operation) of the forward and of the input gradient, each with an adapter and without, on meta tensors."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    a, b, bias = empty(rank, cols), empty(rows, rank), empty(rows)
    for format, n, m in FORMATS:
        weight = empty_weight(format, n, m, rows, cols, dtype)
        for count in tokens:
            x, dy = empty(count, cols), empty(count, rows)
            for lora in (None, (a, b, 2.0)):
                name = f"{format}, {count} tokens, rank {rank if lora else 0}"
                yield f"linear {name}", partial(linear, x, weight, bias, lora)
                yield f"linear backward {name}", partial(linear_backward, dy, weight, lora)
