"""Quality of PERP against full retraining with the masks held: each at its own best learning rate.

    python -m trisparse.bench.perp_quality [--steps 100] [--json FILE]

prunes SmolLM2-135M to 50% by magnitude, finds a learning rate by ``learning_rate="grid"`` (PERP's, Appendix A, and
1e-3: 30 steps with each, the loss on the validation split decides), retrains with it, and gives the perplexity on the
test split. Each result, and a short run of every LoRA variant that is merged, is saved, and the pruned weights of the
saved file that are not zero are counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trisparse.bench.smollm2 import load_smollm2
from trisparse.env import environment
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
    """How many pruned weights are not zero in the file that ``save`` writes of ``model``.

    Args:
        model: retrained and merged.
        kept: the masks from before retraining, bool, True where a weight is kept.
    """
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model")
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
        print(f"{name}: perplexity {row['perplexity']:.2f} at {row['learning_rate']:g}, grid {row['grid']}", flush=True)
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


def main(arguments: list[str] | None = None) -> None:
    """Compare, print, and store what was found if a file is given."""
    parser = argparse.ArgumentParser(prog="python -m trisparse.bench.perp_quality", description=__doc__)
    parser.add_argument("--model", help="folder of a causal language model; SmolLM2-135M by default")
    parser.add_argument("--sparsity", default="50%")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--grid-steps", type=int, default=30, help="steps with each learning rate")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32, help="of the validation split, and of the test split")
    parser.add_argument("--rates", type=float, nargs="+", default=[*LEARNING_RATES, 1e-3])
    parser.add_argument("--dtype", default="auto", help="auto, fp32 or bf16")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args(arguments)
    if options.model is None:
        model, tokenizer = load_smollm2()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    sparsify(model, options.sparsity, "magnitude", progress=False)
    size = {"train": options.steps * options.batch_size, "validation": options.windows, "test": options.windows}
    data = {
        split: token_windows(pydoc_text(split), tokenizer=tokenizer, seq_len=options.seq_len, samples=count)
        for split, count in size.items()
    }
    training = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "gradient_accumulation": 1,
        "seq_len": options.seq_len,
        "dtype": options.dtype,
        "learning_rates": tuple(options.rates),
        "grid_steps": options.grid_steps,
    }
    result = compare(model, data, training)
    print(f"before {result['before']:.2f}; PERP's perplexity is {result['ratio']:.3f}x of full retraining's")
    print(f"pruned weights that are not zero in the saved file: {result['revived']}")
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "model")}
        content = {"settings": settings, **result, "environment": environment()}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
