"""What a search found, as an object, as JSON and as text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trisparse.sparsity.search.population import Individual, Population


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the best metrics, best first, at most ``settings.top``.
        references: perplexity of known metrics on the same windows, by name.
        evaluations: how many metrics were evaluated.
        tokens: spent on them.
        full_tokens: what they would have taken without racing.
        counts: how evaluations ended and why trees were skipped (see ``Population``).
        finished: False if the time limit came first; the same call goes on.
        seconds: of the evaluations, over all runs.
        log: the log file.
    """

    best: list[Individual]
    references: dict[str, float]
    evaluations: int
    tokens: int
    full_tokens: int
    counts: dict[str, int]
    finished: bool
    seconds: float
    log: Path

    @property
    def saving(self) -> float:
        """How many times fewer tokens racing spent."""
        return self.full_tokens / self.tokens if self.tokens else math.nan

    @classmethod
    def of(cls, population: Population, *, finished: bool, log: Path) -> SearchResult:
        """The result that ``population`` stands for."""
        return cls(
            best=population.parents,
            references={record["name"]: record["perplexity"] for record in population.references.values()},
            evaluations=population.evaluations,
            tokens=population.tokens,
            full_tokens=population.full_tokens,
            counts=dict(sorted(population.counts.items())),
            finished=finished,
            seconds=round(population.seconds, 3),
            log=log,
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the log's summary."""
        return {
            "evaluations": self.evaluations,
            "best": [{"expression": found.expression, "perplexity": found.perplexity} for found in self.best],
            "references": self.references,
            "tokens": self.tokens,
            "full_tokens": self.full_tokens,
            "saving": round(self.saving, 2) if self.tokens else None,
            "counts": self.counts,
            "finished": self.finished,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        rows = [(found.perplexity, found.expression) for found in self.best]
        rows += [(value, f"({name})") for name, value in self.references.items() if value is not None]
        lines = ["perplexity  metric", *(f"{value:10.3f}  {text}" for value, text in sorted(rows))]
        lines.append(f"{self.evaluations} metrics in {self.seconds:.0f} s, {self.tokens:,} tokens")
        if self.tokens:
            lines[-1] += f", {self.saving:.1f} times fewer than without racing"
        if not self.finished:
            lines.append("stopped by the time limit: the same command goes on")
        return "\n".join(lines)
