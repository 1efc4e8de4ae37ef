"""PERP's Table 12: gradual freezing and unfreezing of layers in prune-retrain cycles, against full IMP."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import ClassVar, Literal

from trisparse.bench.papers.cell import Cell, Session
from trisparse.bench.papers.language import Retraining, Texts, dense_model, evaluate, training_texts
from trisparse.bench.papers.perp_models import OPT_3B
from trisparse.bench.papers.scale import Scale
from trisparse.bench.papers.table import Layout, entry, paper_table
from trisparse.retrain.cycles import CyclesConfig, prune_cycles
from trisparse.retrain.freezing import GradualFreezing

Freezing = tuple[Literal["freeze", "unfreeze"], Literal["input", "output"]]

# In the order of the paper's rows, whose columns are "unfreeze" and "reverse".
FREEZINGS: tuple[Freezing, ...] = (
    ("unfreeze", "output"),
    ("freeze", "input"),
    ("unfreeze", "input"),
    ("freeze", "output"),
)
ROWS = {f"{mode} from the {start}": (mode, start) for mode, start in FREEZINGS}
TASK = "perplexity after the cycles minus that of full IMP (more is worse), of a language model"


@dataclass(frozen=True)
class CyclesCell(Cell):
    """A language model pruned by magnitude in cycles, with full retraining under the masks.

    It measures ``perplexity``, ``trainable_share`` (the mean over the steps) and ``retraining_seconds``.

    Attributes:
        model, texts, retraining: as of a :class:`trisparse.bench.papers.language.LanguageCell`.
        pattern: at the end.
        cycles: how many.
        freezing: mode, end to start from and stages, or None for full IMP.
    """

    kind: ClassVar[str] = "cycles"

    model: str
    texts: Texts
    pattern: str
    cycles: int
    retraining: Retraining
    freezing: tuple[Literal["freeze", "unfreeze"], Literal["input", "output"], int] | None = None

    def measure(self, wanted: frozenset[str], session: Session) -> dict[str, float]:
        """Prune, retrain, and again."""
        model, tokenizer = dense_model(self.model, session)
        if session.keep_copies:
            model = copy.deepcopy(model)
        train, validation = training_texts(self.texts, self.retraining, tokenizer, session, self.model)
        config = CyclesConfig(
            cycles=self.cycles,
            retraining=self.retraining.config(self.texts.seq_len),
            freezing=None if self.freezing is None else GradualFreezing(*self.freezing),
        )
        start = time.perf_counter()
        report = prune_cycles(model, self.pattern, train, config, validation=validation, progress=False)
        seconds = time.perf_counter() - start
        share = sum(cycle.trainable_share for cycle in report.cycles) / len(report.cycles)
        metrics = {"trainable_share": share, "retraining_seconds": seconds}
        return metrics | evaluate(model, tokenizer, self.model, self.texts, wanted, session)


@paper_table(
    "perp-table-12",
    "gradual freezing in prune-retrain cycles, against full IMP",
    models=("ResNet-50",),
    metric="difference to full IMP, perplexity",
    plot="dots",
    log=False,
    run_on=(OPT_3B,),
)
def table_12(model: str, scale: Scale) -> Layout:
    """On a language model: image classifiers have no cycles and no freezing here (docs/vision.md)."""
    cycles = scale.choose(tiny=(2,), small=(2,), paper=(2, 3, 4, 5))
    pattern = scale.choose(tiny="50% layer", small="60% layer", paper="70% layer")
    stages = scale.choose(tiny=3, small=5, paper=5)
    texts, retraining = Texts.of(scale, model), Retraining.of(scale, ("full",))
    full = {count: CyclesCell(model, texts, pattern, count, retraining) for count in cycles}
    entries = {}
    for row, freezing in ROWS.items():
        cells = {count: CyclesCell(model, texts, pattern, count, retraining, (*freezing, stages)) for count in cycles}
        entries[row, "% agg. trainable"] = entry(cells[2], metric="trainable_share", factor=100)
        entries |= {(row, f"{count} cycles"): entry(one, minus=(full[count],)) for count, one in cells.items()}
    return Layout(
        entries,
        other_task=TASK,
        notes=(f"Not ImageNet: {TASK}, pruned by magnitude to {pattern.removesuffix(' layer')}.",),
    )
