"""The figures of a search's report: convergence, operations against perplexity, sensitivity (PNG; needs matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trisparse.sparsity.search.analysis import Correlation

_COLORS = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce")
_MOST_NAMES = 16  # of the operations, for the heat map to stay legible


def draw_convergence(lines: Mapping[str, Sequence[float]], references: Mapping[str, float], file: Path) -> None:
    """Best perplexity so far against evaluations, one line for each search, references as dashed lines (Figure 2)."""
    figure, axes = _figure((7, 4.2))
    known = [value for line in lines.values() for value in line if math.isfinite(value)]
    floor = min([*known, *references.values()])
    for color, (name, line) in zip(_COLORS, lines.items(), strict=False):
        axes.step(range(1, len(line) + 1), line, where="post", color=color, label=name)
    for style, (name, value) in zip(("--", ":", "-."), references.items(), strict=False):
        if value < 3 * floor:  # magnitude pruning is ten times worse and would flatten everything else
            axes.axhline(value, color="#555555", linewidth=1, linestyle=style, label=f"{name} ({value:.2f})")
    axes.set_ylim(0.98 * floor, min(max([*known, *references.values()]), 1.5 * floor))
    axes.set_xlabel("metrics evaluated")
    axes.set_ylabel("best perplexity so far (less is better)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, file)


def draw_operations(found: Correlation, file: Path) -> None:
    """Heat map of the correlation of operation counts with each other and with log perplexity (Figure 4)."""
    chosen = [*range(min(_MOST_NAMES, len(found.names) - 1)), len(found.names) - 1]
    names = [found.names[i] for i in chosen]
    matrix = found.matrix[np.ix_(chosen, chosen)]
    figure, axes = _figure((1.8 + 0.42 * len(names), 1.2 + 0.42 * len(names)))
    image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for i in range(len(names)):
        for j in range(len(names)):
            if math.isfinite(matrix[i, j]):
                shade = "white" if abs(matrix[i, j]) > 0.6 else "black"
                axes.text(
                    j,
                    i,
                    f"{matrix[i, j]:.1f}".replace("-0.0", "0.0"),
                    ha="center",
                    va="center",
                    fontsize=6,
                    color=shade,
                )
    axes.set_title(f"correlation over {found.metrics} metrics measured in full", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8)
    _save(figure, file)


def draw_sensitivity(results: Mapping[str, Any], file: Path) -> None:
    """Perplexity against calibration sequences and against sparsity, one line for each metric (Figure 3)."""
    figure, axes = _figure((9, 3.8), columns=2)
    panels = (
        (axes[0], results["samples"], "calibration sequences"),
        (axes[1], results["sparsity"], "pruned weights of the targets, %"),
    )
    for panel, rows, label in panels:
        for color, name in zip(_COLORS, results["metrics"], strict=False):
            values = [row["perplexity"][name] for row in rows]
            panel.plot([row["value"] for row in rows], values, marker="o", markersize=4, color=color, label=name)
        panel.set_xlabel(label)
        panel.set_ylabel("perplexity (less is better)")
        panel.grid(alpha=0.25, which="both")
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks([row["value"] for row in results["samples"]], [str(r["value"]) for r in results["samples"]])
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter("{x:g}")
    axes[1].legend(frameon=False, fontsize=8)
    _save(figure, file)


def _figure(size: tuple[float, float], columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=160, layout="constrained")
    return figure, figure.subplots(1, columns)


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
