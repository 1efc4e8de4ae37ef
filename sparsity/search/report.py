"""``trisparse search-report``: what a search found, as a Markdown page with figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trisparse.sparsity.metric.parser import parse
from trisparse.sparsity.metric.text import latex
from trisparse.sparsity.search.analysis import (
    Correlation,
    SearchHistory,
    convergence,
    correlation,
    mean_and_deviation,
    opposing_in_log,
    opposing_in_random_trees,
)
from trisparse.sparsity.search.figures import draw_convergence, draw_operations, draw_sensitivity
from trisparse.sparsity.search.settings import SearchSettings

PAGE = "report.md"
_BEST = 10  # rows of the table of metrics


def write_report(
    history: SearchHistory,
    out: str | Path,
    *,
    baseline: SearchHistory | None = None,
    sensitivity: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``report.md`` and its PNGs to the folder ``out``; returns the page.

    Args:
        history: the search, from :func:`trisparse.sparsity.search.analysis.read_history`.
        out: folder; files of an earlier report are replaced.
        baseline: a random search on the same model and data, for the figure of convergence.
        sensitivity: from :func:`trisparse.sparsity.search.sensitivity.sensitivity`.

    Raises:
        ValueError: nothing was measured in full yet, or ``baseline`` was measured on other windows.
    """
    out = Path(out)
    if not history.measured:
        raise ValueError("the log holds no metric that was measured on the whole text")
    if baseline is not None and _measured_on(baseline) != _measured_on(history):
        raise ValueError("baseline is the log of a search on another model, sparsity or text")
    out.mkdir(parents=True, exist_ok=True)
    parts = [_summary(history), _convergence(history, baseline, out), _best(history), _operations(history, out)]
    parts.append(_opposing(history))
    if sensitivity is not None:
        parts.append(_sensitivity(sensitivity, out))
    page = out / PAGE
    page.write_text("\n\n".join(parts) + "\n")
    return page


def _measured_on(history: SearchHistory) -> tuple[Any, ...]:
    header = history.header
    return header["model"]["sha256"], header["data"]["evaluation"], header["settings"]["sparsity"]


def _summary(history: SearchHistory) -> str:
    header, settings = history.header, history.header["settings"]
    evaluations = history.evaluations
    tokens, full = (sum(r[key] for r in evaluations) for key in ("tokens", "full_tokens"))
    skipped: dict[str, int] = {}
    for record in evaluations:
        for reason, count in record["skipped"].items():
            skipped[reason] = skipped.get(reason, 0) + count
    windows, seq_len = header["data"]["windows"]
    best = history.measured[0]
    rows = [
        ("model", header["model"]["name"] or header["model"]["sha256"][:12]),
        ("search", f"{settings['strategy']}, seed {settings['seed']}" + ("" if history.finished else " (unfinished)")),
        (
            "fitness",
            f"perplexity at {100 * settings['sparsity']:g}% of each row on {windows} windows of {seq_len} tokens",
        ),
        ("metrics evaluated", f"{len(evaluations)}, of which {len(history.measured)} on the whole text"),
        ("stopped by racing", str(sum(r["stopped"] is not None for r in evaluations))),
        ("dropped as not finite", str(sum(r["dropped"] is not None for r in evaluations))),
        (
            "not evaluated",
            ", ".join(f"{count} {_SKIPPED[reason]}" for reason, count in sorted(skipped.items())) or "none",
        ),
        (
            "tokens",
            f"{tokens:,}" + (f"; without racing {full:,} ({full / tokens:.1f} times as many)" if tokens else ""),
        ),
        ("time of the evaluations", f"{sum(r['seconds'] for r in evaluations) / 60:.1f} min"),
        ("best", f"`{best['simplified']}`, perplexity {best['perplexity']:.3f}"),
        *((f"reference: {r['name']}", _perplexity(r["perplexity"])) for r in history.references),
    ]
    note = (
        "Perplexities here are those that the search minimised: compare metrics on other text before you rely on one."
    )
    return "# Metric search\n\n" + _table(("", ""), rows) + "\n\n" + note


_SKIPPED = {
    "shape": "without the shape of W",
    "depth": "too deep",
    "form": "with the form of an earlier one",
    "fingerprint": "with the masks of an earlier one",
}


