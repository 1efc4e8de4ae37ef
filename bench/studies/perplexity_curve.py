"""Perplexity of SmolLM2-135M against sparsity, for magnitude and Wanda: the README's picture.

trisparse bench run perplexity-curve                      # measures
python -m trisparse.bench.studies.perplexity_curve        # draws docs/perplexity.png from the newest rows
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from trisparse.bench.registry import Measured, Options, benchmark
from trisparse.bench.rows import Row, newest, quick, read_rows, rows_file
from trisparse.bench.studies.pruned_smollm2 import PrunedSmolLM2

NAME = "perplexity-curve"
PICTURE = Path("docs/perplexity.png")
SPARSITIES = ("10%", "20%", "30%", "40%", "50%", "60%", "70%")
PATTERNS = ("2:4", "4:8")
METHODS = ("magnitude", "wanda")


@benchmark(NAME, "perplexity of SmolLM2 against sparsity, by magnitude and by Wanda")
def perplexity_curve(options: Options) -> Iterator[Measured]:
    """The dense model's perplexity, and that of each method at each sparsity."""
    smollm2 = PrunedSmolLM2(quick=options.quick)
    yield Measured("dense", {**smollm2.parameters, "sparsity": 0.0}, {"dense": {"perplexity": smollm2.dense()}})
    for method in METHODS:
        for pattern in (*SPARSITIES, *PATTERNS):
            case = f"{method} {pattern}"
            if options.wants(case):
                sparsity = smollm2.prune(method, pattern).sparsity
                parameters = {**smollm2.parameters, "pattern": pattern, "sparsity": sparsity}
                yield Measured(case, parameters, {method: {"perplexity": smollm2.perplexity()}})


def draw(rows: Sequence[Row], file: Path) -> None:
    """Write the picture of the rows of :func:`perplexity_curve` to ``file`` (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    colors = dict(zip(METHODS, ("#c2410c", "#1d4ed8"), strict=True))
    markers = {"2:4": "s", "4:8": "D"}
    for method in METHODS:
        own = [row for row in rows if row.contestant == method]
        line = sorted(
            (100 * row.parameters["sparsity"], row.metrics["perplexity"])
            for row in own
            if row.parameters["pattern"] not in PATTERNS
        )
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, color=colors[method], label=method)
        for row in own:
            pattern = row.parameters["pattern"]
            if pattern in PATTERNS:
                axes.plot(
                    [50],
                    [row.metrics["perplexity"]],
                    linestyle="none",
                    marker=markers[pattern],
                    markerfacecolor="white",
                    color=colors[method],
                    label=f"{method} {pattern}",
                )
    dense = next(row for row in rows if row.contestant == "dense")
    perplexity = dense.metrics["perplexity"]
    axes.axhline(perplexity, color="#555555", linewidth=1, linestyle="--", label=f"dense ({perplexity:.1f})")
    axes.set_yscale("log")
    axes.set_xlabel("pruned weights of the decoder blocks, %")
    axes.set_ylabel("perplexity, log scale (less is better)")
    tokens = dense.parameters["test_tokens"]
    axes.set_title(f"SmolLM2-135M, Python documentation, {tokens:,} held-out tokens", fontsize=10)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


if __name__ == "__main__":
    draw(newest(row for row in read_rows(rows_file(NAME, dirty=False)) if not quick(row)), PICTURE)
    print(f"wrote {PICTURE}")
