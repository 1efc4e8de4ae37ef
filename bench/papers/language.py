"""Cells of language models: prune, retrain or not, and measure."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trisparse.bench.papers.cell import Cell, Session
from trisparse.bench.papers.choice import choice_accuracy, choice_questions
from trisparse.bench.papers.scale import Scale
from trisparse.bench.smollm2 import load_smollm2
from trisparse.retrain.loop_options import LEARNING_RATES
from trisparse.retrain.lora_layer import Variant
from trisparse.retrain.perp import PERPConfig, retrain
from trisparse.retrain.precision import computing_dtype
from trisparse.sparsity.calibration import Propagate
from trisparse.sparsity.data import load_text, token_windows
from trisparse.sparsity.metric import find_metric
from trisparse.sparsity.obs import Update
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.progress import quiet_transformers
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.zero_shot import PAPER_TASKS, zero_shot

_MOST_TO_DRAW_FROM = 4096  # windows: a text is tokenized as a whole


@dataclass(frozen=True)
class Texts:
    """What a cell calibrates, trains and measures on: names of texts, windows of ``seq_len`` tokens; None is all."""

    calibration: str
    train: str
    validation: str
    test: str
    seq_len: int
    validation_windows: int | None
    test_windows: int | None

    @classmethod
    def of(cls, scale: Scale, model: str) -> Texts:
        """Those of ``scale``."""
        return cls(
            scale.calibration,
            scale.train,
            scale.validation,
            scale.test,
            scale.context(model),
            scale.validation_windows,
            scale.test_windows,
        )


@dataclass(frozen=True)
class Pruning:
    """How to prune, see :func:`trisparse.sparsity.sparsify.sparsify`.

    Attributes:
        method: name of a metric, an expression or "sparsegpt".
        pattern: "50%", "50% layer", "2:4".
        samples: calibration windows; 0 where the method reads no data.
        seed: of the choice of the windows.
        update, propagate: of ``sparsify``.
    """

    method: str
    pattern: str
    samples: int
    seed: int = 0
    update: Update | None = None
    propagate: Propagate = "block"

    @classmethod
    def of(cls, scale: Scale, method: str, pattern: str, **options: Any) -> Pruning:
        """With the samples of ``scale`` if ``method`` reads data.

        Magnitudes compete in a whole layer (PERP, section 2.3), scores of the other methods in a row, as in Wanda.
        """
        if method == "magnitude" and pattern.endswith("%"):
            pattern = f"{pattern} layer"
        reads = bool(find_metric(method, has_data=True).uses & {"X", "G"}) or options.get("update") is not None
        return cls(method, pattern, **{"samples": scale.samples if reads else 0, **options})


@dataclass(frozen=True)
class Retraining:
    """How to retrain; the fields of :class:`trisparse.retrain.perp.PERPConfig` of the same names."""

    groups: tuple[str, ...]
    steps: int
    learning_rate: float | Literal["grid"]
    learning_rates: tuple[float, ...] = ()
    grid_steps: int = 20
    batch_size: int | None = None
    gradient_accumulation: int | None = None
    variant: Variant = "mask_lora"
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | None = None
    gradient_checkpointing: bool = False
    seed: int = 0

    @classmethod
    def of(cls, scale: Scale, groups: Sequence[str], **options: Any) -> Retraining:
        """With the settings of ``scale``."""
        rate = scale.rate(groups)
        if "lora" not in groups:  # then nothing but the head gets one
            options.pop("targets", None)
        chosen = {
            "steps": scale.steps,
            "learning_rate": rate,
            "learning_rates": scale.grid if rate == "grid" else (),
            "grid_steps": scale.grid_steps if rate == "grid" else 1,
            "batch_size": scale.batch_size,
            "gradient_accumulation": scale.accumulation,
            "gradient_checkpointing": scale.checkpointing,
        }
        return cls(tuple(groups), **{**chosen, **options})

    def config(self, seq_len: int) -> PERPConfig:
        """For ``retrain``."""
        return PERPConfig(
            groups=self.groups,
            variant=self.variant,
            merge=self.variant != "lora",  # which cannot be merged under a mask: it is measured beside the weights
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            learning_rate=self.learning_rate,
            learning_rates=self.learning_rates or LEARNING_RATES,
            grid_steps=self.grid_steps,
            steps=self.steps,
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
            seq_len=seq_len,
            gradient_checkpointing=self.gradient_checkpointing,
            seed=self.seed,
        )


@dataclass(frozen=True)
class LanguageCell(Cell):
    """A language model: pruned, then retrained, or neither.

    It measures ``perplexity`` on the test text, ``sparsity``, ``pruning_seconds``, ``retraining_seconds``,
    ``trainable_share`` and ``learning_rate``; where wanted, ``choice_accuracy`` (a local task, see
    :mod:`trisparse.bench.papers.choice`) and ``zero_shot_accuracy`` (the mean over seven tasks, by lm-eval).
    """

    kind: ClassVar[str] = "language"

    model: str
    texts: Texts
    pruning: Pruning | None = None
    retraining: Retraining | None = None

    @property
    def order(self) -> str:
        """By the pruned model."""
        spec = self.spec
        return json.dumps([spec[name] for name in ("model", "texts", "pruning", "retraining")], sort_keys=True)

    def measure(self, wanted: frozenset[str], session: Session) -> dict[str, float]:
        """Load, prune, retrain and measure."""
        metrics = {"trainable_share": 0.0, "sparsity": 0.0}
        if self.pruning is None:
            model, tokenizer = dense_model(self.model, session)
        else:
            model, tokenizer, pruned = pruned_model(self.model, self.texts, self.pruning, session)
            metrics |= pruned
        if self.retraining is not None:
            if self.pruning is None or session.keep_copies:  # else it is nobody else's
                model = copy.deepcopy(model)
            train, validation = training_texts(self.texts, self.retraining, tokenizer, session, self.model)
            report = retrain(
                model, train, self.retraining.config(self.texts.seq_len), validation=validation, progress=False
            )
            metrics |= {"trainable_share": report.trainable_share, "retraining_seconds": report.seconds}
            if report.learning_rate is not None:
                metrics["learning_rate"] = report.learning_rate
        return metrics | evaluate(model, tokenizer, self.model, self.texts, wanted, session)


def load_dense(name: str, device: torch.device) -> tuple[Any, Any]:
    """A causal language model in eval mode and its tokenizer: ``smollm2``, a folder or a Hugging Face id."""
    from transformers import AutoModelForCausalLM

    from trisparse.sparsity.checkpoint.tokenizer import load_tokenizer

    if name == "smollm2":
        model, tokenizer = load_smollm2()
        return model.to(device), tokenizer  # type: ignore[arg-type]
    with quiet_transformers():
        tokenizer = load_tokenizer(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", trust_remote_code=False)
        return model.eval().to(device), tokenizer


def dense_model(name: str, session: Session) -> tuple[Any, Any]:
    """The model, not to be changed, and its tokenizer."""
    if session.keep_copies:
        return session.last("dense", name, lambda: load_dense(name, session.device))
    return load_dense(name, session.device)


def pruned_model(name: str, texts: Texts, pruning: Pruning, session: Session) -> tuple[Any, Any, dict[str, float]]:
    """The pruned model, its tokenizer, and what pruning measured; not to be changed if the session keeps copies."""

    def prune() -> tuple[Any, Any, dict[str, float]]:
        model, tokenizer = dense_model(name, session)
        if session.keep_copies:
            model = copy.deepcopy(model)
        data = None
        if pruning.samples:
            data = session.once(("text", texts.calibration), lambda: load_text(texts.calibration, "calibration"))
        start = time.perf_counter()
        report = sparsify(
            model,
            pruning.pattern,
            pruning.method,
            data,
            tokenizer=tokenizer,
            samples=max(1, pruning.samples),
            seq_len=texts.seq_len if pruning.samples else None,
            seed=pruning.seed,
            propagate=pruning.propagate,
            update=pruning.update,
            progress=False,
        )
        seconds = time.perf_counter() - start
        return model, tokenizer, {"sparsity": report.sparsity, "pruning_seconds": seconds}

    if session.keep_copies:
        return session.last("pruned", (name, texts, pruning), prune)
    return prune()


def windows(
    session: Session, model: str, tokenizer: Any, text: str, split: str, seq_len: int, samples: int | None
) -> Tensor:
    """Token windows [n, seq_len] of a text, cut once a session."""
    return session.once(
        ("windows", model, text, seq_len, samples),
        lambda: token_windows(load_text(text, split), tokenizer=tokenizer, seq_len=seq_len, samples=samples),
    )


def training_texts(
    texts: Texts, retraining: Retraining, tokenizer: Any, session: Session, model: str
) -> tuple[Tensor, Tensor | None]:
    """Windows to train on, and those to choose the learning rate by.

    A short run draws from eight times what it reads, so that its seed chooses among the data; a long one reads all.
    """
    read = (retraining.batch_size or 2) * (retraining.gradient_accumulation or 4) * max(retraining.steps, 16)
    train = windows(
        session, model, tokenizer, texts.train, "train", texts.seq_len, max(read, min(8 * read, _MOST_TO_DRAW_FROM))
    )
    if retraining.learning_rate != "grid":
        return train, None
    count = texts.validation_windows
    return train, windows(session, model, tokenizer, texts.validation, "validation", texts.seq_len, count)


def evaluate(
    model: Any, tokenizer: Any, name: str, texts: Texts, wanted: frozenset[str], session: Session
) -> dict[str, float]:
    """The numbers ``wanted`` of ``model`` as it is: perplexity, choice_accuracy, zero_shot_accuracy."""
    metrics: dict[str, float] = {}
    with autocast(model):
        if "perplexity" in wanted:
            test = windows(session, name, tokenizer, texts.test, "test", texts.seq_len, texts.test_windows)
            metrics["perplexity"] = perplexity(model, test, seq_len=texts.seq_len)
        if "choice_accuracy" in wanted:
            questions = session.once(("choice", name), lambda: choice_questions(tokenizer))
            metrics["choice_accuracy"] = choice_accuracy(model, questions)
    if "zero_shot_accuracy" in wanted:
        mean = zero_shot(model, tokenizer, PAPER_TASKS, progress=False).mean
        if mean is None:
            raise ValueError(f"zero_shot_accuracy is a mean of accuracies, and one of {PAPER_TASKS} has none")
        metrics["zero_shot_accuracy"] = mean
    return metrics


def autocast(model: Any) -> AbstractContextManager[Any]:
    """bf16 where the device is faster in it, as retraining has it by default."""
    device = next(model.parameters()).device
    dtype = computing_dtype("auto", device, {param.dtype for param in model.parameters()})
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
