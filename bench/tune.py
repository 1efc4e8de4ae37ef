"""``trisparse bench tune``: which backend runs a compressed layer fastest here, by shape, pattern and token count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers.pytorch_utils import Conv1D

from trisparse.kernels.tuned import tune_file
from trisparse.sparsity.backends import candidates
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import masks
from trisparse.sparsity.pattern import Pattern, parse_pattern
from trisparse.sparsity.report import as_text
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.tuning import TOKENS, key, plan_from, tune

LLAMA_2_7B = ((4096, 4096), (11008, 4096), (4096, 11008))
PATTERNS = ("2:4", "4:8", "50%")


def layers_of(model: nn.Module) -> Iterator[SparseLinear]:
    """One compressed layer for each kind of pruned linear layer in ``model``, which is not changed."""
    seen = set()
    for name in masks(model):
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, SparseLinear) or type(layer) in (nn.Linear, Conv1D):
            sparse = layer if isinstance(layer, SparseLinear) else SparseLinear.from_dense(layer)
            if key(sparse) not in seen:
                seen.add(key(sparse))
                yield sparse


def random_layers(
    shapes: Iterable[tuple[int, int]], patterns: Iterable[str | Pattern], dtype: torch.dtype, device: torch.device
) -> Iterator[SparseLinear]:
    """Compressed layers [out, in] with random weights, pruned by magnitude."""
    for rows, cols in shapes:
        for pattern in patterns:
            dense = nn.Linear(cols, rows, bias=False, device=device, dtype=dtype)
            sparsify(dense, parse_pattern(pattern), "magnitude", include="weight", progress=False)
            yield SparseLinear.from_dense(dense)


def tune_layers(
    layers: Iterable[SparseLinear], *, tokens: Sequence[int] = TOKENS, ranks: Sequence[int] = (0,), again: bool = False
) -> dict[str, Any]:
    """Measure all ``layers`` and keep their times; the device, the file and a row for each layer and rank."""
    rows: list[dict[str, Any]] = []
    device = torch.device("cpu")
    for layer in layers:
        device = layer.values.device
        for rank in ranks:
            times = tune(layer, tokens=tokens, rank=rank, again=again)
            plan = plan_from(times)
            chosen = {count: "dense" if plan is None else plan.backend(count) for count in times}
            rows.append(
                {
                    "layer": key(layer, rank),
                    "plan": "dense" if plan is None else str(plan),
                    "seconds": times,
                    "chosen": chosen,
                    "of_dense": {count: times[count][name] / times[count]["dense"] for count, name in chosen.items()},
                    "not_run": {name: why for name, why in candidates(layer, rank).items() if why is not None},
                }
            )
    return {"device": str(device), "file": str(tune_file(device)), "layers": rows}


def as_table(result: dict[str, Any]) -> str:
    """The times in microseconds, the fastest backend of each token count marked."""
    parts: list[Table | str] = []
    for row in result["launches"]:
        gain = row["computed_seconds"] / row["seconds"]
        tried = f"{row['tried']} launch configurations, the fastest {gain:.2f}x as fast as the computed one"
        parts.append(f"{row['kernel']} {row['case']}: {tried}")
    for row in result["layers"]:
        counts = list(row["seconds"])
        table = Table(title=row["layer"], title_justify="left")
        table.add_column("us at tokens")
        for count in counts:
            table.add_column(str(count), justify="right")
        for name in row["seconds"][counts[0]]:
            cells = [
                f"{1e6 * row['seconds'][count][name]:.1f}{'*' if row['chosen'][count] == name else ''}"
                for count in counts
            ]
            table.add_row(name, *cells)
        parts += [table, *(f"{name}: not here, {why}" for name, why in row["not_run"].items())]
    parts.append(f"* runs. Measured on {result['device']}, kept in {result['file']}")
    if not result["device"].startswith("cuda"):
        parts.append("On a CPU compress() holds the compressed weight whatever these times say: it saves memory.")
    return as_text(*parts, width=140)
