"""Images and labels for retraining: folders and datasets decoded by ``datasets`` and PIL, and batches of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CROPPED = 0.875  # the centre that is kept of the shorter side: 224 of 256 pixels, ImageNet's convention


@dataclass(frozen=True)
class ImageTransform:
    """A PIL image to normalised pixel values, float32 [channels, size, size].

    Without ``augment`` the shorter side is resized to size / 0.875 and the centre cut out. With it, a random part of
    8% to 100% of the area and of an aspect ratio of 3/4 to 4/3 is resized to the size, and flipped every other time,
    as is usual for ImageNet (Szegedy et al. 2015, section 6); draws come from torch's global generator.

    Attributes:
        size: height and width.
        mean, std: of each channel, for pixels in [0, 1]; one or three of them, and images become grey or RGB.
        augment: for training.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    size: int = 224
    mean: Sequence[float] = _IMAGENET_MEAN
    std: Sequence[float] = _IMAGENET_STD
    augment: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size must be an integer of at least 1, got {self.size!r}")
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if len(self.mean) not in (1, 3):
            raise ValueError(f"mean must have one value (grey) or three (RGB), got {self.mean!r}")
        if len(self.std) != len(self.mean) or min(self.std) <= 0:
            raise ValueError(f"std must have {len(self.mean)} values above 0, as many as mean, got {self.std!r}")

    def __call__(self, image: Image) -> Tensor:
        """Pixel values [channels, size, size] of ``image``."""
        from PIL.Image import Resampling  # the extra "vision"; data that is tensors already does without it

        image = image.convert("RGB" if len(self.mean) == 3 else "L")
        box = self._random_box(*image.size) if self.augment else self._centre_box(*image.size)
        image = image.resize((self.size, self.size), Resampling.BILINEAR, box=box)
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).reshape(self.size, self.size, -1)
        if self.augment and torch.rand(()) < 0.5:
            pixels = pixels.flip(1)
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1).contiguous()

    def _centre_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        side = min(width, height) * _CROPPED
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def _random_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        for _ in range(10):
            area = width * height * float(torch.empty(()).uniform_(0.08, 1))
            ratio = math.exp(float(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3))))
            across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if across <= width and down <= height:
                left, top = float(torch.rand(())) * (width - across), float(torch.rand(())) * (height - down)
                return left, top, left + across, top + down
        return self._centre_box(width, height)  # an image so narrow that none of the draws fits into it


class Images(Dataset[tuple[Tensor, int]]):
    """Rows of a ``datasets.Dataset`` as (pixel values, label).

    Args:
        source: with a column of images, ``image`` or ``img``, and one of integer labels, ``label`` or ``labels``.
        transform: of each image.

    Raises:
        ValueError: a column is missing.
    """

    def __init__(self, source: datasets.Dataset, transform: ImageTransform) -> None:
        self.source, self.transform = source, transform
        self._image = _column(source, "images", ("image", "img"))
        self._label = _column(source, "labels", ("label", "labels"))

    @classmethod
    def from_folder(cls, folder: str | Path, transform: ImageTransform, *, split: str = "train") -> Images:
        """``folder/CLASS/*.png``, or ``folder/SPLIT/CLASS/*.png`` for several splits.

        Classes are numbered in the order of their names. Nothing is downloaded.

        Raises:
            ValueError: there is no such folder, or no such split in it.
        """
        if not Path(folder).is_dir():
            raise ValueError(f"folder must be a folder of images, got {str(folder)!r}")
        found = datasets.load_dataset("imagefolder", data_dir=str(folder))
        if split not in found:
            raise ValueError(f"split must be one of {', '.join(found)} of {folder}, got {split!r}")
        return cls(found[split], transform)

    @property
    def labels(self) -> list[int]:
        """Every label, without decoding an image."""
        return list(self.source[self._label])

    @property
    def classes(self) -> list[str]:
        """The names of the classes; empty where the dataset has none."""
        return list(getattr(self.source.features[self._label], "names", ()))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.source[index]
        return self.transform(row[self._image]), int(row[self._label])


def _column(source: datasets.Dataset, what: str, names: tuple[str, ...]) -> str:
    for name in names:
        if name in source.column_names:
            return name
    raise ValueError(
        f"data must have a column of {what}, {' or '.join(names)}; it has {', '.join(source.column_names)}"
    )


