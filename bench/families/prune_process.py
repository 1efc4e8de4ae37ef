"""One contestant of the benchmark "prune", in its own process: python -m trisparse.bench.families.prune_process JOB.

JOB is a :class:`trisparse.bench.families.prune.Job` in JSON; the last line of the output is what it found, in JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trisparse.bench.families.prune import USUAL, Found, Job
from trisparse.bench.models import load_causal_lm
from trisparse.bench.usual_pruning import prune_as_usual, prune_by_gradients_as_usual, prune_magnitude_as_usual
from trisparse.sparsity.data import token_windows
from trisparse.sparsity.hardware import keep_freed_memory
from trisparse.sparsity.pattern import NM, parse_pattern
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.text import pydoc_text

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def main(arguments: list[str]) -> None:
    """Run the job of the only argument and print what it found."""
    print(json.dumps(found_by(Job(**json.loads(arguments[0])))))


def found_by(job: Job) -> Found:
    """Seconds, ``peak_bytes`` while it was pruned, ``model_bytes``, the share pruned and the perplexity after it.

    ``peak_bytes`` is the device's allocated memory, or on the CPU the resident memory of the process, with the model
    and all libraries: since the pruning began on Linux, since the process began elsewhere.
    """
    model, tokenizer = _load(job)
    calibration = token_windows(
        pydoc_text("calibration"), tokenizer=tokenizer, seq_len=job.seq_len, samples=job.samples
    )
    windows = token_windows(pydoc_text("test"), tokenizer=tokenizer, seq_len=job.seq_len, samples=job.test)
    device = torch.device(job.device)
    if job.how != USUAL and device.type == "cpu":
        keep_freed_memory()  # as the command line does; the usual implementations have glibc's setting
    _restart_peak(device)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRISPARSE_CACHE"] = cache  # gradients of a run before would cost nothing
        start = time.perf_counter()
        prune_model(model, calibration, job)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    peak = _peak_bytes(device)
    linears = [module.weight for module in _blocks(model).modules() if isinstance(module, nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in linears)
    return {
        "seconds": seconds,
        "perplexity": perplexity(model, windows, seq_len=job.seq_len),
        "peak_bytes": peak,
        "model_bytes": sum(param.nbytes for param in model.parameters()),
        "sparsity": zeros / sum(weight.numel() for weight in linears),
    }


def _load(job: Job) -> tuple[Any, Any]:
    model, tokenizer = load_causal_lm(job.model, getattr(torch, job.dtype))
    return model.to(job.device), tokenizer


def _blocks(model: Any) -> nn.Module:
    blocks = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(blocks, nn.Module):
        raise ValueError(f"the usual implementations take Llama-like models, not {type(model).__name__}")
    return blocks


def prune_model(model: Any, calibration: Tensor, job: Job) -> None:
    """Prune a Llama-like ``model`` in place as ``job`` says, on token ids [samples, seq_len]."""
    if job.how != USUAL:
        samples, seq_len = calibration.shape
        how: Any = job.how
        data = None if job.method == "magnitude" else calibration
        sparsify(model, job.pattern, job.method, data, samples=samples, seq_len=seq_len, propagate=how, progress=False)
        return
    parsed = parse_pattern(job.pattern)
    n_of_m = (parsed.n, parsed.m) if isinstance(parsed, NM) else None
    if job.method == "magnitude":
        prune_magnitude_as_usual(model, parsed.sparsity)
    elif job.method == "pruner-zero":
        prune_by_gradients_as_usual(model, calibration, parsed.sparsity, n_of_m)
    else:
        prune_as_usual(model, calibration, job.method, parsed.sparsity, n_of_m)


def _restart_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(_CLEAR_REFS, os.W_OK):
        _CLEAR_REFS.write_text("5")


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.access(_CLEAR_REFS, os.W_OK):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main(sys.argv[1:])
