"""Perplexity of SmolLM2-135M pruned by each metric of the library, on text that no search has seen.

    python -m trisparse.bench.metric_comparison

prints a table and writes bench/results/metric_comparison.json. No weight is updated after pruning.
"""

from __future__ import annotations

import json
from pathlib import Path

from trisparse.bench.demo import FULL
from trisparse.bench.smollm2 import load_smollm2
from trisparse.env import environment
from trisparse.sparsity.data import token_windows
from trisparse.sparsity.metric import METRICS
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.text import pydoc_text

RESULTS = Path("bench/results/metric_comparison.json")
PATTERNS = ("50%", "4:8", "2:4")


def main() -> None:
    """Measure, print and write."""
    model, tokenizer = load_smollm2()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    test = token_windows(pydoc_text("test"), tokenizer=tokenizer, seq_len=FULL.seq_len, samples=FULL.test)
    rows = []
    print(f"{'metric':20} {'pattern':7} {'perplexity':>10}  expression")
    for name, metric in METRICS.items():
        if name == "random":
            continue
        for pattern in PATTERNS:
            model.load_state_dict(original)
            sparsify(
                model,
                pattern,
                name,
                pydoc_text("calibration"),
                tokenizer=tokenizer,
                samples=FULL.calibration,
                seq_len=FULL.seq_len,
                progress=False,
            )
            value = perplexity(model, test, seq_len=FULL.seq_len)
            rows.append({"metric": name, "expression": metric.infix, "pattern": pattern, "perplexity": value})
            print(f"{name:20} {pattern:7} {value:10.3f}  {metric.infix}", flush=True)
    model.load_state_dict(original)
    results = {
        "command": "python -m trisparse.bench.metric_comparison",
        "calibration": f"{FULL.calibration} sequences of {FULL.seq_len} tokens, block by block",
        "test_tokens": test.numel(),
        "dense": perplexity(model, test, seq_len=FULL.seq_len),
        "rows": rows,
        "environment": environment(),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
