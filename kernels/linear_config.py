"""How a linear layer with a compressed weight is cut into tiles: a pure function of shape, dtype and device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

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
        tile = 128 if backward else 32
        splits, why = _splits(tokens, outer, inner, tile, cc)
        size = (tile, 32) if backward else (tile, 128)
        partial = splits > 1 or rank > 0
        return Config(
            16 if tokens <= 16 else 32, *size, splits, 2, 3, partial, f"few tokens: stream the weight; {why}"
        )
    block = 64 if tokens <= 64 or rank > 64 else 128
    why = "many tokens: tensor cores, each decompressed tile used for all of its tokens"
    return Config(block, 128, 32 if backward else 64, 1, 8, 3, False, why)


def _splits(tokens: int, outer: int, inner: int, tile: int, cc: int) -> tuple[int, str]:
    """In how many parts to cut the contraction, so that every multiprocessor has as much to do."""
    sms = SMS.get(cc, 108)
    tiles = -(-outer // tile)
    # The partial sums, fp32, are written once and read once; 6% of the 1.125 bytes that a weight takes at 50%.
    allowed = min(inner // 512, int(0.06 * 1.125 * inner / (8 * max(1, tokens))))

    def busy(splits: int) -> float:
        waves = tiles * splits / sms
        return min(1.0, waves / 2) * waves / math.ceil(waves)

    splits = max(range(1, max(1, min(16, allowed)) + 1), key=lambda s: round(busy(s) - 0.01 * s, 6))
    return splits, f"{splits} of at most {allowed} parts keep {sms} multiprocessors {busy(splits):.0%} busy"
