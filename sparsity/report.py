"""What was pruned, by how much, and what was left out and why."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from trisparse.sparsity.mask import masks
from trisparse.sparsity.targets import Skipped

DENSE_BY_ALLOCATION = "dense by allocation"


@dataclass(frozen=True)
class TargetReport:
    """One pruned weight; ``seconds`` is the time of scoring and selecting it, ``note`` is empty or a warning.

    ``damping`` is that of an OBS update, as a share of the mean of the Hessian's diagonal; None without an update.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    kept: int
    total: int
    seconds: float = 0.0
    note: str = ""
    damping: float | None = None

    @property
    def sparsity(self) -> float:
        """Pruned share, in [0, 1)."""
        return 1 - self.kept / self.total


@dataclass(frozen=True)
class SkippedReport:
    """One parameter that was not pruned, the reason, and its share of all parameters of the model."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    share: float
    reason: str


@dataclass(frozen=True)
class SparsityReport:
    """Result of ``sparsify``.

    Attributes:
        pattern, method, propagate: as they were applied ("auto" resolved); "mixed" where layers got different ones
            one by one.
        update: how kept weights were updated, "sequential" or "iterative"; None if they were not.
        seconds: wall time of the whole call.
        samples, tokens: calibration sequences and tokens; 0 without data.
        parameters: parameters of the model, tied ones counted once.
        targets: every pruned weight.
        skipped: every other parameter; biases and norms are one row.
        allocation: how the sparsity was spread over the layers, or None.
    """

    pattern: str
    method: str
    propagate: str | None
    seconds: float
    samples: int
    tokens: int
    parameters: int
    targets: list[TargetReport] = field(default_factory=list)
    skipped: list[SkippedReport] = field(default_factory=list)
    allocation: str | None = None
    update: str | None = None

    @property
    def kept(self) -> int:
        """Weights that stay, over all targets."""
        return sum(target.kept for target in self.targets)

    @property
    def total(self) -> int:
        """Weights of all targets."""
        return sum(target.total for target in self.targets)

    @property
    def sparsity(self) -> float:
        """Pruned share of the targets."""
        return 1 - self.kept / self.total

    @property
    def left_dense(self) -> int:
        """Weights of layers that the allocation leaves dense; they are part of its budget."""
        return sum(row.parameters for row in self.skipped if row.reason == DENSE_BY_ALLOCATION)

    @property
    def allocated_sparsity(self) -> float:
        """Pruned share of the targets and of the layers that the allocation leaves dense: what a budget is of."""
        return (self.total - self.kept) / (self.total + self.left_dense)

    @property
    def model_sparsity(self) -> float:
        """Pruned share of all parameters of the model."""
        return (self.total - self.kept) / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """All fields and totals as plain Python objects."""
        content = asdict(self)
        for row, target in zip(content["targets"], self.targets, strict=True):
            row["sparsity"] = target.sparsity
        totals = ("kept", "total", "left_dense", "sparsity", "allocated_sparsity", "model_sparsity")
        return {**content, **{name: getattr(self, name) for name in totals}}

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """Tables in which parameters with the same role in different blocks share a row."""
        title = f"{self.method} {self.pattern}" + (f", allocation {self.allocation}" if self.allocation else "")
        table = _target_table(title, self.targets)
        left_out = Table(title="not pruned", title_justify="left")
        for heading in ("parameter", "shape", "why"):
            left_out.add_column(heading)
        left_out.add_column("of the model", justify="right")
        similar: dict[tuple[str, str], list[SkippedReport]] = {}
        for skipped in self.skipped:
            similar.setdefault((re.sub(r"\d+", "*", skipped.name), skipped.reason), []).append(skipped)
        for (role, reason), rows in similar.items():
            name = rows[0].name if len(rows) == 1 else f"{role} ({len(rows)})"
            left_out.add_row(name, "×".join(map(str, rows[0].shape)), reason, f"{sum(r.share for r in rows):.2%}")
        notes = [f"{target.name}: {target.note}" for target in self.targets if target.note]
        if self.left_dense:
            notes.append(
                f"{self.allocated_sparsity:.2%} of {self.total + self.left_dense:,} weights with the layers that the "
                "allocation leaves dense"
            )
        data = f", {self.samples} sequences ({self.tokens:,} tokens) of calibration" if self.samples else ""
        if self.update is not None:
            least = min((target.damping for target in self.targets if target.damping is not None), default=0.0)
            notes.append(
                f"kept weights updated ({self.update} OBS), Hessians damped by {least:g} of their mean diagonal"
            )
        notes.append(
            f"{self.sparsity:.2%} of {self.total:,} weights pruned, {self.model_sparsity:.2%} of all "
            f"{self.parameters:,} parameters, in {self.seconds:.1f} s{data}"
        )
        return as_text(table, left_out, *notes)


def skipped_rows(skipped: Sequence[Skipped], parameters: int) -> list[SkippedReport]:
    """Rows of a report for what is not pruned, in a model of so many ``parameters``."""
    rows = []
    for item in skipped:
        count = torch.Size(item.shape).numel()
        tied = item.reason.startswith("tied to ")  # counted with the parameter that it shares
        rows.append(SkippedReport(item.name, item.shape, count, 0 if tied else count / parameters, item.reason))
    return rows


def describe_masks(model: nn.Module) -> str:
    """Table of the masks attached to ``model``."""
    rows = [TargetReport(n, tuple(m.shape), str(m.pattern), m.kept, m.shape.numel()) for n, m in masks(model).items()]
    kept, total = sum(row.kept for row in rows), sum(row.total for row in rows)
    table = _target_table("masks", rows)
    return as_text(table, f"{1 - kept / total:.2%} of {total:,} weights pruned" if rows else "no masks")


def _target_table(title: str, targets: Sequence[TargetReport]) -> Table:
    timed = any(target.seconds for target in targets)
    table = Table(title=title, title_justify="left")
    for heading in ("weight", "shape", "pattern"):
        table.add_column(heading)
    for heading in ("kept", "sparsity", *(["seconds"] if timed else [])):
        table.add_column(heading, justify="right")
    groups: dict[tuple[str, tuple[int, ...], str], list[TargetReport]] = {}
    for target in targets:
        groups.setdefault((re.sub(r"\d+", "*", target.name), target.shape, target.pattern), []).append(target)
    for (role, shape, pattern), members in groups.items():
        name = members[0].name if len(members) == 1 else f"{role} ({len(members)})"
        kept, total = sum(m.kept for m in members), sum(m.total for m in members)
        cells = [name, "×".join(map(str, shape)), pattern, f"{kept:,}", f"{1 - kept / total:.2%}"]
        table.add_row(*cells, *([f"{sum(m.seconds for m in members):.2f}"] if timed else []))
    return table


def as_text(*parts: Table | str, width: int = 120) -> str:
    """What rich prints, without colours, at a width that does not depend on the terminal."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False)
    for part in parts:
        console.print(part, markup=False, soft_wrap=isinstance(part, str))
    return out.getvalue().rstrip()
