"""Perplexity of SmolLM2-135M against sparsity, for magnitude and Wanda: the README's picture.

    python -m trisparse.bench.perplexity_curve

measures (bench/results/perplexity_curve.json) and draws (docs/perplexity.png); ``--draw`` only draws.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from trisparse.bench.demo import FULL
from trisparse.bench.smollm2 import load_smollm2
from trisparse.env import environment
from trisparse.sparsity.calibration import Propagate
from trisparse.sparsity.data import token_windows
from trisparse.sparsity.obs import Update
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.report import SparsityReport
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.text import pydoc_text

RESULTS = Path("bench/results/perplexity_curve.json")
PICTURE = Path("docs/perplexity.png")
SPARSITIES = ("10%", "20%", "30%", "40%", "50%", "60%", "70%")
PATTERNS = ("2:4", "4:8")
METHODS = ("magnitude", "wanda")


class PrunedSmolLM2:
    """Prunes SmolLM2 anew each time, and measures it on the test split, with the demo's data.

    Attributes:
        test_tokens: that perplexity is measured on.
    """

    def __init__(self) -> None:
        self._model, self._tokenizer = load_smollm2()
        self._dense = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        self._test = token_windows(
            pydoc_text("test"), tokenizer=self._tokenizer, seq_len=FULL.seq_len, samples=FULL.test
        )
        self.test_tokens = self._test.numel()

    def dense(self) -> float:
        """Perplexity of the dense model."""
        self._model.load_state_dict(self._dense)
        return self.perplexity()

    def prune(
        self, method: str, pattern: str, *, update: Update | None = None, propagate: Propagate = "block"
    ) -> SparsityReport:
        """Prune the dense model by ``method``."""
        self._model.load_state_dict(self._dense)
        return sparsify(
            self._model,
            pattern,
            method,
            pydoc_text("calibration"),
            tokenizer=self._tokenizer,
            samples=FULL.calibration,
            seq_len=FULL.seq_len,
            update=update,
            propagate=propagate,
            progress=False,
        )

    def perplexity(self) -> float:
        """Perplexity of the model as it is."""
        return perplexity(self._model, self._test, seq_len=FULL.seq_len)

    def pruned(self, method: str, pattern: str) -> tuple[float, float]:
        """(sparsity, perplexity) of the model pruned by ``method``."""
        return self.prune(method, pattern).sparsity, self.perplexity()


def measure() -> dict[str, Any]:
    """Perplexity of the dense model and of each method at each sparsity."""
    smollm2 = PrunedSmolLM2()
    rows = []
    for method in METHODS:
        for pattern in (*SPARSITIES, *PATTERNS):
            sparsity, value = smollm2.pruned(method, pattern)
            rows.append({"method": method, "pattern": pattern, "sparsity": sparsity, "perplexity": value})
            print(f"{method:10} {pattern:4} {value:10.2f}", flush=True)
    return {
        "command": "python -m trisparse.bench.perplexity_curve",
        "test_tokens": smollm2.test_tokens,
        "dense": smollm2.dense(),
        "rows": rows,
        "environment": environment(),
    }


def draw(results: dict[str, Any], file: Path) -> None:
    """Write the picture of ``results`` to ``file`` (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    colors = dict(zip(METHODS, ("#c2410c", "#1d4ed8"), strict=True))
    markers = {"2:4": "s", "4:8": "D"}
    for method in METHODS:
        rows = [row for row in results["rows"] if row["method"] == method]
        line = [row for row in rows if row["pattern"] not in PATTERNS]
        axes.plot(
            [100 * row["sparsity"] for row in line],
            [row["perplexity"] for row in line],
            marker="o",
            markersize=4,
            color=colors[method],
            label=method,
        )
        for row in rows:
            if row["pattern"] in PATTERNS:
                axes.plot(
                    [50],
                    [row["perplexity"]],
                    linestyle="none",
                    marker=markers[row["pattern"]],
                    markerfacecolor="white",
                    color=colors[method],
                    label=f"{method} {row['pattern']}",
                )
    dense = results["dense"]
    axes.axhline(dense, color="#555555", linewidth=1, linestyle="--", label=f"dense ({dense:.1f})")
    axes.set_yscale("log")
    axes.set_xlabel("pruned weights of the decoder blocks, %")
    axes.set_ylabel("perplexity, log scale (less is better)")
    axes.set_title(f"SmolLM2-135M, Python documentation, {results['test_tokens']:,} held-out tokens", fontsize=10)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help=f"only draw {RESULTS}")
    if not parser.parse_args().draw:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(measure(), indent=2) + "\n")
    draw(json.loads(RESULTS.read_text()), PICTURE)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
