"""An allocation applied to the targets of a model: what ``sparsify`` does before it prunes."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trisparse.sparsity.allocation.base import Allocation
from trisparse.sparsity.calibration import Step, walk
from trisparse.sparsity.capture import Batch
from trisparse.sparsity.distributed import ALONE, Processes
from trisparse.sparsity.mask import mask_of
from trisparse.sparsity.pattern import Pattern
from trisparse.sparsity.progress import progress_bar
from trisparse.sparsity.report import DENSE_BY_ALLOCATION
from trisparse.sparsity.targets import Skipped, Targets


@dataclass(frozen=True, eq=False)
class Allocated:
    """What an allocation decided.

    Attributes:
        targets: those left to prune; the ones that stay dense are among the skipped.
        patterns: of each target left, by name.
        measured: statistics of the dense model, of all targets, if the allocation read them.
    """

    targets: Targets
    patterns: dict[str, Pattern]
    measured: list[Step]

    def steps(self) -> Generator[Step]:
        """What was measured, without the targets that stay dense: ``propagate="dense"`` needs no other pass."""
        for group, statistics in self.measured:
            if left := [target for target in group if target.name in self.patterns]:
                yield left, statistics


def allocate(
    allocation: Allocation,
    model: nn.Module,
    targets: Targets,
    pattern: Pattern,
    batches: Sequence[Batch] = (),
    *,
    dtype: torch.dtype | None = None,
    masked: Collection[str] = (),
    processes: Processes = ALONE,
    progress: bool = False,
) -> Allocated:
    """Spread ``pattern`` over ``targets``; the model stays as it is.

    Args:
        allocation: how.
        model, targets: as from ``find_targets(model)``.
        pattern: what ``allocation.check`` gave.
        batches, dtype: of the calibration, as in ``walk``; used if the allocation reads inputs.
        masked: names of targets that were pruned before, where ``model`` does not hold their masks.
        processes: those that call this together, with the same ``batches``: each one runs its share.
        progress: show a progress bar.

    Raises:
        ValueError: the budget cannot be met like this, nothing is left to prune, or a layer to stay dense was pruned
            before.
    """
    measured: list[Step] = []
    if allocation.reads_inputs:
        with progress_bar(str(allocation), len(targets.found), enabled=progress) as advance:
            share = processes.share(batches)
            steps = walk(model, targets, share, propagate="dense", dtype=dtype, processes=processes)
            for group, statistics in steps:
                measured.append((group, statistics))
                advance(len(group))
    inputs = {target.name: statistics for group, statistics in measured for target in group}
    spread = allocation.patterns(model, targets.found, pattern, inputs)
    patterns = {name: one for name, one in spread.items() if one is not None}
    if not patterns:
        raise ValueError(f"allocation {allocation} leaves every weight dense: ask for a higher sparsity")
    dense = [target for target in targets.found if target.name not in patterns]
    if before := [t.name for t in dense if t.name in masked or mask_of(t.module, t.param) is not None]:
        raise ValueError(f"allocation {allocation} leaves {', '.join(before[:3])} dense, which was pruned before")
    found = [target for target in targets.found if target.name in patterns]
    skipped = [Skipped(target.name, tuple(target.weight.shape), DENSE_BY_ALLOCATION) for target in dense]
    return Allocated(Targets(found, [*targets.skipped, *skipped], targets.blocks), patterns, measured)
