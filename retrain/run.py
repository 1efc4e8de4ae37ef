"""One training run: adapters on, the loop, and off again if anything fails."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, set_seed

from trisparse.retrain.adapters import Adapted
from trisparse.retrain.batch_settings import BatchSettings
from trisparse.retrain.full import FullWeights
from trisparse.retrain.groups import ParameterGroups
from trisparse.retrain.guard import MaskGuard
from trisparse.retrain.held_masks import held_masks
from trisparse.retrain.loop import RetrainError, Watch, mean_loss, trainer_for
from trisparse.retrain.processes import launcher_alone
from trisparse.retrain.report import PeakMemory
from trisparse.retrain.sharding import Shards, accelerate_left_out, training_device
from trisparse.sparsity.mask import check_masks

if TYPE_CHECKING:
    from trisparse.retrain.perp import PERPConfig


def adapted_for(
    model: Any, groups: ParameterGroups, config: PERPConfig, *, trains: bool = True
) -> Adapted | FullWeights:
    """``model`` made ready to train ``config.groups``; with ``trains`` False for a look at it, which writes nothing."""
    if "full" in config.groups:
        return FullWeights(model, config.output_dir, kept=trains)
    return Adapted(model, groups, tuple(config.groups), config.rank, config.alpha, config.variant)


@dataclass(frozen=True)
class Run:
    """What the run and the short ones of the grid share."""

    model: Any
    groups: ParameterGroups
    windows: torch.Tensor
    held_out: torch.Tensor | None
    config: PERPConfig
    batch: BatchSettings
    dtype: torch.dtype | None
    teacher: Any
    progress: bool

    def train(
        self,
        config: PERPConfig,
        learning_rate: float,
        *,
        resume_from: Path | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> tuple[Watch, PeakMemory, Adapted | FullWeights, list[float]]:
        """Adapters on the model, trained; and the validation losses, if any. A failure leaves the model as it was."""
        set_seed(config.seed)
        adapted = adapted_for(self.model, self.groups, config)
        watch = Watch(
            config.steps,
            progress=self.progress,
            scaled=self.dtype == torch.float16,
            folder=None if config.output_dir is None else Path(config.output_dir),
        )
        # the Trainer wants a folder even when it saves nothing
        temporary = tempfile.TemporaryDirectory(prefix="trisparse-") if config.output_dir is None else nullcontext()
        try:
            adapted.switch_cache_off()
            with self._split(adapted):
                losses = self._loss(adapted)
                memory = PeakMemory(next(self.model.parameters()).device)
                with launcher_alone(), watch, temporary as folder, memory:
                    trainer = trainer_for(
                        adapted.module,
                        self.windows,
                        config,
                        watch,
                        batch=self.batch,
                        learning_rate=learning_rate,
                        folder=folder or str(config.output_dir),
                        dtype=self.dtype,
                        teacher=self.teacher,
                        callbacks=(*callbacks, MaskGuard(self.model, config.guard_every)),
                    )
                    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
                if config.merge:
                    adapted.as_merged()
                losses += self._loss(adapted)
            if broken := adapted.first_not_finite():
                raise RetrainError(f"{broken} is not finite after step {config.steps}; the model is as it was before")
            check_masks(self.model)
        except BaseException:
            adapted.discard()
            raise
        return watch, memory, adapted, losses

    def validation_loss_of(self, learning_rate: float) -> float:
        """The validation loss after a short run with ``learning_rate``; the model is put back."""
        short = replace(
            self.config, steps=self.config.grid_steps, output_dir=None, save_steps=None, resume=False, report_to=()
        )
        _, _, adapted, losses = self.train(short, learning_rate)
        adapted.discard()
        return losses[-1]

    @contextmanager
    def _split(self, adapted: Adapted | FullWeights) -> Iterator[None]:
        """Inside, the processes share the weights among them, the teacher's too, if the config asks for it."""
        if self.config.sharding == "none":
            yield
            return
        device = training_device(self.model)
        teacher = nullcontext() if self.teacher is None else Shards(self.teacher, device)
        with accelerate_left_out(), teacher, Shards(adapted.module, device), ExitStack() as held:
            if isinstance(adapted, FullWeights):  # again: the parameters are others now
                held.enter_context(held_masks(self.model, self.model.parameters()))
            yield

    def _loss(self, adapted: Adapted | FullWeights) -> list[float]:
        if self.held_out is None:
            return []
        return [mean_loss(adapted.module, self.held_out, self.batch.size, self.dtype)]
