"""From scores to masks: a pattern's exact budget, filled with the greatest scores, ties to the lower index.

The kernels give packed bits, and could zero the weights in the same launch. They are not asked to: an error in
the last layer of a block must leave its first ones as they were, and the scores of a metric may be another
tensor than the weights. `trisparse.sparsity.mask.attach` zeroes by the packed bits once a whole block has its
masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trisparse.kernels.bitmask import pack_bits
from trisparse.kernels.nm import select_nm
from trisparse.kernels.select import select_rows
from trisparse.kernels.threshold import select_global
from trisparse.sparsity.mask import Mask
from trisparse.sparsity.metric import Score
from trisparse.sparsity.pattern import NM, Pattern, Rows, Unstructured, kept_of, kept_per_row
from trisparse.sparsity.targets import Target


def check_pattern(targets: Sequence[Target], pattern: Pattern) -> None:
    """Check that ``pattern`` divides the inputs of every target.

    Raises:
        ValueError: names the layers whose inputs are no multiple of m.
    """
    if not isinstance(pattern, NM):
        return
    unfit = [f"{target.name} ({target.cols})" for target in targets if target.cols % pattern.m]
    if unfit:
        shown = ", ".join(unfit[:5]) + (f" and {len(unfit) - 5} more" if len(unfit) > 5 else "")
        raise ValueError(f"sparsity {pattern} needs inputs divisible by {pattern.m}, but not so: {shown}; exclude them")


def select(target: Target, parts: Sequence[Score], pattern: Pattern) -> Mask:
    """Mask of one target; ``parts`` are the scores of its row blocks in order.

    Raises:
        ValueError: a score is NaN, or the pattern needs all targets together (scope ``"global"``).
    """
    bits: list[Tensor]
    if isinstance(pattern, NM):
        bits = [
            select_nm(s.weight, pattern.n, pattern.m, x=s.x, absolute=s.absolute, score=s.metric, g=s.g, out="packed")
            for s in parts
        ]
    elif isinstance(pattern, Rows):
        norms = torch.cat([torch.linalg.vector_norm(s.materialise(), dim=1) for s in parts])
        kept = select_rows(norms[None], kept_of(norms.numel(), pattern.sparsity), absolute=False)
        whole = pack_bits(kept.new_ones(1, target.cols))
        bits = [torch.where(kept.T, whole, torch.zeros_like(whole))]
    elif pattern.scope in ("row", "balanced"):
        k, more = kept_per_row(pattern, sum(s.weight.shape[0] for s in parts), target.cols)
        bits = []
        for s in parts:
            bits += _select_rows(s, k, more)
            more = max(0, more - s.weight.shape[0])
    elif pattern.scope == "layer":
        bits = _select_together(parts, pattern)
    else:
        raise ValueError("scope 'global' ranks all targets together: use select_over_all")
    return _as_mask(target, bits, pattern)


def _select_rows(score: Score, k: int, more: int) -> list[Tensor]:
    """Packed bits of k weights a row, and of k + 1 in the first ``more`` rows."""
    more = min(more, score.weight.shape[0])
    if more and score.metric is not None:  # it may reduce over the matrix, which is about to be cut
        score = Score(score.materialise(), absolute=False)
    sections = [(score.weight[:more], k + 1), (score.weight[more:], k)] if more else [(score.weight, k)]
    return [
        select_rows(w, count, x=score.x, absolute=score.absolute, score=score.metric, g=score.g, out="packed")
        for w, count in sections
        if w.shape[0]
    ]


def select_over_all(targets: Sequence[Target], scores: Sequence[Sequence[Score]], pattern: Unstructured) -> list[Mask]:
    """Masks of all targets under one common budget, ties by (target, index)."""
    bits = iter(_select_together([score for parts in scores for score in parts], pattern))
    return [
        _as_mask(target, [next(bits) for _ in parts], pattern) for target, parts in zip(targets, scores, strict=True)
    ]


def _select_together(scores: Sequence[Score], pattern: Unstructured) -> list[Tensor]:
    if len({score.absolute for score in scores}) > 1:  # as where only some targets were pruned before
        scores = [Score(score.materialise(), absolute=False) for score in scores]
    total = sum(score.weight.numel() for score in scores)
    return select_global(
        [score.weight for score in scores],
        kept_of(total, pattern.sparsity),
        xs=[score.x for score in scores],
        absolute=scores[0].absolute,
        score=scores[0].metric,
        gs=[score.g for score in scores],
        out="packed",
    )


def _as_mask(target: Target, bits: list[Tensor], pattern: Pattern) -> Mask:
    packed = bits[0] if len(bits) == 1 else torch.cat(bits)
    return Mask(packed.cpu(), target.weight.shape, target.cols, target.transposed, pattern)
