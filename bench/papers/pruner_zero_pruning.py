"""Pruner-Zero's Tables 2, 4, 6, 13, 22, 24 and 25 and Figure 3: perplexity after pruning by each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trisparse.bench.papers import pruner_zero_models as models
from trisparse.bench.papers.language import Retraining
from trisparse.bench.papers.pruner_zero_models import METHODS, PATTERNS, PERPLEXITY, PRUNER_ZERO, cell, pruned
from trisparse.bench.papers.scale import Scale
from trisparse.bench.papers.table import Entry, Layout, Place, entry, paper_table

SPARSITIES = ("10%", "20%", "30%", "40%", "50%", "60%")
SAMPLES = (8, 16, 32, 64, 128, 256)
# Figure 3 leaves magnitude out.
CALIBRATED = {name: method for name, method in METHODS.items() if method != "magnitude"}


def by_method(
    model: str, scale: Scale, patterns: Sequence[str], methods: Mapping[str, str] = METHODS
) -> dict[Place, Entry]:
    """Rows: ``methods``; columns: ``patterns``, of which the scale "tiny" takes the first."""
    patterns = scale.choose(tiny=patterns[:1], small=patterns, paper=patterns)
    return {
        (name, pattern): entry(cell(scale, model, method, pattern))
        for name, method in methods.items()
        for pattern in patterns
    }


@paper_table(
    "pruner-zero-table-2",
    "pruning methods without retraining, three patterns",
    models=models.LLAMAS,
    metric=PERPLEXITY,
    plot="dots",
)
def table_2(model: str, scale: Scale) -> Layout:
    """Four methods at 50%, 4:8 and 2:4."""
    return pruned("table-2", model, scale, by_method(model, scale, PATTERNS))


@paper_table(
    "pruner-zero-table-4",
    "the OPT family at 50%, Pruner-Zero with and without updates of the kept weights",
    models=models.OPTS,
    metric=PERPLEXITY,
    plot="dots",
)
def table_4(model: str, scale: Scale) -> Layout:
    """Table 2's methods at 50%, and Pruner-Zero's masks with both forms of the OBS update."""
    entries = by_method(model, scale, ("50%",))
    for update in ("sequential", "iterative"):
        one = cell(scale, model, PRUNER_ZERO, "50%", update=update)
        entries[f"Pruner-Zero, {update} update", "50%"] = entry(one)
    return pruned("table-4", model, scale, entries)


@paper_table(
    "pruner-zero-table-6",
    "LoRA fine-tuning of models that Pruner-Zero pruned",
    models=(models.LLAMA_7B, models.LLAMA2_7B),
    metric=PERPLEXITY,
    plot="dots",
)
def table_6(model: str, scale: Scale) -> Layout:
    """LoRA that is kept beside the pruned weights, on queries and values, of rank 8 as in Wanda's code."""
    options: dict[str, Any] = {"variant": "lora", "rank": 8, "alpha": 16.0, "targets": ("q_proj", "v_proj")}
    if scale.name == "paper":  # Wanda's 30,000 windows at its rate; there is no time for a grid in half a day
        options |= {"steps": 3750, "batch_size": 1, "gradient_accumulation": 8}
        options |= {"learning_rate": 1e-4, "learning_rates": (), "grid_steps": 1}
    elif scale.name == "small":
        options |= {"steps": 48}
    retraining = Retraining.of(scale, ("lora",), **options)
    entries: dict[Place, Entry] = {}
    for pattern in scale.choose(tiny=("2:4",), small=PATTERNS, paper=PATTERNS):
        entries["no fine-tuning", pattern] = entry(cell(scale, model, PRUNER_ZERO, pattern))
        entries["LoRA", pattern] = entry(cell(scale, model, PRUNER_ZERO, pattern, retraining))
    retrained = (
        f"LoRA of rank 8 and α 16 on queries and values, kept beside the weights, for {retraining.steps} steps at "
        f"{retraining.learning_rate:g} on {scale.train}"
    )
    notes = ("Of its LoRA the paper says that it ran on C4, on one GPU, for 12 hours; rank and layers are Wanda's.",)
    return pruned("table-6", model, scale, entries, retrained=retrained, notes=notes)


