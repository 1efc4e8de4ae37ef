"""PERP's Tables 13 and 14: what each group of parameters adds, and the LoRA's rank and scaling."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from trisparse.bench.papers import perp_models as models
from trisparse.bench.papers.language import Retraining
from trisparse.bench.papers.perp_models import PERPLEXITY, TRAINABLE, cell, dense, groups_of, has_biases
from trisparse.bench.papers.scale import Scale
from trisparse.bench.papers.table import Entry, Layout, Place, entry, paper_table
from trisparse.retrain.groups import PRESETS

GROUPS = PRESETS["perp"]
# In the order of the paper's table: none, one, two, three, four.
COMBINATIONS = tuple(subset for size in range(len(GROUPS) + 1) for subset in combinations(GROUPS, size))


@paper_table(
    "perp-table-13",
    "every combination of parameter groups, magnitude pruning",
    models=(models.OPT_13B,),
    metric=PERPLEXITY,
    plot="dots",
)
def table_13(model: str, scale: Scale) -> Layout:
    """The 16 combinations of biases, norms, head and LoRA, or 8 where the model has no biases."""
    sparsities = scale.choose(tiny=("50%",), small=("50%",), paper=("50%", "70%"))
    seeds = scale.choose(tiny=(0,), small=(0,), paper=(0, 1, 2))
    # The paper's 0.41% of OPT-13B is LoRA of rank 32 on all of attention (or 64 on queries and values).
    large = {"targets": ("self_attn.*",), "rank": 32}
    options: dict[str, Any] = large if model == models.OPT_13B else {"targets": models.lora_targets(model)}
    entries: dict[Place, Entry] = {}
    for groups in COMBINATIONS:
        if groups != groups_of(model, groups):
            continue
        row = " + ".join(groups) or "none"
        for sparsity in sparsities:
            cells = []
            for seed in seeds:
                retraining = Retraining.of(scale, groups, seed=seed, **options) if groups else None
                cells.append(cell(scale, model, "magnitude", sparsity, retraining))
            chosen = dict.fromkeys(cells)
            entries.setdefault((row, TRAINABLE), entry(*chosen, metric="trainable_share", factor=100))
            entries[row, sparsity] = entry(*chosen)
    notes = () if has_biases(model) else (f"{model} has no biases: the eight combinations with them are left out.",)
    return models.shown("table-13", model, entries, dense=dense(scale, model), notes=notes)


@paper_table(
    "perp-table-14",
    "rank and scaling of the LoRA, magnitude pruning to 50%",
    models=(models.OPT_13B,),
    metric=PERPLEXITY,
    log=False,
)
def table_14(model: str, scale: Scale) -> Layout:
    """PERP with each rank r and each α; the scaling is α / r."""
    ranks = scale.choose(tiny=(8,), small=(8, 16, 64), paper=(8, 16, 32, 64, 128))
    alphas = scale.choose(tiny=(32,), small=(32,), paper=(32, 64, 128))
    seeds = scale.choose(tiny=(0,), small=(0,), paper=(0, 1, 2))
    entries = {}
    for alpha in alphas:
        for rank in ranks:
            retrainings = [models.perp(scale, model, rank=rank, alpha=float(alpha), seed=seed) for seed in seeds]
            cells = [cell(scale, model, "magnitude", "50%", retraining) for retraining in retrainings]
            entries[f"α = {alpha}", f"rank {rank}"] = entry(*cells)
    return models.shown("table-14", model, entries, dense=dense(scale, model))
