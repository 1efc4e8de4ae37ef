"""How a linear layer with a compressed weight is cut into tiles: a pure function of shape, dtype and device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import torch

from trisparse.kernels.tuned import bucket

SMS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148}  # streaming multiprocessors: A100, A10/3090, 4090/L40, H100, B200
DECODE_TOKENS = 32  # up to here the weight's bytes bind, and the work is cut for streaming them


@dataclass(frozen=True)
class Config:
    """The tile of a program, `tokens` x `outer`, with `inner` of the contraction at a time, and why.

    With ``partial`` the contraction is cut in ``splits`` parts, whose sums a second kernel adds.
    """

    tokens: int
    outer: int
    inner: int
    splits: int
    num_warps: int
    num_stages: int
    partial: bool
    reason: str


def config(
    shape: tuple[int, int],
    dtype: torch.dtype,
    cc: int,
    tokens: int,
    *,
    format: str = "2:4",
    rank: int = 0,
    backward: bool = False,
) -> Config:
    """The configuration of `linear` (or, with ``backward``, of its input gradient).

    Args:
        shape: (rows, cols) of the weight.
        dtype: of x and the weight.
        cc: compute capability, as 80.
        tokens: rows of x.
        format: of the compressed weight.
        rank: of the fused low-rank product, 0 for none.
        backward: for dx, which contracts over the weight's rows.
    """
    outer, inner = shape[::-1] if backward else shape
    if dtype == torch.float32:
        size = 16 if tokens <= 16 else 32
        return Config(size, 32, 32, 1, 4, 2, False, "fp32 without tensor cores: what FMA holds in registers")
    if tokens <= DECODE_TOKENS:
        return _few(outer, inner, cc, tokens, format, rank, backward)
    # Both accumulators, tokens x outer and tokens x rank, stay in registers beside the tile of W.
    block = 64 if tokens <= 64 or rank > 64 else 128
    narrow = backward or (rank > 0 and cc < 90)
    wide = 64 if 32 < rank <= 64 and cc < 90 else 128
    why = "many tokens: tensor cores, each decompressed tile used for all of its tokens"
    return Config(block, wide, 32 if narrow else 64, 1, 8, 3, False, why)


def _few(outer: int, inner: int, cc: int, tokens: int, format: str, rank: int, backward: bool) -> Config:
    """Up to 32 tokens: stream the weight."""
    sms, block = SMS.get(cc, 108), 16 if tokens <= 16 else 32
    if backward:
        tile, step, warps, share = 128, 32, 4, 0.06
    elif format in ("2:4", "masked"):
        # Wide tiles pass x through shared memory less often. With 128 columns the stores of W's tile conflict.
        tile, step, warps, share = 64, 64, 4, 0.085
    else:
        # 128 columns need no count of the columns before; offsets leave less room for partial sums.
        tile, step, warps, share = 32, 128, 2, 0.06
    tiles = -(-outer // tile)
    # The partial sums, fp32, are written and read once; a share of the 1.125 bytes that a weight takes at 50%.
    allowed = min(16, inner // 512, int(share * 1.125 * inner / (8 * max(1, tokens))))

    def busy(splits: int) -> float:
        """The share of the multiprocessors' time in use, less where fewer than two programs run on each."""
        waves = (tiles + -(-rank // 16)) * splits / sms  # x A^T has programs of its own
        return min(1.0, waves / 2) * waves / math.ceil(waves)

    splits = max(range(1, max(1, allowed) + 1), key=lambda count: busy(count) - count * 8 * tokens / (1.125 * inner))
    why = f"few tokens: stream the weight; {splits} of at most {allowed} parts keep {sms} SMs {busy(splits):.0%} busy"
    return Config(block, tile, step, splits, warps, 3, splits > 1 or rank > 0, why)


def key(shape: tuple[int, int], dtype: torch.dtype, tokens: int, *, format: str, rank: int, backward: bool) -> str:
    """What a measured configuration is filed under; the arguments are those of `config`."""
    direction = "backward" if backward else "forward"
    name = str(dtype).removeprefix("torch.")
    return f"{shape[0]}x{shape[1]} {name} {format} {direction} {bucket(tokens)} tokens rank {rank}"


def alternatives(
    shape: tuple[int, int], dtype: torch.dtype, cc: int, tokens: int, *, format: str, rank: int, backward: bool
) -> list[Config]:
    """Configurations to measure against each other; the first is `config`'s. Some may not fit a device."""
    first = config(shape, dtype, cc, tokens, format=format, rank=rank, backward=backward)
    found = {first}
    if dtype != torch.float32:
        splits = sorted({1, 2, 4, 8, first.splits}) if tokens <= DECODE_TOKENS else [1]
        tiles = [(64, 64, 4), (32, 128, 2), (64, 128, 4), (128, 32, 4), (128, 64, 8), (64, 32, 4)]
        shapes = [(first.outer, first.inner, first.num_warps), *tiles]
        for (outer, inner, warps), parts, stages in product(shapes, splits, (2, 3, 4)):
            partial = tokens <= DECODE_TOKENS and (parts > 1 or rank > 0)
            found.add(Config(first.tokens, outer, inner, parts, warps, stages, partial, "measured"))
        found -= {replace(first, reason="measured")}
    return sorted(found, key=lambda one: one != first)
