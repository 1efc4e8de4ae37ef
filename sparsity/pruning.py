"""Masks from statistics: what ``sparsify`` does with the targets of a block once they are measured."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trisparse.kernels.launch import by_kernel
from trisparse.sparsity.hessian import Factor
from trisparse.sparsity.interrupt import interrupt_after
from trisparse.sparsity.mask import Mask, attach, from_matrix, mask_of
from trisparse.sparsity.metric import SPARSEGPT, Metric, Score
from trisparse.sparsity.obs import ScoreOf, Update, prune_and_update, update_kept
from trisparse.sparsity.pattern import Pattern, Rows, Unstructured
from trisparse.sparsity.progress import Advance
from trisparse.sparsity.report import TargetReport
from trisparse.sparsity.selection import select, select_over_all
from trisparse.sparsity.statistics import InputStatistics
from trisparse.sparsity.targets import Skipped, Target

if TYPE_CHECKING:
    from trisparse.sparsity.gradient_statistics import GradientStatistics


@dataclass(frozen=True)
class _Pruned:
    """The mask of a target and, where its weights were updated, their new values and the damping that it took."""

    mask: Mask
    seconds: float
    weight: Tensor | None = None
    damping: float | None = None


class Pruning:
    """Turns statistics into masks, and updated weights where asked, and attaches them, a block at a time.

    ``allocated`` has the pattern of each target by name, where an allocation gave them patterns of their own.
    """

    def __init__(
        self,
        pattern: Pattern,
        metric: Metric,
        seed: int,
        gradients: GradientStatistics | None,
        allocated: Mapping[str, Pattern] | None = None,
        update: Update | None = None,
        damping: float = 0.01,
    ) -> None:
        self.pattern = pattern
        self.allocated = allocated
        self.metric = metric
        self.seed = seed
        self.gradients = gradients
        self.update = update
        self.damping = damping
        self.rows: list[TargetReport] = []
        self.unreached: list[Skipped] = []
        self._on_use: dict[str, _Pruned] = {}

    def pattern_of(self, target: Target) -> Pattern:
        """The pattern that ``target`` is pruned to."""
        return self.pattern if self.allocated is None else self.allocated[target.name]

    def prune(self, group: Sequence[Target], statistics: InputStatistics | None) -> None:
        """Select the masks of all of ``group``, then attach them."""
        chosen = []
        for target in self._reached(group, statistics):
            pruned = self._on_use.pop(target.name, None) or self._prune(target, statistics)
            chosen.append((target, pruned, _note(target, statistics)))
        if statistics is not None:
            statistics.forget_hessians()
        with interrupt_after():
            for target, pruned, note in chosen:
                self._attach(target, pruned, note)

    def prune_together(self, steps: Iterable[tuple[list[Target], InputStatistics | None]], advance: Advance) -> None:
        """Measure everything, then select all masks under one budget and attach them."""
        members: list[tuple[Target, Tensor | None, str]] = []
        for group, statistics in steps:
            members.extend(
                (target, statistics.rms(target) if statistics else None, _note(target, statistics))
                for target in self._reached(group, statistics)
            )
            advance(len(group))
        if not members:
            return
        start = time.perf_counter()
        new = all(mask_of(target.module, target.param) is None for target, _, _ in members)
        scores = [self._scores(target, x, self._generator(target), fused=new) for target, x, _ in members]
        assert isinstance(self.pattern, Unstructured)
        chosen = select_over_all([target for target, _, _ in members], scores, self.pattern)
        seconds = (time.perf_counter() - start) / len(members)
        with interrupt_after():
            for (target, _, note), mask in zip(members, chosen, strict=True):
                self._attach(target, _Pruned(mask, seconds), note)

    def prune_on_use(self, target: Target, statistics: InputStatistics) -> Tensor:
        """The pruned weight while a block runs; it is attached with its block."""
        pruned = self._on_use[target.name] = self._prune(target, statistics)
        if pruned.weight is not None:
            return pruned.weight
        return target.weight.detach().masked_fill(~pruned.mask.dense(target.weight.device), 0)

    def _reached(self, group: Sequence[Target], statistics: InputStatistics | None) -> Iterator[Target]:
        for target in group:
            if statistics is not None and statistics.rms(target) is None:
                reason = "no calibration input reached it"
            elif self.gradients is not None and target.name in self.gradients.info.unreached:
                reason = "no gradient reached it"
            else:
                yield target
                continue
            self.unreached.append(Skipped(target.name, tuple(target.weight.shape), reason))

    def _prune(self, target: Target, statistics: InputStatistics | None) -> _Pruned:
        start = time.perf_counter()
        x = statistics.rms(target) if statistics else None
        generator = self._generator(target)
        if self.update is None:
            mask = select(target, self._scores(target, x, generator), self.pattern_of(target))
            return _Pruned(mask, time.perf_counter() - start)
        assert statistics is not None
        assert x is not None
        self._check_inputs(target, x)
        mask, weight, damping = self._updated(target, x, statistics.factors(target, self.damping), generator)
        return _Pruned(mask, time.perf_counter() - start, weight, damping)

    def _updated(
        self, target: Target, x: Tensor, factors: Sequence[Factor], generator: torch.Generator
    ) -> tuple[Mask, Tensor, float]:
        """The mask, the updated parameter in its own dtype, and the greatest damping of its parts."""
        weight, pattern = target.weight, self.pattern_of(target)
        matrix = target.matrix().to(torch.float32, copy=True)
        parts = list(matrix.chunk(target.parts))
        if self.update == "sequential":
            mask = select(target, self._scores(target, x, generator), pattern)
            update_kept(parts, factors, mask.matrix(weight.device).chunk(target.parts))
        else:
            own = self.metric is SPARSEGPT
            if own:
                x = torch.stack([1 / factor.upper.diagonal() for factor in factors])
                for part, factor in zip(parts, factors, strict=True):
                    part.masked_fill_(factor.dead, 0)
            keeps = prune_and_update(
                parts,
                factors,
                pattern,
                self._scores_while_updating(target, parts, x, generator),
                by_group=own,
                forced=mask_of(target.module, target.param) is not None,
            )
            keep = keeps[0] if len(keeps) == 1 else torch.cat(keeps)
            mask = Mask.from_matrix(keep, weight.shape, pattern, transposed=target.transposed)
        new = from_matrix(matrix.to(weight.dtype), weight.shape, transposed=target.transposed)
        if not bool(torch.isfinite(new).all()):
            raise ValueError(f"{target.name} cannot be updated: a weight overflows {weight.dtype}")
        return mask, new, max(factor.damping for factor in factors)

    def _generator(self, target: Target) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {target.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def _check_inputs(self, target: Target, x: Tensor | None) -> None:
        if x is not None and not torch.isfinite(x).all():
            raise ValueError(f"the inputs of {target.name} overflow on the calibration data")

    def _scores(
        self, target: Target, x: Tensor | None, generator: torch.Generator, *, fused: bool = True
    ) -> list[Score]:
        """Scores of the parts of ``target``."""
        self._check_inputs(target, x)
        parts = target.matrix().chunk(target.parts)
        earlier = mask_of(target.module, target.param)
        # Kernels select by the metric itself, unless scores are changed below.
        pattern = self.pattern_of(target)
        fused = fused and by_kernel(target.weight) and earlier is None and not isinstance(pattern, Rows)
        scores = self._measured(target, parts, x, generator, fused=fused)
        by_norm = isinstance(pattern, Rows) and not scores[0].absolute
        if by_norm and any(bool((score.weight < 0).any()) for score in scores):
            raise ValueError(
                f"{target.name}: metric {self.metric} gives negative scores, and {pattern} ranks rows by the norm "
                "of their scores"
            )
        # Weights pruned before are zero and go first again: before live ones that score zero, too, where an input or
        # the weight itself is 0.
        kept = None if earlier is None else earlier.matrix(target.weight.device).chunk(target.parts)
        if kept is not None and (
            not scores[0].absolute
            or scores[0].x is not None
            or any(bool(((w == 0) & part).any()) for w, part in zip(parts, kept, strict=True))
        ):
            least = 0.0 if isinstance(pattern, Rows) else -torch.inf  # rows are ranked by a norm
            scores = [
                Score(score.materialise().masked_fill(~part & (w == 0), least), absolute=False)
                for score, part, w in zip(scores, kept, parts, strict=True)
            ]
        return scores

    def _scores_while_updating(
        self, target: Target, parts: Sequence[Tensor], x: Tensor | None, generator: torch.Generator
    ) -> ScoreOf:
        """Scores of columns of ``parts``, the weights of ``target`` as updated so far.

        Weights pruned before go first again, whatever an update makes of them: they are those that are zero now,
        before any update.
        """
        self._check_inputs(target, x)
        earlier = mask_of(target.module, target.param)
        gone = None
        if earlier is not None:
            gone = (~earlier.matrix(target.weight.device) & (target.matrix() == 0)).chunk(target.parts)

        whole: list[Score] | None = None

        def score(first: int, end: int) -> list[Score]:
            nonlocal whole
            # Scores that read the weights themselves, as |W| X does, follow an update; all others are made anew.
            if whole is None or any(s.weight is not part for s, part in zip(whole, parts, strict=True)):
                whole = self._measured(target, parts, x, generator)
            scores = [s.columns(first, end) for s in whole]
            if gone is None:
                return scores
            return [
                Score(s.materialise().masked_fill(pruned[:, first:end], -torch.inf), absolute=False)
                for s, pruned in zip(scores, gone, strict=True)
            ]

        return score

    def _measured(
        self,
        target: Target,
        parts: Sequence[Tensor],
        x: Tensor | None,
        generator: torch.Generator,
        *,
        fused: bool = False,
    ) -> list[Score]:
        """What the metric says of the weights in ``parts``."""
        xs = [None] * target.parts if x is None else list(x)
        gs = self._gradient_parts(target)
        try:
            return [self.metric.score(w, x, g, generator, fused=fused) for w, x, g in zip(parts, xs, gs, strict=True)]
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from None

    def _gradient_parts(self, target: Target) -> Sequence[Tensor | None]:
        norm = None if self.gradients is None else self.gradients.norm(target)
        if norm is None:
            return [None] * target.parts
        return list(norm.chunk(target.parts))

    def _attach(self, target: Target, pruned: _Pruned, note: str) -> None:
        if pruned.weight is not None:
            with torch.no_grad():
                target.weight.copy_(pruned.weight)
        mask = pruned.mask
        attach(target.module, target.param, mask)
        if pruned.damping is not None and pruned.damping > self.damping:
            grown = f"its Hessian took a damping of {pruned.damping:g}"
            note = f"{note}; {grown}" if note else grown
        shape = tuple(mask.shape)
        total = mask.shape.numel()
        row = TargetReport(
            target.name, shape, str(mask.pattern), mask.kept, total, pruned.seconds, note, damping=pruned.damping
        )
        self.rows.append(row)


def _note(target: Target, statistics: InputStatistics | None) -> str:
    unreached = statistics.unreached_parts(target) if statistics else 0
    if not unreached or statistics is None:
        return ""
    also = " and their Hessian the identity" if statistics.has_hessians else ""
    return f"{unreached} of {target.parts} experts saw no calibration token: their X is 1{also}"
