"""Pruner-Zero's Tables 5 and 12 and Figures 2 and 4: the search for a metric, with and without what makes it work."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from trisparse.bench.papers.cell import Cell, Session
from trisparse.bench.papers.language import dense_model
from trisparse.bench.papers.pruner_zero_models import LLAMA2_7B, PERPLEXITY, shown
from trisparse.bench.papers.scale import Scale
from trisparse.bench.papers.table import Entry, Layout, Place, entry, paper_table
from trisparse.bench.rows import RESULTS
from trisparse.kernels.cache import cache_folder
from trisparse.sparsity.batches import calibration_batches
from trisparse.sparsity.metric.operations import INPUTS
from trisparse.sparsity.search.analysis import (
    SearchHistory,
    convergence,
    correlation,
    opposing_in_random_trees,
    read_history,
)
from trisparse.sparsity.search.evaluator import compute_dtype
from trisparse.sparsity.search.measure import data_hash, model_hash
from trisparse.sparsity.search.run import LOG_FILE, evaluation_windows, search
from trisparse.sparsity.search.settings import SearchSettings, Strategy
from trisparse.sparsity.text import load_text

RANDOM_TREES = "random-trees"  # in place of a model: Table 12 has none
_STEP = 50  # evaluations between two points of Figure 2
_FREE = ("iterations", "dtype")  # settings of a log that are compared apart


@dataclass(frozen=True)
class SearchCell(Cell):
    """A search: a log in bench/results/search where that is of the same one, else run and kept in the cache folder.

    It measures ``perplexity`` of the best metric on the text that the search minimises it on, ``after N`` evaluations
    for Figure 2, ``converged_after``, the evaluation that found the best, and ``correlation A B`` of operation counts
    and log perplexity over the metrics measured in full; NaN where that is undefined.

    Attributes:
        calibration, evaluation: names of texts.
        samples, windows: of ``seq_len`` tokens of either.
        strategy, opposing, population, iterations, seed: of :class:`trisparse.sparsity.search.SearchSettings`.
    """

    kind: ClassVar[str] = "search"

    model: str
    calibration: str
    evaluation: str
    samples: int
    windows: int
    seq_len: int
    population: int
    iterations: int
    strategy: Strategy = "evolution"
    opposing: bool = True
    seed: int = 0

    @property
    def settings(self) -> SearchSettings:
        """Of the search."""
        return SearchSettings(
            population=self.population,
            iterations=self.iterations,
            strategy=self.strategy,
            opposing=self.opposing,
            seed=self.seed,
        )

    def measure(self, wanted: frozenset[str], session: Session) -> dict[str, float]:
        """Search, or read the log, and analyse it."""
        history = self._history(session)
        best = convergence(history)
        metrics = {"perplexity": best[-1], "converged_after": float(best.index(best[-1]) + 1)}
        metrics |= {f"after {count}": best[count - 1] for count in self.counts}
        found = correlation(history)
        place = {name: index for index, name in enumerate(found.names)}
        for name in wanted:
            kind, _, pair = name.partition(" ")
            if kind == "correlation":
                first, second = pair.split()
                both = first in place and second in place
                metrics[name] = float(found.matrix[place[first], place[second]]) if both else math.nan
        return metrics

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of evaluations that Figure 2 shows: the first population, then every 50th."""
        return tuple(range(self.population, self.settings.evaluations + 1, min(_STEP, self.population)))

    def _history(self, session: Session) -> SearchHistory:
        model, tokenizer = dense_model(self.model, session)
        calibration = load_text(self.calibration, "calibration")
        evaluation = load_text(self.evaluation, "validation")
        found = self._recorded(model, tokenizer, calibration, evaluation)
        if found is None:
            folder = cache_folder() / "searches" / self.key
            search(
                model,
                calibration,
                evaluation,
                out=folder,
                settings=self.settings,
                tokenizer=tokenizer,
                samples=self.samples,
                seq_len=self.seq_len,
                windows=self.windows,
                name=self.model,
                progress=False,
            )
            found = read_history(folder / LOG_FILE)
        evaluations = found.evaluations[: self.settings.evaluations]
        return SearchHistory(found.header, evaluations, found.references, found.finished)

    def _recorded(self, model: Any, tokenizer: Any, calibration: Any, evaluation: Any) -> SearchHistory | None:
        files = sorted((RESULTS / "search").glob("*.jsonl"))
        if not files:
            return None
        batches = calibration_batches(
            model, calibration, tokenizer=tokenizer, samples=self.samples, seq_len=self.seq_len, seed=self.seed
        )
        tokens = [value for batch in batches for value in batch.values() if isinstance(value, Tensor)]
        text = evaluation_windows(evaluation, tokenizer=tokenizer, seq_len=self.seq_len, windows=self.windows)
        own = {"calibration": data_hash(tokens), "evaluation": data_hash([text]), "model": model_hash(model)}
        own |= {"dtype": str(compute_dtype(model)).removeprefix("torch.")}
        wanted = {**_settings(self.settings.to_dict()), **own}
        for file in files:
            history = read_history(file)
            header = history.header
            its = {"calibration": header["data"]["calibration"], "evaluation": header["data"]["evaluation"]}
            its |= {"model": header["model"]["sha256"], "dtype": header["settings"]["dtype"]}
            whole = len(history.evaluations) >= self.settings.evaluations
            if whole and wanted == {**_settings(header["settings"]), **its}:
                return history
        return None


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(json.dumps({key: one for key, one in settings.items() if key not in _FREE}))
    return kept


