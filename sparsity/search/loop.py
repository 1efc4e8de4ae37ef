"""The rounds of a search: propose, evaluate or read from the log, and take in the records."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trisparse.sparsity.metric import METRICS, Metric
from trisparse.sparsity.metric.expression import Node
from trisparse.sparsity.metric.fingerprint import fingerprint
from trisparse.sparsity.metric.text import infix
from trisparse.sparsity.search.evaluator import Outcome, perplexity_of
from trisparse.sparsity.search.log import LogError, Record, SearchLog
from trisparse.sparsity.search.population import Population
from trisparse.sparsity.search.propose import Proposal, propose, simplified
from trisparse.sparsity.search.race import Reference, extrapolated
from trisparse.sparsity.search.settings import SearchSettings
from trisparse.sparsity.search.trees import operation_counts
from trisparse.sparsity.search.workers import Workers

REFERENCES = ("magnitude", "wanda", "pruner-zero")


class Loop:
    """Rounds of the search: from the log as long as it has records, then by evaluation."""

    def __init__(
        self, settings: SearchSettings, given: list[Node], log: SearchLog, workers: Workers, text: Tensor
    ) -> None:
        self.population = Population(settings)
        self.recorded = log.records[::-1]  # from the end, the next one
        self.left = settings.evaluations - sum(record["kind"] != "reference" for record in log.records)
        self.new_best = False
        self._given = given
        self._log = log
        self._workers = workers
        self._text = text

    def refer(self) -> None:
        """Evaluate known metrics on the whole text; they are no part of the population."""
        inputs = set(self.population.settings.inputs)
        for name in REFERENCES:
            root = simplified(find_root(name), self.population.settings)
            if root.inputs <= inputs:
                record = {
                    "kind": "reference",
                    "name": name,
                    "expression": infix(root),
                    "fingerprint": fingerprint(root),
                }
                if not self._replay([record], ("kind", "name", "expression")):
                    (outcome,) = self._workers.evaluate([root], None)
                    record |= self._measured(outcome, None) | {"seconds": round(outcome.seconds, 3)}
                    self._log.append(record)
                self.population.apply([record])

    def round(self, places: Sequence[tuple[int, int]]) -> int:
        """Propose and evaluate one round; returns how many of its places were not in the log."""
        best = self.population.pool[:1]
        bar = self.population.bar
        proposals = [propose(self.population, self._given, *place) for place in places]
        records = [_described(proposal) for proposal in proposals]
        done = sum(self._replay([record], ("kind", "iteration", "slot", "simplified")) for record in records)
        waiting = list(zip(records[done:], proposals[done:], strict=True))
        known = {id(r): self.population.references.get(r.get("fingerprint", "")) for r, _ in waiting}
        roots = [p.root for r, p in waiting if p.root is not None and known[id(r)] is None]
        outcomes = self._workers.evaluate(roots, bar)
        for record, proposal in waiting:
            reference = known[id(record)]
            if reference is not None:  # measured in full already: a search may find a known metric
                outcome = Outcome(segments=tuple(reference["segments"]), dropped=reference["dropped"])
                record["same_as"] = reference["name"]
            else:
                outcome = Outcome() if proposal.root is None else next(outcomes)
            if proposal.root is not None:
                record |= self._measured(outcome, bar)
            self._log.append(record | {"seconds": round(outcome.seconds, 3)})
            record["seconds"] = round(outcome.seconds, 3)
        self.population.apply(records)
        self.new_best = self.population.pool[:1] != best
        return len(waiting)

    @property
    def note(self) -> str:
        """For the progress bar: the best so far, and what racing saved."""
        population = self.population
        best = population.pool[0] if population.pool else None
        shown = "nothing yet" if best is None else f"{best.perplexity:.2f} {_shortened(best.expression)}"
        saving = population.full_tokens / population.tokens if population.tokens else 1.0
        return f"best {shown} | {population.evaluations} metrics, {saving:.1f}x fewer tokens"

    def _replay(self, records: list[Record], keys: Sequence[str]) -> bool:
        """Fill ``records[0]`` from the log's next record if there is one.

        Raises:
            LogError: the log has another record there: other code wrote it, or it was edited.
        """
        if not self.recorded:
            return False
        found, wanted = self.recorded.pop(), records[0]
        for key in keys:
            if found.get(key) != wanted.get(key):
                raise LogError(
                    f"{self._log.path} cannot be continued: after {self.population.evaluations} evaluations it has "
                    f"{key} {found.get(key)!r} where the search now has {wanted.get(key)!r}; another version wrote it?"
                )
        wanted.update(found)
        return True

    def _measured(self, outcome: Outcome, bar: Reference | None) -> Record:
        """What an outcome adds to a record."""
        seq_len = self._text.shape[1]
        value = perplexity_of(outcome.segments, self._text) if outcome.segments else None
        full = outcome.dropped is None and outcome.stopped is None
        record: Record = {"segments": list(outcome.segments), "perplexity": value if full else None}
        record |= {"stopped": outcome.stopped, "dropped": outcome.dropped, "tokens": outcome.tokens}
        # A dropped metric would have taken no more without racing.
        record["full_tokens"] = outcome.tokens if outcome.dropped else len(self._text) * seq_len * bool(outcome.tokens)
        if outcome.stopped is not None and bar is not None:
            record["lower_bound"] = value
            record["extrapolated"] = perplexity_of([extrapolated(outcome.segments, bar)], self._text)
        record["pruning_seconds"] = round(outcome.pruning_seconds, 3)
        return record


def find_root(metric: str) -> Node:
    """The tree of a metric given by its name in the library or as an expression.

    Raises:
        ValueError: the metric has no tree (random), or the expression is wrong.
    """
    root = (METRICS[metric] if metric in METRICS else Metric.parse(metric)).root
    if root is None:
        raise ValueError(f"start_from cannot take {metric!r}: it is no expression")
    return root


def _described(proposal: Proposal) -> Record:
    """The part of a record that is known before the evaluation."""
    record: Record = {"kind": "exhausted", "iteration": proposal.iteration, "slot": proposal.slot}
    if proposal.tree is not None and proposal.root is not None:
        record |= {
            "kind": "evaluation",
            "origin": proposal.origin,
            "parents": list(proposal.parents),
            "expression": infix(proposal.tree),
            "simplified": proposal.form,
            "fingerprint": proposal.fingerprint,
            "depth": proposal.root.depth,
            "size": sum(1 for _ in proposal.root.walk()),
            "operations": operation_counts(proposal.root),
        }
    return record | {"skipped": proposal.skipped}


def _shortened(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
