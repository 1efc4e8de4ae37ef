"""Quality of PERP against full retraining with the masks held: each at its own best learning rate.

Prunes SmolLM2-135M to 50% by magnitude, finds a learning rate by ``learning_rate="grid"`` (PERP's, Appendix A, and
1e-3: 30 steps with each, the loss on the validation split decides), retrains with it, and gives the perplexity on the
test split. Each result, and a short run of every LoRA variant that is merged, is saved, and the pruned weights of the
saved file that are not zero are counted.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trisparse.bench.models import load_causal_lm, model_label
from trisparse.bench.registry import Measured, Options, benchmark
from trisparse.retrain.loop_options import LEARNING_RATES
from trisparse.retrain.perp import PERPConfig, retrain
from trisparse.sparsity.checkpoint import save
from trisparse.sparsity.data import token_windows
from trisparse.sparsity.mask import masks
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.text import pydoc_text

METHODS: dict[str, dict[str, Any]] = {
    "full": {"groups": ("full",)},
    "mask_lora + norms + head": {"groups": ("norms", "head", "lora"), "variant": "mask_lora"},
}
MERGED_VARIANTS = ("lora_prune", "mask_lora", "scale_lora")


def retrained(model: Any, data: dict[str, Tensor], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A retrained copy of ``model``, and what was measured.

    Args:
        model: with masks.
        data: token windows [n, seq_len] by split: train, validation, test.
        options: of PERPConfig; its learning rate is found by the grid.
    """
    own = copy.deepcopy(model)
    config = PERPConfig(learning_rate="grid", **options)
    report = retrain(own, data["train"], config, validation=data["validation"], progress=False)
    assert report.grid is not None
    row = {
        "trainable_share": report.trainable_share,
        "grid": {f"{rate:g}": loss for rate, loss in report.grid.items()},
        "learning_rate": report.learning_rate,
        "validation_loss": report.validation_loss,
        "perplexity": perplexity(own, data["test"], seq_len=data["test"].shape[1]),
        "seconds": report.seconds,
    }
    return own, row


def revived_in_the_file(model: Any, kept: dict[str, Tensor]) -> int:
    """How many pruned weights are not zero in the dense file that ``save`` writes of ``model``.

    Args:
        model: retrained and merged.
        kept: the masks from before retraining, bool, True where a weight is kept.
    """
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model", form="dense")
        weights: dict[str, Tensor] = {}
        for file in (Path(folder) / "model").glob("model*.safetensors"):
            with safe_open(file, "pt") as opened:
                weights |= {name: opened.get_tensor(name) for name in opened.keys() if name in kept}  # noqa: SIM118
    if weights.keys() != kept.keys():
        raise RuntimeError(f"the saved file lacks {sorted(kept.keys() - weights.keys())[:3]}")
    return sum(int(torch.count_nonzero(weights[name][~keep])) for name, keep in kept.items())


def compare(model: Any, data: dict[str, Tensor], options: dict[str, Any], check_steps: int = 5) -> dict[str, Any]:
    """All rows: the methods at their best rates, and the pruned weights that are not zero once they are saved."""
    kept = {name: mask.dense() for name, mask in masks(model).items()}
    rows: dict[str, Any] = {}
    for name, method in METHODS.items():
        own, row = retrained(model, data, options | method)
        rows[name] = row | {"revived": revived_in_the_file(own, kept)}
    revived = {}
    for variant in MERGED_VARIANTS:
        own = copy.deepcopy(model)
        short = options | {"steps": check_steps, "learning_rate": 1e-3, "variant": variant}
        retrain(own, data["train"], PERPConfig(**short), progress=False)
        revived[variant] = revived_in_the_file(own, kept)
    full, perp = rows.values()
    return {
        "rows": rows,
        "ratio": perp["perplexity"] / full["perplexity"],
        "before": perplexity(model, data["test"], seq_len=data["test"].shape[1]),
        "revived": revived,
    }


@benchmark(
    "perp-quality",
    "PERP against full retraining with the masks held, each at its own best learning rate",
    takes=("model",),
)
def perp_quality(options: Options) -> Iterator[Measured]:
    """100 steps of 2 x 256 tokens after magnitude pruning to 50%; ``quick``: 10 steps and two rates."""
    model, tokenizer = load_causal_lm(options.model)
    sparsify(model, "50%", "magnitude", progress=False)
    steps, batch, seq_len, windows = 10 if options.quick else 100, 2, 256, 32
    size = {"train": steps * batch, "validation": windows, "test": windows}
    data = {
        split: token_windows(pydoc_text(split), tokenizer=tokenizer, seq_len=seq_len, samples=count)
        for split, count in size.items()
    }
    training = {
        "steps": steps,
        "batch_size": batch,
        "gradient_accumulation": 1,
        "seq_len": seq_len,
        "learning_rates": LEARNING_RATES[-2:] if options.quick else (*LEARNING_RATES, 1e-3),
        "grid_steps": min(steps, 30),
    }
    result = compare(model, data, training)
    parameters = {"model": model_label(options.model), "sparsity": 0.5, "pattern": "50%", "steps": steps,
                  "train_tokens": steps * batch * seq_len}  # fmt: skip
    yield Measured("before", parameters, {"pruned": {"perplexity": result["before"]}})
    for name, row in result["rows"].items():
        kept = ("perplexity", "learning_rate", "trainable_share", "revived")
        metrics = {key: row[key] for key in kept}
        metrics |= {f"grid_loss_at_{rate}": loss for rate, loss in row["grid"].items()}
        yield Measured("retrained", parameters, {name: metrics}, {name: [row["seconds"]]})
    yield Measured("ratio", parameters, {"mask_lora + norms + head": {"perplexity_ratio_to_full": result["ratio"]}})
    for variant, revived in result["revived"].items():
        yield Measured("saved after merging", parameters, {variant: {"revived": revived}})
