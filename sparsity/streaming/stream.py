"""``stream_sparsify(folder, out)``: prune a model that is larger than memory, from one folder to another.

The blocks are run, measured and pruned by what :func:`trisparse.sparsity.sparsify.sparsify` uses, one at a time, so
that the result is the same to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from trisparse.sparsity.allocation import Allocation, PerLayer, find_allocation
from trisparse.sparsity.allocation.allocate import allocate
from trisparse.sparsity.batches import batch_size, calibration_batches
from trisparse.sparsity.calibration import PROPAGATE, BlockRunner, Propagate
from trisparse.sparsity.capture import Batch
from trisparse.sparsity.data import Sampling
from trisparse.sparsity.distributed import ALONE, own_device, running_processes
from trisparse.sparsity.gradient_statistics import GradientStatistics
from trisparse.sparsity.metric import Method, Metric, find_metric, shown_name
from trisparse.sparsity.obs import Update, check_update
from trisparse.sparsity.pattern import Pattern, Unstructured, parse_pattern
from trisparse.sparsity.progress import progress_bar
from trisparse.sparsity.pruning import Pruning
from trisparse.sparsity.report import SparsityReport, TargetReport, skipped_rows
from trisparse.sparsity.selection import check_pattern
from trisparse.sparsity.sparsify import check_batches, check_distributed, checked_update
from trisparse.sparsity.streaming.block_steps import BlockSteps
from trisparse.sparsity.streaming.model_on_disk import ModelOnDisk
from trisparse.sparsity.streaming.output import Output, check_place
from trisparse.sparsity.streaming.settings import settings_of
from trisparse.sparsity.targets import Skipped, Targets, find_targets

HiddenStatesIn = Literal["memory", "disk"]


def stream_sparsify(
    folder: str | Path,
    out: str | Path,
    sparsity: float | str | Pattern = "2:4",
    method: Method = "auto",
    data: Any = None,
    *,
    tokenizer: Any = None,
    gradients: str | Path | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    sampling: Sampling = "windows",
    propagate: Propagate = "block",
    dtype: torch.dtype | None = None,
    allocation: Allocation | str | PathLike[str] | None = None,
    update: Update | None = None,
    damping: float = 0.01,
    hidden_states: HiddenStatesIn = "memory",
    device: torch.device | str | None = None,
    distributed: bool = False,
    recipe: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> SparsityReport:
    """Prune the model in ``folder`` into the checkpoint ``out``, with one block and the hidden states in memory.

    Weights and masks are those that ``sparsify`` gives with the same arguments, and ``out`` is what ``save`` writes,
    but for one file of weights a block. A run that was killed goes on from its last finished block when the same call
    is made again, and ends with the same bytes; its work lies in ``.NAME.streaming`` beside ``out`` until then.

    Args:
        folder: a Hugging Face folder with safetensors, or a checkpoint of ours, whose masks are then replaced.
        out: a new folder, an empty one, or an earlier checkpoint of ours, which is replaced at the end; neither
            ``folder`` nor inside of it, nor around it.
        sparsity, method, data, include, exclude, samples, seq_len, seed, sampling, propagate, dtype, update, damping:
            as in ``sparsify``.
        tokenizer: for text; saved alongside.
        gradients: a file of G, for a metric that reads G.
        allocation: as in ``sparsify``; one that goes by the shapes alone.
        hidden_states: ``"memory"``, or ``"disk"``: they are written behind each block and read before the next.
        device: that runs the blocks; None takes this process's GPU, or the CPU where there is none.
        distributed: as in ``sparsify``; every process reads every block, the first one writes.
        recipe: what the checkpoint's recipe is to say of this step besides the settings.
        progress: show a progress bar with the time left.

    Returns:
        The report; its ``seconds`` are those of this call.

    Raises:
        ValueError: an argument is wrong, the model cannot be streamed, or there is an unfinished run with other
            settings (a JournalError that names them); nothing was changed.
        BlocksNotChainedError: the model does something between its blocks; ``sparsify`` with ``propagate="dense"``
            works.
    """
    start = time.perf_counter()
    out = Path(out).resolve()
    check_place(out, Path(folder))
    pattern = parse_pattern(sparsity)
    metric = find_metric(method, has_data=data is not None, has_gradients=gradients is not None)
    spread = None if allocation is None else find_allocation(allocation)
    if spread is not None:
        pattern = spread.check(pattern)
        if spread.reads_inputs or spread.reads_weights:
            raise ValueError(
                f"allocation {spread} weighs all layers together, and streaming holds one block: use uniform, "
                "uniform+, erk or a PerLayer"
            )
    update = checked_update(update, damping, metric, has_data=data is not None)
    processes = running_processes() if distributed else ALONE
    reads_inputs = "X" in metric.uses or update is not None
    _check_arguments(pattern, metric, propagate, hidden_states, gradients)
    check_distributed(processes, metric, propagate, gradients)
    device = own_device() if device is None else torch.device(device)
    source = ModelOnDisk(folder, device)
    targets = find_targets(source.model, include=include, exclude=exclude, on_meta=True)
    allocated = None
    if spread is None:
        check_pattern(targets.found, pattern)
    else:
        allocated = allocate(spread, source.model, targets, pattern, masked=source.masked)
        targets = allocated.targets
    batches: list[Batch] = []
    if reads_inputs:
        _check_outside(targets)
        batches = calibration_batches(
            source.model,
            data,
            tokenizer=tokenizer,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            sampling=sampling,
            in_one=propagate == "linear",
            device=device,
        )
        check_batches(source.model, targets.found, batches, propagate)
    settings = settings_of(
        source,
        batches,
        sparsity=repr(pattern),  # exact, where str() has six digits
        method=str(metric),
        include=include,
        exclude=exclude,
        seed=seed,
        propagate=propagate if reads_inputs else None,
        dtype=str(dtype),
        hidden_states=hidden_states if reads_inputs else None,
        gradients=gradients,
        allocation=None if spread is None else repr(spread),
        patterns=None if allocated is None else {name: repr(one) for name, one in allocated.patterns.items()},
        update=update,
        damping=None if update is None else damping,
        # How it was typed may differ, as in the order of the options, where a run goes on.
        recipe={key: value for key, value in (recipe or {}).items() if key != "command"},
        processes=processes,
    )
    processes.check_equal("the settings", settings)
    norms = None if gradients is None else GradientStatistics.load(gradients, targets.found)
    pruning = Pruning(pattern, metric, seed, norms, None if allocated is None else allocated.patterns, update, damping)
    if update is not None:
        for target in targets.found:
            check_update([target], pruning.pattern_of(target))
    on_use = pruning.prune_on_use if propagate == "linear" else None
    runner = BlockRunner(propagate, dtype, device, on_use=on_use, hessians=update is not None, processes=processes)
    texts = {str(pattern)}
    if allocated is not None and isinstance(spread, PerLayer):
        texts = {str(one) for one in allocated.patterns.values()}
    step = {
        "step": "prune",
        "stream": True,
        **(recipe or {}),
        "seed": seed,
        "pattern": texts.pop() if len(texts) == 1 else "mixed",
        "method": shown_name(metric),
        "allocation": None if spread is None else str(spread),
        "update": update,
        "propagate": propagate if reads_inputs else None,
        "samples": sum(batch_size(batch) for batch in batches),
        "tokens": sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch),
    }
    if update is not None:
        step["damping"] = damping
    if dtype is not None:
        step["dtype"] = str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    label = f"{metric.name} {pattern}"
    with progress_bar(label, len(targets.found), enabled=progress) as advance, ExitStack() as stack:
        steps = BlockSteps(source, targets, pruning, Output(out, len(source.parts)), settings, processes, advance)
        stack.callback(steps.close)
        try:
            if reads_inputs:
                steps.calibrate(processes.share(batches), runner, on_disk=hidden_states == "disk")
            else:
                steps.prune_without_data()
        except BaseException as error:
            error.add_note(steps.how_far())
            raise
        steps.finish(tokenizer=tokenizer, recipe=[*source.recipe, step])
    lines = [steps.done[part] for part in sorted(steps.done)]
    unreached = [Skipped(name, tuple(shape), why) for line in lines for name, shape, why in line["unreached"]]
    parameters = sum(p.numel() for p in source.model.parameters())
    return SparsityReport(
        pattern=step["pattern"],
        method=step["method"],
        propagate=step["propagate"],
        seconds=time.perf_counter() - start,
        samples=step["samples"],
        tokens=step["tokens"],
        parameters=parameters,
        targets=[TargetReport(**{**row, "shape": tuple(row["shape"])}) for line in lines for row in line["rows"]],
        skipped=skipped_rows([*targets.skipped, *unreached], parameters),
        allocation=step["allocation"],
        update=update,
    )


def _check_arguments(pattern: Pattern, metric: Metric, propagate: str, hidden_states: str, gradients: object) -> None:
    if propagate not in PROPAGATE:
        raise ValueError(f"propagate must be one of {', '.join(PROPAGATE)}, got {propagate!r}")
    if hidden_states not in get_args(HiddenStatesIn):
        raise ValueError(f"hidden_states must be one of {', '.join(get_args(HiddenStatesIn))}, got {hidden_states!r}")
    if isinstance(pattern, Unstructured) and pattern.scope == "global":
        raise ValueError(
            "sparsity with scope 'global' ranks all layers together, and streaming holds one block: use 'row'"
        )
    if "G" in metric.uses and gradients is None:
        raise ValueError(
            f"{metric.name} reads gradients, which need the whole model in memory: measure them on a machine that "
            "holds it (trisparse.sparsity.gradients.gradient_norms(path=...)), and pass the file as gradients"
        )
    if gradients is not None and not isinstance(gradients, str | Path):
        raise ValueError(f"gradients must be a file, got {type(gradients).__name__}")


def _check_outside(targets: Targets) -> None:
    outside = next((target.name for target in targets.found if target.block is None), None)
    if outside is not None:
        raise ValueError(
            f"{outside} is outside of the repeated blocks, and its inputs are those of the whole model: exclude it, "
            "use a method without data, or prune in memory"
        )
