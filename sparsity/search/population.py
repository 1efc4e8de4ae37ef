"""The state of a search: the pool of the best, which records change, and what was proposed before."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from trisparse.sparsity.metric.expression import Node
from trisparse.sparsity.metric.parser import parse
from trisparse.sparsity.search.log import Record
from trisparse.sparsity.search.race import Reference
from trisparse.sparsity.search.settings import SearchSettings


@dataclass(frozen=True)
class Individual:
    """A metric that was measured on the whole text.

    Attributes:
        number: of its evaluation, from 0.
        root: its tree.
        expression: the tree as text.
        perplexity: its fitness; less is better.
        segments: negative log-likelihood of each segment.
    """

    number: int
    root: Node
    expression: str
    perplexity: float
    segments: tuple[float, ...]


@dataclass
class Population:
    """Everything that the next proposal depends on, next to the settings.

    Attributes:
        pool: the best individuals, best first; of equal ones the earlier is first.
        forms, fingerprints: of all metrics proposed so far.
        references: outcomes of known metrics by fingerprint, with their names.
        evaluations, tokens, full_tokens: counted over all evaluations; ``full_tokens`` is what they would have taken
            without racing.
        counts: how evaluations ended ("full", "total", "paired", "dropped", "exhausted"), how many of the full ones
            were "twin" of another, and why trees were skipped ("skipped form", ...).
    """

    settings: SearchSettings
    pool: list[Individual] = field(default_factory=list)
    forms: set[str] = field(default_factory=set)
    fingerprints: set[str] = field(default_factory=set)
    references: dict[str, Record] = field(default_factory=dict)
    evaluations: int = 0
    tokens: int = 0
    full_tokens: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def parents(self) -> list[Individual]:
        """The best ``top``, from which parents are drawn."""
        return self.pool[: self.settings.top]

    @property
    def bar(self) -> Reference | None:
        """What a candidate must beat to become a parent, once there are ``top`` of them."""
        if not self.settings.race or len(self.pool) < self.settings.top:
            return None
        return Reference(self.pool[self.settings.top - 1].segments)

    def apply(self, records: Iterable[Record]) -> None:
        """Take in the records of one round, as they come from the log or are about to be in it.

        A metric with the very likelihoods of one in the pool chose the same masks on this model, if not on the
        fingerprint's sample (tanh(G) and G, where G is small). It is not taken in: its kind would fill the pool.
        """
        for record in records:
            self.seconds += record["seconds"]
            if record["kind"] == "reference":
                self.references[record["fingerprint"]] = record
                continue
            for reason, count in record["skipped"].items():
                self.counts[f"skipped {reason}"] += count
            if record["kind"] == "exhausted":
                self.counts["exhausted"] += 1
                continue
            self.tokens += record["tokens"]
            self.full_tokens += record["full_tokens"]
            self.counts["dropped" if record["dropped"] else record["stopped"] or "full"] += 1
            if record["perplexity"] is not None and tuple(record["segments"]) in {one.segments for one in self.pool}:
                self.counts["twin"] += 1
            elif record["perplexity"] is not None:
                self.pool.append(
                    Individual(
                        number=self.evaluations,
                        root=parse(record["simplified"]),
                        expression=record["simplified"],
                        perplexity=record["perplexity"],
                        segments=tuple(record["segments"]),
                    )
                )
            self.evaluations += 1
        self.pool.sort(key=lambda individual: (math.fsum(individual.segments), individual.number))
        del self.pool[max(self.settings.population, self.settings.top) :]
