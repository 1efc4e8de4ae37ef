"""What a retraining did: counts, losses, speed and memory, as a dict, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import json
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]
import torch
from rich.table import Table

from trisparse.sparsity.report import as_text

if TYPE_CHECKING:
    from peft import PeftModel


class PeakMemory:
    """Context manager: the peak memory in use inside it, in bytes.

    On CUDA the peak of the allocator (exact). Elsewhere the peak resident set of the whole process, sampled
    every 20 ms, so the model's own weights are included and a shorter peak can be missed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._done.wait(0.02):
                return

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._done.set()
            self._thread.join()


@dataclass(frozen=True)
class RetrainReport:
    """Outcome of :func:`trisparse.retrain.perp.retrain`.

    Attributes:
        steps: optimizer steps.
        tokens: tokens trained on, over all steps.
        seconds: wall time of the training loop alone.
        trainable: trained parameters per group asked for; 0 where the model has none of that group.
        total_parameters: parameters of the model before retraining, a shared one counted once, pruned ones included.
        losses: training loss of each step (nats per token, before that step's update).
        peak_memory_bytes: peak while training; see :class:`PeakMemory`.
        untied_head: whether the head got a weight of its own, having shared the input embedding's.
        added_parameters: parameters that the model has more than before (the untied head).
        missing: groups asked for that the model has nothing of.
        not_covered: pruned parameters that no LoRA reaches, with the reason.
        effective_sparsity: of the pruned parameters, adapters that are not merged counted as kept
            (:func:`trisparse.retrain.effective_sparsity.effective_sparsity`); None without masks.
        validation_loss: loss on the validation data before and after, if any was given; the latter with what was
            trained in fp32, before a half-precision model is rounded.
        learning_rate: the peak.
        grid: validation loss of each learning rate that was tried, None where it diverged; None without a grid.
        batch: windows per forward, forwards per step, processes.
        resumed_at: step of the checkpoint that this run went on from; ``seconds`` are those of the steps after it.
        skipped_steps: steps whose fp16 gradients overflowed, which changed nothing.
        peft_model: the model under its adapters, where they were not merged; in no dict and no JSON.
    """

    steps: int
    tokens: int
    seconds: float
    trainable: dict[str, int]
    total_parameters: int
    losses: list[float] = field(repr=False)
    peak_memory_bytes: int
    untied_head: bool
    added_parameters: int
    not_covered: list[str]
    missing: list[str] = field(default_factory=list)
    effective_sparsity: float | None = None
    validation_loss: tuple[float, float] | None = None
    learning_rate: float | None = None
    grid: dict[float, float | None] | None = None
    batch: tuple[int, int, int] | None = None
    resumed_at: int = 0
    skipped_steps: int = 0
    peft_model: PeftModel | None = field(default=None, repr=False, compare=False)

    @property
    def tokens_per_second(self) -> float:
        """Train tokens per second of training."""
        return self.tokens * (1 - self.resumed_at / self.steps) / self.seconds

    @property
    def trainable_share(self) -> float:
        """Trained parameters over the parameters of the model (as the paper counts it)."""
        return sum(self.trainable.values()) / self.total_parameters

    @property
    def first_loss(self) -> float:
        """Loss of the first step."""
        return self.losses[0]

    @property
    def last_loss(self) -> float:
        """Loss of the last step."""
        return self.losses[-1]

    def to_dict(self) -> dict[str, Any]:
        """Every attribute and property, as plain Python values."""
        values = dataclasses.asdict(dataclasses.replace(self, peft_model=None))  # asdict copies deeply
        del values["peft_model"]
        for name in ("tokens_per_second", "trainable_share", "first_loss", "last_loss"):
            values[name] = getattr(self, name)
        if self.validation_loss is not None:
            values["validation_loss"] = list(self.validation_loss)
        if self.batch is not None:
            values["batch"] = list(self.batch)
        if self.grid is not None:  # JSON's keys are strings
            values["grid"] = {f"{rate:g}": loss for rate, loss in self.grid.items()}
        return values

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        table = Table("retraining", "", show_lines=False)
        table.add_row("steps", f"{self.steps:,} ({self.tokens:,} tokens in {self.seconds:.1f} s)")
        if self.resumed_at:
            table.add_row("resumed", f"after step {self.resumed_at:,}")
        if self.skipped_steps:
            table.add_row("skipped", f"{self.skipped_steps:,} steps, whose fp16 gradients overflowed")
        if self.batch is not None:
            table.add_row("batch", "{} x {} accumulated x {} processes".format(*self.batch))
        for rate, loss in (self.grid or {}).items():
            found = "diverged" if loss is None else f"validation loss {loss:.4f}"
            table.add_row(f"tried {rate:g}", found + (", chosen" if rate == self.learning_rate else ""))
        table.add_row("train tokens/s", f"{self.tokens_per_second:,.0f}")
        table.add_row("loss", f"{self.first_loss:.4f} -> {self.last_loss:.4f}")
        if self.validation_loss is not None:
            table.add_row("validation loss", "{:.4f} -> {:.4f}".format(*self.validation_loss))
        groups = ", ".join(f"{group} {count:,}" for group, count in self.trainable.items())
        table.add_row("trained", f"{self.trainable_share:.3%} of {self.total_parameters:,} ({groups})")
        table.add_row("peak memory", f"{self.peak_memory_bytes / 2**20:,.0f} MiB")
        if self.untied_head:
            table.add_row("head", f"untied from the input embedding, +{self.added_parameters:,} parameters")
        if self.missing:
            table.add_row("missing", f"{', '.join(self.missing)}: the model has none")
        if self.effective_sparsity is not None:
            table.add_row("effective sparsity", f"{self.effective_sparsity:.2%}")
        for line in self.not_covered:
            table.add_row("not covered", line)
        return as_text(table, width=110)
