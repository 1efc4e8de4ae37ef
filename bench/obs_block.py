"""How fast one block of columns takes its OBS update on the CPU, against the loop over its columns.

    python -m trisparse.bench.obs_block [--json]

The loop is the reference, `obs_block_ref`, which is SparseGPT's. Each case first checks the masks (random weights have
no ties) and the weights against it, then times the two in turn, A B A B, in one process, with weights stored by rows,
as a slice of a wider weight, and by columns. Reported: minimum and median seconds of each and the ratio of the minima.
"""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trisparse.bench.timing import CpuTimer, interleave, summary
from trisparse.kernels.obs import MAX_BLOCK, obs_block, obs_block_ref

ROWS = (576, 1536, 4096)
PATTERNS: tuple[tuple[int, int] | None, ...] = (None, (2, 4), (4, 8))  # None: the mask is given


def random_factor(block: int) -> Tensor:
    """The upper Cholesky factor of the inverse of a random, damped Hessian."""
    x = torch.randn(2 * block, block, generator=torch.Generator().manual_seed(0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(x.T @ x / block + 0.1 * torch.eye(block)))
    factor: Tensor = torch.linalg.cholesky(inverse)
    return factor.T.contiguous()


def compare(rows: int, pattern: tuple[int, int] | None, by_columns: bool, repeats: int) -> dict[str, Any]:
    """Check, then time, one case; raises where the result is not the reference's."""
    block = MAX_BLOCK
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, 4 * block + 64, generator=generator)[:, block : 2 * block]
    weight = weight.t().contiguous().t() if by_columns else weight
    mask = torch.rand(rows, block, generator=generator) < 0.5 if pattern is None else None
    factor = random_factor(block)
    n, m = pattern or (None, None)

    def ours(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return obs_block(w, factor, mask, n, m)

    def loop(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return obs_block_ref(w, factor, mask, n, m)

    found, expected = ours(weight), loop(weight)
    if not torch.equal(found[2], expected[2]):
        raise RuntimeError(f"{rows} rows, {pattern}: our mask is not the reference's")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    name = "mask" if pattern is None else f"{pattern[0]}:{pattern[1]}"
    case = {"rows": rows, "pattern": name, "by_columns": by_columns}
    times = interleave({"ours": lambda: ours(weight), "usual": lambda: loop(weight)}, repeats, CpuTimer())
    row: dict[str, Any] = dict(case)
    for contestant, seconds in times.items():
        found = summary(seconds)
        row[f"{contestant}_min_s"], row[f"{contestant}_median_s"] = found["min"], found["median"]
    return row | {"ratio": row["usual_min_s"] / row["ours_min_s"]}


def main() -> None:
    """Print the comparison as a table, or as JSON with the versions and the machine."""
    parser = argparse.ArgumentParser(prog="python -m trisparse.bench.obs_block", description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    table = [
        compare(rows, pattern, by_columns, options.repeats)
        for rows in ROWS
        for pattern in PATTERNS
        for by_columns in (False, True)
    ]
    about = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
    }
    if options.json:
        print(json.dumps({**about, "block": MAX_BLOCK, "results": table}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(
        f"{'rows':>5} {'n:m':>5} {'stored by':9} {'ours min':>10} {'median':>10} {'loop min':>10} {'median':>10} ratio"
    )
    for row in table:
        keys = ("ours_min_s", "ours_median_s", "usual_min_s", "usual_median_s")
        figures = " ".join(f"{1e3 * row[key]:7.2f} ms" for key in keys)
        stored = "columns" if row["by_columns"] else "rows"
        print(f"{row['rows']:5} {row['pattern']:>5} {stored:9} {figures} {row['ratio']:5.1f}x")


if __name__ == "__main__":
    main()
