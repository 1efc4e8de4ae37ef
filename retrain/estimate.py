"""What a retraining will take, before it starts: what trains, how many steps and tokens, and how much memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from trisparse.kernels.cross_entropy import tokens_at_once
from trisparse.retrain.batch_settings import BatchSettings, batch_settings
from trisparse.retrain.distillation import check_teacher
from trisparse.retrain.loop import autocast, random_state_kept, with_labels
from trisparse.retrain.perp import (
    PERPConfig,
    autocast_dtype,
    check_grid,
    check_length,
    parameter_count,
    parameter_groups_for,
)
from trisparse.retrain.processes import chosen_sharding, process_count
from trisparse.retrain.run import adapted_for
from trisparse.retrain.sharding import training_device
from trisparse.retrain.token_loss import lean_loss, takes_lean_loss
from trisparse.sparsity.modes import training
from trisparse.sparsity.report import as_text
from trisparse.sparsity.targets import find_blocks


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device at the peak of training; the sum is an upper bound of what is alive at once.

    - weights: of the model, its buffers, its adapters and the teacher.
    - gradients: one number for each that trains; twice with several processes (DDP's buckets).
    - optimizer: AdamW's two moments, two numbers for each that trains.
    - with sharding "fsdp": of each of these the process's part. To the weights and the gradients come, whole, those
      outside the blocks and of two blocks, the one that runs and the one that is gathered meanwhile.
    - activations: what autograd keeps of a forward, plus what the backward adds to it. Kept: c0 + batch · (c1·s +
      c2·s²) for windows of s tokens, by three forwards of 8, 16 and 32 tokens. c0 is the casts of the weights under
      autocast, c2 is attention that keeps its scores. The backward adds the fp32 logits of some tokens
      (kernels/cross_entropy.py), or where the model has a loss of its own two fp32 tensors of [batch, s, vocabulary],
      the gradients of the loss and of its softmax; with a teacher another three. With gradient checkpointing each block
      keeps its input alone, and after the head's backward, which frees a tensor of that size, one block is whole again:
      its share of what is kept without checkpointing, with two gradients as wide as its widest layer. The larger of
      the two moments counts.

    Attributes:
        weights, gradients, optimizer, activations: bytes.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes of all four."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class RetrainingPlan:
    """What :func:`trisparse.retrain.perp.retrain` would do.

    Attributes:
        trainable: parameters that train, per group.
        total_parameters: of the model, pruned ones included, a shared one once.
        missing: groups asked for that the model has nothing of.
        not_covered: pruned parameters that no LoRA reaches, with the reason.
        steps: optimizer steps.
        grid_steps: steps of the short runs for the learning rate, over all rates.
        batch: windows per forward, forwards per step, processes.
        seq_len: tokens per window.
        memory: on each device.
    """

    trainable: dict[str, int]
    total_parameters: int
    missing: list[str]
    not_covered: list[str]
    steps: int
    grid_steps: int
    batch: tuple[int, int, int]
    seq_len: int
    memory: MemoryEstimate

    @property
    def tokens(self) -> int:
        """Tokens of all steps; those of the grid not counted."""
        size, accumulation, processes = self.batch
        return self.steps * size * accumulation * processes * self.seq_len

    @property
    def trainable_share(self) -> float:
        """Trained parameters over the model's."""
        return sum(self.trainable.values()) / self.total_parameters

    def to_dict(self) -> dict[str, Any]:
        """Every attribute and property, as plain Python values."""
        values = dataclasses.asdict(self) | {"tokens": self.tokens, "trainable_share": self.trainable_share}
        values["memory"]["total"] = self.memory.total
        values["batch"] = list(self.batch)
        return values

    def __str__(self) -> str:
        table = Table("retraining", "dry run", show_lines=False)
        for group, count in self.trainable.items():
            table.add_row(group, f"{count:,} parameters, {count / self.total_parameters:.3%}")
        table.add_row("trained", f"{self.trainable_share:.3%} of {self.total_parameters:,}")
        if self.missing:
            table.add_row("missing", f"{', '.join(self.missing)}: the model has none")
        for line in self.not_covered:
            table.add_row("not covered", line)
        table.add_row("batch", "{} x {} accumulated x {} processes".format(*self.batch))
        table.add_row("steps", f"{self.steps:,} ({self.tokens:,} tokens)")
        if self.grid_steps:
            table.add_row("steps of the grid", f"{self.grid_steps:,}")
        for field in dataclasses.fields(self.memory):
            table.add_row(field.name, f"{getattr(self.memory, field.name) / 2**20:,.1f} MiB")
        table.add_row("memory", f"{self.memory.total / 2**20:,.1f} MiB on each device, estimated")
        return as_text(table, width=110)


