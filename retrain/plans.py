"""What cycles, a reconstruction and the retraining of an image classifier will take, before they start.

Like :mod:`trisparse.retrain.estimate` for PERP itself: counts are exact, memory is an estimate on each device.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import nn

from trisparse.retrain.cycles import CyclesConfig, check_nested, check_sizes, checked_targets
from trisparse.retrain.estimate import MemoryEstimate, RetrainingPlan, counting_saved, retraining_plan, stored_bytes
from trisparse.retrain.groups import parameter_groups, trainable_parameters
from trisparse.retrain.images import batches_of
from trisparse.retrain.layer_adapters import LayerAdapters
from trisparse.retrain.loop import autocast, random_state_kept
from trisparse.retrain.lora import factor_sizes
from trisparse.retrain.precision import computing_dtype
from trisparse.retrain.processes import process_count
from trisparse.retrain.reconstruct import ReconstructConfig
from trisparse.retrain.sparsity_schedule import pattern_schedule
from trisparse.retrain.vision import VisionConfig
from trisparse.retrain.vision_groups import logits_of, vision_groups
from trisparse.sparsity.mask import Mask, attach, check_masks, detach, mask_of, masks
from trisparse.sparsity.metric import find_metric
from trisparse.sparsity.pattern import Pattern, parse_pattern
from trisparse.sparsity.report import as_text
from trisparse.sparsity.targets import find_blocks


@dataclass(frozen=True)
class CyclesPlan:
    """What :func:`trisparse.retrain.cycles.prune_cycles` would do.

    Attributes:
        patterns: that each cycle prunes to.
        retraining: of each cycle, where nothing were pruned yet: whole pruned rows take less. Pruning itself, and
            calibrating for it, comes before and is not counted.
    """

    patterns: list[str]
    retraining: RetrainingPlan

    def to_dict(self) -> dict[str, Any]:
        """Every attribute, as plain Python values."""
        return {"patterns": self.patterns, "retraining": self.retraining.to_dict()}

    def __str__(self) -> str:
        return f"{len(self.patterns)} cycles: {' -> '.join(self.patterns)}; each of them\n{self.retraining}"


def cycles_plan(
    model: Any, target: float | str | Pattern, config: CyclesConfig, *, teacher: Any = None, validation: Any = None
) -> CyclesPlan:
    """What ``prune_cycles(model, target, ...)`` would do and take; the model is left as it was.

    ``validation`` is not read, but a grid of learning rates needs one.

    Raises:
        ValueError: the model or ``target`` does not fit ``config``; as of ``prune_cycles``.
        LayerCollapseError: a layer would be wholly pruned, as far as shapes tell.
        MaskError: a pruned weight is not zero.
    """
    pattern = parse_pattern(target)
    find_metric(config.method, has_data=True)
    targets, present = checked_targets(model, pattern, config)
    patterns = pattern_schedule(config.schedule, present, pattern, config.cycles)
    check_nested(targets, patterns[0])
    if not config.allow_collapse:
        check_sizes(targets, pattern)
    earlier = [(one, mask) for one in targets if (mask := mask_of(one.module, one.param)) is not None]
    bare = [one for one in targets if mask_of(one.module, one.param) is None]
    try:
        for one in bare:  # the groups are told by the masks
            rows = one.weight.numel() // one.cols
            keep = torch.ones(rows, one.cols, dtype=torch.bool)
            attach(one.module, one.param, Mask.from_matrix(keep, one.weight.shape, pattern, transposed=one.transposed))
        plan = retraining_plan(model, config.retraining, teacher=teacher, validation=validation)
    finally:
        for one in bare:
            detach(one.module)
        for one, mask in earlier:  # of modules of which only some parameters had masks
            attach(one.module, one.param, mask)
    return CyclesPlan([str(step) for step in patterns], plan)


@dataclass(frozen=True)
class ReconstructionPlan:
    """What :func:`trisparse.retrain.reconstruct.reconstruct` would do.

    Attributes:
        blocks: how many.
        trainable: parameters that train, over all blocks.
        largest: of one block, the largest; only one trains at a time.
        total_parameters: of the model.
        steps: optimizer steps, over all blocks.
        tokens: of the calibration data.
        hidden_states: bytes of the three sets of hidden states (fp32).
        memory: bytes of the model with one dense block in fp32, of the gradients and AdamW's moments of one block, and
            of the hidden states. The activations of one block for one batch come on top.
    """

    blocks: int
    trainable: int
    largest: int
    total_parameters: int
    steps: int
    tokens: int
    hidden_states: int
    memory: int

    def to_dict(self) -> dict[str, Any]:
        """Every attribute, as plain Python values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        table = Table("reconstruction", "dry run", show_lines=False)
        table.add_row("blocks", f"{self.blocks}, one after the other")
        table.add_row("trained", f"{self.trainable:,} of {self.total_parameters:,}, at most {self.largest:,} at a time")
        table.add_row("steps", f"{self.steps:,} over all blocks, on {self.tokens:,} tokens")
        table.add_row("hidden states", f"{self.hidden_states / 2**20:,.1f} MiB")
        table.add_row("memory", f"{self.memory / 2**20:,.1f} MiB and the activations of one block, estimated")
        return as_text(table)


