"""Pruning metrics by name: which tensor is ranked, greater = kept.

A metric never forms its score matrix where a kernel can do it on the fly; it hands the selection kernels the
tensor to rank, an optional scale of the columns and whether absolute values are ranked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """score = (|weight| if absolute else weight) · x, the arguments of the selection kernels.

    Attributes:
        weight: [rows, cols].
        x: [cols] or None.
        absolute: whether absolute values are ranked.
    """

    weight: Tensor
    x: Tensor | None = None
    absolute: bool = True

    def materialise(self) -> Tensor:
        """The score matrix itself, fp32 [rows, cols]."""
        score = self.weight.float()
        score = score.abs() if self.absolute else score
        return score if self.x is None else score * self.x


@dataclass(frozen=True)
class Metric:
    """A pruning metric.

    Attributes:
        name: what ``sparsify(method=...)`` takes.
        needs_data: whether the metric ranks by the inputs X that calibration measures.
        source: where the metric comes from.
        score: (W [rows, cols], X [cols] or None, generator) -> what to rank.
    """

    name: str
    needs_data: bool
    source: str
    score: Callable[[Tensor, Tensor | None, torch.Generator], Score]


def _magnitude(weight: Tensor, x: Tensor | None, generator: torch.Generator) -> Score:
    return Score(weight)


def _wanda(weight: Tensor, x: Tensor | None, generator: torch.Generator) -> Score:
    return Score(weight, x)


def _random(weight: Tensor, x: Tensor | None, generator: torch.Generator) -> Score:
    return Score(torch.rand(weight.shape, generator=generator).to(weight.device), absolute=False)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("magnitude", False, "|W|; Han et al., 2015", _magnitude),
        Metric("wanda", True, "|W| · X, X the rms of each input; Sun et al., 2023, Eq. 1", _wanda),
        Metric("random", False, "uniform random numbers; a lower bound", _random),
    )
}


def find_metric(method: str, *, has_data: bool) -> Metric:
    """The metric called ``method``; ``"auto"`` is Wanda with data and magnitude without.

    Raises:
        ValueError: an unknown name, or a metric that needs data where there is none.
    """
    if method == "auto":
        method = "wanda" if has_data else "magnitude"
    if method not in METRICS:
        raise ValueError(f"method must be one of {', '.join(['auto', *METRICS])}, got {method!r}")
    metric = METRICS[method]
    if metric.needs_data and not has_data:
        raise ValueError(f"method {method!r} ranks by the layers' inputs: pass data (and a tokenizer for text)")
    return metric
