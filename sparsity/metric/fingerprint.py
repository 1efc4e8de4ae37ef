"""A digest of the masks that a metric gives on a fixed small sample: equal digests, equal metric for a search."""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor

from trisparse.sparsity.metric.expression import Node

# Scales of W, G and X: those of a language model, and two where sums, logarithms and exponentials weigh otherwise.
_SCALES = ((0.02, 1e-3, 1.0), (0.5, 0.5, 0.5), (0.1, 5.0, 0.05))
_ROWS, _COLS = 32, 48
_SPARSITIES = (0.5, 0.25, 0.75)
_NEAR = 2e-6  # relative; a handful of fp32 operations round by less


def fingerprint(node: Node) -> str:
    """Hex digest of the row-wise masks of ``node``.

    The sample is three matrices of 32 x 48 heavy-tailed weights (Student's t with 4 degrees of freedom), some of them
    of equal magnitude, with log-normal G and X. In each row, scores within 2e-6 of the threshold count as tied with it
    and go by their index, so that two ways to round the same formula give the same digest. A metric that gives NaN on
    the sample equals no other one.

    Equal metrics have equal digests but for a score that lies right at that bound; different ones have different
    digests unless they agree in all 13,824 decisions.
    """
    digest = hashlib.sha256()
    for w, g, x in _sample():
        score = node.evaluate(w, g, x)
        if bool(score.isnan().any()):
            return hashlib.sha256(f"NaN {node!r}".encode()).hexdigest()
        digest.update(_masks(score))
    return digest.hexdigest()


def _masks(score: Tensor) -> bytes:
    ordered = torch.sort(score, dim=1, descending=True).values
    packed = []
    for sparsity in _SPARSITIES:
        kept = _COLS - round(_COLS * sparsity)
        threshold = ordered[:, kept - 1 : kept]
        # An infinite threshold has no surroundings; only what equals it is tied.
        near = torch.where(threshold.isfinite(), threshold.abs() * _NEAR, torch.zeros_like(threshold))
        above = score > threshold + near
        tied = (score >= threshold - near) & ~above
        keep = above | (tied & (tied.cumsum(1) <= kept - above.sum(1, keepdim=True)))
        packed.append(keep)
    return torch.cat(packed).numpy().tobytes()


@cache
def _sample() -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    generator = torch.Generator().manual_seed(2406_02924)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    matrices = []
    for w_scale, g_scale, x_scale in _SCALES:
        w = w_scale * normal(_ROWS, _COLS) / normal(4, _ROWS, _COLS).square().mean(0).sqrt()
        w[:, 8:16] = w[:, :8]
        w[:, 16:24] = -w[:, :8]
        g = g_scale * normal(_ROWS, _COLS).exp()
        x = x_scale * normal(_COLS).exp()
        matrices.append((w, g, x))
    return tuple(matrices)
