"""OBS updates: the weights that stay make up for those that go (SparseGPT and its relatives).

Columns of W [rows, cols] are pruned from left to right, up to 128 at a time. What the pruned weights of a block B
contributed to the output is passed to the columns A after it, by the upper Cholesky factor U of the inverse Hessian:

    choose the mask of B, unless it is known from the start
    W[:, B], E = obs_block(W[:, B], U[B, B], mask)
    W[:, A] -= E U[B, A]

Source: Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774, algorithm 1. The mask is found in one of two ways:

- ``"sequential"``: by the metric, for the whole matrix, before any update (Pruner-Zero's †, Dong et al. 2024,
  https://arxiv.org/abs/2406.02924, section 4.2).
- ``"iterative"``: by the metric, block by block, from the weights as updated so far (§ there). ``"sparsegpt"`` is
  iterative with its own metric, |w_ij| / U_jj, whose square is twice what pruning w_ij costs once the columns before j
  are final; for n:m it chooses each group of m columns from the weights as updated up to that group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from trisparse.kernels.nm import select_nm
from trisparse.kernels.obs import MAX_BLOCK, obs_block
from trisparse.kernels.select import select_rows
from trisparse.kernels.threshold import select_global
from trisparse.sparsity.hessian import Factor, product_precision
from trisparse.sparsity.metric import Score
from trisparse.sparsity.pattern import NM, Pattern, Rows, Unstructured, kept_of, kept_per_row
from trisparse.sparsity.targets import Target

Update = Literal["sequential", "iterative"]
UPDATES: tuple[str, ...] = get_args(Update)

Choose = Callable[[int, int], Sequence[Tensor | None]]
"""(first, end) of a block of columns -> for each part its mask, bool [rows, block]; None chooses n:m while updating."""

ScoreOf = Callable[[int, int], Sequence[Score]]
"""(first, end) of columns -> for each part the scores of these columns, of its weights as they are when it is called.

