"""Image classifiers: what each group of parameters and each schedule brings back, on scikit-learn's digits.

    python -m trisparse.bench.digits

trains a ResNet of 20,346 parameters, prunes it by magnitude and retrains it for two epochs, with three seeds each, and
writes bench/results/digits.json. It takes about a minute on one core, and needs scikit-learn (the extra ``test``).
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from trisparse.env import environment
from trisparse.retrain.groups import VISION_PRESETS
from trisparse.retrain.schedule import ALLR, CLR, FT, LLR, LRW, SLR, Linear, Original, Schedule, pruning_change
from trisparse.retrain.vision import VisionConfig, accuracy, retrain_vision
from trisparse.sparsity.sparsify import sparsify

RESULTS = Path("bench/results/digits.json")
EPOCHS, RETRAIN_EPOCHS = 8, 2
ORIGINAL = Original.linear(0.1, EPOCHS)
SPARSITIES = ("80%", "90%", "95%")
SEEDS = (0, 1, 2)

Labelled = tuple[Tensor, Tensor]


def digits() -> tuple[Labelled, Labelled]:
    """1,400 images [n, 1, 8, 8] in [0, 1] with their labels to train on, and 397 to test on."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def trained_resnet(train: Labelled, seed: int) -> nn.Module:
    """A ResNet of two basic blocks, trained on ``train``."""
    shape = ResNetConfig(num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    shape.num_labels = 10
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNetForImageClassification(shape)
    config = VisionConfig("full", Linear(0.1), epochs=EPOCHS, batch_size=64, weight_decay=5e-4, seed=seed)
    retrain_vision(model, train, config, progress=False)
    return model


def prune(model: nn.Module, sparsity: str) -> nn.Module:
    """A copy without ``sparsity`` of its smallest weights; biases and batch norms stay (PERP, Appendix A.2)."""
    pruned = copy.deepcopy(model)
    sparsify(pruned, f"{sparsity} global", "magnitude", include="*", progress=False)
    return pruned


def schedules(change: float) -> dict[str, Schedule]:
    """Every schedule of the vision experiments, for a retraining of ``RETRAIN_EPOCHS``."""
    return {
        "FT": FT(ORIGINAL),
        "LRW": LRW(ORIGINAL, RETRAIN_EPOCHS),
        "SLR": SLR(ORIGINAL),
        "CLR": CLR(ORIGINAL),
        "LLR": LLR(ORIGINAL),
        "ALLR": ALLR(ORIGINAL, change, RETRAIN_EPOCHS),
    }


def measure() -> Iterator[dict[str, Any]]:
    """One row for each model, sparsity, group and schedule: test accuracy, and the share of parameters trained."""
    train, test = digits()
    for seed in SEEDS:
        dense = trained_resnet(train, seed)
        yield {"sparsity": "0%", "groups": "dense", "schedule": "", "seed": seed, "accuracy": accuracy(dense, test)}
        for sparsity in SPARSITIES:
            pruned = prune(dense, sparsity)
            change = pruning_change(dense, pruned)
            row = {"sparsity": sparsity, "seed": seed, "change": change}
            yield {**row, "groups": "pruned", "schedule": "", "accuracy": accuracy(pruned, test)}
            runs = [(groups, "ALLR") for groups in VISION_PRESETS]
            runs += [("full", name) for name in schedules(change) if name != "ALLR"]
            for groups, name in runs:
                model = copy.deepcopy(pruned)
                config = VisionConfig(groups, schedules(change)[name], epochs=RETRAIN_EPOCHS, batch_size=64, seed=seed)
                report = retrain_vision(model, train, config, progress=False)
                result = {"accuracy": accuracy(model, test), "trainable_share": report.trainable_share}
                yield {**row, "groups": groups, "schedule": name, **result}


def as_table(rows: list[dict[str, Any]]) -> str:
    """Mean test accuracy over the seeds, in per cent; one line for each group and schedule."""
    lines = []
    for key in dict.fromkeys((row["groups"], row["schedule"]) for row in rows):
        chosen = [row for row in rows if (row["groups"], row["schedule"]) == key]
        share = chosen[0].get("trainable_share")
        cells = [f"{key[0]:15} {key[1]:5}", f"{share:8.2%}" if share is not None else " " * 8]
        for sparsity in dict.fromkeys(row["sparsity"] for row in chosen):
            mean = statistics.mean(row["accuracy"] for row in chosen if row["sparsity"] == sparsity)
            cells.append(f"{mean:6.1%}")
        lines.append("  ".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Measure, write and print."""
    torch.set_num_threads(1)
    rows = list(measure())
    head = {"how": "python -m trisparse.bench.digits", "environment": environment()}
    lines = ",\n ".join(json.dumps(row) for row in rows)
    RESULTS.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n {lines}\n]}}\n')
    print(as_table(rows))


if __name__ == "__main__":
    main()
