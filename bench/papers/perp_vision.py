"""PERP's Figures 2 and 4: what each group of parameters of an image classifier wins back, in one epoch and in five.

Without a folder of images that is a ResNet of 20,346 parameters on scikit-learn's digits, as in docs/vision.md.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from trisparse.bench.papers.cell import Cell, Session
from trisparse.bench.papers.scale import Scale
from trisparse.bench.papers.table import Layout, entry, paper_table
from trisparse.bench.studies.digits import ORIGINAL as DIGITS_ORIGINAL
from trisparse.bench.studies.digits import digits, trained_resnet
from trisparse.retrain.schedule import ALLR, Original, pruning_change
from trisparse.retrain.vision import VisionConfig, accuracy, retrain_vision
from trisparse.sparsity.sparsify import sparsify

DIGITS = "digits"
METHODS = {
    "Full IMP": "full",
    "PERP": "perp",
    "Linear Probing": "linear-probing",
    "BN-Parameters": "norms",
    "BN-Recalibrate": "bn-recalibrate",
    "No Retraining": None,
}


@dataclass(frozen=True)
class VisionCell(Cell):
    """An image classifier, pruned by magnitude over all layers together and retrained under ALLR, or neither.

    It measures ``accuracy`` and ``trainable_share``.

    Attributes:
        model: "digits", or an image classifier of transformers, by id or folder.
        images: folder with TRAIN and TEST images by class for the latter, see docs/vision.md; "" for digits.
        sparsity: "80%", or "" for the dense model.
        groups: preset of :class:`trisparse.retrain.vision.VisionConfig`, or None for no retraining.
        epochs: of retraining.
        rank: of the LoRAs.
        seed: of the dense training of digits, and of retraining.
    """

    kind: ClassVar[str] = "vision"

    model: str
    images: str = ""
    sparsity: str = ""
    groups: str | None = None
    epochs: int = 1
    rank: int = 10
    seed: int = 0

    def measure(self, wanted: frozenset[str], session: Session) -> dict[str, float]:
        """Prune, retrain and count what is right."""
        train, test = session.once(("images", self.images), lambda: _images(self.images, self.model))
        dense = session.last("classifier", (self.model, self.seed), lambda: self._dense(train))
        model = copy.deepcopy(dense).to(session.device)
        metrics = {"trainable_share": 0.0}
        if self.sparsity:
            sparsify(model, f"{self.sparsity} global", "magnitude", include="*", progress=False)
        if self.groups is not None:
            original = DIGITS_ORIGINAL if self.model == DIGITS else Original.linear(0.1, 90)
            schedule = ALLR(original, pruning_change(dense, model), self.epochs)
            size = 64 if self.model == DIGITS else 256
            config = VisionConfig(
                self.groups, schedule, epochs=self.epochs, rank=self.rank, batch_size=size, seed=self.seed
            )
            metrics["trainable_share"] = retrain_vision(model, train, config, progress=False).trainable_share
        return metrics | {"accuracy": accuracy(model, test)}

    def _dense(self, train: Any) -> nn.Module:
        if self.model == DIGITS:
            return trained_resnet(train, self.seed)
        from transformers import AutoModelForImageClassification

        found: nn.Module = AutoModelForImageClassification.from_pretrained(self.model).eval()
        return found


def _images(folder: str, model: str) -> tuple[Any, Any]:
    if model == DIGITS:
        return digits()
    from trisparse.retrain.images import Images, ImageTransform

    test = Images.from_folder(Path(folder), ImageTransform(size=224), split="test")
    return Images.from_folder(Path(folder), ImageTransform(size=224, augment=True)), test


def vision_layout(model: str, scale: Scale, epochs: int) -> Layout:
    """Accuracy by method and sparsity, over three seeds."""
    own = scale.images != DIGITS
    classifier = (model if "resnet" in model.lower() else RESNET) if own else DIGITS
    images = scale.images if own else ""
    sparsities = scale.choose(
        tiny=("90%",), small=("70%", "80%", "90%", "95%"), paper=("40%", "50%", "60%", "70%", "80%", "90%")
    )
    seeds = scale.choose(tiny=(0,), small=(0, 1, 2), paper=(0, 1, 2))

    def cells(sparsity: str, groups: str | None) -> list[VisionCell]:
        retraining: dict[str, Any] = {} if groups is None else {"groups": groups, "epochs": epochs}
        return [VisionCell(classifier, images, sparsity, **retraining, seed=seed) for seed in seeds]

    entries = {
        (row, sparsity): entry(*cells(sparsity, groups), metric="accuracy", factor=100)
        for row, groups in METHODS.items()
        for sparsity in sparsities
    }
    notes = () if own else ("Not ResNet-50 on ImageNet, but a ResNet of 20,346 parameters on scikit-learn's digits.",)
    dense = entry(*cells("", None), metric="accuracy", factor=100)
    return Layout(
        entries,
        dense=dense,
        notes=notes,
        model=classifier,
        settings=f"{epochs} epochs of retraining under ALLR, the mean over {len(seeds)} seeds",
        other_task="" if own else "accuracy on digits",
    )


RESNET = "microsoft/resnet-50"


@paper_table(
    "perp-figure-2",
    "retraining methods of an image classifier, one epoch",
    models=(RESNET,),
    metric="accuracy, %",
    log=False,
)
def figure_2(model: str, scale: Scale) -> Layout:
    """One epoch of retraining."""
    return vision_layout(model, scale, epochs=1)


@paper_table(
    "perp-figure-4",
    "retraining methods of an image classifier, five epochs",
    models=(RESNET,),
    metric="accuracy, %",
    log=False,
)
def figure_4(model: str, scale: Scale) -> Layout:
    """Five epochs of retraining."""
    return vision_layout(model, scale, epochs=5)
