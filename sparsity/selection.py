"""From scores to masks: a pattern's exact budget, filled with the greatest scores, ties to the lower index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trisparse.kernels.nm import select_nm
from trisparse.kernels.select import select_rows
from trisparse.kernels.threshold import select_global
from trisparse.sparsity.mask import Mask
from trisparse.sparsity.metric import Score
from trisparse.sparsity.pattern import NM, Pattern, Rows, Unstructured, kept_of
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
    keep: list[Tensor]
    if isinstance(pattern, NM):
        keep = [select_nm(s.weight, pattern.n, pattern.m, x=s.x, absolute=s.absolute) for s in parts]
    elif isinstance(pattern, Rows):
        norms = torch.cat([torch.linalg.vector_norm(s.materialise(), dim=1) for s in parts])
        kept = select_rows(norms[None], kept_of(norms.numel(), pattern.sparsity), absolute=False)
        keep = [kept[0, :, None].expand(-1, target.cols)]
    elif pattern.scope == "row":
        k = kept_of(target.cols, pattern.sparsity)
        keep = [select_rows(s.weight, k, x=s.x, absolute=s.absolute) for s in parts]
    elif pattern.scope == "layer":
        keep = _select_together(parts, pattern)
    else:
        raise ValueError("scope 'global' ranks all targets together: use select_over_all")
    return _as_mask(target, keep, pattern)


def select_over_all(targets: Sequence[Target], scores: Sequence[Sequence[Score]], pattern: Unstructured) -> list[Mask]:
    """Masks of all targets under one common budget, ties by (target, index)."""
    keep = iter(_select_together([score for parts in scores for score in parts], pattern))
    return [
        _as_mask(target, [next(keep) for _ in parts], pattern) for target, parts in zip(targets, scores, strict=True)
    ]


def _select_together(scores: Sequence[Score], pattern: Unstructured) -> list[Tensor]:
    total = sum(score.weight.numel() for score in scores)
    return select_global(
        [score.weight for score in scores],
        kept_of(total, pattern.sparsity),
        xs=[score.x for score in scores],
        absolute=scores[0].absolute,
    )


def _as_mask(target: Target, keep: list[Tensor], pattern: Pattern) -> Mask:
    matrix = keep[0] if len(keep) == 1 else torch.cat(keep)
    return Mask.from_matrix(matrix, target.weight.shape, pattern, transposed=target.transposed)
