"""How much a metric's perplexity depends on the calibration size and on the sparsity (Pruner-Zero's Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trisparse.sparsity.batches import calibration_batches
from trisparse.sparsity.data import token_windows
from trisparse.sparsity.metric.expression import Node
from trisparse.sparsity.metric.parser import parse
from trisparse.sparsity.progress import progress_bar
from trisparse.sparsity.search.analysis import SearchHistory
from trisparse.sparsity.search.evaluator import Evaluator, perplexity_of
from trisparse.sparsity.search.measure import Statistics, measure
from trisparse.sparsity.targets import Targets, find_targets

SAMPLES = (1, 2, 4, 8, 16, 32)
SPARSITY = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def metrics_to_compare(history: SearchHistory) -> dict[str, Node]:
    """The best metric of a search, by the name "searched", and the references that could be measured.

    Raises:
        ValueError: the search measured no metric on the whole text.
    """
    if not history.measured:
        raise ValueError("the log holds no metric that was measured on the whole text")
    references = [r for r in history.references if r["perplexity"] is not None and r["name"] != "magnitude"]
    found = {"searched": parse(history.measured[0]["simplified"])}
    return found | {r["name"]: parse(r["expression"]) for r in references}


def sensitivity(
    model: Any,
    metrics: Mapping[str, Node],
    calibration: Any,
    evaluation: Any,
    *,
    tokenizer: Any = None,
    samples: Sequence[int] = SAMPLES,
    sparsity: Sequence[float] = SPARSITY,
    at: float = 0.5,
    seq_len: int = 512,
    windows: int = 16,
    seed: int = 0,
    include: str | Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Perplexity of ``metrics`` at each number of calibration sequences, and at each sparsity with the most of them.

    Args:
        model: a dense causal language model; it is the same at the end.
        metrics: trees by the name that they get in the result.
        calibration, evaluation: as in :func:`trisparse.sparsity.search.search`.
        tokenizer: needed for text.
        samples: numbers of calibration sequences.
        sparsity: shares of each row.
        at: sparsity of the runs over ``samples``.
        seq_len, windows: tokens in a sequence or window, and windows that are measured.
        seed: of the choice of calibration sequences.
        include: which weights are pruned, as in ``sparsify``.
        progress: show a progress bar.

    Returns:
        The arguments, and in "samples" and "sparsity" (in percent) lists of ``{"value", "perplexity": {name: value}}``;
        a metric by which the model cannot be pruned has the value None.

    Raises:
        ValueError: an argument is wrong or the data are too short.
    """
    targets = find_targets(model, include=include)
    text = token_windows(evaluation, tokenizer=tokenizer, seq_len=seq_len, samples=windows)
    gradients = any("G" in root.inputs for root in metrics.values())
    result: dict[str, Any] = {
        "metrics": list(metrics),
        "at": at,
        "windows": len(text),
        "seq_len": seq_len,
        "samples": [],
        "sparsity": [],
    }
    with progress_bar("sensitivity", len(samples) + len(sparsity), enabled=progress) as advance:
        for count in sorted(samples):
            batches = calibration_batches(
                model, calibration, tokenizer=tokenizer, samples=count, seq_len=seq_len, seed=seed
            )
            statistics = measure(model, targets, batches, gradients=gradients, progress=False)
            found = _perplexities(model, targets, statistics, text, metrics, at)
            result["samples"].append({"value": count, "perplexity": found})
            advance(1)
        for share in sparsity:
            found = _perplexities(model, targets, statistics, text, metrics, share)
            result["sparsity"].append({"value": round(100 * share, 6), "perplexity": found})
            advance(1)
    return result


def _perplexities(
    model: Any, targets: Targets, statistics: Statistics, text: Tensor, metrics: Mapping[str, Node], sparsity: float
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    with Evaluator(model, targets.found, statistics, text, sparsity=sparsity) as evaluator:
        for name, root in metrics.items():
            outcome = evaluator.evaluate(root)
            found[name] = None if outcome.dropped else perplexity_of(outcome.segments, text)
    return found