Scores are products, without a metric of their own (`Score.metric`)."""


def check_update(targets: Sequence[Target], pattern: Pattern) -> None:
    """Check that weights pruned by ``pattern`` can be updated.

    Raises:
        ValueError: says why not.
    """
    if isinstance(pattern, Rows):
        raise ValueError(
            f"update cannot help with {pattern}: a row makes up for its own pruned weights, and a pruned row keeps none"
        )
    if isinstance(pattern, Unstructured) and pattern.scope == "global":
        raise ValueError(
            "update with scope 'global' would hold the Hessians of all layers at once: use scope 'layer', or an "
            "unstructured or n:m pattern for each layer"
        )
    if volumes := [target.name for target in targets if isinstance(target.module, nn.Conv3d)]:
        raise ValueError(f"update is not made for Conv3d, whose inputs torch cannot unfold ({volumes[0]}): exclude it")


def update_kept(weights: Sequence[Tensor], factors: Sequence[Factor], keeps: Sequence[Tensor]) -> None:
    """Prune ``weights`` by their masks and update what is kept, in place (``"sequential"``).

    Args:
        weights: of each part, fp32 [rows, cols], contiguous.
        factors: of each part's Hessian.
        keeps: of each part, bool [rows, cols], True = kept.
    """
    _run(weights, factors, lambda first, end: [keep[:, first:end] for keep in keeps], MAX_BLOCK)


def prune_and_update(
    weights: Sequence[Tensor],
    factors: Sequence[Factor],
    pattern: Pattern,
    score: ScoreOf,
    *,
    by_group: bool = False,
    forced: bool = False,
) -> list[Tensor]:
    """Prune ``weights`` by ``pattern`` and update what is kept, in place (``"iterative"``).

    Args:
        weights: of each part, fp32 [rows, cols], contiguous.
        factors: of each part's Hessian.
        pattern: row, balanced or layer scope, or n:m.
        score: the scores of columns of ``weights``; asked for no column that is final.
        by_group: choose each group of an n:m pattern when the update has come to it, not once a block.
        forced: ``score`` is more than |w| / U_jj, so that ``by_group`` has to ask for it in each group.

    Returns:
        The masks of the parts, bool [rows, cols].
    """
    if isinstance(pattern, NM):
        n, m = pattern.n, pattern.m
        if by_group and not forced:
            return _run(weights, factors, lambda first, end: [None] * len(weights), MAX_BLOCK // m * m, n, m)

        def choose_nm(first: int, end: int) -> Sequence[Tensor]:
            return [select_nm(s.weight, n, m, x=s.x, absolute=s.absolute) for s in score(first, end)]

        return _run(weights, factors, choose_nm, m if by_group else MAX_BLOCK // m * m)
    assert isinstance(pattern, Unstructured)
    budget = _LayerBudget if pattern.scope == "layer" else _RowBudgets
    return _run(weights, factors, budget(weights, pattern, score).choose, MAX_BLOCK)


# A budget is spent on blocks of columns from left to right: at each block, all columns from there on compete for what
# is left of it, with their scores as of now, and the block keeps those of its weights that win. Published code gives
# each block the same share instead, which costs perplexity: docs/sparsegpt.md.


class _LayerBudget:
    """Spends the exact budget of a layer."""

    def __init__(self, weights: Sequence[Tensor], pattern: Unstructured, score: ScoreOf) -> None:
        self._score = score
        self._cols = weights[0].shape[1]
        self._left = kept_of(sum(weight.numel() for weight in weights), pattern.sparsity)

    def choose(self, first: int, end: int) -> list[Tensor]:
        rest = self._score(first, self._cols)
        keeps = select_global(
            [s.weight for s in rest], self._left, xs=[s.x for s in rest], absolute=all(s.absolute for s in rest)
        )
        chosen = [keep[:, : end - first] for keep in keeps]
        self._left -= sum(int(keep.count_nonzero()) for keep in chosen)
        return chosen


class _RowBudgets:
    """Spends the exact budget of each row.

    What is left of it differs from row to row, and a selection takes one k for all rows: so the decided columns stay,
    with scores by which they take their part of the budget.
    """

    def __init__(self, weights: Sequence[Tensor], pattern: Unstructured, score: ScoreOf) -> None:
        self._pattern = pattern
        self._score = score
        self._held = [torch.empty_like(weight) for weight in weights]
        self._keeps = [torch.empty_like(weight, dtype=torch.bool) for weight in weights]
        self._decided = 0
        self._won, self._lost = (weights[0].new_tensor(value) for value in (torch.inf, -torch.inf))

    def choose(self, first: int, end: int) -> list[Tensor]:
        last = slice(self._decided, first)
        rest = self._score(first, self._held[0].shape[1])
        for held, score, keep in zip(self._held, rest, self._keeps, strict=True):
            torch.where(keep[:, last], self._won, self._lost, out=held[:, last])
            open_ = held[:, first:]
            if score.absolute:
                torch.abs(score.weight, out=open_)
            else:
                open_.copy_(score.weight)
            if score.x is not None:
                open_.mul_(score.x)
            if not score.absolute:
                open_.clamp_(min=torch.finfo(torch.float32).min)  # above the decided columns that lost
        self._decided = first
        k, more = kept_per_row(self._pattern, sum(len(held) for held in self._held), self._held[0].shape[1])
        self._keeps = []
        for held in self._held:
            first_rows = min(more, len(held))
            more -= first_rows
            sections = ((held[:first_rows], k + 1), (held[first_rows:], k))
            chosen = [select_rows(w, count, absolute=False) for w, count in sections if len(w)]
            self._keeps.append(torch.cat(chosen) if len(chosen) > 1 else chosen[0])
        return [keep[:, first:end] for keep in self._keeps]


def _run(
    weights: Sequence[Tensor],
    factors: Sequence[Factor],
    choose: Choose,
    width: int,
    n: int | None = None,
    m: int | None = None,
) -> list[Tensor]:
    """The masks; ``choose`` is asked once for each block, when all columns before it are final."""
    cols = weights[0].shape[1]
    keeps = [torch.empty(weight.shape, dtype=torch.bool, device=weight.device) for weight in weights]
    with product_precision("ieee"):
        for first in range(0, cols, width):
            end = min(first + width, cols)
            for weight, factor, keep, mask in zip(weights, factors, keeps, choose(first, end), strict=True):
                corner = factor.upper[first:end, first:end]
                nm = (n, m) if mask is None else (None, None)
                _, errors, keep[:, first:end] = obs_block(weight[:, first:end], corner, mask, *nm, in_place=True)
                if end < cols:
                    weight[:, end:].addmm_(errors, factor.upper[first:end, end:], alpha=-1)
    return keeps
