"""What brings a pruned language model back: layer-wise reconstruction, cycles, or one pruning and one retraining.

    python -m trisparse.bench.reconstruction [--steps 60] [--json]

prunes SmolLM2-135M by magnitude and prints the perplexity on the test split of the pruned model, of a copy whose
blocks were reconstructed one by one, of one that was retrained by PERP, and of one that was pruned and retrained in
cycles. The cycles share the steps of the one retraining among them. ``--json`` writes bench/results/reconstruction.json
as well.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from trisparse.bench.smollm2 import load_smollm2
from trisparse.env import environment
from trisparse.retrain.batch_settings import batch_settings
from trisparse.retrain.cycles import CyclesConfig, prune_cycles
from trisparse.retrain.perp import PERPConfig, parameter_count, retrain
from trisparse.retrain.reconstruct import ReconstructConfig, reconstruct
from trisparse.sparsity.data import token_windows
from trisparse.sparsity.mask import check_masks
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.text import pydoc_text

RESULTS = Path("bench/results/reconstruction.json")


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


def as_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    return f"{row['what']:15} {row['perplexity']:10.2f} {row['seconds']:8.1f} s"


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Load, prune and measure."""
    if options.model is None:
        model, tokenizer = load_smollm2()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    retraining = PERPConfig(
        steps=options.steps,
        seq_len=options.seq_len,
        gradient_accumulation=1,
        learning_rate=options.learning_rate,
        rank=options.rank,
        alpha=2 * options.rank,
    )
    reconstruction = ReconstructConfig(
        steps=options.block_steps,
        samples=options.samples,
        seq_len=options.seq_len,
        rank=options.rank,
        alpha=2 * options.rank,
    )
    windows = options.steps * batch_settings(retraining, parameter_count(model)).windows
    cut = {"tokenizer": tokenizer, "seq_len": options.seq_len}
    yield from measure(
        model,
        options.sparsity,
        token_windows(pydoc_text("train"), samples=windows, **cut),
        token_windows(pydoc_text("calibration"), samples=options.samples, **cut),
        token_windows(pydoc_text("test"), samples=options.test, **cut),
        retraining=retraining,
        reconstruction=reconstruction,
        cycles=options.cycles,
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write it where it is asked for."""
    parser = argparse.ArgumentParser(prog="python -m trisparse.bench.reconstruction", description=__doc__)
    parser.add_argument("--model", help="folder of a causal language model; SmolLM2-135M by default")
    parser.add_argument("--sparsity", default="50%")
    parser.add_argument("--steps", type=int, default=60, help="of the retraining, and of all cycles together")
    parser.add_argument("--block-steps", type=int, default=40, help="of the reconstruction of a block")
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32, help="windows to reconstruct on")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--test", type=int, default=32, help="windows of the test split")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the retraining")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS}")
    options = parser.parse_args(arguments)
    rows = []
    for row in run(options):
        rows.append(row)
        print(as_line(row), flush=True)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "model")}
        given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
        result = {
            "how": f"python -m trisparse.bench.reconstruction {given} --json",
            "environment": environment(),
            "settings": settings,
            "rows": rows,
        }
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
