"""Masks from statistics: what ``sparsify`` does with the targets of a block once they are measured."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trisparse.kernels.launch import by_kernel
from trisparse.sparsity.interrupt import interrupt_after
from trisparse.sparsity.mask import Mask, attach, mask_of
from trisparse.sparsity.metric import Metric, Score
from trisparse.sparsity.pattern import Pattern, Rows, Unstructured
from trisparse.sparsity.progress import Advance
from trisparse.sparsity.report import TargetReport
from trisparse.sparsity.selection import select, select_over_all
from trisparse.sparsity.statistics import InputStatistics
from trisparse.sparsity.targets import Skipped, Target

if TYPE_CHECKING:
    from trisparse.sparsity.gradient_statistics import GradientStatistics


class Pruning:
    """Turns statistics into masks and attaches them, a block at a time.

    ``allocated`` has the pattern of each target by name, where an allocation gave them patterns of their own.
    """

    def __init__(
        self,
        pattern: Pattern,
        metric: Metric,
        seed: int,
        gradients: GradientStatistics | None,
        allocated: Mapping[str, Pattern] | None = None,
    ) -> None:
        self.pattern = pattern
        self.allocated = allocated
        self.metric = metric
        self.seed = seed
        self.gradients = gradients
        self.rows: list[TargetReport] = []
        self.unreached: list[Skipped] = []
        self._on_use: dict[str, tuple[Mask, float]] = {}

    def pattern_of(self, target: Target) -> Pattern:
        """The pattern that ``target`` is pruned to."""
        return self.pattern if self.allocated is None else self.allocated[target.name]

    def prune(self, group: Sequence[Target], statistics: InputStatistics | None) -> None:
        """Select the masks of all of ``group``, then attach them."""
        chosen = []
        for target in self._reached(group, statistics):
            if target.name in self._on_use:
                mask, seconds = self._on_use.pop(target.name)
            else:
                mask, seconds = self._select(target, statistics.rms(target) if statistics else None)
            chosen.append((target, mask, seconds, _note(target, statistics)))
        with interrupt_after():
            for target, mask, seconds, note in chosen:
                self._attach(target, mask, seconds, note)

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
        scores = [self._scores(target, x, fused=new) for target, x, _ in members]
        assert isinstance(self.pattern, Unstructured)
        chosen = select_over_all([target for target, _, _ in members], scores, self.pattern)
        seconds = (time.perf_counter() - start) / len(members)
        with interrupt_after():
            for (target, _, note), mask in zip(members, chosen, strict=True):
                self._attach(target, mask, seconds, note)

    def select_on_use(self, target: Target, x: Tensor) -> Tensor:
        """Select while a block runs; the mask is attached with its block."""
        self._on_use[target.name] = self._select(target, x)
        return self._on_use[target.name][0].dense(target.weight.device)

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

    def _select(self, target: Target, x: Tensor | None) -> tuple[Mask, float]:
        start = time.perf_counter()
        mask = select(target, self._scores(target, x), self.pattern_of(target))
        return mask, time.perf_counter() - start

    def _scores(self, target: Target, x: Tensor | None, *, fused: bool = True) -> list[Score]:
        if x is not None and not torch.isfinite(x).all():
            raise ValueError(f"the inputs of {target.name} overflow on the calibration data")
        pattern = self.pattern_of(target)
        digest = hashlib.sha256(f"{self.seed} {target.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        parts = target.matrix().chunk(target.parts)
        xs = [None] * target.parts if x is None else list(x)
        gs = self._gradient_parts(target)
        earlier = mask_of(target.module, target.param)
        # Kernels select by the metric itself, unless scores are changed below.
        fused = fused and by_kernel(target.weight) and earlier is None and not isinstance(pattern, Rows)
        try:
            scores = [self.metric.score(w, x, g, generator, fused=fused) for w, x, g in zip(parts, xs, gs, strict=True)]
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from None
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

    def _gradient_parts(self, target: Target) -> Sequence[Tensor | None]:
        norm = None if self.gradients is None else self.gradients.norm(target)
        if norm is None:
            return [None] * target.parts
        return list(norm.chunk(target.parts))

    def _attach(self, target: Target, mask: Mask, seconds: float, note: str) -> None:
        attach(target.module, target.param, mask)
        shape = tuple(mask.shape)
        total = mask.shape.numel()
        self.rows.append(TargetReport(target.name, shape, str(mask.pattern), mask.kept, total, seconds, note))


def _note(target: Target, statistics: InputStatistics | None) -> str:
    unreached = statistics.unreached_parts(target) if statistics else 0
    return f"{unreached} of {target.parts} experts saw no calibration token: their X is 1" if unreached else ""
