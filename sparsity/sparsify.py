"""``sparsify(model)``: score, select, prune, in place, with a report of everything that was and was not pruned."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trisparse.sparsity.allocation import Allocation, PerLayer, find_allocation
from trisparse.sparsity.allocation.allocate import allocate
from trisparse.sparsity.batches import batch_size, batches_sha256, calibration_batches, is_padded
from trisparse.sparsity.calibration import PROPAGATE, Propagate, walk
from trisparse.sparsity.capture import Batch
from trisparse.sparsity.data import Sampling
from trisparse.sparsity.distributed import ALONE, Processes, running_processes
from trisparse.sparsity.mask import HoldsMask
from trisparse.sparsity.metric import SPARSEGPT, Method, Metric, find_metric, shown_name
from trisparse.sparsity.obs import UPDATES, Update, check_update
from trisparse.sparsity.pattern import Pattern, Unstructured, parse_pattern
from trisparse.sparsity.progress import progress_bar
from trisparse.sparsity.pruning import Pruning
from trisparse.sparsity.report import SparsityReport, skipped_rows
from trisparse.sparsity.selection import check_pattern
from trisparse.sparsity.statistics import InputStatistics, is_fused_experts
from trisparse.sparsity.targets import Target, Targets, find_targets, is_peft_wrapped

if TYPE_CHECKING:
    from trisparse.sparsity.gradient_statistics import GradientStatistics


def sparsify(
    model: nn.Module,
    sparsity: float | str | Pattern = "2:4",
    method: Method = "auto",
    data: Any = None,
    *,
    tokenizer: Any = None,
    gradients: GradientStatistics | str | PathLike[str] | None = None,
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
    distributed: bool = False,
    progress: bool = True,
) -> SparsityReport:
    """Prune ``model`` in place and attach its masks.

    A model that has masks already gets new ones. Weights that were pruned before go first again; at a lower
    sparsity than before some of them are kept by the new mask, as zeros that retraining may change.

    Args:
        model: any module with Linear, Conv1d/2d/3d, transformers' Conv1D or fused expert weights.
        sparsity: ``0.5``, ``"50%"``, ``"50% layer"``, ``"2:4"`` or a Pattern.
        method: a name in ``METRICS`` such as ``"wanda"``, an expression such as ``"abs(W) * X"``, a Metric, a
            JSON file of one, ``"sparsegpt"``, or ``"auto"``: wanda with data, magnitude without.
        data: calibration data: token tensor [length] or [n, length], string(s), a ``datasets`` dataset, or an
            iterable of batches (dicts of the model's keyword arguments, or tensors for its first argument).
        tokenizer: needed for text.
        gradients: G of the weights, or a file of it, for a metric that reads G; None measures it on data, or takes it
            from the cache when it was measured before.
        include, exclude: shell-style patterns of weight or module names; ``include`` replaces the default choice.
        samples, seq_len: calibration sequences and their length in tokens; the length defaults to 2048 or the
            model's maximum, whichever is less. Batches are taken as they are.
        seed: of the choice of sequences and of ``"random"``.
        sampling: ``"windows"`` cuts the data, joined, into sequences; ``"documents"`` takes a random place in each of
            random long rows, as Wanda does on C4 (see ``token_windows``).
        propagate: how calibration goes on behind a pruned layer: ``"block"``, ``"dense"`` or ``"linear"``
            (see :mod:`trisparse.sparsity.calibration`).
        dtype: compute dtype of calibration; None takes bf16 where the device is fast at it. Statistics are fp32.
        allocation: how ``sparsity`` is spread over the layers: "uniform", "uniform+", "global", "erk", "lamp", "owl",
            with parameters as in ``"owl:M=7,lambda=0.1"``, the file of a PerLayer, or an Allocation
            (see :mod:`trisparse.sparsity.allocation`); None prunes each layer to ``sparsity``.
        update: let the kept weights make up for the pruned ones by an OBS update (see :mod:`trisparse.sparsity.obs`):
            ``"sequential"`` (all of a layer's mask first), ``"iterative"`` (block by block of columns) or None.
            ``"sparsegpt"`` is always iterative.
        damping: of the update's Hessians, as a share of the mean of their diagonal; it grows where that is needed.
        distributed: split the micro-batches over the processes of torch.distributed and add up what they measure. Every
            process must make this same call; all of them end with the masks that one process would give the same
            micro-batches (see :mod:`trisparse.sparsity.distributed`).
        progress: show a progress bar with the time left.

    Raises:
        ValueError: an argument is wrong; nothing was changed. An error that comes up later carries a note that
            says up to where the model was pruned; no block is left half done.
    """
    start = time.perf_counter()
    pattern = parse_pattern(sparsity)
    spread = None if allocation is None else find_allocation(allocation)
    if spread is not None:
        pattern = spread.check(pattern)
    weighs_inputs = spread is not None and spread.reads_inputs
    if weighs_inputs and data is None:
        raise ValueError(f"allocation {spread} weighs the layers' inputs: pass data (and a tokenizer for text)")
    metric = find_metric(method, has_data=data is not None, has_gradients=gradients is not None)
    update = checked_update(update, damping, metric, has_data=data is not None)
    reads_inputs = "X" in metric.uses or update is not None
    if propagate not in PROPAGATE:
        raise ValueError(f"propagate must be one of {', '.join(PROPAGATE)}, got {propagate!r}")
    together = isinstance(pattern, Unstructured) and pattern.scope == "global"
    if together and reads_inputs and propagate != "dense":
        raise ValueError("sparsity with scope 'global' ranks all layers together: it needs propagate='dense'")
    if is_peft_wrapped(model):
        raise ValueError("model is wrapped by PEFT: merge_and_unload() or unload() it first")
    if any(isinstance(module, HoldsMask) for module in model.modules()):
        raise ValueError("model is compressed: decompress(model) it first")
    processes = running_processes() if distributed else ALONE
    check_distributed(processes, metric, propagate, gradients)
    targets = find_targets(model, include=include, exclude=exclude)
    if spread is None:
        check_pattern(targets.found, pattern)
    if update is not None:
        check_update(targets.found, pattern)
    check_finite(targets.found)
    batches: list[Batch] = []
    if reads_inputs or weighs_inputs or ("G" in metric.uses and gradients is None):
        batches = calibration_batches(
            model,
            data,
            tokenizer=tokenizer,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            sampling=sampling,
            in_one=reads_inputs and propagate == "linear",
        )
    if reads_inputs:
        check_batches(model, targets.found, batches, propagate)
    if weighs_inputs:
        check_batches(model, targets.found, batches, "dense")
    if processes.count > 1:
        processes.check_equal("the calibration data", batches_sha256(batches))
    allocated = None
    if spread is not None:
        allocated = allocate(
            spread, model, targets, pattern, batches, dtype=dtype, processes=processes, progress=progress
        )
    norms = _gradients(model, targets, batches, gradients, dtype, progress) if "G" in metric.uses else None
    if allocated is not None:
        targets = allocated.targets
    pruning = Pruning(pattern, metric, seed, norms, None if allocated is None else allocated.patterns, update, damping)
    if update is not None and allocated is not None:
        for target in targets.found:
            check_update([target], pruning.pattern_of(target))
    steps: Generator[tuple[list[Target], InputStatistics | None]]
    if not reads_inputs:
        steps = _blocks(targets)
    elif propagate == "dense" and allocated is not None and allocated.measured and update is None:
        steps = allocated.steps()
    else:
        steps = walk(
            model,
            targets,
            processes.share(batches),
            propagate=propagate,
            dtype=dtype,
            on_use=pruning.prune_on_use if propagate == "linear" else None,
            hessians=update is not None,
            processes=processes,
        )
    label = f"{metric.name} {pattern}"
    with progress_bar(label, len(targets.found), enabled=progress) as advance, closing(steps):
        try:
            if together:
                pruning.prune_together(steps, advance)
            else:
                for group, statistics in steps:
                    pruning.prune(group, statistics)
                    advance(len(group))
            if not pruning.rows:
                raise ValueError("data reaches none of the weights to prune: the model's forward does not use them")
        except BaseException as error:
            done = f"pruned up to {pruning.rows[-1].name}" if pruning.rows else "unchanged"
            error.add_note(f"sparsify stopped; the model is {done}")
            raise
    parameters = sum(p.numel() for p in model.parameters())
    texts = {row.pattern for row in pruning.rows} if isinstance(spread, PerLayer) else {str(pattern)}
    return SparsityReport(
        pattern=texts.pop() if len(texts) == 1 else "mixed",
        method=shown_name(metric),
        propagate=propagate if reads_inputs else None,
        seconds=time.perf_counter() - start,
        samples=sum(batch_size(batch) for batch in batches),
        tokens=sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch),
        parameters=parameters,
        targets=pruning.rows,
        skipped=skipped_rows([*targets.skipped, *pruning.unreached], parameters),
        allocation=None if spread is None else str(spread),
        update=update,
    )


def checked_update(update: Update | None, damping: float, metric: Metric, *, has_data: bool) -> Update | None:
    """The update that ``metric`` goes with.

    Raises:
        ValueError: it cannot be as asked; says why.
    """
    if update is not None and update not in UPDATES:
        raise ValueError(f"update must be one of {', '.join(UPDATES)} or None, got {update!r}")
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < math.inf:
        raise ValueError(f"damping must be a finite number above 0, got {damping!r}")
    if metric is SPARSEGPT:
        if update == "sequential":
            raise ValueError("method 'sparsegpt' finds its masks while it updates: update='sequential' takes a metric")
        return "iterative"
    if update is not None and not has_data:
        raise ValueError(f"update={update!r} needs the layers' inputs: pass data (and a tokenizer for text)")
    return update


def check_distributed(processes: Processes, metric: Metric, propagate: Propagate, gradients: object) -> None:
    """Check that the calibration can be split.

    Raises:
        ValueError: it cannot, and why.
    """
    if processes.count == 1:
        return
    if propagate == "linear":
        raise ValueError("propagate='linear' runs the data as one batch, which processes cannot share: use 'block'")
    if "G" in metric.uses and gradients is None:
        raise ValueError("several processes do not measure gradients: measure them once, and pass gradients=FILE")


def _gradients(
    model: nn.Module,
    targets: Targets,
    batches: Sequence[Batch],
    given: GradientStatistics | str | PathLike[str] | None,
    dtype: torch.dtype | None,
    progress: bool,
) -> GradientStatistics:
    # Imported here: only metrics that read G pay for it.
    if given is None:
        from trisparse.sparsity.gradient_cache import cached_gradient_norms

        return cached_gradient_norms(model, targets, batches, compute_dtype=dtype, progress=progress)
    from trisparse.sparsity.gradient_statistics import GradientStatistics

    if isinstance(given, (str, PathLike)):
        return GradientStatistics.load(Path(given), targets.found)
    if not isinstance(given, GradientStatistics):
        raise ValueError(f"gradients must be GradientStatistics or a file of them, got {type(given).__name__}")
    given.check(targets.found)
    return given


def _blocks(targets: Targets) -> Generator[tuple[list[Target], None]]:
    """Targets of each block; those outside the blocks one by one."""
    groups: dict[int | str, list[Target]] = {}
    for target in targets.found:
        groups.setdefault(target.name if target.block is None else target.block, []).append(target)
    for group in groups.values():
        yield group, None


def check_finite(targets: Sequence[Target]) -> None:
    """Raise a ValueError if a weight is NaN or Inf."""
    broken = [target.name for target in targets if not torch.isfinite(target.weight).all()]
    if broken:
        raise ValueError(f"model has NaN or Inf weights: {', '.join(broken)}")


def check_batches(model: nn.Module, targets: Sequence[Target], batches: Sequence[Batch], propagate: Propagate) -> None:
    """Raise a ValueError if ``batches`` cannot be measured in this way."""
    fused = next((target.name for target in targets if is_fused_experts(target)), None)
    if propagate == "linear":
        if len(batches) > 1:
            raise ValueError(f"propagate='linear' runs the whole data as one batch, but data has {len(batches)}")
        if fused:
            raise ValueError(f"propagate='linear' cannot prune fused experts ({fused}): use 'block' or 'dense'")
    padded = any(is_padded(batch) for batch in batches)
    if padded and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("data is padded, and an encoder-decoder model pads two sequences differently: pack it")
    if padded and fused:
        raise ValueError(f"data is padded, and padding would count as input of fused experts ({fused}): pack it")
