"""What a model scored on each task, with all that the numbers depend on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from trisparse.sparsity.report import as_text


@dataclass(frozen=True)
class TaskResult:
    """One task.

    Attributes:
        version: of the task, as its author counts them.
        questions: that were asked.
        num_fewshot: examples before each.
        metrics: name to value; accuracies are in [0, 1].
        standard_errors: of those metrics that are means.
    """

    name: str
    version: Any
    questions: int
    num_fewshot: int
    metrics: dict[str, float]
    standard_errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ZeroShotReport:
    """Result of ``zero_shot``.

    Attributes:
        tasks: in the order that lm-eval ran them.
        limit: questions of each task at most, or None for all of them.
        seed: that chose the examples.
        truncated: answers before which the question was too long for the model and lost its beginning.
        model: the class of the model.
        sparsity: pruned share of the weights that have masks, 0 where none has.
        masks_sha256: the hash of the masks, None without.
        versions: of the packages that the numbers depend on.
        seconds: of loading the tasks and answering.
    """

    tasks: list[TaskResult]
    limit: int | None
    seed: int
    truncated: int
    model: str
    sparsity: float
    masks_sha256: str | None
    versions: dict[str, str | None]
    seconds: float

    @property
    def mean(self) -> float | None:
        """Mean of ``acc`` over the tasks, as the papers report it; None if a task has none."""
        values = [task.metrics.get("acc") for task in self.tasks]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    def to_dict(self) -> dict[str, Any]:
        """All fields and the mean as plain Python objects."""
        return {**asdict(self), "mean": self.mean}

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """A table of the tasks, with ± one standard error, and their mean."""
        table = Table(title="accuracy" if self.limit is None else f"accuracy on {self.limit} questions of each task",
                      title_justify="left")  # fmt: skip
        table.add_column("task")
        names = list(dict.fromkeys(metric for task in self.tasks for metric in task.metrics))
        for heading in (*names, "questions", "few-shot", "version"):
            table.add_column(heading, justify="right")
        for task in self.tasks:
            cells = [_cell(task, name) for name in names]
            table.add_row(task.name, *cells, str(task.questions), str(task.num_fewshot), str(task.version))
        if self.mean is not None and len(self.tasks) > 1:
            table.add_section()
            table.add_row("mean", *(f"{self.mean:.2%}" if name == "acc" else "" for name in names))
        lines = [f"{self.truncated} answers to questions that were cut to the model's length"] if self.truncated else []
        return as_text(table, *lines, f"lm-eval {self.versions['lm_eval']}, sparsity {self.sparsity:.2%}")


def _cell(task: TaskResult, name: str) -> str:
    if name not in task.metrics:
        return ""
    value, error = task.metrics[name], task.standard_errors.get(name)
    if not name.startswith("acc"):
        return f"{value:.4g}"
    return f"{value:.2%}" if error is None else f"{value:.2%} ± {error:.2%}"
