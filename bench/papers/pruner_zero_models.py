"""Pruner-Zero's models and methods, and what its tables have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trisparse.bench.papers.language import LanguageCell, Pruning, Retraining, Texts
from trisparse.bench.papers.scale import Scale
from trisparse.bench.papers.table import Entry, Layout, Place, entry, paper_name, published_paper

LLAMA_7B, LLAMA_13B, LLAMA_30B, LLAMA_65B = (f"huggyllama/llama-{size}" for size in ("7b", "13b", "30b", "65b"))
LLAMA2_7B, LLAMA2_13B, LLAMA2_70B = (f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b"))
LLAMAS = (LLAMA_7B, LLAMA_13B, LLAMA_30B, LLAMA_65B, LLAMA2_7B, LLAMA2_13B, LLAMA2_70B)
OPTS = tuple(f"facebook/opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b"))
TINY_LLAMA = "TinyLlama/TinyLlama_v1.1"

PERPLEXITY = "perplexity"
PRUNER_ZERO = "pruner-zero"
METHODS = {"Magnitude": "magnitude", "SparseGPT": "sparsegpt", "Wanda": "wanda", "Pruner-Zero": PRUNER_ZERO}
PATTERNS = ("50%", "4:8", "2:4")


def texts(scale: Scale, model: str, method: str = "") -> Texts:
    """The texts of ``scale``; at the paper's, Pruner-Zero takes X and G from WikiText-2, the others from C4 (4.1)."""
    chosen = Texts.of(scale, model)
    if method == PRUNER_ZERO and scale.name == "paper":
        return replace(chosen, calibration="wikitext2:train")
    return chosen


def cell(
    scale: Scale, model: str, method: str, pattern: str, retraining: Retraining | None = None, **pruning: Any
) -> LanguageCell:
    """``model`` pruned to ``pattern`` by ``method``, and retrained if that is given."""
    return LanguageCell(model, texts(scale, model, method), Pruning.of(scale, method, pattern, **pruning), retraining)


def dense(scale: Scale, model: str) -> Entry:
    """The perplexity before pruning."""
    return entry(LanguageCell(model, texts(scale, model)))


def shown(table: str, model: str, entries: dict[Place, Entry], /, **options: Any) -> Layout:
    """The layout of ``entries``; of one of the paper's models only those that the paper has."""
    models = published_paper("pruner-zero")["tables"].get(table, {"models": {}})["models"]
    if (named := paper_name(model)) in models:
        rows = models[named]["rows"]
        entries = {(row, column): one for (row, column), one in entries.items() if column in rows.get(row, ())}
    return Layout(entries, **options)


def pruned(
    table: str,
    model: str,
    scale: Scale,
    entries: dict[Place, Entry],
    *,
    samples: str = "",
    retrained: str = "not retrained",
    notes: tuple[str, ...] = (),
) -> Layout:
    """A layout of perplexities after pruning, beside the dense one, with what was done in words.

    Args:
        samples: numbers of calibration windows, if not those of ``scale``.
        retrained: what follows the pruning.
    """
    own = texts(scale, model, PRUNER_ZERO)
    others = "" if own.calibration == scale.calibration else f" (others: {scale.calibration})"
    tested = "all" if scale.test_windows is None else scale.test_windows
    settings = (
        f"{samples or scale.samples} calibration windows of {own.calibration}{others}, {tested} test windows of "
        f"{scale.test}, each of {own.seq_len} tokens; pruned block by block, {retrained}"
    )
    return shown(table, model, entries, dense=dense(scale, model), settings=settings, notes=notes)
