"""``compress(model)``: every pruned linear layer becomes a SparseLinear; ``decompress(model)`` turns them back."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trisparse.sparsity.backends import Plan, Prefer
from trisparse.sparsity.checkpoint.quantizer import mark_compressed, unmark_compressed
from trisparse.sparsity.interrupt import interrupt_after
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import Mask, check_masks, masks
from trisparse.sparsity.report import as_text
from trisparse.sparsity.tuning import TOKENS, Times, cached_times, choose_plan, key
from trisparse.sparsity.tuning import tune as measure


@dataclass(frozen=True)
class CompressedLayer:
    """One pruned weight and what became of it.

    Attributes:
        name: of its parameter.
        pattern: that it was pruned to.
        backend: what runs it, by token count; "dense" where the layer was left as it is.
        dense_bytes, bytes: of the weight before and now, with every copy that is held.
        times: measured seconds by tokens and backend, of a layer like this one; empty if nothing was measured.
        chosen: which backend runs at each of these token counts.
        note: why it was left dense, or empty.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    backend: str
    dense_bytes: int
    bytes: int
    times: Times = field(default_factory=dict)
    chosen: dict[int, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class CompressionReport:
    """Result of ``compress``."""

    device: str
    layers: list[CompressedLayer]
    note: str = ""

    @property
    def dense_bytes(self) -> int:
        """Bytes of all pruned weights before."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of the same weights now."""
        return sum(layer.bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All fields and totals as plain Python objects."""
        return {**asdict(self), "dense_bytes": self.dense_bytes, "bytes": self.bytes}

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """A table in which weights with the same role in different blocks share a row."""
        table = Table(title=f"compressed for {self.device}", title_justify="left")
        for heading in ("weight", "shape", "pattern", "backend"):
            table.add_column(heading)
        table.add_column("of dense", justify="right")
        tokens = sorted({count for layer in self.layers for count in layer.times})
        shown = [count for count in (1, 16, 512, 2048) if count in tokens] or tokens[:4]
        for count in shown:
            table.add_column(f"{count} tok, us (dense)", justify="right")
        similar: dict[tuple[str, ...], list[CompressedLayer]] = {}
        for layer in self.layers:
            role = re.sub(r"\d+", "*", layer.name)
            similar.setdefault((role, str(layer.shape), layer.pattern, layer.backend), []).append(layer)
        for (role, *_), rows in similar.items():
            first = rows[0]
            name = first.name if len(rows) == 1 else f"{role} ({len(rows)})"
            share = sum(row.bytes for row in rows) / sum(row.dense_bytes for row in rows)
            cells = [_time_cell(first, count) for count in shown]
            table.add_row(name, "×".join(map(str, first.shape)), first.pattern, first.backend, f"{share:.3f}", *cells)
        lines = [f"{count} weights left dense: {why}" for why, count in self._left_dense().items()]
        lines += [self.note] if self.note else []
        lines.append(
            f"{self.bytes / 2**20:.1f} MiB instead of {self.dense_bytes / 2**20:.1f} MiB for {len(self.layers)} weights"
        )
        return as_text(table, *lines)

    def _left_dense(self) -> Counter[str]:
        return Counter(layer.note for layer in self.layers if layer.note)


def _time_cell(layer: CompressedLayer, count: int) -> str:
    times = layer.times.get(count)
    if times is None:
        return ""
    return f"{times[layer.chosen[count]] * 1e6:.1f} ({times['dense'] * 1e6:.1f})"


def compress(
    model: nn.Module,
    *,
    tune: bool | Literal["lazy"] = False,
    prefer: Prefer = "speed",
    tokens: tuple[int, ...] = TOKENS,
    rank: int = 0,
) -> CompressionReport:
    """Replace every pruned ``nn.Linear`` (and transformers' ``Conv1D``) of ``model`` by a SparseLinear, in place.

    Layers that were compressed before get a new plan.

    Which code runs a layer on a GPU follows from times that were measured there (``tune=True`` here, or
    ``trisparse bench tune``), else from `default_plan`. On the CPU nothing is faster than dense: layers are held
    compressed, and a layer is dense while it is multiplied, which saves memory, takes longer and gives the same bits.

    Args:
        model: with masks, from ``sparsify`` or ``load``.
        tune: measure on the model's device what was not measured before: now (True), or ``"lazy"``, when a layer is
            first used.
        prefer: ``"speed"`` keeps the dense weight besides where that is faster for some token counts, and leaves a
            layer as it is where dense wins for all; ``"memory"`` holds the compressed weight only.
        tokens: with ``tune``, the token counts to measure at; larger ones are served as the largest.
        rank: of the adapter that will run beside each layer, whose times are used; 0 for none.

    Returns:
        What became of each pruned weight. Layers left dense are listed with the reason.

    Raises:
        ValueError: the model has no masks, an unknown ``prefer`` or ``tune``, or a mask that does not hold its pattern.
        MaskError: a pruned weight is not zero; nothing was changed.
    """
    if prefer not in ("speed", "memory"):
        raise ValueError(f"prefer must be 'speed' or 'memory', got {prefer!r}")
    if tune not in (True, False, "lazy"):
        raise ValueError(f"tune must be True, False or 'lazy', got {tune!r}")
    found = masks(model)
    if not found:
        raise ValueError("model has no masks: prune it with sparsify, or load a pruned one")
    if not any(model.children()):
        raise ValueError(f"model is itself a {type(model).__name__}: use SparseLinear.from_dense")
    check_masks(model)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    measured: dict[str, Times | None] = {}
    rows: list[CompressedLayer] = []
    for name, mask in found.items():
        path, _, param = name.rpartition(".")
        layer = model.get_submodule(path)
        made: SparseLinear | None = None
        reason, times = "", Times()
        if isinstance(layer, SparseLinear):
            made = layer
        elif not (reason := _reason_to_stay_dense(layer, param, owners)):
            made = SparseLinear.from_dense(layer, mask, plan=Plan("rows", ((None, "compressed"),)))
        if made is not None:
            kind = key(made, rank)
            if kind not in measured:
                measured[kind] = measure(made, tokens=tokens, rank=rank) if tune is True else cached_times(made, rank)
            known = measured[kind]
            times, plan = known or times, choose_plan(made, prefer, known)
            if plan is None and made is not layer:
                reason = "dense is faster at every measured token count"
            else:
                made.prefer = prefer
                made.adopt(plan or Plan("rows", ((None, "dense"),)))
                made.tune_for = prefer if tune == "lazy" and known is None else None
                larger = made.nbytes >= mask.shape.numel() * made.values.element_size()
                if made is not layer and larger and (prefer == "memory" or not made.values.is_cuda):
                    reason = f"the compressed form is not smaller at {mask.sparsity:.0%}"
        if made is not None and not reason:
            if made is not layer:
                with interrupt_after():
                    _replace(model, path, made)
            rows.append(_row(name, mask, made.values, made.nbytes, times, made.plan))
        else:
            stored = layer.get_parameter(param)
            rows.append(_row(name, mask, stored, stored.nbytes, times, Plan("rows", ((None, "dense"),)), reason))
    if any(not row.note for row in rows):
        mark_compressed(model)
    device = next(itertools.chain(model.buffers(), model.parameters())).device
    note = ""
    if device.type != "cuda" and any(not row.note for row in rows):
        note = f"on {device.type} a layer is dense while it is multiplied: less memory, not less time"
    return CompressionReport(str(device), rows, note)


def decompress(model: nn.Module) -> int:
    """Turn every SparseLinear of ``model`` back into a dense layer with its mask, in place; returns how many."""
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, SparseLinear)]
    for name, layer in found:
        with interrupt_after():
            _replace(model, name, layer.to_dense())
    unmark_compressed(model)
    return len(found)


def _row(name: str, mask: Mask, like: Tensor, nbytes: int, times: Times, plan: Plan, note: str = "") -> CompressedLayer:
    dense_bytes = mask.shape.numel() * like.element_size()
    chosen = {count: plan.backend(count) for count in times}
    return CompressedLayer(
        name, tuple(mask.shape), str(mask.pattern), str(plan), dense_bytes, nbytes, times, chosen, note
    )


def _reason_to_stay_dense(layer: nn.Module, param: str, owners: Counter[int]) -> str:
    # A subclass may compute something else, or be read without being called, as in nn.MultiheadAttention.
    if type(layer) not in (nn.Linear, Conv1D) or param != "weight":
        return f"a {type(layer).__name__} has no compressed form"
    if layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook"):
        return "it has hooks, which a new layer would not have"
    return "its weight is shared with another parameter" if owners[id(layer.weight)] > 1 else ""


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
