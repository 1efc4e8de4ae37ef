"""A table of correlations as a heat map."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from trisparse.bench.papers.run import Comparison


def draw_matrix(found: Comparison, file: Path) -> None:
    """Write the heat map of ours (PNG) to ``file``; rows and columns without any number are left out."""
    from matplotlib.figure import Figure

    values = {place: value for place, value in found.ours.items() if value is not None and math.isfinite(value)}
    rows = [row for row in found.rows if any(place[0] == row for place in values)]
    columns = [column for column in found.columns if any(place[1] == column for place in values)]
    matrix = np.array([[values.get((row, column), math.nan) for column in columns] for row in rows], dtype=float)
    figure = Figure(figsize=(2.4 + 0.42 * len(columns), 1.6 + 0.42 * len(rows)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix.reshape(len(rows), len(columns)), vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if (value := values.get((row, column))) is not None:
                shade = "white" if abs(value) > 0.6 else "black"
                text = f"{value:.1f}".replace("-0.0", "0.0")
                axes.text(x, y, text, ha="center", va="center", fontsize=6, color=shade)
    axes.set_title(f"{found.table.title}, {Path(found.model).name}\n{found.table.about}", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(file)
