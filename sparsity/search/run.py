"""The search loop: measure once, then round after round propose, evaluate, log, and take in the records."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trisparse.sparsity.batches import calibration_batches
from trisparse.sparsity.data import token_windows
from trisparse.sparsity.hardware import bf16_is_fast
from trisparse.sparsity.mask import masks
from trisparse.sparsity.metric import Metric
from trisparse.sparsity.progress import progress_bar
from trisparse.sparsity.search.evaluator import compute_dtype
from trisparse.sparsity.search.log import LogError, Record, SearchLog
from trisparse.sparsity.search.loop import Loop, find_root
from trisparse.sparsity.search.measure import data_hash, load_statistics, measure, model_hash, save_statistics
from trisparse.sparsity.search.population import Individual
from trisparse.sparsity.search.result import SearchResult
from trisparse.sparsity.search.settings import SearchSettings
from trisparse.sparsity.search.workers import Engine, Task, working
from trisparse.sparsity.targets import Targets, find_targets

LOG_FILE = "log.jsonl"
BEST_FILE = "best.json"
STATISTICS_FILE = "statistics.safetensors"

# The windows are measured in a random order, the same for every search: a race's first windows then stand for the
# whole text, where those of a text in its own order are about one subject.
_WINDOW_ORDER = 0


def search(
    model: Any,
    calibration: Any,
    evaluation: Any,
    *,
    out: str | Path,
    settings: SearchSettings | None = None,
    tokenizer: Any = None,
    samples: int = 32,
    seq_len: int = 512,
    windows: int = 16,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    workers: Engine = "local",
    time_limit: float | None = None,
    dtype: torch.dtype | None = None,
    name: str = "",
    progress: bool = True,
) -> SearchResult:
    """Search the pruning metric with the least perplexity for ``model`` (Pruner-Zero, algorithm 1).

    ``out`` gets ``log.jsonl``, ``best.json`` (for ``sparsify(method=...)``) and the statistics. A search that was
    stopped, however that came, goes on where it was when it is called again with the same arguments.

    Args:
        model: a dense causal language model; it is the same at the end, also after an error.
        calibration: data for X and G, as ``sparsify`` takes it.
        evaluation: data whose perplexity is the fitness. Report results on a third text: the search fits this one.
        out: folder of the results.
        settings: of the search; the paper's by default.
        tokenizer: needed for text.
        samples, seq_len: calibration sequences and tokens in each.
        windows: how many windows of ``seq_len`` tokens of ``evaluation`` are measured.
        include, exclude: which weights are pruned, as in ``sparsify``.
        workers: "local", or "ray": ``settings.batch`` actors.
        time_limit: seconds, after which no new round begins.
        dtype: compute dtype of the perplexity; None takes bf16 for an fp32 model where the device is fast at it.
        name: of the model, for the log.
        progress: show a progress bar.

    Raises:
        ValueError: an argument is wrong, or ``model`` is pruned already.
        LogError: ``out`` holds the log of another search, or a damaged one.
    """
    start = time.monotonic()
    out = Path(out)
    settings = settings or SearchSettings()
    given = [find_root(metric) for metric in settings.start_from]
    if masks(model):
        raise ValueError("model is pruned already: search on the dense model")
    targets = find_targets(model, include=include, exclude=exclude)
    batches = calibration_batches(
        model, calibration, tokenizer=tokenizer, samples=samples, seq_len=seq_len, seed=settings.seed
    )
    text = evaluation_windows(evaluation, tokenizer=tokenizer, seq_len=seq_len, windows=windows)
    dtype = dtype or compute_dtype(model)
    header = _header(model, targets, settings, batches, text, dtype, name)
    with ExitStack() as stack:
        log = SearchLog(out / LOG_FILE, header)
        stack.callback(log.close)
        measured = json.dumps([header["model"]["targets"], settings.inputs, str(bf16_is_fast(text.device))])
        key = " ".join((header["model"]["sha256"], header["data"]["calibration"], measured))
        statistics = load_statistics(out / STATISTICS_FILE, key)
        if statistics is None:
            statistics = measure(model, targets, batches, gradients="G" in settings.inputs, progress=progress)
            save_statistics(statistics, out / STATISTICS_FILE, key)
        names = tuple(target.name for target in targets.found)
        task = Task(names, statistics, text, settings.share, dtype)
        crew = stack.enter_context(working(workers, model, task, settings.batch))
        loop = Loop(settings, given, log, crew, text)
        loop.refer()
        advance = stack.enter_context(progress_bar("search", loop.left, enabled=progress))
        finished = True
        for places in rounds(settings):
            if time_limit is not None and not loop.recorded and time.monotonic() - start > time_limit:
                finished = False
                break
            fresh = loop.round(places)
            if fresh:
                advance(fresh, loop.note)
            if loop.new_best:
                _save_best(loop.population.pool[0], out / BEST_FILE, header)
        if loop.recorded:
            raise LogError(
                f"{log.path} has {len(loop.recorded)} evaluations more than iterations={settings.iterations} makes"
            )
        result = SearchResult.of(loop.population, finished=finished, log=log.path)
        if finished:
            log.append({"kind": "summary", **result.to_dict()})
    return result


def evaluation_windows(evaluation: Any, *, tokenizer: Any = None, seq_len: int, windows: int) -> Tensor:
    """The windows [windows, seq_len] that a search measures perplexity on, in the order that it takes them."""
    text = token_windows(evaluation, tokenizer=tokenizer, seq_len=seq_len, samples=windows)
    return text[torch.randperm(len(text), generator=torch.Generator().manual_seed(_WINDOW_ORDER))]


def rounds(settings: SearchSettings) -> Iterator[list[tuple[int, int]]]:
    """The places (iteration, slot) that are filled from one state of the pool."""
    for start in range(0, settings.population, settings.batch):
        yield [(0, slot) for slot in range(start, min(start + settings.batch, settings.population))]
    for iteration in range(1, settings.iterations + 1):
        yield [(iteration, slot) for slot in range(settings.batch)]


def _save_best(best: Individual, path: Path, header: Record) -> None:
    source = f"trisparse search, perplexity {best.perplexity:.3f} on its evaluation text"
    source += f", model {header['model']['name'] or header['model']['sha256'][:12]}, seed {header['settings']['seed']}"
    unfinished = path.with_suffix(".unfinished")
    Metric(best.expression, best.root, source=source).save(unfinished)
    unfinished.replace(path)


def _header(
    model: nn.Module,
    targets: Targets,
    settings: SearchSettings,
    batches: Sequence[dict[str, Any]],
    text: Tensor,
    dtype: torch.dtype,
    name: str,
) -> Record:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("trisparse", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    tokens = [value for batch in batches for value in batch.values() if isinstance(value, Tensor)]
    return {
        "settings": settings.to_dict() | {"dtype": str(dtype).removeprefix("torch.")},
        "model": {"name": name, "sha256": model_hash(model), "targets": [target.name for target in targets.found]},
        "data": {
            "calibration": data_hash(tokens),
            "calibration_tokens": sum(len(value.flatten()) for value in tokens),
            "evaluation": data_hash([text]),
            "windows": list(text.shape),
        },
        "versions": versions,
    }