def reconstruction_plan(model: Any, config: ReconstructConfig) -> ReconstructionPlan:
    """What ``reconstruct(model, ...)`` would do and take; the model is left as it was.

    Raises:
        ValueError: no blocks with masks, or nothing to train in them.
        MaskError: a pruned weight is not zero.
    """
    check_masks(model)
    masked = masks(model)
    found = find_blocks(model)
    stacks = {block.stack for block in found if any(name.startswith(f"{block.name}.") for name in masked)}
    blocks = [block for block in found if block.stack in stacks]
    if not blocks:
        raise ValueError("model has no repeated blocks with masks: reconstruction goes block by block")
    groups = parameter_groups(model)
    counts, sizes = [], []
    for block in blocks:
        prefix = f"{block.name}."
        inside = {
            name: tuple(member for member in getattr(groups, name) if member.startswith(prefix))
            for name in ("biases", "norms", "lora", "full")
        }
        counts.append(
            sum(trainable_parameters(model, replace(groups, **inside), tuple(config.groups), config.rank).values())
        )
        sizes.append(sum(param.numel() for param in block.module.parameters()))
    if not any(counts):
        raise ValueError(f"model has nothing to train in groups={tuple(config.groups)} inside its blocks")
    tokens = config.samples * config.seq_len
    hidden = 3 * 4 * tokens * model.get_input_embeddings().weight.shape[1]
    # the trained block and the dense one are in fp32, with a gradient and two moments for each number that trains
    block_bytes = 2 * 4 * max(sizes) + 4 * 4 * max(counts)
    return ReconstructionPlan(
        blocks=len(blocks),
        trainable=sum(counts),
        largest=max(counts),
        total_parameters=sum(param.numel() for param in model.parameters()),
        steps=config.steps * len(blocks),
        tokens=tokens,
        hidden_states=hidden,
        memory=stored_bytes(model) + block_bytes + hidden,
    )


