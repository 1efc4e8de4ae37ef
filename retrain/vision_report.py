"""What retraining an image classifier did, as a dict, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from trisparse.sparsity.report import as_text


@dataclass(frozen=True)
class VisionReport:
    """Outcome of :func:`trisparse.retrain.vision.retrain_vision`.

    Attributes:
        steps, epochs: optimizer steps, and passes over the data; 0 where nothing trains.
        seconds: wall time of the training loop alone.
        trainable: trained parameters per group; one that is in two groups counts in the first.
        total_parameters: parameters of the model, a shared one counted once.
        losses: training loss of each step, before that step's update.
        recalibrated: batch norms whose statistics were measured anew.
        missing: groups of the preset that the model has nothing of.
        not_covered: pruned parameters that no LoRA reaches, where "lora" trains, with the reason.
        accuracy: top-1 on the validation data before and after, if any was given.
    """

    steps: int
    epochs: int
    seconds: float
    trainable: dict[str, int]
    total_parameters: int
    losses: list[float] = field(repr=False)
    recalibrated: int
    missing: list[str]
    accuracy: tuple[float, float] | None = None
    not_covered: list[str] = field(default_factory=list)

    @property
    def trainable_share(self) -> float:
        """Trained parameters over all parameters of the model (as the paper counts it)."""
        return sum(self.trainable.values()) / self.total_parameters

    def to_dict(self) -> dict[str, Any]:
        """Every attribute and property, as plain Python values."""
        values = {**dataclasses.asdict(self), "trainable_share": self.trainable_share}
        if self.accuracy is not None:
            values["accuracy"] = list(self.accuracy)
        return values

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        table = Table("retraining", "", show_lines=False)
        if self.steps:
            table.add_row("steps", f"{self.steps:,} ({self.epochs} epochs in {self.seconds:.1f} s)")
            table.add_row("loss", f"{self.losses[0]:.4f} -> {self.losses[-1]:.4f}")
        groups = ", ".join(f"{group} {count:,}" for group, count in self.trainable.items()) or "nothing"
        table.add_row("trained", f"{self.trainable_share:.3%} of {self.total_parameters:,} ({groups})")
        table.add_row("recalibrated", f"{self.recalibrated} batch norms")
        if self.missing:
            table.add_row("not in the model", ", ".join(self.missing))
        for line in self.not_covered:
            table.add_row("not covered", line)
        if self.accuracy is not None:
            table.add_row("accuracy", "{:.2%} -> {:.2%}".format(*self.accuracy))
        return as_text(table)
