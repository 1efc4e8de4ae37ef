"""transformers' Trainer on a model that is sharded before it comes there; on another one it is as it was.

accelerate's own FSDP is left out: on the CPU it would be DDP, so that what is tested would not be what runs, and it
wraps a model whose weights from before it does not keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from trisparse.retrain.sharding import is_sharded, split_state, whole_state


class ShardedTrainer(Trainer):
    """Trainer that leaves a sharded model alone, and whose checkpoints hold it whole.

    They are those of a model that is not sharded: the optimizer's state is put together on the main process.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        # the Trainer's own mark of a model that was sharded by others: no DDP around it. When it is made the Trainer
        # refuses to save such a model's optimizer, which is done below.
        self.is_distributed_loading_by_transformers = is_sharded(self.model)
        return super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Every forward's gradients are spread at once: waiting for the last would hold them whole."""
        yield

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_state(self.optimizer.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        self.optimizer.load_state_dict(split_state(state, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
