"""Image classifiers: what each group of parameters and each schedule brings back, on scikit-learn's digits.

Trains a ResNet of 20,346 parameters, prunes it by magnitude and retrains it for two epochs, with three seeds each, in
about a minute on one core. Needs scikit-learn (the extra ``test``).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from trisparse.bench.registry import Measured, Options, benchmark
from trisparse.retrain.groups import VISION_PRESETS
from trisparse.retrain.schedule import ALLR, CLR, FT, LLR, LRW, SLR, Linear, Original, Schedule, pruning_change
from trisparse.retrain.vision import VisionConfig, accuracy, retrain_vision
from trisparse.sparsity.sparsify import sparsify

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


def measure(seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One row for each model, sparsity, group and schedule: test accuracy, and the share of parameters trained."""
    train, test = digits()
    for seed in seeds:
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


@benchmark("digits", "image classifiers: what each group of parameters and each schedule brings back, on digits")
def digits_accuracy(options: Options) -> Iterator[Measured]:
    """Mean test accuracy over the seeds; one row for each sparsity, group and schedule."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small for more
    try:
        rows = list(measure(SEEDS[:1] if options.quick else SEEDS))
    finally:
        torch.set_num_threads(threads)
    for sparsity, groups, schedule in dict.fromkeys((row["sparsity"], row["groups"], row["schedule"]) for row in rows):
        own = [row for row in rows if (row["sparsity"], row["groups"], row["schedule"]) == (sparsity, groups, schedule)]
        metrics = {"accuracy": statistics.mean(row["accuracy"] for row in own)}
        if "trainable_share" in own[0]:
            metrics["trainable_share"] = own[0]["trainable_share"]
        name = f"{groups} {schedule}".strip()
        parameters = {"model": "ResNet, 20,346 parameters", "sparsity": float(sparsity.rstrip("%")) / 100,
                      "groups": groups, "schedule": schedule, "seeds": len(own)}  # fmt: skip
        if options.wants(f"{sparsity} {name}"):
            yield Measured(f"{sparsity} {name}", parameters, {name: metrics})
