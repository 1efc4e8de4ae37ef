"""Calibration data as micro-batches: keyword arguments of the model's forward, checked before anything runs."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trisparse.sparsity.capture import Batch
from trisparse.sparsity.data import Sampling, check_ids, token_windows

_MICRO_BATCH_TOKENS = 4096  # enough to fill the cores; one block's activations stay near 100 MB at 7B widths
_DEFAULT_SEQ_LEN = 2048


def calibration_batches(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    in_one: bool = False,
    rows: int | None = None,
    device: torch.device | None = None,
    sampling: Sampling = "windows",
) -> list[Batch]:
    """Micro-batches on the model's device.

    Args:
        model: the model that the batches are for.
        data: tokens or text (see ``token_windows``), or an iterable of batches: dicts of keyword arguments of the
            model's forward, or tensors for its first argument. Batches are taken as they are.
        tokenizer, samples, seq_len, seed, sampling: as in ``sparsify``.
        in_one: put all windows into one batch.
        rows: windows of a batch, all batches alike; None takes about 4,096 tokens.
        device: another device than the model's, which may be on the meta device.

    Raises:
        ValueError: no, empty or too short data, ids outside the vocabulary, or text without a tokenizer.
    """
    device = next(model.parameters()).device if device is None else device
    extra = {"use_cache": False} if accepts(model, "use_cache") else {}
    config = getattr(model, "config", None)
    vocab_size = getattr(config, "vocab_size", None)
    if isinstance(data, Mapping):
        data = [data]
    if _is_batches(data):
        if sampling != "windows":
            raise ValueError(f"sampling={sampling!r} cuts text or tokens, and data holds batches, taken as they are")
        batches = [_as_batch(model, batch) for batch in data]
        if not batches:
            raise ValueError("data is empty: it holds no batch")
        for batch in batches:
            _check(batch, vocab_size)
        return [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in (b | extra).items()} for b in batches]
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    longest = getattr(config, "max_position_embeddings", None)
    if seq_len is None:
        seq_len = min(_DEFAULT_SEQ_LEN, longest or _DEFAULT_SEQ_LEN)
    elif longest is not None and seq_len > longest:
        raise ValueError(f"seq_len must be at most the model's {longest} positions, got {seq_len}")
    windows = token_windows(
        data, tokenizer=tokenizer, seq_len=seq_len, samples=samples, seed=seed, vocab_size=vocab_size, sampling=sampling
    ).to(device)
    if rows is not None:
        if len(windows) < rows:
            raise ValueError(
                f"data is shorter than one batch: {len(windows)} windows of seq_len={seq_len} tokens, and "
                f"batch_size={rows}"
            )
        windows = windows[: len(windows) // rows * rows]
    else:
        rows = len(windows) if in_one else max(1, _MICRO_BATCH_TOKENS // seq_len)
    return [{"input_ids": part, **extra} for part in windows.split(rows)]


def batch_size(batch: Batch) -> int:
    """Samples in a batch: the length of its first tensor."""
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 0)


def batches_sha256(batches: Sequence[Batch]) -> str:
    """One hash over the names and values of all batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            shown = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            digest.update(f"{name} {shown}\n".encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_padded(batch: Batch) -> bool:
    """Whether the batch has an attention mask with zeros."""
    mask = batch.get("attention_mask")
    return isinstance(mask, Tensor) and not bool(mask.all())


def _is_batches(data: Any) -> bool:
    if data is None or isinstance(data, str | Tensor) or not isinstance(data, Iterable):
        return False
    datasets = sys.modules.get("datasets")  # importing it takes 80 MB; who passes a dataset has done so
    if datasets is not None and isinstance(data, datasets.Dataset | datasets.IterableDataset):
        return False
    return not (isinstance(data, list | tuple) and any(isinstance(item, str) for item in data))


def _as_batch(model: nn.Module, batch: Any) -> Batch:
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        batch = batch[0]  # (inputs, labels), as a DataLoader of a labelled dataset gives it
    if isinstance(batch, Tensor):
        return {next(iter(inspect.signature(model.forward).parameters)): batch}
    raise ValueError(f"data must yield dicts of the model's arguments or tensors, got {type(batch).__name__}")


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the forward of ``model`` has such an argument by name."""
    return argument in inspect.signature(model.forward).parameters


def _check(batch: Batch, vocab_size: int | None) -> None:
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.numel():
        check_ids(int(ids.min()), int(ids.max()), vocab_size)
    if any(isinstance(v, Tensor) and v.is_floating_point() and not torch.isfinite(v).all() for v in batch.values()):
        raise ValueError("data has NaN or Inf")
