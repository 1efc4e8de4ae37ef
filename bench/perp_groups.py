"""The ablation of PERP's Table 13: perplexity after retraining each of the 16 combinations of parameter groups.

    python -m trisparse.bench.perp_groups [--steps 20] [--targets q_proj,v_proj] [--json]

prunes SmolLM2-135M by magnitude, retrains a copy for every subset of biases, norms, head and lora, and prints what
trained, its share of the parameters and the perplexity on the test split. A group that the model has nothing of
(Llama-like models have no biases) is marked "-", and its rows are those without it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from trisparse.bench.smollm2 import load_smollm2
from trisparse.env import environment
from trisparse.retrain.batch_settings import batch_settings
from trisparse.retrain.groups import PRESETS, parameter_groups
from trisparse.retrain.perp import PERPConfig, parameter_count, retrain
from trisparse.sparsity.data import token_windows
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.text import pydoc_text

GROUPS = PRESETS["perp"]
# in the order of the paper's table: none, one, two, three, four
COMBINATIONS = tuple(subset for size in range(len(GROUPS) + 1) for subset in itertools.combinations(GROUPS, size))


def measure(model: Any, train: Tensor, test: Tensor, config: PERPConfig) -> Iterator[dict[str, Any]]:
    """One row for each combination, on copies of the pruned ``model``.

    Args:
        model: with masks.
        train, test: token windows [n, seq_len].
        config: how to retrain; its groups are replaced.
    """
    has = parameter_groups(model)
    before = perplexity(model, test, seq_len=test.shape[1])
    rows: dict[tuple[str, ...], dict[str, Any]] = {(): {"trainable_share": 0.0, "perplexity": before, "seconds": 0.0}}
    for groups in COMBINATIONS:
        present = tuple(group for group in groups if getattr(has, group))
        if present not in rows:
            retrained = copy.deepcopy(model)
            targets = config.targets if "lora" in present else None
            report = retrain(retrained, train, replace(config, groups=present, targets=targets), progress=False)
            rows[present] = {
                "trainable_share": report.trainable_share,
                "trainable": report.trainable,
                "perplexity": perplexity(retrained, test, seq_len=test.shape[1]),
                "seconds": report.seconds,
            }
        missing = [group for group in groups if group not in present]
        yield {"groups": list(groups), "missing": missing, **rows[present]}


def heading() -> str:
    """The table's first line."""
    return "  ".join([*(f"{group:7}" for group in GROUPS), "% trainable", "perplexity"])


def as_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    marks = ["-" if group in row["missing"] else "yes" if group in row["groups"] else "" for group in GROUPS]
    cells = [*(f"{mark:7}" for mark in marks), f"{row['trainable_share']:11.2%}", f"{row['perplexity']:10.2f}"]
    return "  ".join(cells)


def run(options: argparse.Namespace, on_row: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Load, prune and measure."""
    if options.model is None:
        model, tokenizer = load_smollm2()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    sparsify(model, options.sparsity, "magnitude", progress=False)
    config = PERPConfig(
        steps=options.steps,
        seq_len=options.seq_len,
        gradient_accumulation=1,
        learning_rate=options.learning_rate,
        variant=options.variant,
        rank=options.rank,
        alpha=options.alpha,
        targets=None if options.targets is None else options.targets.split(","),
    )
    batch = batch_settings(config, parameter_count(model))
    cut = {"tokenizer": tokenizer, "seq_len": options.seq_len}
    train = token_windows(pydoc_text("train"), samples=config.steps * batch.windows, **cut)
    test = token_windows(pydoc_text("test"), samples=options.test, **cut)
    rows = []
    for row in measure(model, train, test, config):
        rows.append(row)
        on_row(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print the table, or give it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m trisparse.bench.perp_groups", description=__doc__)
    parser.add_argument("--model", help="folder of a causal language model; SmolLM2-135M by default")
    parser.add_argument("--sparsity", default="50%")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--test", type=int, default=16, help="windows of the test split")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--variant", default="mask_lora", choices=("lora_prune", "mask_lora", "scale_lora"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--targets", help="layers that get a LoRA, such as q_proj,v_proj; every pruned one by default")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if not options.json:
        print(f"magnitude {options.sparsity}, {options.steps} steps of 2 x {options.seq_len} tokens\n{heading()}")
    rows = run(options, lambda row: None if options.json else print(as_line(row), flush=True))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "model")}
        print(json.dumps({"settings": settings, "rows": rows, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
