"""The training loop of retraining: transformers' Trainer on token windows, watched step by step."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from trisparse.sparsity.modes import evaluating
from trisparse.sparsity.progress import progress_bar

if TYPE_CHECKING:
    from trisparse.retrain.perp import PERPConfig


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
    """Losses, time and the progress bar; stops at the first loss or gradient that is not finite."""

    def __init__(self, steps: int, *, progress: bool) -> None:
        self.losses: list[float] = []
        self.seconds = 0.0
        self._total = steps
        self._progress = progress
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Watch:
        bar = progress_bar("retraining", self._total, enabled=self._progress)
        self._advance = self._open.enter_context(bar)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
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
        for name in ("loss", "grad_norm"):
            if not math.isfinite(value := logs.get(name, 0.0)):
                raise RetrainError(
                    f"{name} is {value} at step {state.global_step} of {state.max_steps}: retraining stopped and "
                    f"the model is as it was before; a learning_rate below {args.learning_rate:g} may help"
                )
        self.losses.append(logs["loss"])
        self._advance(1, f"loss {logs['loss']:.4f}")


class _Trainer(Trainer):
    """Trainer whose autocast is around the loss only.

    accelerate's wraps the model's forward and copies its output to fp32; for the logits of a batch that is
    another tensor of [batch, seq_len, vocabulary] in fp32, which nobody reads.
    """

    autocast_dtype: torch.dtype | None = None

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        stack.enter_context(autocast(self.args.device, self.autocast_dtype))
        return stack


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to ``dtype``, or nothing for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def trainer_for(
    model: nn.Module,
    windows: Tensor,
    config: PERPConfig,
    watch: Watch,
    *,
    folder: str,
    dtype: torch.dtype | None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """A Trainer that runs ``config`` on ``windows`` [n, seq_len]; only what requires a gradient is optimised."""
    device = next(model.parameters()).device
    args = TrainingArguments(
        output_dir=folder,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(config.steps * config.warmup_ratio),
        activation_checkpointing=config.gradient_checkpointing,
        # the reentrant kind gives no gradients where a block's input needs none, and the embedding is frozen
        activation_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        train_sampling_strategy="sequential",  # Windows are in random order already
        seed=config.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        report_to=list(config.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if args.n_gpu > 1:  # one process drives one device; several come with torchrun
        args._n_gpu = 1
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=Windows(windows, config.steps * config.batch_size * config.gradient_accumulation, config.seed),
        data_collator=default_data_collator,
        callbacks=[watch, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.autocast_dtype = dtype
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
