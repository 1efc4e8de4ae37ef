"""How fast masks are selected on the CPU, against the usual implementations.

    python -m trisparse.bench.selection [--json]

Each case first checks both masks against the reference (the weights have no ties), then times the two in
turn, A B A B, in one process, so that both see the same machine. Reported: minimum and median seconds of
each and the ratio of the minima.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trisparse.kernels.nm import select_nm, select_nm_ref
from trisparse.kernels.select import select_rows, select_rows_ref
from trisparse.kernels.threshold import select_global, select_global_ref

Select = Callable[[Tensor], Tensor]


def usual_rows(weight: Tensor, x: Tensor | None, k: int) -> Tensor:
    """Wanda's unstructured mask (its lib/prune.py): stable sort of every row, scatter of the indices pruned."""
    metric = weight.abs() if x is None else weight.abs() * x.reshape(1, -1)
    pruned = torch.zeros_like(metric) == 1
    order = torch.sort(metric, dim=-1, stable=True)[1]
    pruned.scatter_(1, order[:, : weight.shape[1] - k], True)
    return ~pruned


def usual_nm(weight: Tensor, x: Tensor | None, n: int, m: int) -> Tensor:
    """Wanda's N:M mask (its lib/prune.py): for every group of m columns, topk of the pruned and a scatter."""
    metric = weight.abs() if x is None else weight.abs() * x.reshape(1, -1)
    pruned = torch.zeros_like(metric) == 1
    for start in range(0, metric.shape[1], m):
        group = metric[:, start : start + m].float()
        pruned.scatter_(1, start + torch.topk(group, m - n, dim=1, largest=False)[1], True)
    return ~pruned


def usual_layer(weight: Tensor, k: int) -> Tensor:
    """The usual layer-wide magnitude mask: sort all weights, compare with the k-th."""
    metric = weight.abs()
    return metric >= torch.sort(metric.flatten(), descending=True)[0][k - 1]


def interleave(ours: Select, usual: Select, weight: Tensor, repeats: int) -> dict[str, Any]:
    """Seconds of both, called in turn ``repeats`` times after one call each to warm up."""
    times: dict[str, list[float]] = {"ours": [], "usual": []}
    for repeat in range(-1, repeats):
        for name, select in (("ours", ours), ("usual", usual)):
            start = time.perf_counter()
            select(weight)
            if repeat >= 0:
                times[name].append(time.perf_counter() - start)
    row: dict[str, Any] = {}
    for name, seconds in times.items():
        row[f"{name}_min_s"], row[f"{name}_median_s"] = min(seconds), statistics.median(seconds)
    row["ratio"] = row["usual_min_s"] / row["ours_min_s"]
    return row


@dataclass(frozen=True)
class Case:
    """One selection: ours and the usual route, and the reference that both must equal when nothing ties."""

    name: str
    ours: Select
    usual: Select
    reference: Select
    dtype: torch.dtype = torch.float32


def cases(rows: int, cols: int, x: Tensor) -> list[Case]:
    """The selections that are compared, for a weight [rows, cols]."""
    k, total = cols // 2, rows * cols // 2
    out = []
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, ", bf16")):
        for vector, score in ((None, "|W|"), (x, "|W| * X")):
            out.append(
                Case(
                    f"row 50%, {score}{suffix}",
                    partial(select_rows, k=k, x=vector),
                    partial(usual_rows, x=vector, k=k),
                    partial(select_rows_ref, k=k, x=vector),
                    dtype,
                )
            )
            for n, m in ((2, 4), (4, 8), (8, 16), (16, 32)):
                out.append(
                    Case(
                        f"{n}:{m}, {score}{suffix}",
                        partial(select_nm, n=n, m=m, x=vector),
                        partial(usual_nm, x=vector, n=n, m=m),
                        partial(select_nm_ref, n=n, m=m, x=vector),
                        dtype,
                    )
                )
        out.append(
            Case(
                f"layer 50%, |W|{suffix}",
                lambda w: select_global([w], total)[0],
                partial(usual_layer, k=total),
                lambda w: select_global_ref([w], total)[0],
                dtype,
            )
        )
    return out


def weights(rows: int, cols: int) -> Tensor:
    """A fp32 weight [rows, cols] of both signs, no two magnitudes of which are equal."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(rows * cols, generator=generator).reshape(rows, cols)
    magnitude = (order + 0x3F80_0000).to(torch.int32).view(torch.float32)  # consecutive floats from 1.0 on
    return magnitude * (torch.randint(0, 2, (rows, cols), generator=generator) * 2 - 1)


def compare(rows: int, cols: int, repeats: int, only: str) -> list[dict[str, Any]]:
    """Check, then time, every case whose name contains ``only``; raises where a mask is not the reference's."""
    weight = weights(rows, cols)
    x = 2.0 ** torch.randint(-2, 3, (cols,), generator=torch.Generator().manual_seed(1))
    table = []
    for case in cases(rows, cols, x):
        if only not in case.name:
            continue
        w = weight.to(case.dtype)
        expected = case.reference(w)
        if not torch.equal(case.ours(w), expected):
            raise RuntimeError(f"{case.name}: our mask is not the reference's")
        # |W| alone has no ties in fp32. Elsewhere the usual routes break ties as they happen to.
        tied = case.dtype != torch.float32 or "X" in case.name
        if not tied and not torch.equal(case.usual(w), expected):
            raise RuntimeError(f"{case.name}: the usual mask is not the reference's")
        row = {"case": case.name, "rows": rows, "cols": cols, **interleave(case.ours, case.usual, w, repeats)}
        table.append(row)
    return table


def main() -> None:
    """Print the comparison as a table, or as JSON with the versions and the machine."""
    parser = argparse.ArgumentParser(prog="python -m trisparse.bench.selection", description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="time only the cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    table = compare(options.rows, options.cols, options.repeats, options.only)
    about = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
    }
    if options.json:
        print(json.dumps({**about, "results": table}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'case':24} {'ours min':>10} {'median':>10} {'usual min':>10} {'median':>10} {'ratio':>8}")
    for row in table:
        keys = ("ours_min_s", "ours_median_s", "usual_min_s", "usual_median_s")
        figures = " ".join(f"{1e3 * row[key]:7.1f} ms" for key in keys)
        print(f"{row['case']:24} {figures} {row['ratio']:7.1f}x")


if __name__ == "__main__":
    main()