@dataclass(frozen=True)
class OpposingCell(Cell):
    """``share`` of ``trees`` random trees of ``depth`` that hold opposing operations, which OOS removes."""

    kind: ClassVar[str] = "opposing"

    depth: int
    trees: int
    trial: int

    def measure(self, wanted: frozenset[str], session: Session) -> dict[str, float]:
        """Draw and count."""
        drawn = opposing_in_random_trees(SearchSettings(seed=self.trial), (self.depth,), trials=1, trees=self.trees)
        return {"share": drawn[self.depth][0]}


def searched(scale: Scale, model: str, **options: Any) -> SearchCell:
    """A search of the paper's 50 metrics and 300 iterations, of 4 and 4 at the scale "tiny"."""
    few, many = {"population": 4, "iterations": 4}, {"population": 50, "iterations": 300}
    sizes = scale.choose(
        tiny={"samples": 2, "windows": 2, "seq_len": 16, **few},
        small={"samples": 32, "windows": 16, "seq_len": 512, **many},
        paper={"samples": 128, "windows": 64, "seq_len": scale.context(model), **many},
    )
    calibration, evaluation = scale.calibration, scale.validation
    if scale.name == "paper":
        calibration, evaluation = "wikitext2:train", "wikitext2:validation"
    return SearchCell(model, calibration, evaluation, **{**sizes, **options})


@paper_table(
    "pruner-zero-table-5",
    "the search with and without opposing operation simplification",
    models=(LLAMA2_7B,),
    metric=PERPLEXITY,
    plot="dots",
    log=False,
)
def table_5(model: str, scale: Scale) -> Layout:
    """The perplexity of the best metric, on the text that the search minimises it on."""
    entries = {
        ("with OOS", PERPLEXITY): entry(searched(scale, model)),
        ("without OOS", PERPLEXITY): entry(searched(scale, model, opposing=False)),
    }
    notes = ("The expressions found stand beside the numbers in the paper, but are missing in the text that was read.",)
    return shown("table-5", model, entries, notes=notes, settings=_searches(scale, model))


@paper_table(
    "pruner-zero-table-12",
    "share of random trees with opposing operations",
    models=(RANDOM_TREES,),
    metric="share",
    plot="dots",
    log=False,
)
def table_12(model: str, scale: Scale) -> Layout:
    """Four trials at each depth, their mean, and their standard deviation, which the paper divides by 4."""
    trees = scale.choose(tiny=20, small=1000, paper=1000)
    trials = (1, 2, 3, 4)
    entries: dict[Place, Entry] = {}
    for depth in scale.choose(tiny=(3,), small=(3, 5, 7, 9), paper=(3, 5, 7, 9)):
        cells = [OpposingCell(depth, trees, trial) for trial in trials]
        row = f"depth {depth}"
        entries |= {
            (row, f"trial {trial}"): entry(one, metric="share") for trial, one in zip(trials, cells, strict=True)
        }
        entries[row, "average"] = entry(*cells, metric="share")
        entries[row, "deviation"] = entry(*cells, metric="share", statistic="deviation")
    notes = ("Of how a random tree is drawn, the paper gives the depth alone.",)
    settings = f"{trees:,} random trees a trial"
    return shown("table-12", model, entries, notes=notes, model=RANDOM_TREES, settings=settings)


@paper_table(
    "pruner-zero-figure-2",
    "evolution against random search",
    models=(LLAMA2_7B,),
    metric=PERPLEXITY,
)
def figure_2(model: str, scale: Scale) -> Layout:
    """The least perplexity after so many evaluations."""
    searches = {"evolution": searched(scale, model), "random search": searched(scale, model, strategy="random")}
    entries = {
        (name, str(count)): entry(one, metric=f"after {count}")
        for name, one in searches.items()
        for count in one.counts
    }
    notes = (
        "Columns are metrics evaluated, with the first population. The paper: evolution converges in fewer than 100 "
        "iterations, random search in about 300.",
    )
    return Layout(entries, notes=notes, settings=_searches(scale, model))


@paper_table(
    "pruner-zero-figure-4",
    "correlation of operation counts with each other and with log perplexity",
    models=(LLAMA2_7B,),
    metric="correlation",
    plot="matrix",
    log=False,
)
def figure_4(model: str, scale: Scale) -> Layout:
    """Over the metrics that the search measured in full; the paper takes those of a perplexity below 7."""
    settings = SearchSettings()
    names = [*INPUTS, *settings.binary, *settings.unary]
    one = searched(scale, model)
    entries = {
        (row, column): entry(one, metric=f"correlation {row} {column}")
        for row in names
        for column in (*names, PERPLEXITY)
    }
    notes = (
        "Negative with perplexity means that an operation is found in better metrics. One that no metric has has no "
        "correlation. The paper: mul correlates strongly with perplexity, sqrt with sqr, mms with nothing.",
    )
    return Layout(entries, notes=notes, settings=_searches(scale, model))


def _searches(scale: Scale, model: str) -> str:
    one = searched(scale, model)
    return (
        f"a search of {one.population} random metrics and {one.iterations} iterations, X and G from {one.samples} "
        f"windows of {one.calibration}, perplexity on {one.windows} of {one.evaluation}, each of {one.seq_len} tokens"
    )