@paper_table(
    "pruner-zero-table-13",
    "Pruner-Zero beside GBLM-Pruner",
    models=(models.LLAMA_7B, models.LLAMA_13B, models.LLAMA_30B),
    metric=PERPLEXITY,
    plot="dots",
)
def table_13(model: str, scale: Scale) -> Layout:
    """Table 2 with GBLM-Pruner."""
    methods = {**METHODS, "GBLM-Pruner, l2": "gblm"}
    return pruned(
        "table-13",
        model,
        scale,
        by_method(model, scale, ("50%", "2:4", "4:8"), methods),
        notes=("GBLM-Pruner, l1 is left out: G is the l2 norm of the gradient over the calibration sequences here.",),
    )


@paper_table("pruner-zero-table-22", "TinyLlama", models=(models.TINY_LLAMA,), metric=PERPLEXITY, plot="dots")
def table_22(model: str, scale: Scale) -> Layout:
    """Table 2 of another model; the paper does not give its dense perplexity."""
    return pruned("table-22", model, scale, by_method(model, scale, ("50%", "2:4", "4:8")))


@paper_table("pruner-zero-table-24", "60% sparsity", models=models.LLAMAS, metric=PERPLEXITY, plot="dots")
def table_24(model: str, scale: Scale) -> Layout:
    """Table 2's methods at 60%."""
    return pruned("table-24", model, scale, by_method(model, scale, ("60%",)))


@paper_table(
    "pruner-zero-table-25",
    "Pruner-Zero over seeds of the calibration",
    models=(models.LLAMA_7B, models.LLAMA2_7B),
    metric=PERPLEXITY,
    plot="dots",
)
def table_25(model: str, scale: Scale) -> Layout:
    """Four seeds, their mean, and their standard deviation, which the paper divides by 4 and not by 3."""
    entries: dict[Place, Entry] = {}
    seeds = scale.choose(tiny=(0, 1), small=(0, 1, 2, 3), paper=(0, 1, 2, 3))
    for pattern in scale.choose(tiny=("50%",), small=("50%", "2:4", "4:8"), paper=("50%", "2:4", "4:8")):
        cells = [cell(scale, model, PRUNER_ZERO, pattern, seed=seed) for seed in seeds]
        entries |= {(pattern, f"seed {seed}"): entry(one) for seed, one in zip(seeds, cells, strict=True)}
        entries[pattern, "average"] = entry(*cells)
        entries[pattern, "deviation"] = entry(*cells, statistic="deviation")
    return pruned("table-25", model, scale, entries)


@paper_table("pruner-zero-figure-3a", "perplexity by sparsity", models=(models.LLAMA2_7B,), metric=PERPLEXITY, log=True)
def figure_3a(model: str, scale: Scale) -> Layout:
    """The left of Figure 3."""
    return pruned("figure-3a", model, scale, by_method(model, scale, SPARSITIES, CALIBRATED))


@paper_table(
    "pruner-zero-figure-3b",
    "perplexity by the number of calibration sequences, at 50%",
    models=(models.LLAMA2_7B,),
    metric=PERPLEXITY,
    log=False,
)
def figure_3b(model: str, scale: Scale) -> Layout:
    """The right of Figure 3."""
    counts = scale.choose(tiny=(2, 4), small=(1, 2, 4, 8, 16, 32), paper=SAMPLES)
    entries = {
        (name, str(count)): entry(cell(scale, model, method, "50%", samples=count))
        for name, method in CALIBRATED.items()
        for count in counts
    }
    notes = ("Columns are numbers of calibration windows.",)
    return pruned("figure-3b", model, scale, entries, samples=f"{counts[0]} to {counts[-1]}", notes=notes)
