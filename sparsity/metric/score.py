"""What the selection kernels rank."""

from __future__ import annotations

from dataclasses import dataclass

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
