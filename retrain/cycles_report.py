"""What iterative pruning did, cycle by cycle, as a dict, as JSON and as a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from trisparse.sparsity.report import as_text


@dataclass(frozen=True)
class CycleReport:
    """One prune-retrain cycle.

    Attributes:
        pattern: that the cycle pruned to.
        method: that it pruned by ("auto" resolved).
        sparsity: pruned share of the targets after it.
        first_loss, last_loss: training loss of the first and of the last step (nats per token).
        perplexity_pruned, perplexity: on the validation data before and after retraining; None without any.
        pruning_seconds, retraining_seconds: wall time of each.
        trainable_share: parameters that trained over the parameters of the model, on average over the steps.
        learning_rate: the peak; the one chosen, of a grid.
        missing: groups asked for that the model has nothing of.
        not_covered: pruned parameters that no LoRA reaches, with the reason.
        skipped_steps: steps whose fp16 gradients overflowed, which changed nothing.
        collapsed: layers that are wholly pruned, where that is allowed.
    """

    pattern: str
    method: str
    sparsity: float
    first_loss: float
    last_loss: float
    perplexity_pruned: float | None
    perplexity: float | None
    pruning_seconds: float
    retraining_seconds: float
    trainable_share: float
    learning_rate: float | None = None
    missing: list[str] = field(default_factory=list)
    not_covered: list[str] = field(default_factory=list)
    skipped_steps: int = 0
    collapsed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CyclesReport:
    """Outcome of :func:`trisparse.retrain.cycles.prune_cycles`.

    Attributes:
        target, schedule, method: as they were asked for ("auto" resolved).
        start_sparsity: pruned share of the targets before.
        perplexity_before: on the validation data, before anything; None without any.
        seconds: wall time of the whole call.
        cycles: one row a cycle.
    """

    target: str
    schedule: str
    method: str
    start_sparsity: float
    perplexity_before: float | None
    seconds: float
    cycles: list[CycleReport]

    @property
    def sparsity(self) -> float:
        """Pruned share of the targets at the end."""
        return self.cycles[-1].sparsity

    @property
    def perplexity(self) -> float | None:
        """Perplexity at the end; None without validation data."""
        return self.cycles[-1].perplexity

    def to_dict(self) -> dict[str, Any]:
        """Every attribute and property, as plain Python values."""
        return {**asdict(self), "sparsity": self.sparsity, "perplexity": self.perplexity}

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        table = Table("cycle", show_edge=False)
        for heading in ("pattern", "sparsity", "train loss", "perplexity pruned", "retrained", "trained", "s"):
            table.add_column(heading, justify="right")
        for number, cycle in enumerate(self.cycles, start=1):
            table.add_row(
                str(number),
                cycle.pattern,
                f"{cycle.sparsity:.2%}",
                f"{cycle.first_loss:.3f} -> {cycle.last_loss:.3f}",
                "-" if cycle.perplexity_pruned is None else f"{cycle.perplexity_pruned:.2f}",
                "-" if cycle.perplexity is None else f"{cycle.perplexity:.2f}",
                f"{cycle.trainable_share:.2%}",
                f"{cycle.pruning_seconds + cycle.retraining_seconds:.1f}",
            )
        before = "" if self.perplexity_before is None else f", perplexity before {self.perplexity_before:.2f}"
        total = f"{self.method} {self.target}, {self.schedule} schedule, {self.seconds:.1f} s{before}"
        last, lines = self.cycles[-1], [total]
        rates = [cycle.learning_rate for cycle in self.cycles]
        if len(set(rates)) > 1:
            lines.append(f"learning rates: {', '.join(f'{rate:g}' for rate in rates)}")
        if last.collapsed:
            lines.append(f"wholly pruned: {', '.join(last.collapsed)}")
        if last.missing:
            lines.append(f"missing: the model has no {', no '.join(last.missing)}")
        if skipped := sum(cycle.skipped_steps for cycle in self.cycles):
            lines.append(f"skipped: {skipped} steps, whose fp16 gradients overflowed")
        return as_text(table, *lines, *(f"not covered: {line}" for line in last.not_covered))
