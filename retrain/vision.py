"""Retraining of pruned image classifiers: PERP on convolutional networks (Zimmer et al.; section 3.1, Appendix A).

The chosen parameters train by momentum SGD under a learning-rate schedule, the masks hold after every step, and the
batch norms' statistics are recalibrated at the end, when the weights are final.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import set_seed

from trisparse.retrain.batchnorm import batch_norms, recalibrate
from trisparse.retrain.groups import VISION_PRESETS, group_names
from trisparse.retrain.images import LabelledBatches, batches_of, check_labels, labels_of
from trisparse.retrain.layer_adapters import LayerAdapters
from trisparse.retrain.loop import RetrainError, Watch, autocast, random_state_kept
from trisparse.retrain.lora import fills_zeros
from trisparse.retrain.lora_layer import VARIANTS, Variant
from trisparse.retrain.precision import computing_dtype
from trisparse.retrain.processes import check_launcher, process_count
from trisparse.retrain.schedule import Linear, Schedule
from trisparse.retrain.vision_groups import VisionGroups, logits_of, vision_groups
from trisparse.retrain.vision_loop import train
from trisparse.retrain.vision_report import VisionReport
from trisparse.sparsity.mask import HoldsMask, check_masks
from trisparse.sparsity.modes import evaluating
from trisparse.sparsity.targets import is_peft_wrapped

_DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class VisionConfig:
    """How to retrain an image classifier. Batch size, momentum and weight decay are the paper's (Table 3).

    Attributes:
        groups: a preset, each of which holds those before it: "bn-recalibrate" (no gradient at all), "biases",
            "norms", "linear-probing", "perp", "full"; or which of "biases", "norms", "head", "lora" and "full" train.
        schedule: the learning rate; the paper takes :class:`trisparse.retrain.schedule.ALLR`, which has to know the
            original training and what pruning changed. The default falls from the paper's 0.1 to 0.
        variant: LoRA of the pruned layers but the head: "lora_prune", "mask_lora" or "scale_lora", or "lora" where
            whole filters are pruned; retrain/lora_layer.py has the formulas. All are merged in the end.
        rank: rank of every LoRA; the paper's are 1, 2, 5 and 10.
        alpha: the LoRAs' scaling is s = alpha / rank; "scale_lora" has none.
        epochs: over the data; 1 and 5 in the paper.
        batch_size: images; of data that comes in batches, theirs holds.
        momentum: SGD's.
        nesterov: Nesterov's momentum, which the authors' code takes; needs a momentum above 0.
        weight_decay: of all that trains.
        max_grad_norm: clipping of the gradient's l2 norm; 0 turns it off.
        recalibrate: measure the statistics of the batch norms over the data at the end, if the model has any.
        seed: of the order of the data, of augmentation and of dropout.
        dtype: "fp32", or "bf16" for autocast; what trains stays fp32.
        num_workers: processes that load images.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    groups: str | Sequence[str] = "norms"
    schedule: Schedule = Linear(0.1, warmup_ratio=0.0)  # noqa: RUF009 (frozen)
    variant: Variant = "mask_lora"
    rank: int = 10
    alpha: float = 10.0
    epochs: int = 1
    batch_size: int = 256
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    max_grad_norm: float = 0.0
    recalibrate: bool = True
    seed: int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    num_workers: int = 0

    def __post_init__(self) -> None:
        names = group_names(self.groups, VISION_PRESETS)
        if not isinstance(self.groups, str):  # a preset may lack some of its groups, names are all wanted
            object.__setattr__(self, "groups", names)
        if not isinstance(self.schedule, Schedule):
            raise ValueError(f"schedule must be a Schedule such as Linear(0.1), got {self.schedule!r}")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        for name, least in (("rank", 1), ("epochs", 1), ("batch_size", 1), ("seed", 0), ("num_workers", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        planned = getattr(self.schedule, "epochs", self.epochs)
        if planned != self.epochs:
            raise ValueError(f"epochs must be those of the schedule, {planned}, got {self.epochs}")
        for name in ("alpha", "momentum", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
            if not number or value < 0:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if not self.alpha:
            raise ValueError(f"alpha must be above 0, got {self.alpha!r}")
        if self.momentum >= 1:
            raise ValueError(f"momentum must be below 1, got {self.momentum!r}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov must be False without momentum, got True")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.groups == "bn-recalibrate" and not self.recalibrate:
            raise ValueError("recalibrate must be True for groups='bn-recalibrate', got False")


_DEFAULT = VisionConfig()


def retrain_vision(
    model: nn.Module, data: Any, config: VisionConfig = _DEFAULT, *, validation: Any = None, progress: bool = True
) -> VisionReport:
    """Retrain a pruned image classifier in place, keeping its zeros.

    What can be seen to be wrong with the arguments raises before anything changes, and a failure or an interrupt
    while training leaves the model as it was, but for ``.grad``, which is cleared. Modes and flags are put back.

    Under ``torchrun`` every process calls this with the same arguments and holds the whole model. They share the
    batches among them (DDP) and end with the same weights and the same statistics: recalibrated over all the data, or
    the first process's, as DDP has it in every forward.

    Args:
        model: maps pixel values [batch, channels, height, width], its first argument, to logits [batch, classes]: a
            tensor, an output with ``logits`` such as that of transformers' image classifiers, or a tuple.
        data: to train on, labelled images; see :func:`trisparse.retrain.images.batches_of`.
        config: what trains, and how.
        validation: labelled images to measure the accuracy on, before and after.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the model or the data does not fit ``config``.
        MaskError: a pruned weight is not zero.
        RetrainError: the loss, the gradient or a trained parameter became NaN or infinite.
    """
    check_launcher()
    _check(model)
    batches = batches_of(data, config.batch_size, train=True, seed=config.seed, num_workers=config.num_workers)
    held_out = None if validation is None else _held_out(validation, config)
    device = _device(model)
    dtype = computing_dtype(config.dtype, device)
    norms = batch_norms(model)
    if config.groups == "bn-recalibrate" and not norms:
        raise ValueError("groups='bn-recalibrate' needs a batch norm with running statistics, the model has none")
    with random_state_kept(), autocast(device, dtype):
        groups = vision_groups(model, _names(config), next(batches.images()))
    if config.variant == "lora" and (full := [name for name in groups.lora if fills_zeros(model.get_submodule(name))]):
        raise ValueError(
            f"variant='lora' cannot be merged: it would fill the zeros of {full[0]}; take lora_prune, mask_lora or "
            "scale_lora"
        )
    for part, labelled in ((data, batches), (validation, held_out)):
        if labelled is None:
            continue
        labelled.classes = groups.classes
        if (labels := labels_of(part)) is not None:
            check_labels(labels, groups.classes)

    # several processes share the batches among them
    steps = config.epochs * -(-len(batches) // process_count()) if groups.trained else 0
    watch = Watch(steps, progress=progress and steps > 0)
    accuracies = []
    with random_state_kept(), _restored_on_failure(model, groups):
        set_seed(config.seed)
        if held_out is not None:
            accuracies.append(_accuracy(model, held_out, config))
        trained = groups.parameters(model)
        with LayerAdapters(model, groups.lora, config.variant, config.rank, config.alpha) as adapters:
            trained.update(adapters.parameters)
            if steps:
                with watch:
                    train(model, trained, batches, config, watch, steps=steps, dtype=dtype)
            adapters.merge()
            recalibrated = 0
            if config.recalibrate and norms:
                with autocast(device, dtype):
                    recalibrated = recalibrate(model, batches.images())
            _check_finite(model, groups, steps)
            if held_out is not None:
                accuracies.append(_accuracy(model, held_out, config))
            check_masks(model)
    trainable = {
        group: sum(model.get_parameter(name).numel() for name in names) for group, names in groups.trained.items()
    }
    if "lora" in trainable:
        trainable["lora"] = sum(factor.numel() for factor in adapters.parameters.values())
    return VisionReport(
        steps=steps,
        epochs=config.epochs if steps else 0,
        seconds=watch.seconds,
        trainable=trainable,
        total_parameters=sum(param.numel() for param in model.parameters()),
        losses=watch.losses,
        recalibrated=recalibrated,
        missing=list(groups.missing),
        not_covered=list(groups.not_covered),
        accuracy=(accuracies[0], accuracies[1]) if held_out is not None else None,
    )


def accuracy(model: nn.Module, data: Any, *, batch_size: int = 256) -> float:
    """Share of ``data`` whose label is the highest logit (top-1), in eval mode; the modes are put back.

    Args:
        model: as in :func:`retrain_vision`.
        data: labelled images; see :func:`trisparse.retrain.images.batches_of`.
        batch_size: images at a time, for what is not in batches yet.

    Raises:
        ValueError: no labelled images, or a label that is no class of the model.
    """
    return _accuracy(model, batches_of(data, batch_size, train=False))


@torch.no_grad()
def _accuracy(model: nn.Module, batches: LabelledBatches, config: VisionConfig = _DEFAULT) -> float:
    device = _device(model)
    right = total = 0
    with evaluating(model), autocast(device, computing_dtype(config.dtype, device)):
        for batch in batches:
            logits = logits_of(model(batch["pixel_values"].to(device)))
            check_labels(batch["labels"], logits.shape[1])
            right += int((logits.argmax(1).cpu() == batch["labels"].cpu()).sum())
            total += len(logits)
    return right / total


def _held_out(validation: Any, config: VisionConfig) -> LabelledBatches:
    return batches_of(validation, config.batch_size, train=False, num_workers=config.num_workers)


def _names(config: VisionConfig) -> str | tuple[str, ...]:
    return config.groups if isinstance(config.groups, str) else tuple(config.groups)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module) or not any(True for _ in model.parameters()):
        raise ValueError(f"model must be a torch module with parameters, got {type(model).__name__}")
    if is_peft_wrapped(model):
        raise ValueError("model is wrapped by PEFT already: merge_and_unload() or unload() it first")
    if any(param.is_meta for param in model.parameters()):
        raise ValueError("model is on the meta device: it has no weights to retrain")
    if dtypes := {str(param.dtype) for param in model.parameters()} - {"torch.float32"}:
        raise ValueError(f"model must be in fp32, this one has {', '.join(sorted(dtypes))}: call model.float() first")
    if any(isinstance(module, HoldsMask) for module in model.modules()):
        raise ValueError("model holds compressed layers: decompress() it first")
    check_masks(model)


def _check_finite(model: nn.Module, groups: VisionGroups, steps: int) -> None:
    for name, tensor in (*groups.parameters(model).items(), *model.named_buffers()):
        if not torch.isfinite(tensor).all():
            raise RetrainError(f"{name} is not finite after step {steps}; the model is as it was before")


@contextmanager
def _restored_on_failure(model: nn.Module, groups: VisionGroups) -> Iterator[None]:
    """Flags, modes and gradients put back at the end, and after an error what trains and the buffers as well."""
    flags = [(param, param.requires_grad) for param in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    changed: list[tuple[Tensor, Tensor]] = [
        (tensor, tensor.detach().clone()) for tensor in (*groups.parameters(model).values(), *model.buffers())
    ]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, before in changed:
                tensor.copy_(before)
        raise
    finally:
        for param, flag in flags:
            param.requires_grad_(flag)
            param.grad = None
        for module, training in modes:
            module.training = training
