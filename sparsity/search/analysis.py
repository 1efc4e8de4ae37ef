"""What a search's log tells: convergence, the best metrics, operations against perplexity, opposing operations.

These are the numbers behind Figures 2 and 4 and Tables 11 and 12 of Pruner-Zero (Dong et al. 2024,
https://arxiv.org/abs/2406.02924). Nothing is measured again.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trisparse.sparsity.metric.expression import Node
from trisparse.sparsity.metric.parser import parse
from trisparse.sparsity.search.log import LogError, Record
from trisparse.sparsity.search.settings import SearchSettings
from trisparse.sparsity.search.trees import random_tree

_KINDS = ("header", "evaluation", "reference", "summary", "exhausted")


@dataclass(frozen=True)
class SearchHistory:
    """A log that was read for a report.

    Attributes:
        header: the first line.
        evaluations: the evaluations in order.
        references: known metrics, measured on the same windows.
        finished: whether the search came to its end.
    """

    header: Record
    evaluations: list[Record]
    references: list[Record]
    finished: bool

    @property
    def measured(self) -> list[Record]:
        """The evaluations on the whole text, best first."""
        return sorted(
            (r for r in self.evaluations if r["perplexity"] is not None), key=lambda r: float(r["perplexity"])
        )


def read_history(path: str | Path) -> SearchHistory:
    """Read the log of a finished or running search; a torn last line is left out.

    Raises:
        LogError: no log of a search, or a damaged line.
        FileNotFoundError: there is no such file.
    """
    content = Path(path).read_bytes()
    records: list[Record] = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise LogError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(record, dict) or record.get("kind") not in _KINDS:
            raise LogError(f"{path}, line {number} is no record of a search")
        records.append(record)
    if not records or records[0]["kind"] != "header":
        raise LogError(f"{path} is no log of a search: its first line is no header")
    kinds: dict[str, list[Record]] = {kind: [] for kind in _KINDS}
    for record in records[1:]:
        kinds[record["kind"]].append(record)
    return SearchHistory(records[0], kinds["evaluation"], kinds["reference"], bool(kinds["summary"]))


def convergence(history: SearchHistory) -> list[float]:
    """The least perplexity after each evaluation; NaN until one is measured."""
    best, line = math.nan, []
    for record in history.evaluations:
        if record["perplexity"] is not None and not record["perplexity"] >= best:
            best = record["perplexity"]
        line.append(best)
    return line


@dataclass(frozen=True)
class Correlation:
    """Pearson's correlation of operation counts and log perplexity over the metrics measured in full.

    Attributes:
        names: operations and inputs that occur, the most frequent first, and "perplexity" at the end.
        matrix: [names, names]; NaN where a count never varies.
        metrics: over how many.
    """

    names: list[str]
    matrix: npt.NDArray[np.float64]
    metrics: int


def correlation(history: SearchHistory) -> Correlation:
    """How often operations occur against perplexity: negative with perplexity means found in better metrics.

    Metrics that racing stopped were never measured in full and are left out, so that this is about the better part
    of the search, as in the paper, which takes those below a perplexity of 7.
    """
    records = history.measured
    totals: dict[str, int] = {}
    for record in records:
        for name, count in record["operations"].items():
            totals[name] = totals.get(name, 0) + count
    names = sorted(totals, key=lambda name: (-totals[name], name))
    table = np.array(
        [[r["operations"].get(name, 0) for name in names] + [math.log(r["perplexity"])] for r in records], dtype=float
    ).reshape(len(records), len(names) + 1)
    matrix = np.full((table.shape[1], table.shape[1]), math.nan)
    varies = np.flatnonzero(np.ptp(table, axis=0) > 0) if len(records) > 1 else np.empty(0, np.int64)
    if varies.size:
        matrix[np.ix_(varies, varies)] = np.atleast_2d(np.corrcoef(table[:, varies], rowvar=False))
    return Correlation([*names, "perplexity"], matrix, len(records))


_UNDO = {("exp", "log"), ("log", "exp"), ("neg", "neg")}
_UNDO |= {pair for square in ("sqr", "pow") for pair in ((square, "sqrt"), ("sqrt", square))}
_UNDO_BINARY = {("add", "sub"), ("sub", "add"), ("mul", "div"), ("div", "mul"), ("mul", "ratio"), ("ratio", "mul")}


def has_opposing(tree: Node) -> bool:
    """Whether the tree holds a pair of opposing operations, by the list in Pruner-Zero's sections 3.2 and E.1.

    exp and log, sqr (or pow) and sqrt, neg and neg, one upon the other; add and sub, mul and div with the same operand;
    add or sub of a neg.
    """
    for node in tree.walk():
        for place, below in enumerate(node.operands):
            if (node.data, below.data) in _UNDO:
                return True
            if node.data in ("add", "sub") and below.data == "neg":
                return True
            if (node.data, below.data) in _UNDO_BINARY:
                other = node.operands[1 - place]
                if other == below.right or (below.data in ("add", "mul") and other == below.left):
                    return True
    return False


def opposing_in_log(history: SearchHistory) -> dict[int, tuple[int, int]]:
    """{depth: (trees with opposing operations, trees)} over the metrics evaluated, as they were made."""
    sums: dict[int, tuple[int, int]] = {}
    for record in history.evaluations:
        tree = parse(record["expression"])
        before = sums.get(tree.depth, (0, 0))
        sums[tree.depth] = before[0] + has_opposing(tree), before[1] + 1
    return dict(sorted(sums.items()))


def opposing_in_random_trees(
    settings: SearchSettings, depths: Sequence[int] = (3, 5, 7, 9), *, trials: int = 4, trees: int = 500
) -> dict[int, list[float]]:
    """{depth: share of random trees with opposing operations, for each trial} (Table 12)."""
    shares: dict[int, list[float]] = {}
    for depth in depths:
        drawn = SearchSettings(
            least_depth=depth, most_depth=depth, operations=settings.operations, inputs=settings.inputs
        )
        shares[depth] = []
        for trial in range(trials):
            rng = random.Random(f"{settings.seed} {depth} {trial}")
            found = kept = 0
            while kept < trees:
                tree = random_tree(rng, drawn)
                if all(tree.shape):  # others are never metrics
                    kept += 1
                    found += has_opposing(tree)
            shares[depth].append(found / trees)
    return shares


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
