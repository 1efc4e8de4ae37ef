"""PERP's Tables 1 and 4 to 8, what each group of parameters wins back by sparsity, and Figure 3, how fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from trisparse.bench.papers import perp_models as models
from trisparse.bench.papers.language import Retraining
from trisparse.bench.papers.perp_models import PERPLEXITY, TRAINABLE, cell, dense, groups_of, has_biases, no_biases
from trisparse.bench.papers.scale import Scale
from trisparse.bench.papers.table import Layout, entry, paper_table
from trisparse.retrain.groups import PRESETS

ABOUT = "retraining methods by sparsity, magnitude pruning"


def methods(scale: Scale, model: str) -> dict[str, Retraining | None]:
    """Each method of section 3.1; each also trains what the simpler ones train."""
    found: dict[str, Retraining | None] = {
        "Full IMP": Retraining.of(scale, PRESETS["full"]),
        "PERP": models.perp(scale, model),
        "Linear Probing": Retraining.of(scale, groups_of(model, PRESETS["linear-probing"])),
        "LN-Parameters": Retraining.of(scale, groups_of(model, PRESETS["norms"])),
    }
    if has_biases(model):
        found["Biases"] = Retraining.of(scale, PRESETS["biases"])
    return {**found, "No Retraining": None}


def retraining_table(table: str) -> Callable[[str, Scale], Layout]:
    """The layout of one of these tables, which differ by their models alone."""

    def layout(model: str, scale: Scale) -> Layout:
        sparsities = scale.choose(tiny=("50%",), small=("50%", "70%"), paper=("30%", "40%", "50%", "60%", "70%"))
        sparsities = tuple(sparsity for sparsity in sparsities if sparsity in models.columns_of(table))
        entries = {}
        for row, retraining in methods(scale, model).items():
            cells = {sparsity: cell(scale, model, "magnitude", sparsity, retraining) for sparsity in sparsities}
            # Of the middle sparsity, which every model of the paper has; the share is the same at all of them.
            entries[row, TRAINABLE] = entry(cells["50%"], metric="trainable_share", factor=100)
            entries |= {(row, sparsity): entry(one) for sparsity, one in cells.items()}
        return models.shown(table, model, entries, dense=dense(scale, model), notes=no_biases(model))

    return layout


for _table, _models in (
    ("table-1", (models.OPT_3B, models.OPT_30B)),
    ("table-4", (models.OPT_1B, models.OPT_3B, models.OPT_13B, models.OPT_30B)),
    ("table-5", (models.LLAMA_7B, models.LLAMA_13B)),
    ("table-6", (models.LLAMA_70B,)),
    ("table-7", (models.MISTRAL,)),
    ("table-8", (models.MIXTRAL,)),
):
    paper_table(f"perp-{_table}", ABOUT, models=_models, metric=PERPLEXITY)(retraining_table(_table))


@paper_table(
    "perp-figure-3", "perplexity by iterations of PERP, magnitude pruning", models=(models.OPT_7B,), metric=PERPLEXITY
)
def figure_3(model: str, scale: Scale) -> Layout:
    """Every number of iterations is a run of its own, with its own warm-up and decay, as the paper's are."""
    iterations = scale.choose(tiny=(2,), small=(4, 8, 16), paper=(10, 50, 100, 250, 500, 1000))
    sparsities = scale.choose(tiny=("50%",), small=("50%", "70%"), paper=("40%", "50%", "60%", "70%"))
    entries = {}
    for sparsity in sparsities:
        entries[sparsity, "0"] = entry(cell(scale, model, "magnitude", sparsity))
        for steps in iterations:
            retraining = replace(models.perp(scale, model), steps=steps)
            entries[sparsity, str(steps)] = entry(cell(scale, model, "magnitude", sparsity, retraining))
    return Layout(entries, dense=dense(scale, model), notes=("Rows are sparsities, columns iterations.",))
