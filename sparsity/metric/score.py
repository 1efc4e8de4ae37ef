"""What the selection kernels rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trisparse.kernels.metric import CompiledMetric


@dataclass(frozen=True)
class Score:
    """score = (|weight| if absolute else weight) · x, or metric(weight, g, x): the arguments of the selection kernels.

    Attributes:
        weight: [rows, cols].
        x: [cols] or None.
        absolute: whether absolute values are ranked.
        metric: computed inside the kernel, instead of the product.
        g: [rows, cols], for a metric that reads G.
    """

    weight: Tensor
    x: Tensor | None = None
    absolute: bool = True
    metric: CompiledMetric | None = None
    g: Tensor | None = None

    def materialise(self) -> Tensor:
        """The score matrix itself, fp32 [rows, cols]."""
        if self.metric is not None:
            return self.metric.evaluate(self.weight, self.g, self.x)
        score = self.weight.float()
        score = score.abs() if self.absolute else score
        return score if self.x is None else score * self.x

    def columns(self, first: int, end: int) -> Score:
        """The score of the columns ``first`` to ``end``, of a product; a metric may read the whole matrix.

        Raises:
            ValueError: it is a metric.
        """
        if self.metric is not None:
            raise ValueError("a metric reads whole matrices: its score has no columns of its own")
        return Score(self.weight[:, first:end], None if self.x is None else self.x[first:end], self.absolute)