def retraining_plan(model: Any, config: PERPConfig, *, teacher: Any = None, validation: Any = None) -> RetrainingPlan:
    """What retraining ``model`` by ``config`` would do and take; the model is left as it was, and nothing is written.

    Args:
        model: as of :func:`trisparse.retrain.perp.retrain`.
        config: likewise.
        teacher: likewise.
        validation: likewise; it is not read, but a grid of learning rates needs one.

    Raises:
        ValueError: the model does not fit ``config``.
        MaskError: a pruned weight is not zero.
    """
    config = dataclasses.replace(config, sharding=chosen_sharding(config.sharding))
    check_grid(config, validation)
    groups = parameter_groups_for(model, config)
    check_length(model, config)
    dtype = autocast_dtype(model, config)
    if teacher is not None:
        check_teacher(teacher, model)
    total = parameter_count(model)
    batch = batch_settings(config, total)
    with random_state_kept():
        adapted = adapted_for(model, groups, config, trains=False)
        try:
            adapted.switch_cache_off()
            memory = _memory(adapted.module, model, config, batch, dtype, teacher)
        finally:
            adapted.discard()
    return RetrainingPlan(
        trainable=adapted.trainable,
        total_parameters=total,
        missing=[group for group in config.groups if not getattr(groups, group)],
        not_covered=list(groups.not_covered) if "lora" in config.groups else [],
        steps=config.steps,
        grid_steps=config.grid_steps * len(config.learning_rates) if config.learning_rate == "grid" else 0,
        batch=(batch.size, batch.accumulation, process_count()),
        seq_len=config.seq_len,
        memory=memory,
    )


def _memory(
    model: nn.Module, bare: Any, config: PERPConfig, batch: BatchSettings, dtype: torch.dtype | None, teacher: Any
) -> MemoryEstimate:
    trained = sum(param.numel() * param.element_size() for param in model.parameters() if param.requires_grad)
    tokens, vocabulary = batch.size * config.seq_len, bare.get_input_embeddings().weight.shape[0]
    logits = 4 * tokens * vocabulary
    lean = takes_lean_loss(model)
    kept = _kept_bytes(model, batch.size, config.seq_len, dtype)
    sharded = config.sharding == "fsdp"
    device = training_device(model) if sharded else next(model.parameters()).device
    at_once = tokens_at_once(vocabulary, device.type)
    of_loss = 4 * min(tokens, at_once) * vocabulary if lean else 2 * logits
    of_loss += 0 if teacher is None else 3 * logits
    activations = kept + of_loss
    if config.gradient_checkpointing:
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        sizes = [size for block in blocks for param in block.parameters() for size in param.shape[1:]]
        if not bare.is_activation_checkpointing:
            bare.activation_checkpointing_enable({"use_reentrant": False})
        inputs = _kept_bytes(model, batch.size, config.seq_len, dtype)
        itemsize = 4 if dtype is None else dtype.itemsize
        freed = logits * itemsize // 4 if lean else logits
        in_flight = 2 * tokens * max(sizes, default=0) * itemsize
        activations = inputs + max(of_loss, (kept - inputs) / max(len(blocks), 1) + in_flight - freed)
    models = [model] if teacher is None else [model, teacher]
    if sharded:
        buffers = sum(buffer.nbytes for held in models for buffer in held.buffers())
        return MemoryEstimate(
            weights=buffers + sum(_sharded_bytes(held) for held in models),
            gradients=_sharded_bytes(model, trained=True),
            optimizer=-(-2 * trained // process_count()),
            activations=round(activations),
        )
    return MemoryEstimate(
        weights=sum(map(stored_bytes, models)),
        gradients=trained * (1 if process_count() == 1 else 2),
        optimizer=2 * trained,
        activations=round(activations),
    )


def _sharded_bytes(model: nn.Module, *, trained: bool = False) -> int:
    """Bytes of parameters in a process's part and in what is gathered at a time; of those that train, if so asked."""

    def size(module: nn.Module) -> int:
        return sum(param.nbytes for param in module.parameters() if param.requires_grad or not trained)

    blocks = sorted(size(block.module) for block in find_blocks(model))
    everything = size(model)
    return -(-everything // process_count()) + everything - sum(blocks) + sum(blocks[-2:])


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, a shared storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for storage in storages.values())


def _kept_bytes(model: Any, rows: int, seq_len: int, dtype: torch.dtype | None) -> float:
    """Bytes that autograd keeps of a forward of [rows, seq_len] tokens, from forwards of one short row."""
    device = next(model.parameters()).device
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    longest = max(8, min(32, seq_len))
    probes = (longest // 4, longest // 2, longest)
    measured = []
    with training(model):
        for length in probes:
            ids = (torch.arange(length, device=device) % model.get_input_embeddings().weight.shape[0])[None]
            with counting_saved(own) as kept, autocast(device, dtype), lean_loss(model):
                loss = model(**with_labels(ids)).loss
            del loss
            measured.append(sum(kept.values()))
    # the parabola through the three points, by Newton's divided differences
    (s0, s1, s2), (y0, y1, y2) = probes, measured
    first, second = (y1 - y0) / (s1 - s0), (y2 - y1) / (s2 - s1)
    quadratic = (second - first) / (s2 - s0)
    linear = first - quadratic * (s0 + s1)
    constant = y0 - linear * s0 - quadratic * s0**2
    return constant + rows * (linear * seq_len + quadratic * seq_len**2)


@contextmanager
def counting_saved(own: set[int]) -> Iterator[dict[int, int]]:
    """Sizes of the storages that autograd saves inside, but for those in ``own``; each once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor.detach()  # an output kept by its own node would be a cycle

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
