"""The training loop of retraining: transformers' Trainer on token windows, watched step by step."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, default_data_collator

from trisparse.retrain.distillation import divergence, teacher_logits
from trisparse.retrain.loop_options import save_every
from trisparse.retrain.processes import is_main_process, process_count
from trisparse.retrain.run_folder import checkpoints, load_trained, save_trained, unmark
from trisparse.retrain.sharded_trainer import ShardedTrainer
from trisparse.retrain.sharding import first_not_finite, whole_parameters
from trisparse.retrain.token_loss import lean_loss
from trisparse.sparsity.modes import evaluating
from trisparse.sparsity.progress import progress_bar

if TYPE_CHECKING:
    from trisparse.retrain.batch_settings import BatchSettings
    from trisparse.retrain.perp import PERPConfig

# fp16's gradient scale starts at 2^16 and halves with each overflow: after so many it is nothing that a scale mends
_MOST_OVERFLOWS = 24


class RetrainError(RuntimeError):
    """Retraining stopped; the model is as it was before."""


def with_labels(windows: Tensor) -> dict[str, Tensor]:
    """A batch for a causal LM. Nothing predicts a window's first token, so it does not count in the mean."""
    labels = windows.clone()
    labels[..., 0] = -100
    return {"input_ids": windows, "labels": labels}


class Windows(Dataset[dict[str, Tensor]]):
    """``count`` rows of ``windows`` [n, seq_len]: one seeded permutation after another.

    The length is the run's own, so every step is a full one and no epoch ends inside it.
    """

    def __init__(self, windows: Tensor, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        rounds = -(-count // len(windows))
        order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(rounds)])
        self.windows, self.order = windows, order[:count]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return with_labels(self.windows[self.order[index]])


class Watch(TrainerCallback):
    """Losses, time and the progress bar; stops at the first loss or gradient that is not finite.

    Args:
        steps: optimizer steps.
        progress: show the bar (on the main process).
        scaled: the gradients are scaled, as fp16 needs it: a step whose gradients overflow is skipped and counted.
        folder: of the checkpoints that the run writes, if any.
    """

    def __init__(self, steps: int, *, progress: bool, scaled: bool = False, folder: Path | None = None) -> None:
        self.losses: list[float] = []
        self.seconds = 0.0
        self.resumed_at = 0
        self.skipped = 0
        self._in_a_row = 0
        self._total = steps
        self._progress = progress and is_main_process()
        self._scaled = scaled
        self._folder = folder
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Watch:
        bar = progress_bar("retraining", self._total, enabled=self._progress)
        self._advance = self._open.enter_context(bar)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; a run that goes on takes the losses so far from its checkpoint."""
        self.resumed_at = state.global_step
        if self.resumed_at:
            self.losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            self._advance(self.resumed_at, f"loss {self.losses[-1]:.4f}")
        self._start = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds = time.perf_counter() - self._start

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the step's loss.

        Raises:
            RetrainError: the loss or the norm of the gradient is NaN or infinite.
        """
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return
        overflow = self._scaled and not math.isfinite(logs.get("grad_norm", 0.0))
        self.skipped += overflow
        self._in_a_row = self._in_a_row + 1 if overflow else 0
        for name in ("loss", "grad_norm"):
            if math.isfinite(value := logs.get(name, 0.0)):
                continue
            if name == "grad_norm" and overflow and self._in_a_row < _MOST_OVERFLOWS:
                continue
            raise RetrainError(
                f"{name} is {value} at step {state.global_step} of {state.max_steps}: retraining stopped and "
                f"the model is as it was before; a learning_rate below {args.learning_rate:g} may help"
                f"{self._last_checkpoint()}"
            )
        self.losses.append(logs["loss"])
        self._advance(1, f"loss {logs['loss']:.4f}")

    def _last_checkpoint(self) -> str:
        if self._folder is None:
            return ""
        complete = checkpoints(self._folder)
        return f"; the last good checkpoint is {complete[-1]}" if complete else "; no checkpoint was written yet"


