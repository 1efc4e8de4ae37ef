"""PERP's Tables 2, 9, 10, 11 and 15: magnitude, Wanda and SparseGPT, each with and without PERP."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trisparse.bench.papers import perp_models as models
from trisparse.bench.papers.choice import OPTIONS, QUESTIONS
from trisparse.bench.papers.perp_models import PERPLEXITY, cell, dense
from trisparse.bench.papers.scale import Scale
from trisparse.bench.papers.table import Entry, Layout, Place, entry, paper_table

CRITERIA = {"Magnitude": "magnitude", "Wanda": "wanda", "SparseGPT": "sparsegpt"}
PATTERNS = ("50%", "2:4", "4:8")
ABOUT = "pruning criteria with and without PERP"


def by_criterion(
    model: str, scale: Scale, patterns: Sequence[str], metric: str = PERPLEXITY, factor: float = 1.0
) -> dict[Place, Entry]:
    """Rows: each criterion without and with PERP; columns: ``patterns``."""
    entries = {}
    for name, method in CRITERIA.items():
        for row, retraining in ((name, None), (f"{name} + PERP", models.perp(scale, model))):
            for pattern in patterns:
                one = cell(scale, model, method, pattern, retraining)
                entries[row, pattern] = entry(one, metric=metric, factor=factor)
    return entries


def criteria_table(table: str) -> Callable[[str, Scale], Layout]:
    """The layout of Table 2, 9 or 10, which differ by their models and by what Table 2 leaves out."""

    def layout(model: str, scale: Scale) -> Layout:
        patterns = scale.choose(tiny=("2:4",), small=("50%", "2:4"), paper=PATTERNS)
        entries = by_criterion(model, scale, patterns)
        if table == "table-2":
            entries = {place: one for place, one in entries.items() if place[0] not in ("Wanda", "SparseGPT")}
        return models.shown(table, model, entries, dense=dense(scale, model))

    return layout


for _table, _models in (
    ("table-2", (models.OPT_3B, models.OPT_7B, models.OPT_13B, models.OPT_30B)),
    ("table-9", (models.OPT_3B, models.OPT_7B, models.OPT_13B, models.OPT_30B, models.OPT_66B)),
    ("table-10", (models.LLAMA_7B, models.LLAMA_13B, models.MISTRAL)),
):
    paper_table(f"perp-{_table}", ABOUT, models=_models, metric=PERPLEXITY, plot="dots")(criteria_table(_table))


@paper_table(
    "perp-table-11",
    "zero-shot accuracy of pruning criteria with and without PERP",
    models=(models.OPT_3B, models.OPT_7B, models.OPT_13B, models.OPT_30B),
    metric="accuracy, %",
    plot="dots",
    log=False,
)
def table_11(model: str, scale: Scale) -> Layout:
    """The mean over seven tasks; below the paper's scale, of a local task, which needs no network."""
    patterns = scale.choose(tiny=("2:4",), small=("50%", "2:4"), paper=PATTERNS)
    if scale.name == "paper":
        entries = by_criterion(model, scale, patterns, "zero_shot_accuracy", 100)
        return models.shown("table-11", model, entries)
    task = f"the choice among {OPTIONS} continuations of {QUESTIONS} paragraphs of Python's documentation"
    return models.shown(
        "table-11",
        model,
        by_criterion(model, scale, patterns, "choice_accuracy", 100),
        dense=dense(scale, model, "choice_accuracy", 100),
        other_task=task,
        notes=(f"Not the paper's seven tasks, but {task}; chance is {100 / OPTIONS:.0f}%.",),
    )


@paper_table(
    "perp-table-15",
    "high sparsity: pruning criteria with and without PERP",
    models=(models.OPT_30B,),
    metric=PERPLEXITY,
)
def table_15(model: str, scale: Scale) -> Layout:
    """The rows of Table 9 at more than half."""
    sparsities = scale.choose(tiny=("80%",), small=("50%", "70%"), paper=("50%", "60%", "70%", "80%"))
    entries = by_criterion(model, scale, sparsities)
    return models.shown("table-15", model, entries, dense=dense(scale, model))
