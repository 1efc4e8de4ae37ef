"""OWL: blocks with more outliers among their scores keep more weights.

A = |W| · X over all weights of a block, as Wanda scores them (X of the dense model)

D_b = share of A that exceeds M times the mean of A                        the block's outlier ratio
S_b = S + λ − 2λ (D_b − min D) / (max D − min D) + c, held within [S − λ, S + λ]

with the one c that keeps the model's sparsity at S. Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL)",
https://arxiv.org/abs/2310.05175, section 3: D_b is their layerwise outlier distribution, whose layer is a transformer
block; S_b falls with D_b, in [S − λ, S + λ], and the mean is S. Their code shifts the mean without holding the bounds;
both agree where it does not leave them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from trisparse.sparsity.allocation.base import Budget, BudgetAllocation, Shares
from trisparse.sparsity.allocation.rounding import spread
from trisparse.sparsity.statistics import InputStatistics
from trisparse.sparsity.targets import Target

_ROWS = 256  # scored at once: the fp32 copy stays in the cache


@dataclass(frozen=True)
class OWL(BudgetAllocation):
    """Outlier-weighed sparsity of each block; a target outside the blocks counts as a block. See the module.

    Needs data: one pass over the dense model, which ``sparsify(propagate="dense")`` shares with a metric that reads X,
    and two readings of the weights.

    Attributes:
        M: how many times the mean an outlier exceeds; the paper takes 5 or 7.
        lambda_: how far a block's sparsity may be from the model's.

    Raises:
        ValueError: ``M`` is not above 0, or ``lambda_`` not in (0, 1).
    """

    name: ClassVar[str] = "owl"
    reads_inputs: ClassVar[bool] = True
    M: float = 5
    lambda_: float = 0.08

    def __post_init__(self) -> None:
        for name, most in (("M", math.inf), ("lambda_", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
                raise ValueError(f"{name} must be a number in (0, {most}), got {value!r}")

    def shares(self, budget: Budget) -> Shares:
        """See :meth:`BudgetAllocation.shares`."""
        assert budget.inputs is not None
        unreached = [t.name for t in budget.targets if not bool(budget.inputs[t.name].reached(t).any())]
        if unreached:
            more = f" and {len(unreached) - 3} more" if len(unreached) > 3 else ""
            raise ValueError(
                f"allocation owl: no calibration input reached {', '.join(unreached[:3])}{more}: exclude it"
            )
        blocks: dict[int | str, list[int]] = {}
        for i, target in enumerate(budget.targets):
            blocks.setdefault(target.name if target.block is None else target.block, []).append(i)
        ratio = np.empty(len(budget.targets))
        for members in blocks.values():
            ratio[members] = outlier_ratio([budget.targets[i] for i in members], budget.inputs, self.M)
        sizes = np.asarray(budget.sizes, dtype=np.float64)
        density, width = budget.density, ratio.max() - ratio.min()
        place = (ratio - ratio.min()) / width if width else np.full_like(ratio, 0.5)
        least, most = sizes * max(0.0, density - self.lambda_), sizes * min(1.0, density + self.lambda_)
        wanted = sizes * (density - self.lambda_ + 2 * self.lambda_ * place)
        return Shares(spread(sizes, least, most, budget.kept, base=wanted), [1] * len(sizes))


def outlier_ratio(targets: Sequence[Target], inputs: Mapping[str, InputStatistics], multiple: float) -> float:
    """Share of the scores |W| · X of all ``targets`` that exceed ``multiple`` times their mean.

    Experts that no token reached are left out, where X is unknown.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    for target in targets:
        x = inputs[target.name].rms(target)
        assert x is not None
        reached = inputs[target.name].reached(target).tolist()
        matrices = target.matrix().chunk(target.parts)
        parts.extend((w, row.float()) for w, row, seen in zip(matrices, x, reached, strict=True) if seen)
    chunks = [(rows, x) for w, x in parts for rows in w.split(_ROWS)]
    size: int = sum(rows.numel() for rows, _ in chunks)
    # Sums of a row are exact enough in fp32; there may be 10^8 of them in a block.
    mean = sum(_scores(*chunk).sum(1).sum(dtype=torch.float64).item() for chunk in chunks) / size
    exceeding: int = sum(int((_scores(*chunk) > multiple * mean).sum()) for chunk in chunks)
    return exceeding / size


def _scores(rows: Tensor, x: Tensor) -> Tensor:
    return rows.float().abs() * x
