"""Perplexity of SmolLM2-135M pruned by each metric of the library, on text that no search has seen.

    python -m trisparse.bench.metric_comparison

prints a table and writes bench/results/metric_comparison.json. No weight is updated after pruning.
"""

from __future__ import annotations

import json
from pathlib import Path

from trisparse.bench.demo import FULL
from trisparse.bench.perplexity_curve import PrunedSmolLM2
from trisparse.env import environment
from trisparse.sparsity.metric import METRICS

RESULTS = Path("bench/results/metric_comparison.json")
PATTERNS = ("50%", "4:8", "2:4")


def main() -> None:
    """Measure, print and write."""
    smollm2 = PrunedSmolLM2()
    rows = []
    print(f"{'metric':20} {'pattern':7} {'perplexity':>10}  expression")
    for name, metric in METRICS.items():
        if name == "random":
            continue
        for pattern in PATTERNS:
            _, value = smollm2.pruned(name, pattern)
            rows.append({"metric": name, "expression": metric.infix, "pattern": pattern, "perplexity": value})
            print(f"{name:20} {pattern:7} {value:10.3f}  {metric.infix}", flush=True)
    results = {
        "command": "python -m trisparse.bench.metric_comparison",
        "calibration": f"{FULL.calibration} sequences of {FULL.seq_len} tokens, block by block",
        "test_tokens": smollm2.test_tokens,
        "dense": smollm2.dense(),
        "rows": rows,
        "environment": environment(),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
