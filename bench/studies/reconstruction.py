"""What brings a pruned language model back: layer-wise reconstruction, cycles, or one pruning and one retraining.

Prunes SmolLM2-135M by magnitude and measures the perplexity on the test split of the pruned model, of a copy whose
blocks were reconstructed one by one, of one that was retrained by PERP, and of one that was pruned and retrained in
cycles. The cycles share the steps of the one retraining among them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from trisparse.bench.models import load_causal_lm, model_label
from trisparse.bench.registry import Measured, Options, benchmark
from trisparse.retrain.batch_settings import batch_settings
from trisparse.retrain.cycles import CyclesConfig, prune_cycles
from trisparse.retrain.perp import PERPConfig, parameter_count, retrain
from trisparse.retrain.reconstruct import ReconstructConfig, reconstruct
from trisparse.sparsity.data import token_windows
from trisparse.sparsity.mask import check_masks
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.text import pydoc_text


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        sparsity: of the magnitude pruning.
        steps: of the retraining, and of all cycles together.
        block_steps: of the reconstruction of a block.
        samples: windows to reconstruct on.
        test: windows of the test split.
    """

    sparsity: str = "50%"
    steps: int = 60
    block_steps: int = 40
    cycles: int = 3
    samples: int = 32
    seq_len: int = 256
    test: int = 32
    learning_rate: float = 1e-3
    rank: int = 16

    def quick(self) -> Scale:
        """A sixth of the steps and a quarter of the windows."""
        return replace(
            self, steps=self.steps // 6, block_steps=self.block_steps // 6, samples=self.samples // 4,
            test=self.test // 4,
        )  # fmt: skip


RECORDED = Scale()


def measure(
    dense: Any,
    sparsity: str,
    train: Tensor,
    calibration: Tensor,
    test: Tensor,
    *,
    retraining: PERPConfig,
    reconstruction: ReconstructConfig,
    cycles: int,
) -> Iterator[dict[str, Any]]:
    """One row for each way, on copies of ``dense``.

    Args:
        dense: a causal language model.
        sparsity: of the magnitude pruning.
        train, calibration, test: token windows [n, seq_len].
        retraining: of the one retraining; the cycles share its steps.
        reconstruction: of the blocks.
        cycles: how many.
    """

    def row(what: str, model: Any, start: float, **more: Any) -> dict[str, Any]:
        seconds = time.perf_counter() - start
        return {"what": what, "perplexity": perplexity(model, test, seq_len=test.shape[1]), "seconds": seconds, **more}

    yield row("dense", dense, time.perf_counter())
    start = time.perf_counter()
    pruned = copy.deepcopy(dense)
    sparsify(pruned, sparsity, "magnitude", progress=False)
    yield row("pruned", pruned, start)

    start, model = time.perf_counter(), copy.deepcopy(pruned)
    fitted = reconstruct(model, dense, calibration, reconstruction, progress=False)
    check_masks(model)
    errors = {"error_before": fitted.error_before, "error_after": fitted.error_after}
    yield row("reconstructed", model, start, trainable=fitted.trainable, targets=reconstruction.targets, **errors)

    start, model = time.perf_counter(), copy.deepcopy(pruned)
    report = retrain(model, train, retraining, progress=False)
    check_masks(model)
    yield row("retrained", model, start, trainable=sum(report.trainable.values()), steps=report.steps)

    start, model = time.perf_counter(), copy.deepcopy(dense)
    config = CyclesConfig(cycles=cycles, retraining=_shared(retraining, cycles))
    turns = prune_cycles(model, sparsity, train, config, progress=False)
    check_masks(model)
    patterns = [cycle.pattern for cycle in turns.cycles]
    yield row(f"{cycles} cycles", model, start, steps=config.retraining.steps * cycles, patterns=patterns)


def _shared(retraining: PERPConfig, cycles: int) -> PERPConfig:
    return PERPConfig(**{**vars(retraining), "steps": max(1, retraining.steps // cycles)})


@benchmark("reconstruction", "layer-wise reconstruction, cycles, or one pruning and one retraining", takes=("model",))
def reconstruction(options: Options) -> Iterator[Measured]:
    """Magnitude pruning to 50%, 60 steps of retraining, 40 of each block; ``quick`` takes a sixth of them."""
    model, tokenizer = load_causal_lm(options.model)
    yield from compare(model, tokenizer, model_label(options.model), RECORDED.quick() if options.quick else RECORDED)


def compare(model: Any, tokenizer: Any, label: str, scale: Scale) -> Iterator[Measured]:
    """One row for each way, at a scale, on the Python documentation."""
    lora: dict[str, Any] = {"rank": scale.rank, "alpha": 2 * scale.rank, "seq_len": scale.seq_len}
    retraining = PERPConfig(steps=scale.steps, gradient_accumulation=1, learning_rate=scale.learning_rate, **lora)
    blocks = ReconstructConfig(steps=scale.block_steps, samples=scale.samples, **lora)
    windows = scale.steps * batch_settings(retraining, parameter_count(model)).windows
    cut: dict[str, Any] = {"tokenizer": tokenizer, "seq_len": scale.seq_len}
    rows = measure(
        model,
        scale.sparsity,
        token_windows(pydoc_text("train"), samples=windows, **cut),
        token_windows(pydoc_text("calibration"), samples=scale.samples, **cut),
        token_windows(pydoc_text("test"), samples=scale.test, **cut),
        retraining=retraining,
        reconstruction=blocks,
        cycles=scale.cycles,
    )
    for row in rows:
        what, seconds = row.pop("what"), row.pop("seconds")
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        words = {key: value for key, value in row.items() if key not in numbers}
        parameters = {"model": label, "pattern": scale.sparsity, **asdict(scale), **words}
        yield Measured(what, parameters, {what: numbers}, {what: [seconds]})
