"""Perplexity of SmolLM2-135M with and without an OBS update, by its mode and by how calibration goes on.

    python -m trisparse.bench.obs_updates [--only METHOD]

prints a table and writes bench/results/obs_updates.json after each row. ``--only`` measures the rows of one method anew
and keeps the others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from trisparse.bench.demo import FULL
from trisparse.bench.perplexity_curve import PrunedSmolLM2
from trisparse.env import environment
from trisparse.sparsity.calibration import Propagate
from trisparse.sparsity.obs import Update

RESULTS = Path("bench/results/obs_updates.json")
PATTERNS = ("50%", "2:4")
CASES: tuple[tuple[str, Update | None, Propagate], ...] = (
    ("sparsegpt", None, "block"),
    ("sparsegpt", None, "linear"),
    ("sparsegpt", None, "dense"),
    ("wanda", "sequential", "block"),
    ("wanda", "iterative", "block"),
    ("wanda", None, "block"),
)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted({case[0] for case in CASES}), help="one of the methods")
    only = parser.parse_args(arguments).only
    smollm2 = PrunedSmolLM2()
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {
        "command": "python -m trisparse.bench.obs_updates",
        "calibration": f"{FULL.calibration} sequences of {FULL.seq_len} tokens",
        "test_tokens": smollm2.test_tokens,
        "dense": smollm2.dense(),
        "environment": environment(),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    if only is not None and RESULTS.is_file():
        rows = [row for row in json.loads(RESULTS.read_text())["rows"] if row["method"] != only]
    for method, update, propagate in CASES:
        if only not in (None, method):
            continue
        for pattern in PATTERNS:
            report = smollm2.prune(method, pattern, update=update, propagate=propagate)
            row = {
                "method": method,
                "update": report.update,
                "propagate": propagate,
                "pattern": pattern,
                "damping": max((t.damping for t in report.targets if t.damping is not None), default=None),
                "perplexity": smollm2.perplexity(),
            }
            rows.append(row)
            print(f"{method:10} {report.update!s:10} {propagate:6} {pattern:4} {row['perplexity']:8.3f}", flush=True)
            RESULTS.write_text(json.dumps({**results, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
