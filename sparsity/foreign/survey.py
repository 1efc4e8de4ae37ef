"""What the zeros in a folder of safetensors say, one tensor at a time: no model is built of the weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from trisparse.sparsity.checkpoint import CheckpointError
from trisparse.sparsity.checkpoint.architecture import empty_model
from trisparse.sparsity.foreign.architecture import dense_architecture
from trisparse.sparsity.foreign.compressed_tensors import TWO_FOUR, decompressed, grouped, sparse_format
from trisparse.sparsity.foreign.recover import MIN_SPARSITY, RecoveredWeight, check_min_sparsity, zero_pattern
from trisparse.sparsity.foreign.tensor_files import TensorFiles
from trisparse.sparsity.report import as_text


def survey(folder: str | Path, *, min_sparsity: float = MIN_SPARSITY) -> list[RecoveredWeight]:
    """The pattern of the zeros of every weight of two or more dimensions in ``folder``.

    Reads any folder of safetensors, also compressed-tensors' sparse formats. Names and shapes are those of the files:
    experts that transformers stacks as it loads them stand there one by one. Tensors are taken as [out, in, ...],
    those of transformers' Conv1D (GPT-2) as [in, out], which needs a config.json that transformers knows.

    Raises:
        CheckpointError: the folder is damaged, or holds no safetensors.
        ValueError: ``min_sparsity`` is out of (0, 1].
    """
    check_min_sparsity(min_sparsity)
    folder = Path(folder)
    named = sparse_format(folder)
    rows = []
    with TensorFiles(folder) as files:
        turned = _conv1d_weights(folder, len(files))
        for name, parts in (grouped(files) if named else dict.fromkeys(files)).items():
            if parts and named:
                weight, bits = decompressed(files, name, parts, named)
                alive = bits if named == TWO_FOUR else weight != 0
            else:
                weight = files.read(name)
                alive = weight != 0
            if weight.dim() >= 2 and weight.is_floating_point() and weight.numel():
                rows.append(_row(name, alive, _is_one_of(name, turned), min_sparsity))
    return rows


def _row(name: str, alive: Tensor, transposed: bool, min_sparsity: float) -> RecoveredWeight:
    shape = tuple(alive.shape)
    if alive.dim() == 3:  # stacked experts, whose layout the file does not tell
        alive = alive.reshape(-1, shape[-1])
    else:
        alive = (alive.T if transposed else alive).reshape(shape[-1 if transposed else 0], -1)
    alive = alive.contiguous()
    pattern, keep, note = zero_pattern(alive, min_sparsity)
    zeros = alive.numel() - int(alive.count_nonzero())
    kept = alive.numel() if pattern is None else int(keep.count_nonzero())
    return RecoveredWeight(name, shape, None if pattern is None else str(pattern), kept, zeros, note)


def _conv1d_weights(folder: Path, tensors: int) -> Collection[str]:
    """Names of the weights that the model of ``folder`` stores as [in, out]; none where transformers knows no model."""
    try:
        model = empty_model(*dense_architecture(folder, tensors), folder)
    except CheckpointError:
        return ()
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


def _is_one_of(name: str, names: Collection[str]) -> bool:
    """Whether ``name`` is among ``names``, with or without the base model's prefix."""
    return name in names or any(other.endswith(f".{name}") for other in names)


def describe_survey(rows: Sequence[RecoveredWeight]) -> str:
    """Table of :func:`survey`, in which weights with the same role, shape and pattern share a row."""
    table = Table(title="zeros in the files", title_justify="left")
    for heading in ("weight", "shape", "pattern"):
        table.add_column(heading)
    for heading in ("zeros", "sparsity"):
        table.add_column(heading, justify="right")
    groups: dict[tuple[Any, ...], list[RecoveredWeight]] = {}
    for row in rows:
        # Single weights differ by a few in each layer, and say the same.
        kind = None if row.pattern is None else re.sub(r"[\d.]+%", "", row.pattern)
        groups.setdefault((re.sub(r"\d+", "*", row.name), row.shape, kind), []).append(row)
    for (role, shape, _), members in groups.items():
        name = members[0].name if len(members) == 1 else f"{role} ({len(members)})"
        patterns = {row.pattern for row in members}
        pattern = members[0].pattern or "dense" if len(patterns) == 1 else "unstructured"
        zeros, total = sum(row.zeros for row in members), sum(row.total for row in members)
        table.add_row(name, "×".join(map(str, shape)), pattern, f"{zeros:,}", f"{zeros / total:.2%}")
    sparse = [row for row in rows if row.pattern is not None]
    kept, total = sum(row.kept for row in sparse), sum(row.total for row in sparse)
    notes = [f"{row.name}: {row.note}" for row in rows if row.note][:10]
    summary = f"{len(sparse)} of {len(rows)} weights are pruned"
    if sparse:
        summary += f", {1 - kept / total:.2%} of their {total:,} values"
    return as_text(table, *notes, summary)