@dataclass(frozen=True)
class VisionPlan:
    """What :func:`trisparse.retrain.vision.retrain_vision` would do.

    Attributes:
        trainable: parameters that train, per group.
        total_parameters: of the model.
        missing, not_covered: as of the report.
        steps, epochs: optimizer steps, and passes over the data; no steps where nothing trains.
        batch: images of a step, processes.
        memory: of training; the optimizer has SGD's momentum. Activations grow with the batch, as two forwards of a few
            images say.
    """

    trainable: dict[str, int]
    total_parameters: int
    missing: list[str]
    not_covered: list[str]
    steps: int
    epochs: int
    batch: tuple[int, int]
    memory: MemoryEstimate

    @property
    def trainable_share(self) -> float:
        """Trained parameters over the model's."""
        return sum(self.trainable.values()) / self.total_parameters

    def to_dict(self) -> dict[str, Any]:
        """Every attribute and property, as plain Python values."""
        values = {**dataclasses.asdict(self), "trainable_share": self.trainable_share, "batch": list(self.batch)}
        values["memory"]["total"] = self.memory.total
        return values

    def __str__(self) -> str:
        table = Table("retraining", "dry run", show_lines=False)
        for group, count in self.trainable.items():
            table.add_row(group, f"{count:,} parameters, {count / self.total_parameters:.3%}")
        table.add_row("trained", f"{self.trainable_share:.3%} of {self.total_parameters:,}")
        if self.missing:
            table.add_row("not in the model", ", ".join(self.missing))
        for line in self.not_covered:
            table.add_row("not covered", line)
        table.add_row("steps", f"{self.steps:,} in {self.epochs} epochs of {self.batch[0]} x {self.batch[1]} images")
        for field in dataclasses.fields(self.memory):
            table.add_row(field.name, f"{getattr(self.memory, field.name) / 2**20:,.1f} MiB")
        table.add_row("memory", f"{self.memory.total / 2**20:,.1f} MiB on each device, estimated")
        return as_text(table)


def vision_plan(model: nn.Module, data: Any, config: VisionConfig) -> VisionPlan:
    """What ``retrain_vision(model, data, config)`` would do and take; the model is left as it was.

    One batch of ``data`` is read.

    Raises:
        ValueError: the model or the data does not fit ``config``.
        MaskError: a pruned weight is not zero.
    """
    check_masks(model)
    batches = batches_of(data, config.batch_size, train=True, seed=config.seed, num_workers=config.num_workers)
    tried = copy.deepcopy(model)  # forwards in training mode move the statistics of the batch norms
    device = next(tried.parameters()).device
    with random_state_kept(), autocast(device, computing_dtype(config.dtype, device)):
        images = next(batches.images())
        groups = vision_groups(tried, config.groups if isinstance(config.groups, str) else tuple(config.groups), images)
        counts = {name: sum(tried.get_parameter(n).numel() for n in names) for name, names in groups.trained.items()}
        if "lora" in counts:
            sizes = (sum(factor_sizes(tried.get_submodule(name))) for name in groups.lora)
            counts["lora"] = config.rank * sum(sizes)
        params = groups.parameters(tried)
        with LayerAdapters(tried, groups.lora, config.variant, config.rank, config.alpha) as adapters:
            params.update(adapters.parameters)
            weights = stored_bytes(tried)
            activations = _activations(tried, list(params.values()), images.to(device), len(images)) if params else 0
    processes = process_count()
    trained = sum(param.numel() * param.element_size() for param in params.values())
    steps = config.epochs * -(-len(batches) // processes) if params else 0
    return VisionPlan(
        trainable=counts,
        total_parameters=sum(param.numel() for param in model.parameters()),
        missing=list(groups.missing),
        not_covered=list(groups.not_covered),
        steps=steps,
        epochs=config.epochs if steps else 0,
        batch=(len(images), processes),
        memory=MemoryEstimate(
            weights=weights,
            gradients=trained * (1 if processes == 1 else 2),
            optimizer=trained if config.momentum else 0,
            activations=activations,
        ),
    )


def _activations(model: nn.Module, trained: list[nn.Parameter], images: torch.Tensor, batch: int) -> int:
    """Bytes that autograd keeps of a forward of ``batch`` images, from forwards of two and of four."""
    for param in model.parameters():
        param.requires_grad_(False)
    for param in trained:
        param.requires_grad_(True)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    repeated = images.repeat(-(-4 // len(images)), 1, 1, 1)
    model.train()
    measured = []
    for count in (2, 4):
        with counting_saved(own) as kept:
            logits = logits_of(model(repeated[:count]))
        del logits
        measured.append(sum(kept.values()))
    slope = (measured[1] - measured[0]) / 2
    return round(max(0.0, measured[0] - 2 * slope) + slope * batch)