def _convergence(history: SearchHistory, baseline: SearchHistory | None, out: Path) -> str:
    lines = {history.header["settings"]["strategy"]: convergence(history)}
    text = f"The least perplexity found is {lines[history.header['settings']['strategy']][-1]:.3f}"
    if baseline is not None:
        name = baseline.header["settings"]["strategy"]
        name = name if name not in lines else f"{name}, seed {baseline.header['settings']['seed']}"
        lines[name] = convergence(baseline)
        text += f" after {len(history.evaluations)} metrics; {name}: {lines[name][-1]:.3f} after {len(lines[name])}"
    references = {r["name"]: r["perplexity"] for r in history.references if r["perplexity"] is not None}
    draw_convergence(lines, references, out / "convergence.png")
    return f"## Convergence\n\n![best perplexity so far](convergence.png)\n\n{text}."


def _best(history: SearchHistory) -> str:
    rows = [
        (f"{r['perplexity']:.3f}", f"`{r['simplified']}`", f"${_in_table(latex(parse(r['simplified'])))}$")
        for r in history.measured[:_BEST]
    ]
    return "## Best metrics\n\n" + _table(("perplexity", "expression", "formula"), rows)


def _operations(history: SearchHistory, out: Path) -> str:
    found: Correlation = correlation(history)
    draw_operations(found, out / "operations.png")
    last = {
        name: value for name, value in zip(found.names[:-1], found.matrix[-1], strict=False) if math.isfinite(value)
    }
    order = sorted(last, key=lambda name: last[name])
    words = [f"{name} ({last[name]:+.2f})" for name in order]
    text = (
        "How often an operation occurs in a metric, against the logarithm of its perplexity: negative means found in "
    )
    text += (
        f"better metrics. Over the {found.metrics} metrics measured in full; those that racing stopped are left out."
    )
    if words:
        text += f" Most negative: {', '.join(words[:3])}; most positive: {', '.join(words[:-4:-1])}."
    return f"## Operations and perplexity\n\n![correlation of operation counts](operations.png)\n\n{text}"


def _opposing(history: SearchHistory) -> str:
    settings = SearchSettings(
        **{k: history.header["settings"][k] for k in ("operations", "inputs", "seed")}, start_from=()
    )
    trials = opposing_in_random_trees(settings)
    rows = []
    for depth, shares in trials.items():
        mean, deviation = mean_and_deviation(shares)
        rows.append((str(depth), *(f"{share:.2f}" for share in shares), f"{mean:.2f}", f"{deviation:.3f}"))
    head = ("depth", *(f"trial {i + 1}" for i in range(len(next(iter(trials.values()))))), "mean", "deviation")
    text = "Share of trees that hold opposing operations (what OOS removes), over random trees of each depth:"
    seen = ", ".join(f"depth {d}: {c / n:.2f} of {n}" for d, (c, n) in opposing_in_log(history).items())
    seen = f"Of the metrics that this search evaluated, as they were made: {seen}."
    return f"## Opposing operations\n\n{text}\n\n{_table(head, rows)}\n\n{seen}"


def _sensitivity(results: Mapping[str, Any], out: Path) -> str:
    draw_sensitivity(results, out / "sensitivity.png")
    parts = ["## Sensitivity to calibration size and sparsity\n\n![sensitivity](sensitivity.png)"]
    columns = (("samples", "sequences"), ("sparsity", "sparsity, %"))
    for key, label in columns:
        rows = [
            (f"{row['value']:g}", *(_perplexity(row["perplexity"][name]) for name in results["metrics"]))
            for row in results[key]
        ]
        parts.append(_table((label, *results["metrics"]), rows))
    parts.append(
        f"Calibration size at {100 * results['at']:g}% of each row; sparsity with the most sequences. "
        f"Perplexity on {results['windows']} windows of {results['seq_len']} tokens, statistics from the dense model."
    )
    return "\n\n".join(parts)


def _in_table(formula: str) -> str:
    """LaTeX without the bars that would end a cell of a Markdown table."""
    return formula.replace(r"\|", r"\Vert ").replace("|", r"\vert ")


def _perplexity(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
