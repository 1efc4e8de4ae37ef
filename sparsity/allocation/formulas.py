"""Allocations that need the weights alone: uniform, uniform+, global, ERK and LAMP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trisparse.sparsity.allocation.base import Allocation, Budget, BudgetAllocation, Patterns, Shares
from trisparse.sparsity.allocation.rounding import spread
from trisparse.sparsity.pattern import Pattern, Unstructured
from trisparse.sparsity.statistics import InputStatistics, is_fused_experts
from trisparse.sparsity.targets import Target

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Uniform(BudgetAllocation):
    """The same share everywhere, with the model's number exact, where rounding each row alone would miss it."""

    name: ClassVar[str] = "uniform"

    def shares(self, budget: Budget) -> Shares:
        """See :meth:`BudgetAllocation.shares`."""
        return _proportional(self, budget, budget.sizes, [1] * len(budget.targets))


@dataclass(frozen=True)
class UniformPlus(BudgetAllocation):
    """Uniform, but the first convolution stays dense and the last linear keeps at least 1 - ``last`` of its weights.

    First and last are those of the model, in the order of its modules. If one of them is no target, it is dense.
    Gale, Elsen & Hooker 2019, "The State of Sparsity", https://arxiv.org/abs/1902.09574, section 4.

    Raises:
        ValueError: ``last`` is not in [0, 1).
    """

    name: ClassVar[str] = "uniform+"
    last: float = 0.8

    def __post_init__(self) -> None:
        if isinstance(self.last, bool) or not isinstance(self.last, int | float) or not 0 <= self.last < 1:
            raise ValueError(f"last must be a sparsity in [0, 1), got {self.last!r}")

    def shares(self, budget: Budget) -> Shares:
        """See :meth:`BudgetAllocation.shares`."""
        modules = list(budget.model.modules())
        first = next((module for module in modules if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
        last = next((module for module in reversed(modules) if isinstance(module, nn.Linear | Conv1D)), None)
        sizes, least = budget.sizes, [1] * len(budget.targets)
        special = False
        for i, target in enumerate(budget.targets):
            if target.module is first:
                least[i] = sizes[i]
            elif target.module is last:
                least[i] = max(1, sizes[i] - int(sizes[i] * self.last))
            else:
                continue
            special = True
        if not special:
            raise ValueError(
                f"allocation {self} is about the model's first convolution and its last linear, and neither is pruned: "
                "include them, or use 'uniform'"
            )
        return _proportional(self, budget, sizes, least)


@dataclass(frozen=True)
class ERK(BudgetAllocation):
    """Erdős–Rényi-Kernel: density proportional to Σ dims / Π dims of the weight, (in + out) / (in · out) of a linear.

    Where a density would exceed 1, the layer stays dense and the others share the rest. Each expert of fused experts
    is a layer. Evci et al. 2020, "Rigging the Lottery", https://arxiv.org/abs/1911.11134, section 3 (1).
    """

    name: ClassVar[str] = "erk"

    def shares(self, budget: Budget) -> Shares:
        """See :meth:`BudgetAllocation.shares`."""
        weights = []
        for target, size in zip(budget.targets, budget.sizes, strict=True):
            shape = target.weight.shape[1:] if is_fused_experts(target) else target.weight.shape
            weights.append(size * sum(shape) / shape.numel())
        return _proportional(self, budget, weights, [1] * len(weights))


@dataclass(frozen=True)
class LAMP(BudgetAllocation):
    """What one threshold over the LAMP scores of all layers leaves in each of them.

    score(u) = W_u² / Σ W_v² over all v of the layer with |W_v| >= |W_u|

    By magnitude with scope ``"layer"`` this is the paper's method; any other metric gets its number of weights for
    each layer. Memory: 4 bytes for each weight of all targets. Lee et al. 2021, "Layer-adaptive sparsity for the
    Magnitude-based Pruning", https://arxiv.org/abs/2010.07611, section 2, eq. 2.
    """

    name: ClassVar[str] = "lamp"
    reads_weights: ClassVar[bool] = True

    def shares(self, budget: Budget) -> Shares:
        """See :meth:`BudgetAllocation.shares`."""
        kept = _counts_of_the_greatest([lamp_scores(target.weight) for target in budget.targets], budget.kept)
        return Shares([float(count) for count in kept], [1] * len(kept))


def lamp_scores(weight: Tensor) -> Scores:
    """LAMP scores of all elements of ``weight`` in ascending order, fp32 [weight.numel()]; 0 where the weight is 0."""
    squares = np.square(np.sort(weight.detach().float().abs().flatten().cpu().numpy()), dtype=np.float64)
    sums = np.cumsum(squares[::-1])[::-1]  # what outlives a weight comes after it
    scores: Scores = np.divide(squares, sums, out=np.zeros_like(squares), where=squares > 0).astype(np.float32)
    return scores


def _counts_of_the_greatest(scores: Sequence[Scores], kept: int) -> list[int]:
    """How many of the ``kept`` greatest are in each of ``scores``, ascending and >= 0; ties go to the earlier one."""
    keys = [values.view(np.int32) for values in scores]  # the bits of floats >= 0 are in the order of the floats

    def counts(least: int) -> npt.NDArray[np.int64]:
        return np.array([values.size - int(np.searchsorted(values, np.int32(least))) for values in keys])

    below, above = 0, 1 + max(int(values[-1]) for values in keys)  # the k-th greatest is in [below, above)
    while above - below > 1:
        middle = (below + above) // 2
        if counts(middle).sum() >= kept:
            below = middle
        else:
            above = middle
    found = counts(above)
    missing = kept - int(found.sum())
    for i, tied in enumerate(counts(below) - found):
        taken = min(missing, int(tied))
        found[i] += taken
        missing -= taken
    return [int(count) for count in found]


@dataclass(frozen=True)
class Global(Allocation):
    """One ranking of the scores of all layers: scope ``"global"`` of an unstructured pattern."""

    name: ClassVar[str] = "global"
    reads_weights: ClassVar[bool] = True

    def check(self, pattern: Pattern) -> Pattern:
        """See :meth:`Allocation.check`."""
        if not isinstance(pattern, Unstructured) or pattern.scope not in ("row", "global"):
            raise ValueError(f"allocation global ranks single weights over all layers, which {pattern} does not allow")
        return replace(pattern, scope="global")

    def patterns(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        pattern: Pattern,
        inputs: Mapping[str, InputStatistics] | None = None,
    ) -> Patterns:
        """See :meth:`Allocation.patterns`."""
        return {target.name: pattern for target in targets}


def _proportional(allocation: Allocation, budget: Budget, weights: Sequence[float], least: Sequence[int]) -> Shares:
    """Shares proportional to ``weights``, at least ``least`` and at most all."""
    if sum(least) > budget.kept:
        raise ValueError(
            f"allocation {allocation} must keep {sum(least)} weights, and the sparsity leaves {budget.kept}: lower it"
        )
    return Shares(spread(weights, least, budget.sizes, budget.kept), least)
