"""Perplexity of SmolLM2-135M pruned by each metric of the library, on text that no search has seen.

No weight is updated after pruning.
"""

from __future__ import annotations

from collections.abc import Iterator

from trisparse.bench.registry import Measured, Options, benchmark
from trisparse.bench.studies.pruned_smollm2 import PrunedSmolLM2
from trisparse.sparsity.metric import METRICS

PATTERNS = ("50%", "4:8", "2:4")


@benchmark("metric-comparison", "perplexity of SmolLM2 pruned by each metric of the library")
def metric_comparison(options: Options) -> Iterator[Measured]:
    """One row for each metric and pattern, and the dense model's."""
    smollm2 = PrunedSmolLM2(quick=options.quick)
    if options.wants("dense"):
        yield Measured("dense", {**smollm2.parameters, "sparsity": 0.0}, {"dense": {"perplexity": smollm2.dense()}})
    for name, metric in METRICS.items():
        if name == "random":
            continue
        for pattern in PATTERNS:
            case = f"{name} {pattern}"
            if options.wants(case):
                report = smollm2.prune(name, pattern)
                parameters = {
                    **smollm2.parameters,
                    "expression": metric.infix,
                    "pattern": pattern,
                    "sparsity": report.sparsity,
                }
                yield Measured(case, parameters, {name: {"perplexity": smollm2.perplexity()}})
