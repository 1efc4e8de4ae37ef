"""Iterative pruning: prune a little, retrain, and again, until the target sparsity is reached.

IMP (Han et al. 2015; PERP, Zimmer et al. 2023, section 2.1): each cycle prunes the model to the next sparsity of a
schedule, what was pruned before goes first, and retrains it. With :class:`GradualFreezing` a cycle updates every
pruned layer in turn, so that magnitudes stay comparable and no layer collapses (PERP, section 3.4).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trisparse.retrain.batch_settings import batch_settings
from trisparse.retrain.cycles_journal import CyclesJournal
from trisparse.retrain.cycles_report import CycleReport, CyclesReport
from trisparse.retrain.distillation import check_teacher
from trisparse.retrain.freezing import FreezingCallback, GradualFreezing
from trisparse.retrain.perp import PERPConfig, autocast_dtype, check_grid, parameter_count, retrain, training_windows
from trisparse.retrain.processes import chosen_sharding, process_count
from trisparse.retrain.report import RetrainReport
from trisparse.retrain.run_folder import checkpoints, run_identity
from trisparse.retrain.sparsity_schedule import SCHEDULES, SparsitySchedule, pattern_schedule
from trisparse.sparsity.calibration import PROPAGATE, Propagate
from trisparse.sparsity.interrupt import interrupt_after
from trisparse.sparsity.mask import HoldsMask, Mask, MaskError, attach, check_masks, detach, mask_of
from trisparse.sparsity.metric import Method, Score, find_metric
from trisparse.sparsity.pattern import Pattern, Rows, Unstructured, kept_of, parse_pattern
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.selection import check_pattern, select
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.targets import Target, find_targets, is_peft_wrapped


class LayerCollapseError(ValueError):
    """A layer would be pruned wholly."""


@dataclass(frozen=True)
class CyclesConfig:
    """How to prune in cycles.

    Attributes:
        cycles: how many.
        schedule: "linear", "cubic" or "geometric", see :mod:`trisparse.retrain.sparsity_schedule`.
        method: as of :func:`trisparse.sparsity.sparsify.sparsify`.
        retraining: of each cycle; the seed rises by one from cycle to cycle. In ``output_dir`` each has a folder of its
            own, ``cycle-1`` and so on, for its checkpoints and what it ended with. With ``resume`` a run that was
            killed goes on with the cycle it was in; calibration data is not compared then. A learning rate of "grid" is
            chosen in each cycle.
        freezing: gradual freezing of the pruned layers in each cycle, or None.
        allow_collapse: go on where a layer is wholly pruned.
        include, exclude: of ``sparsify``.
        samples: calibration sequences, of ``retraining.seq_len`` tokens, for a method that needs them.
        propagate: of ``sparsify``.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    cycles: int = 3
    schedule: SparsitySchedule = "geometric"
    method: Method = "magnitude"
    retraining: PERPConfig = field(default_factory=PERPConfig)
    freezing: GradualFreezing | None = None
    allow_collapse: bool = False
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    samples: int = 128
    propagate: Propagate = "block"

    def __post_init__(self) -> None:
        for name in ("cycles", "samples"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name, allowed in (("schedule", SCHEDULES), ("propagate", PROPAGATE)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, kind, described in (
            ("retraining", PERPConfig, "a PERPConfig"),
            ("freezing", GradualFreezing | None, "a GradualFreezing or None"),
            ("allow_collapse", bool, "True or False"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be {described}, got {getattr(self, name)!r}")
        if not self.retraining.merge:
            raise ValueError("retraining.merge must be True, got False: a cycle prunes merged weights")
        if self.freezing is not None and process_count() > 1:
            raise ValueError(f"freezing must be None with {process_count()} processes: DDP waits for every gradient")
        groups = set(self.retraining.groups)
        if self.freezing is not None and not groups & {"lora", "full"}:
            raise ValueError(
                f"freezing is of the pruned layers, and groups={tuple(self.retraining.groups)} trains none of their "
                "weights: add 'lora'"
            )
        if self.freezing is not None and self.freezing.mode == "freeze" and groups <= {"lora", "biases"}:
            raise ValueError("freezing leaves nothing to train in the last stage: add 'norms' or 'head' to the groups")


_DEFAULT = CyclesConfig()


def prune_cycles(
    model: Any,
    target: float | str | Pattern,
    data: Any,
    config: CyclesConfig = _DEFAULT,
    *,
    tokenizer: Any = None,
    calibration: Any = None,
    validation: Any = None,
    teacher: Any = None,
    progress: bool = True,
) -> CyclesReport:
    """Prune a causal language model in place to ``target``, in cycles of pruning and retraining.

    Weights that are pruned stay pruned, also those that the model's masks prune already. An n:m target is reached by
    n':m with n' falling (2:4 in two cycles: 3:4, 2:4).

    Args:
        model: a transformers causal language model, with or without masks.
        target: ``0.5``, ``"50% layer"``, ``"2:4"`` or a Pattern.
        data: to retrain on; token ids or text, see :func:`trisparse.sparsity.data.token_windows`.
        config: how.
        tokenizer: for text.
        calibration: for a method that needs data; by default ``data``.
        validation: data whose perplexity is measured in each cycle, and by which a "grid" of learning rates is chosen.
        teacher: the dense model to distil from while retraining; stays as it is.
        progress: show progress bars on stderr.

    Raises:
        ValueError: an argument is wrong or does not fit the others, or there is nothing to resume; nothing was changed.
        LayerCollapseError: a layer would be wholly pruned. Where ranks over all layers decide, this comes up in the
            cycle that would do it, and the model is as the cycle before left it.
        MaskError: a pruned weight is not zero.
        RetrainError: retraining failed. This and what else comes up later carries a note that says which cycle it was.
    """
    start = time.perf_counter()
    own = config.retraining
    chosen_sharding(own.sharding)
    check_grid(own, validation)
    pattern = parse_pattern(target)
    find_metric(config.method, has_data=True)
    targets, present = checked_targets(model, pattern, config)
    patterns = pattern_schedule(config.schedule, present, pattern, config.cycles)
    check_nested(targets, patterns[0])
    if not config.allow_collapse:
        check_sizes(targets, pattern)
    if teacher is not None:
        check_teacher(teacher, model)
    batch = batch_settings(own, parameter_count(model))
    windows, held_out = training_windows(model, data, validation, own, batch, tokenizer, runs=config.cycles)
    journal = None
    if own.output_dir is not None:
        dtype = autocast_dtype(model, own)
        identity = run_identity(own, batch, dtype, model, windows, validation=held_out, teacher=teacher)
        identity |= {name: str(value) for name, value in vars(config).items() if name != "retraining"}
        journal = CyclesJournal(Path(own.output_dir), identity | {"target": str(pattern)})
    calibration = windows if calibration is None else calibration
    cycles = _Cycles(model, targets, windows, held_out, calibration, tokenizer, teacher, config)
    rows: list[CycleReport] = []
    goes_on = journal is not None and (own.resume is True or (own.resume == "auto" and journal.exists()))
    if journal is not None and goes_on:
        before, rows = journal.resume(model)
    else:
        before = None if held_out is None else perplexity(model, held_out, seq_len=own.seq_len)
        if journal is not None:
            journal.start(before)
    resumed = len(rows) + 1 if goes_on else None
    for number, step in list(enumerate(patterns, start=1))[len(rows) :]:
        try:
            rows.append(cycles.run(number, step, resume=number == resumed, progress=progress))
            if journal is not None:
                journal.finish(model, rows[-1])
        except BaseException as error:
            error.add_note(f"prune_cycles stopped in cycle {number} of {config.cycles}, at {step}")
            raise
    return CyclesReport(
        target=str(pattern),
        schedule=config.schedule,
        method=rows[-1].method,
        start_sparsity=present,
        perplexity_before=before,
        seconds=time.perf_counter() - start,
        cycles=rows,
    )


class _Cycles:
    """What all cycles share."""

    def __init__(
        self,
        model: Any,
        targets: Sequence[Target],
        windows: Tensor,
        held_out: Tensor | None,
        calibration: Any,
        tokenizer: Any,
        teacher: Any,
        config: CyclesConfig,
    ) -> None:
        self.model, self.targets, self.windows, self.held_out = model, targets, windows, held_out
        self.calibration, self.tokenizer, self.teacher, self.config = calibration, tokenizer, teacher, config
        self.method = str(config.method)

    def run(self, number: int, pattern: Pattern, *, resume: bool, progress: bool) -> CycleReport:
        """Prune to ``pattern``, measure, retrain (from its last checkpoint, if it has one, to ``resume``), measure."""
        start = time.perf_counter()
        sparsity, collapsed = self._prune(number, pattern, progress=progress)
        pruned = time.perf_counter()
        before = self._perplexity()
        retraining, share = self._retrain(number, resume=resume, progress=progress)
        return CycleReport(
            pattern=str(pattern),
            method=self.method,
            sparsity=sparsity,
            first_loss=retraining.first_loss,
            last_loss=retraining.last_loss,
            perplexity_pruned=before,
            perplexity=self._perplexity(),
            pruning_seconds=pruned - start,
            retraining_seconds=retraining.seconds,
            trainable_share=share,
            learning_rate=retraining.learning_rate,
            missing=retraining.missing,
            not_covered=retraining.not_covered,
            skipped_steps=retraining.skipped_steps,
            collapsed=collapsed,
        )

    def _prune(self, number: int, pattern: Pattern, *, progress: bool) -> tuple[float, list[str]]:
        config = self.config
        earlier = _masks_of(self.targets)
        # Only ranks over all layers can surprise; the other budgets are known from the shapes.
        together = isinstance(pattern, Unstructured) and pattern.scope == "global"
        kept_back = together and not config.allow_collapse
        weights = [target.weight.detach().clone() for target in self.targets] if kept_back else []
        report = sparsify(
            self.model,
            pattern,
            config.method,
            self.calibration,
            tokenizer=self.tokenizer,
            include=config.include,
            exclude=config.exclude,
            samples=config.samples,
            seq_len=config.retraining.seq_len,
            seed=config.retraining.seed + number - 1,
            propagate=config.propagate,
            progress=progress,
        )
        self.method = report.method
        masked = _masks_of(self.targets)
        collapsed = [target.name for target in self.targets if (mask := masked[target.name]) and not mask.kept]
        if collapsed and kept_back:
            _restore(self.targets, weights, earlier)
            raise LayerCollapseError(
                f"{pattern} would prune {', '.join(collapsed)} wholly: use more cycles, freezing, a lower target or "
                "scope 'layer', or allow_collapse=True"
            )
        for name, mask in earlier.items():
            if mask and (new := masked[name]) and bool((new.bits & ~mask.bits).any()):
                raise MaskError(f"{name}: {pattern} would keep weights that were pruned before")
        return report.sparsity, collapsed

    def _retrain(self, number: int, *, resume: bool, progress: bool) -> tuple[RetrainReport, float]:
        own, freezing = self.config.retraining, self.config.freezing
        folder = None if own.output_dir is None else Path(own.output_dir) / f"cycle-{number}"
        goes_on = resume and folder is not None and bool(checkpoints(folder))
        config = replace(own, seed=own.seed + number - 1, output_dir=folder, resume=goes_on)
        callbacks = [] if freezing is None else [FreezingCallback(freezing, self.model)]
        report = retrain(
            self.model,
            self.windows,
            config,
            validation=self.held_out if own.learning_rate == "grid" else None,
            teacher=self.teacher,
            progress=progress,
            callbacks=callbacks,
        )
        share = callbacks[0].mean_trainable / report.total_parameters if callbacks else report.trainable_share
        return report, share

    def _perplexity(self) -> float | None:
        if self.held_out is None:
            return None
        return perplexity(self.model, self.held_out, seq_len=self.config.retraining.seq_len)


def checked_targets(model: Any, pattern: Pattern, config: CyclesConfig) -> tuple[list[Target], float]:
    """The targets and their present sparsity; see :func:`prune_cycles` for what raises."""
    if is_peft_wrapped(model):
        raise ValueError("model is wrapped by PEFT: merge_and_unload() or unload() it first")
    if any(isinstance(module, HoldsMask) for module in model.modules()):
        raise ValueError("model holds compressed layers, which cannot be pruned further: decompress(model) first")
    if not callable(getattr(model, "get_output_embeddings", None)) or not hasattr(model, "config"):
        raise ValueError(f"model must be a transformers causal language model, got {type(model).__name__}")
    check_masks(model)
    targets = find_targets(model, include=config.include, exclude=config.exclude).found
    check_pattern(targets, pattern)
    total = sum(target.weight.numel() for target in targets)
    kept = sum(
        target.weight.numel() if (mask := mask_of(target.module, target.param)) is None else mask.kept
        for target in targets
    )
    return targets, 1 - kept / total


def check_nested(targets: Sequence[Target], pattern: Pattern) -> None:
    """Check that ``pattern`` can prune all that is pruned already; the patterns after it can then, too.

    Raises:
        ValueError: names the weights of which some would come back.
    """
    if isinstance(pattern, Unstructured) and pattern.scope == "global":
        return  # one budget for all, which is above what is pruned
    back = []
    for target in targets:
        present = mask_of(target.module, target.param)
        if present is not None:
            # Ranked by the present mask alone, the weights that are pruned go first, as far as the budget reaches.
            parts = [Score(part) for part in present.matrix().float().chunk(target.parts)]
            if bool((select(target, parts, pattern).bits & ~present.bits).any()):
                back.append(target.name)
    if back:
        more = f" and {len(back) - 3} more" if len(back) > 3 else ""
        raise ValueError(
            f"target: the first cycle's {pattern} has no room for all that is pruned already in "
            f"{', '.join(back[:3])}{more}: use fewer cycles, or a target of the kind of the present masks"
        )


def check_sizes(targets: Sequence[Target], pattern: Pattern) -> None:
    """Check that the budget of ``pattern`` leaves every layer a weight, as far as shapes tell.

    Raises:
        LayerCollapseError: names the layers.
    """
    collapsed = []
    for target in targets:
        rows = target.weight.numel() // target.cols
        if isinstance(pattern, Rows):
            kept = kept_of(rows, pattern.sparsity)
        elif isinstance(pattern, Unstructured) and pattern.scope != "global":
            kept = kept_of(target.cols if pattern.scope == "row" else target.weight.numel(), pattern.sparsity)
        else:
            continue
        if kept == 0:
            collapsed.append(target.name)
    if collapsed:
        raise LayerCollapseError(
            f"target {pattern} would prune {', '.join(collapsed[:3])} wholly ({len(collapsed)} layers): use a lower "
            "one, exclude them, or allow_collapse=True"
        )


def _masks_of(targets: Sequence[Target]) -> dict[str, Mask | None]:
    return {target.name: mask_of(target.module, target.param) for target in targets}


def _restore(targets: Sequence[Target], weights: Sequence[Tensor], earlier: Mapping[str, Mask | None]) -> None:
    """Put weights and masks back as they were before a cycle pruned them."""
    with interrupt_after(), torch.no_grad():
        for target, weight in zip(targets, weights, strict=True):
            target.weight.copy_(weight)
        for module in {id(target.module): target.module for target in targets}.values():
            detach(module)
        for target in targets:
            if (mask := earlier[target.name]) is not None:
                attach(target.module, target.param, mask)