class LabelledBatches:
    """A loader whose batches are dicts of ``pixel_values`` [batch, ...] and ``labels`` [batch], checked as they come.

    Raises:
        ValueError: while iterating, for what is no such batch or for a label outside the model's classes.
    """

    def __init__(self, loader: Any, classes: int | None = None) -> None:
        self.loader, self.classes = loader, classes

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for item in self.loader:
            pixels, labels = _pair(item)
            if not isinstance(pixels, Tensor) or pixels.ndim != 4 or labels.shape != pixels.shape[:1]:
                shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
                raise ValueError(
                    f"data must give pixel values [batch, channels, height, width] with labels [batch], got {shape} "
                    f"with {tuple(labels.shape)}"
                )
            if self.classes is not None:
                check_labels(labels, self.classes)
            yield {"pixel_values": pixels, "labels": labels}

    def images(self) -> Iterator[Tensor]:
        """The pixel values alone."""
        return (batch["pixel_values"] for batch in self)


def batches_of(data: Any, batch_size: int, *, train: bool, seed: int = 0, num_workers: int = 0) -> LabelledBatches:
    """``data`` in batches; for training in a seeded random order without the incomplete last batch.

    Args:
        data: a pair of tensors, pixel values [n, channels, height, width] and labels [n]; a dataset of (pixel values
            [channels, height, width], label) or of dicts of ``pixel_values`` and ``label`` or ``labels``; or batches
            of those, a DataLoader or a list, which are taken as they are.
        batch_size, train, seed, num_workers: for what is not in batches yet.

    Raises:
        ValueError: something else, without a length, empty, or for training with fewer images than ``batch_size``.
    """
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        if len(data[0]) != len(data[1]):
            raise ValueError(f"data must have as many labels as images, got {len(data[1])} and {len(data[0])}")
        data = TensorDataset(*data)
    if isinstance(data, str | Mapping) or not isinstance(data, Sized):
        raise ValueError(
            f"data must be a pair of tensors, a dataset with a length, a DataLoader or a list, "
            f"got {type(data).__name__}"
        )
    if not len(data):
        raise ValueError("data is empty" if train else "data to evaluate on is empty")
    if isinstance(data, DataLoader):
        return LabelledBatches(data)
    dataset: Any = data
    first, _ = _pair(dataset[0])
    if not isinstance(first, Tensor):
        raise ValueError(f"data must give tensors, got {type(first).__name__}: Images(data, ImageTransform()) does")
    if first.ndim == 4:
        return LabelledBatches(DataLoader(dataset, batch_size=None, num_workers=num_workers))
    if train and len(data) < batch_size:
        raise ValueError(f"data is shorter than one batch: {len(data)} images, and batch_size={batch_size}")
    return LabelledBatches(
        DataLoader(
            dataset,
            batch_size,
            shuffle=train,
            drop_last=train,
            num_workers=num_workers,
            collate_fn=_stack,
            generator=torch.Generator().manual_seed(seed) if train else None,
        )
    )


def labels_of(data: Any) -> Tensor | None:
    """All labels of ``data`` where they can be had without loading images, else None."""
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor):
        return data[1]
    return torch.tensor(data.labels) if isinstance(data, Images) else None


def check_labels(labels: Tensor, classes: int) -> None:
    """Check that ``labels`` are integers from 0 to ``classes`` - 1.

    Raises:
        ValueError: names the first that is not.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, the model has {classes} classes; got {int(outside[0])}"
        )


def _pair(item: Any) -> tuple[Any, Tensor]:
    """Pixel values and labels of an example or a batch."""
    if isinstance(item, Mapping):
        label = item.get("labels", item.get("label"))
        if "pixel_values" in item and label is not None:
            return item["pixel_values"], torch.as_tensor(label)
        raise ValueError(f"data must give pixel_values and labels, got {', '.join(map(str, item))}")
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], torch.as_tensor(item[1])
    raise ValueError(f"data must give (pixel values, label), got {type(item).__name__}")


def _stack(examples: Sequence[Any]) -> dict[str, Tensor]:
    pairs = [_pair(example) for example in examples]
    return {"pixel_values": torch.stack([p for p, _ in pairs]), "labels": torch.stack([label for _, label in pairs])}
