"""The batch of a training step, by the size of the model (PERP, Appendix A)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from trisparse.retrain.perp import PERPConfig


class BatchSettings(NamedTuple):
    """``size`` windows a forward on each device, ``accumulation`` forwards a step."""

    size: int
    accumulation: int

    @property
    def windows(self) -> int:
        """Windows that one process reads in a step."""
        return self.size * self.accumulation


def paper_batch(parameters: int) -> BatchSettings:
    """The paper's: "a batch size of 2 and gradient accumulation for 4 steps for all models with less than 30 billion
    parameters. For larger models, we use a batch size of 1 and 2 gradient accumulation steps".

    The size is rounded to whole billions, as models are named: OPT-30B, the smallest of the paper's large ones, has
    29.97 billion parameters.

    Raises:
        ValueError: fewer than one parameter.
    """
    if parameters < 1:
        raise ValueError(f"parameters must be at least 1, got {parameters}")
    return BatchSettings(2, 4) if round(parameters / 1e9) < 30 else BatchSettings(1, 2)


def batch_settings(config: PERPConfig, parameters: int) -> BatchSettings:
    """``config``'s batch; what it leaves out is :func:`paper_batch`'s for a model of so many ``parameters``."""
    paper = paper_batch(parameters)
    return BatchSettings(
        paper.size if config.batch_size is None else config.batch_size,
        paper.accumulation if config.gradient_accumulation is None else config.gradient_accumulation,
    )