class _Trainer(ShardedTrainer):
    """Trainer whose autocast is around the loss only, with a teacher, and exact checkpoints of what trains.

    accelerate's autocast wraps the model's forward and copies its output to fp32; for the logits of a batch that is
    another tensor of [batch, seq_len, vocabulary] in fp32, which nobody reads.
    """

    autocast_dtype: torch.dtype | None = None
    teacher: nn.Module | None = None
    distillation_weight: float
    temperature: float
    adapted: nn.Module
    trained: tuple[str, ...]

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        stack.enter_context(autocast(self.args.device, self.autocast_dtype))
        return stack

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with lean_loss(self.adapted):
            if self.teacher is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        target = teacher_logits(self.teacher, inputs["input_ids"])
        total, count = divergence(outputs.logits, target, inputs["labels"], self.temperature)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # as the Trainer does with the loss: the mean over all tokens of the step, on all processes
            mean = total / num_items_in_batch * self.accelerator.num_processes
        else:
            mean = total / count
        loss = (1 - self.distillation_weight) * loss + self.distillation_weight * mean
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if name := first_not_finite((name, self.adapted.get_parameter(name)) for name in self.trained):
            raise RetrainError(
                f"{name} is not finite after step {self.state.global_step}: no checkpoint was written, and the "
                "model is as it was before"
            )
        if self.args.should_save:
            unmark(Path(str(self.args.output_dir)), self.state.global_step)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # not the Trainer's own: PEFT would add the weight under the head's adapter, and "full" has the model twice.
        # The Trainer comes here on every process, and what is sharded takes all of them.
        trained = whole_parameters(self.adapted, self.trained, keep=self.args.should_save)
        if self.args.should_save:
            save_trained(trained, Path(str(output_dir or self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.adapted, self.trained, Path(resume_from_checkpoint))


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to ``dtype``, or nothing for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def trainer_for(
    model: nn.Module,
    windows: Tensor,
    config: PERPConfig,
    watch: Watch,
    *,
    batch: BatchSettings,
    learning_rate: float,
    folder: str,
    dtype: torch.dtype | None,
    teacher: nn.Module | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> ShardedTrainer:
    """A Trainer that runs ``config`` on ``windows`` [n, seq_len]; only what requires a gradient is optimised."""
    device = next(model.parameters()).device
    processes = process_count()
    every = save_every(config)
    scaled = dtype == torch.float16
    args = TrainingArguments(
        output_dir=folder,
        max_steps=config.steps,
        per_device_train_batch_size=batch.size,
        gradient_accumulation_steps=batch.accumulation,
        learning_rate=learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type="linear",
        # rounded down: a warm-up of one step has the rate 0, and would be all of a run of one step
        warmup_steps=math.floor(config.steps * config.warmup_ratio),
        activation_checkpointing=config.gradient_checkpointing,
        # the reentrant kind gives no gradients where a block's input needs none, and the embedding is frozen
        activation_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        train_sampling_strategy="sequential",  # Windows are in random order already
        seed=config.seed,
        fp16=scaled,  # accelerate's own autocast then, which comes with the scaler of the gradients
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if processes > 1 and device.type == "cpu" else None,
        ddp_find_unused_parameters=False,  # everything that trains is used in every forward
        dataloader_pin_memory=device.type == "cuda",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no" if every is None else "steps",
        save_steps=every or 500,
        report_to=list(config.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if args.n_gpu > 1:  # one process drives one device; several come with torchrun
        args._n_gpu = 1
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=Windows(windows, config.steps * batch.windows * processes, config.seed),
        data_collator=default_data_collator,
        callbacks=[watch, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.autocast_dtype = None if scaled else dtype
    trainer.adapted, trainer.teacher = model, teacher
    trainer.distillation_weight, trainer.temperature = config.distillation_weight, config.temperature
    trainer.trained = tuple(name for name, param in model.named_parameters() if param.requires_grad)
    return trainer


@torch.no_grad()
def mean_loss(model: nn.Module, windows: Tensor, batch_size: int, dtype: torch.dtype | None) -> float:
    """Mean loss per predicted token of ``windows`` [n, seq_len], in eval mode; the modes are put back."""
    device = next(model.parameters()).device
    total = 0.0
    with evaluating(model):
        for batch in torch.split(windows, batch_size):
            with autocast(device, dtype):
                loss = model(**with_labels(batch.to(device))).loss
            total += float(loss) * len(batch)
    return total / len(windows)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global random states (Python, numpy, torch) back afterwards: the Trainer seeds them all."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
