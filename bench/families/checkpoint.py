"""Checkpoints of SmolLM2 in bf16: bytes on disk and seconds to save and to load, compressed against dense.

A load ends when every weight was read once: safetensors are mapped into memory, so ``from_pretrained`` of a dense
folder returns before it has read them. Loads of the three folders take turns in one process, the files being in the
page cache. ``from_pretrained_s`` is the median of the same loads without that reading.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from trisparse.bench.registry import Measured, Options, benchmark
from trisparse.sparsity.progress import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PATTERNS = ("2:4", "50%")


@benchmark(
    "checkpoint",
    "bytes on disk and seconds to load of pruned SmolLM2, against dense",
    takes=("dtype", "model", "repeats"),
)
def checkpoint(options: Options) -> Iterator[Measured]:
    """Rows of the 2:4 and the 50% unstructured checkpoint, each against the dense one."""
    from transformers import AutoModelForCausalLM

    from trisparse.bench.smollm2 import load_smollm2
    from trisparse.sparsity.checkpoint import save
    from trisparse.sparsity.checkpoint.headers import read_headers, weight_files
    from trisparse.sparsity.mask import masks
    from trisparse.sparsity.sparsify import sparsify

    dtype = options.dtype or torch.bfloat16

    def fresh() -> PreTrainedModel:
        if options.model in (None, "smollm2"):
            smollm2, _ = load_smollm2(dtype=dtype)
            return smollm2
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        model.eval()
        return model

    repeats = options.repeats or (3 if options.quick else 15)
    with tempfile.TemporaryDirectory() as work:
        folders, saved, parts = {}, {}, {}
        for pattern in ("dense", *_PATTERNS):
            model = fresh()
            if pattern != "dense":
                sparsify(model, pattern, "magnitude", progress=False)
                parts[pattern] = [name.rpartition(".")[0] for name in masks(model)]
            folders[pattern] = Path(work) / pattern.replace(":", "-").replace("%", "")
            began = time.perf_counter()
            if pattern == "dense":
                with quiet_transformers():
                    model.save_pretrained(folders[pattern])
            else:
                save(model, folders[pattern])
            saved[pattern] = time.perf_counter() - began
            del model
        returned: dict[str, list[float]] = defaultdict(list)
        ready: dict[str, list[float]] = defaultdict(list)
        for round_, name in itertools.product(range(repeats + 1), folders):
            began = time.perf_counter()
            with quiet_transformers():
                model = AutoModelForCausalLM.from_pretrained(folders[name], dtype="auto", local_files_only=True)
            after = time.perf_counter()
            _read_all(model)
            if round_:  # the first fills caches
                returned[name].append(after - began)
                ready[name].append(time.perf_counter() - began)
            del model
        stored = {name: read_headers(weight_files(folder)) for name, folder in folders.items()}
        for pattern in _PATTERNS:
            metrics: dict[str, dict[str, float]] = {}
            for name in ("dense", pattern):
                owners = {part + "." for part in parts[pattern]}
                weights = {key: one for key, one in stored[name].items() if key.rpartition(".")[0] + "." in owners}
                metrics["dense" if name == "dense" else "compressed"] = {
                    "pruned_tensors_bytes": sum(
                        one.dtype.itemsize * torch.Size(one.shape).numel() for one in weights.values() if one.dtype
                    ),
                    "file_bytes": sum(file.stat().st_size for file in folders[name].glob("*.safetensors")),
                    "from_pretrained_s": median(returned[name]),
                    "save_s": saved[name],
                }
            yield Measured(
                f"SmolLM2, {pattern}, {str(dtype).removeprefix('torch.')}: load until every weight was read",
                {"pattern": pattern, "dtype": str(dtype).removeprefix("torch."), "model": options.model or "smollm2"},
                metrics,
                {"dense": ready["dense"], "compressed": ready[pattern]},
                baseline="dense",
            )


def _read_all(model: PreTrainedModel) -> None:
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.numel():
            tensor.detach().reshape(-1).view(torch.uint8).max()
