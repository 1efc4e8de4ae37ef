"""One optimizer step of PERP and of full fine-tuning with the mask applied again: what the speed benchmarks time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trisparse.retrain.adapters import Adapted
from trisparse.retrain.batch_settings import BatchSettings
from trisparse.retrain.groups import parameter_groups
from trisparse.retrain.loop import Watch, autocast, trainer_for, with_labels
from trisparse.retrain.perp import PERPConfig
from trisparse.sparsity.mask import masks

# groups and variant of each; None is full fine-tuning, the usual code
CONTESTANTS: dict[str, tuple[tuple[str, ...], str] | None] = {
    "full": None,
    "lora": (("lora",), "lora"),
    "mask_lora + norms + head": (("norms", "head", "lora"), "mask_lora"),
    "norms only": (("norms",), "mask_lora"),
}


@dataclass(frozen=True)
class TrainingStep:
    """A step on a batch of token ids [batch, seq_len].

    Attributes:
        module: the model that trains, with its adapters.
        run: forward, backward, optimizer.
    """

    module: nn.Module
    run: Callable[[Tensor], None]

    def __call__(self, windows: Tensor) -> None:
        """Take the step."""
        self.run(windows)


def usual_step(model: Any, *, checkpointing: bool, dtype: torch.dtype | None = None) -> TrainingStep:
    """Full fine-tuning as it is usually written: every parameter trains, then the mask is multiplied on.

    ``dtype`` is autocast's, None for none.
    """
    model.config.use_cache = False
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    pruned = []
    for name, mask in masks(model).items():
        param = model.get_parameter(name)
        keep = mask.dense().to(param.device)
        pruned.append((param, keep if keep.is_cuda else keep.to(param.dtype)))  # a CPU is slow with a bool
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)

    def step(windows: Tensor) -> None:
        with autocast(device, dtype):
            loss = model(**with_labels(windows)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for param, keep in pruned:
                param.mul_(keep)

    return TrainingStep(model, step)


def perp_step(
    model: Any, groups: tuple[str, ...], variant: str, *, checkpointing: bool, dtype: torch.dtype | None = None
) -> TrainingStep:
    """A step of ours: the adapters and the loss of ``retrain``; ``dtype`` is autocast's, None for none."""
    batch, seq_len = 2, 512  # of the loop, which takes no step here
    config = PERPConfig(groups, variant, merge=False, steps=1, batch_size=batch, seq_len=seq_len, dtype="fp32")  # type: ignore[arg-type]
    adapted = Adapted(model, parameter_groups(model), groups, config.rank, config.alpha, config.variant)
    adapted.switch_cache_off()
    module = adapted.module.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(1, progress=False)
        trainer: Any = trainer_for(
            module, torch.zeros(batch, seq_len).long(), config, watch, batch=BatchSettings(batch, 1),
            learning_rate=1e-5, folder=folder, dtype=dtype,
        )  # fmt: skip
    trained = [param for param in module.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)

    def step(windows: Tensor) -> None:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(module, with_labels(windows))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return TrainingStep(module, step)


def step_of(name: str, model: Any, *, checkpointing: bool = False, dtype: torch.dtype | None = None) -> TrainingStep:
    """The training step of a contestant on ``model``, which it takes for itself."""
    chosen = CONTESTANTS[name]
    if chosen is None:
        return usual_step(model, checkpointing=checkpointing, dtype=dtype)
    return perp_step(model, *chosen, checkpointing=checkpointing, dtype=dtype)
