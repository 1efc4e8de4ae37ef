"""What an allocation is, and how its shares of a budget become the patterns of the targets."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from torch import nn

from trisparse.sparsity.allocation.rounding import Numbers, largest_remainder, whole_n
from trisparse.sparsity.pattern import NM, Pattern, Rows, Unstructured, kept_of
from trisparse.sparsity.selection import check_pattern
from trisparse.sparsity.statistics import InputStatistics
from trisparse.sparsity.targets import Target

Patterns = dict[str, Pattern | None]  # by name of the target; None leaves it dense


class Allocation(ABC):
    """How sparsity is spread over the targets of a model. Its text reads back: ``owl:M=5,lambda=0.08``.

    Attributes:
        name: in ``sparsify(allocation=name)``.
        reads_inputs: whether it needs the statistics of the dense model's inputs.
        reads_weights: whether it needs the weights of all layers, not their shapes alone.
    """

    name: ClassVar[str]
    reads_inputs: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = False

    def __str__(self) -> str:
        values = [(field.name.rstrip("_"), getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]
        return ":".join([self.name, *([",".join(f"{k}={v:g}" for k, v in values)] if values else [])])

    def check(self, pattern: Pattern) -> Pattern:
        """The pattern to start from.

        Raises:
            ValueError: ``pattern`` cannot be spread like this.
        """
        if isinstance(pattern, Unstructured) and pattern.scope == "global":
            raise ValueError(f"sparsity {pattern} is itself an allocation: give it without 'global' for {self.name}")
        return pattern

    @abstractmethod
    def patterns(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        pattern: Pattern,
        inputs: Mapping[str, InputStatistics] | None = None,
    ) -> Patterns:
        """The pattern of each target by name, None where it stays dense.

        Args:
            model: the model.
            targets: its weights to prune.
            pattern: from :meth:`check`.
            inputs: statistics of the dense model by name of the target, if :attr:`reads_inputs`.

        Raises:
            ValueError: the budget cannot be met like this; says why.
        """


@dataclass(frozen=True, eq=False)
class Budget:
    """What is to be shared.

    Attributes:
        model, targets, inputs: as in :meth:`Allocation.patterns`.
        kept: weights that stay, over all targets.
    """

    model: nn.Module
    targets: Sequence[Target]
    kept: int
    inputs: Mapping[str, InputStatistics] | None = None

    @property
    def sizes(self) -> list[int]:
        """Weights of each target."""
        return [target.weight.numel() for target in self.targets]

    @property
    def density(self) -> float:
        """Kept share of all."""
        return self.kept / sum(self.sizes)


@dataclass(frozen=True)
class Shares:
    """Real-valued number of kept weights of each target, which sum up to the budget, and the least that must stay."""

    kept: Numbers
    least: Sequence[int]


class BudgetAllocation(Allocation):
    """Shares one number of kept weights among the targets, and meets it exactly.

    The budget is what ``pattern`` keeps of all targets together. Unstructured: largest remainders; with scope
    ``"row"`` the rows of a target differ by at most one weight, the first ones keep more. N:M: n differs from target
    to target, m is the same. A target that keeps all its weights stays dense. One that would keep none keeps one
    weight, which the target that keeps most gives up.
    """

    @abstractmethod
    def shares(self, budget: Budget) -> Shares:
        """What each target keeps.

        Raises:
            ValueError: says what makes it impossible.
        """

    def check(self, pattern: Pattern) -> Pattern:
        """See :meth:`Allocation.check`."""
        if isinstance(pattern, Rows):
            raise ValueError(
                f"sparsity {pattern} prunes whole rows, whose widths differ: {self.name} cannot meet a budget of "
                "weights exactly with them; give each layer its own share (PerLayer)"
            )
        return super().check(pattern)

    def patterns(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        pattern: Pattern,
        inputs: Mapping[str, InputStatistics] | None = None,
    ) -> Patterns:
        """See :meth:`Allocation.patterns`."""
        sizes = [target.weight.numel() for target in targets]
        kept = kept_of(sum(sizes), pattern.sparsity)
        if kept < len(targets):
            raise ValueError(f"sparsity {pattern} keeps {kept} weights of {len(targets)} layers: some would keep none")
        shares = self.shares(Budget(model, targets, kept, inputs))
        held = [least == size for least, size in zip(shares.least, sizes, strict=True)]  # wholly dense, whatever m is
        check_pattern([target for target, dense in zip(targets, held, strict=True) if not dense], pattern)
        names = [target.name for target in targets]
        if isinstance(pattern, NM):
            found: list[Pattern | None] = [*_nm_patterns(shares, sizes, pattern.m, kept)]
        else:
            assert isinstance(pattern, Unstructured)
            counts = largest_remainder(shares.kept, kept)
            for i in [i for i, count in enumerate(counts) if not count]:  # as in a layer of zeros, by LAMP
                counts[counts.index(max(counts))] -= 1
                counts[i] = 1
            found = [_unstructured(target, count, pattern) for target, count in zip(targets, counts, strict=True)]
        return dict(zip(names, found, strict=True))


def _nm_patterns(shares: Shares, sizes: Sequence[int], m: int, kept: int) -> list[NM | None]:
    """n:m of each target, None where n = m."""
    found: list[NM | None] = [None] * len(sizes)
    left = [i for i, size in enumerate(sizes) if shares.least[i] < size]  # the others may have no whole groups
    groups = [sizes[i] // m for i in left]
    ideal = [shares.kept[i] / count for i, count in zip(left, groups, strict=True)]
    least = [max(1, math.ceil(shares.least[i] / count)) for i, count in zip(left, groups, strict=True)]
    kept -= sum(sizes) - m * sum(groups)
    for i, n in zip(left, whole_n(ideal, groups, m, least, kept), strict=True):
        found[i] = None if n == m else NM(n, m)
    return found


def _unstructured(target: Target, kept: int, pattern: Unstructured) -> Unstructured | None:
    """The pattern that keeps exactly ``kept`` weights of ``target``; None where that is all of them."""
    size = target.weight.numel()
    if kept == size:
        return None
    # `kept_of` rounds 1 - kept / size back to the same count.
    if pattern.scope == "layer":
        return replace(pattern, sparsity=1 - kept / size)
    k, more = divmod(kept, size // target.cols)
    if more:
        return Unstructured(1 - kept / size, "balanced")
    return Unstructured(1 - k / target.cols, "row")
