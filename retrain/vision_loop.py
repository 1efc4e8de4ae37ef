"""The training loop of image classifiers: transformers' Trainer with momentum SGD, the masks held at every step."""

from __future__ import annotations

import contextlib
import tempfile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainingArguments

from trisparse.retrain.held_masks import held_masks
from trisparse.retrain.images import LabelledBatches
from trisparse.retrain.loop import Watch, autocast
from trisparse.retrain.processes import launcher_alone
from trisparse.retrain.schedule import lr_lambda
from trisparse.retrain.vision_groups import logits_of

if TYPE_CHECKING:
    from trisparse.retrain.vision import VisionConfig


class _Trainer(Trainer):
    """Cross entropy of the logits, on batches that are taken from the loader as they are."""

    batches: LabelledBatches
    autocast_dtype: torch.dtype | None

    def get_train_dataloader(self) -> Any:
        return LabelledBatches(self.accelerator.prepare(self.batches.loader), self.batches.classes)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        stack.enter_context(autocast(self.args.device, self.autocast_dtype))
        return stack

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return F.cross_entropy(logits_of(model(inputs["pixel_values"])).float(), inputs["labels"])


def train(
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    batches: LabelledBatches,
    config: VisionConfig,
    watch: Watch,
    *,
    steps: int,
    dtype: torch.dtype | None,
) -> None:
    """Train the parameters ``trained``, by name, for ``steps`` updates.

    Everything else has neither gradient nor optimizer state. The batch norms use the statistics of the batch and keep
    running ones, whatever trains. ``requires_grad`` and modes are left as training needs them.
    """
    for param in model.parameters():
        param.requires_grad_(False)
    for param in trained.values():
        param.requires_grad_(True)
    optimizer = torch.optim.SGD(
        trained.values(),
        lr=1.0,  # LambdaLR multiplies it by the schedule's rate
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
    device = next(model.parameters()).device
    temporary = tempfile.TemporaryDirectory(prefix="trisparse-")
    with launcher_alone(), temporary as folder, held_masks(model, trained.values()):
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=max(config.schedule.at(step, steps) for step in range(steps)),  # for messages alone
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            use_cpu=device.type == "cpu",
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        if args.n_gpu > 1:  # one process drives one device; several come with torchrun
            args._n_gpu = 1
        scheduler = LambdaLR(optimizer, lr_lambda(config.schedule, steps))
        trainer = _Trainer(model=model, args=args, callbacks=[watch], optimizers=(optimizer, scheduler))
        trainer.batches, trainer.autocast_dtype = batches, dtype
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    _same_buffers(model)


def _same_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the first: DDP does so before a forward, and after the last they differ."""
    if distributed.is_available() and distributed.is_initialized():
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)
